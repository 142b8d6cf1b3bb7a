// Q8_K: | d float | qs int8[256] | bsums int16[16] |   256 weights = d q. Only ever dequantized.
#pragma once
#include "../blocks.h"

struct Q8_K {
    struct Block {
        uint16_t d[2];
        uint8_t qs[256];
        uint16_t bsums[16];
    };
    static_assert(sizeof(Block) == 292, "292 bytes");
    static constexpr int kBlock = 256, kGroup = 32;
    static constexpr bool kMin = false;

    HQ_INLINE uint32_t word(const Block& b, int j) { return load4(b.qs + 4 * j); }
    HQ_INLINE float scale(const Block& b, int) { return bits<float>(load4(b.d)); }
    HQ_INLINE float minimum(const Block&, int) { return 0; }
};
