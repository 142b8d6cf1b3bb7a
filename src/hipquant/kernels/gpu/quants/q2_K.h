// Q2_K: | scales 16 bytes | qs 64 bytes | d half | dmin half |   256 weights = d scale q - dmin minimum, in 16
// sub-blocks of 16: scale in the low, minimum in the high nibble of byte i. Half h of the block, byte j of its 32:
// weight 32s + j in bits 2s, 2s + 1.
#pragma once
#include "../blocks.h"

struct Q2_K {
    struct Block {
        uint8_t scales[16];
        uint8_t qs[64];
        uint16_t d, dmin;
    };
    static_assert(sizeof(Block) == 84, "84 bytes");
    static constexpr int kBlock = 256, kGroup = 16, kFactor = 1;
    static constexpr bool kMin = true;

    HQ_INLINE uint32_t integers(uint32_t q, int s) { return q >> 2 * s & 0x03030303; }

    HQ_INLINE uint32_t word(const Block& b, int j) {
        return integers(load4(b.qs + 32 * (j / 32) + 4 * (j % 8)), j / 8 % 4);
    }
    HQ_INLINE float scale(const Block& b, int g) { return half_to_float(b.d) * (float)(b.scales[g] & 15); }
    HQ_INLINE float minimum(const Block& b, int g) { return half_to_float(b.dmin) * (float)(b.scales[g] >> 4); }

    // Half h, pair of quarters p, bytes 16g to 16g + 15: strip s is sub-block 8h + 4p + 2s + g.
    static constexpr int kUnits = 8, kStrip = 16, kStep = 32, kSpan = 64;
    static constexpr bool kSub = true;
    struct Unit {
        uint32_t dm, scales;  // strip s: byte 2s
        Words<16> q;          // strip s in bits 2s, 2s + 1
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t u) {
        const uint32_t at = block * 84, h = u / 4, p = u / 2 % 2, g = u % 2;
        const Words<8> scales = field<8>(row, at + 8 * h);
        Unit r{field_word(row, at + 80), (p ? scales.w[1] : scales.w[0]) >> 8 * g,
            field<16>(row, at + 16 + 32 * h + 16 * g)};
#pragma unroll
        for (int i = 0; i < 4; i++) r.q.w[i] >>= 4 * p;
        return r;
    }
    HQ_INLINE uint32_t position(uint32_t u) { return u / 2 * 64 + 16 * (u % 2); }
    HQ_INLINE uint32_t word(const Unit& v, int s, int i) { return integers(v.q.w[i], s); }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.dm); }
    HQ_INLINE float dmin(const Unit& v) { return half_to_float(v.dm >> 16); }
    HQ_INLINE float sub_scale(const Unit& v, int s) { return (float)(v.scales >> 16 * s & 15); }
    HQ_INLINE float sub_minimum(const Unit& v, int s) { return (float)(v.scales >> (16 * s + 4) & 15); }
};
