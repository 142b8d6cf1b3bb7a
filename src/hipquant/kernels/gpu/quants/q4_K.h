// Q4_K: | d half | dmin half | scales 12 bytes | qs 128 bytes |   256 weights = d scale q - dmin minimum, in 8
// sub-blocks of 32 (k_scales.h). Chunk c, 32 bytes of qs: sub-block 2c in the low nibbles, 2c + 1 in the high ones.
#pragma once
#include "k_scales.h"

struct Q4_K {
    struct Block {
        uint16_t d, dmin;
        uint8_t scales[12];
        uint8_t qs[128];
    };
    static_assert(sizeof(Block) == 144, "144 bytes");
    static constexpr int kBlock = 256, kGroup = 32, kFactor = 1;
    static constexpr bool kMin = true;

    HQ_INLINE uint32_t integers(uint32_t q, int high) { return (high ? q >> 4 : q) & 0x0F0F0F0F; }

    HQ_INLINE uint32_t word(const Block& b, int j) {
        return integers(load4(b.qs + 32 * (j / 16) + 4 * (j % 8)), j / 8 % 2);
    }
    HQ_INLINE float scale(const Block& b, int g) { return half_to_float(b.d) * (float)k_scales_of(b.scales, g).scales; }
    HQ_INLINE float minimum(const Block& b, int g) {
        return half_to_float(b.dmin) * (float)k_scales_of(b.scales, g).minimums;
    }

    // Bytes 16g to 16g + 15 of chunk c: strip s is half of sub-block 2c + s.
    static constexpr int kUnits = 8, kStrip = 16, kStep = 32, kSpan = 64;
    static constexpr bool kSub = true;
    struct Unit {
        uint32_t dm;
        KScales k;
        Words<16> q;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t u) {
        const uint32_t at = block * 144, chunk = u / 2, part = 16 * (u % 2);
        const Words<16> head = field<16>(row, at);
        return {
            head.w[0], k_scales(head.w[1], head.w[2], head.w[3], chunk), field<16>(row, at + 16 + 32 * chunk + part)};
    }
    HQ_INLINE uint32_t position(uint32_t u) { return u / 2 * 64 + 16 * (u % 2); }
    HQ_INLINE uint32_t word(const Unit& v, int s, int i) { return integers(v.q.w[i], s); }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.dm); }
    HQ_INLINE float dmin(const Unit& v) { return half_to_float(v.dm >> 16); }
    HQ_INLINE float sub_scale(const Unit& v, int s) { return (float)(v.k.scales >> 8 * s & 0xFF); }
    HQ_INLINE float sub_minimum(const Unit& v, int s) { return (float)(v.k.minimums >> 8 * s & 0xFF); }
};
