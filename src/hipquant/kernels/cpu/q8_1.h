// Q8_1, the activations: | d half | s half | qs 32 int8 |   value = d q; s = the sum of the values, kept for kernels
// that have no cheap integer sum.
#pragma once
#include "slice.h"

struct q8_1 {
    uint16_t d, s;
    int8_t qs[32];
};
static_assert(sizeof(q8_1) == 36);

// The 32 weights of a slice as floats. d (q - offset) is exact in float, so only `+ min` rounds.
template <class Q> HQ_INLINE void slice_to_floats(f32x8 v[4], const Slice& w) {
    for (int i = 0; i < 4; i++) {
        const uint8_t* q = (const uint8_t*)&w.q + 8 * i;
        i32x8 n;
        if constexpr (Q::kSigned)
            n = __builtin_convertvector((load<vec<int8_t, 8>>(q)), i32x8);
        else
            n = __builtin_convertvector((load<vec<uint8_t, 8>>(q)), i32x8) - Q::kOffset;
        v[i] = to_float(n) * w.scale[4 * (i / 2)];
        if constexpr (Q::kMin) v[i] += w.min[4 * (i / 2)];
    }
}
