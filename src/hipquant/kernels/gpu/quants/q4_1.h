// Q4_1: | d half | m half | qs 16 bytes |   32 weights = d q + m. Byte j of qs: weight j in the low, j + 16 in the high
// nibble.
#pragma once
#include "../blocks.h"

struct Q4_1 {
    struct Block {
        uint16_t d, m;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 20, "20 bytes");
    static constexpr int kBlock = 32, kGroup = 32, kFactor = 1;
    static constexpr bool kMin = true;

    HQ_INLINE uint32_t integers(uint32_t q, bool high) { return (high ? q >> 4 : q) & 0x0F0F0F0F; }

    HQ_INLINE uint32_t word(const Block& b, int j) { return integers(load4(b.qs + 4 * (j % 4)), j >= 4); }
    HQ_INLINE float scale(const Block& b, int) { return half_to_float(b.d); }
    HQ_INLINE float minimum(const Block& b, int) { return -half_to_float(b.m); }

    static constexpr int kUnits = 1, kStrip = 32, kStep = 32, kSpan = 32;
    static constexpr bool kSub = false;
    struct Unit {
        Words<16> q;
        uint32_t dm;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t) {
        return {field<16>(row, block * 20 + 4), field_word(row, block * 20)};
    }
    HQ_INLINE uint32_t position(uint32_t) { return 0; }
    HQ_INLINE uint32_t word(const Unit& v, int, int i) { return integers(v.q.w[i % 4], i >= 4); }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.dm); }
    HQ_INLINE float dmin(const Unit& v) { return -half_to_float(v.dm >> 16); }
};
