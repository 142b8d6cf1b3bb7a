// Q8_0: | d half | qs int8[32] |   32 weights = d q.
#pragma once
#include "../blocks.h"

struct Q8_0 {
    struct Block {
        uint16_t d;
        uint8_t qs[32];
    };
    static_assert(sizeof(Block) == 34, "34 bytes");
    static constexpr int kBlock = 32, kGroup = 32, kFactor = 1;
    static constexpr bool kMin = false;

    HQ_INLINE uint32_t word(const Block& b, int j) { return load4(b.qs + 4 * j); }
    HQ_INLINE float scale(const Block& b, int) { return half_to_float(b.d); }
    HQ_INLINE float minimum(const Block&, int) { return 0; }

    static constexpr int kUnits = 1, kStrip = 32, kStep = 32, kSpan = 32;
    static constexpr bool kSub = false;
    struct Unit {
        Words<32> q;
        uint32_t d;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t) {
        return {field<32>(row, block * 34 + 2), field_half(row, block * 34)};
    }
    HQ_INLINE uint32_t position(uint32_t) { return 0; }
    HQ_INLINE uint32_t word(const Unit& v, int, int i) { return v.q.w[i]; }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.d); }
};
