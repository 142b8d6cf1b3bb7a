// Q8_K: | d float | qs 256 int8 | bsums 16 int16 |   weight j = d q_j; bsums are sums of 16 quants. Dequantize only.
#pragma once
#include "../slice.h"

struct Q8_K {
    static constexpr int kBlock = 256, kOffset = 0;
    static constexpr bool kMin = false, kSigned = true;
    struct Block {
        float d;
        int8_t qs[256];
        int16_t bsums[16];
    };
    static_assert(sizeof(Block) == 292);

    HQ_INLINE Slice slice(const Block& b, int s) { return {load<u8x32>(b.qs + 32 * s), f32x8(b.d), {}}; }
};
