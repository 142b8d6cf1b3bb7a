// Q5_1: | d half | m half | qh 4 bytes | qs 16 bytes |   32 weights = d q + m. Byte j of qs: the low nibbles of weight
// j and j + 16; bit j of qh: the fifth bit of weight j.
#pragma once
#include "../blocks.h"

struct Q5_1 {
    struct Block {
        uint16_t d, m;
        uint8_t qh[4];
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 24, "24 bytes");
    static constexpr int kBlock = 32, kGroup = 32, kFactor = 1;
    static constexpr bool kMin = true;

    HQ_INLINE uint32_t integers(uint32_t q, uint32_t qh, int j) {
        return ((j < 4 ? q : q >> 4) & 0x0F0F0F0F) | (spread_bits(qh >> 4 * j) << 4);
    }

    HQ_INLINE uint32_t word(const Block& b, int j) { return integers(load4(b.qs + 4 * (j % 4)), load4(b.qh), j); }
    HQ_INLINE float scale(const Block& b, int) { return half_to_float(b.d); }
    HQ_INLINE float minimum(const Block& b, int) { return -half_to_float(b.m); }

    static constexpr int kUnits = 1, kStrip = 32, kStep = 32, kSpan = 32;
    static constexpr bool kSub = false;
    struct Unit {
        Words<8> head;
        Words<16> q;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t) {
        return {field<8>(row, block * 24), field<16>(row, block * 24 + 8)};
    }
    HQ_INLINE uint32_t position(uint32_t) { return 0; }
    HQ_INLINE uint32_t word(const Unit& v, int, int i) { return integers(v.q.w[i % 4], v.head.w[1], i); }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.head.w[0]); }
    HQ_INLINE float dmin(const Unit& v) { return -half_to_float(v.head.w[0] >> 16); }
};
