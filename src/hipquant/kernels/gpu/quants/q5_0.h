// Q5_0: | d half | qh 4 bytes | qs 16 bytes |   32 weights = d (q - 16). Byte j of qs: the low nibbles of weight j and
// j + 16; bit j of qh: the fifth bit of weight j.
#pragma once
#include "../blocks.h"

struct Q5_0 {
    struct Block {
        uint16_t d;
        uint8_t qh[4];
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 22, "22 bytes");
    static constexpr int kBlock = 32, kGroup = 32, kFactor = 8;
    static constexpr bool kMin = false;

    // A nibble in bits 3 to 6 of a byte and the fifth bit, flipped, in bit 7 are 8 (q - 16). j: which word of the 8.
    HQ_INLINE uint32_t integers(uint32_t q, uint32_t flipped, int j) {
        const uint32_t low = (j < 4 ? q << 3 : q >> 1) & 0x78787878;
        return low | (spread_bits(flipped >> 4 * j) << 7);
    }

    HQ_INLINE uint32_t word(const Block& b, int j) { return integers(load4(b.qs + 4 * (j % 4)), ~load4(b.qh), j); }
    HQ_INLINE float scale(const Block& b, int) { return half_to_float(b.d) * (1.0f / kFactor); }
    HQ_INLINE float minimum(const Block&, int) { return 0; }

    static constexpr int kUnits = 1, kStrip = 32, kStep = 32, kSpan = 32;
    static constexpr bool kSub = false;
    struct Unit {
        Words<16> q;
        uint32_t flipped, d;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t) {
        const Words<8> head = field<8>(row, block * 22);
        return {field<16>(row, block * 22 + 6), ~middle(head.w[0], head.w[1]), head.w[0]};
    }
    HQ_INLINE uint32_t position(uint32_t) { return 0; }
    HQ_INLINE uint32_t word(const Unit& v, int, int i) { return integers(v.q.w[i % 4], v.flipped, i); }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.d); }
};
