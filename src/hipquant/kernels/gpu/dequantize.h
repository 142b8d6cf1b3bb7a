// Four weights of a block as floats: bit for bit what the format's definition gives, a product and a difference.
#pragma once
#include "types.h"

template <class Q> HQ_INLINE void weights(float v[4], const typename Q::Block* b, int i) {
    const uint32_t q = Q::word(*b, i / 4);
    const float scale = Q::scale(*b, i / Q::kGroup), minimum = Q::minimum(*b, i / Q::kGroup);
    for (int j = 0; j < 4; j++) {
        v[j] = scale * (float)byte_of(q, j);
        if constexpr (Q::kMin) v[j] -= minimum;
    }
}
