// Q6_K: | ql 128 bytes | qh 64 bytes | scales int8[16] | d half |   256 weights = d scale (q - 32), in 16 sub-blocks of
// 16. Half h, weight 32s + j of it: low nibble in ql[64h + 32 (s % 2) + j], nibble s / 2; high two bits in bits 2s,
// 2s + 1 of qh[32h + j].
#pragma once
#include "../blocks.h"

struct Q6_K {
    struct Block {
        uint8_t ql[128];
        uint8_t qh[64];
        int8_t scales[16];
        uint16_t d;
    };
    static_assert(sizeof(Block) == 210, "210 bytes");
    static constexpr int kBlock = 256, kGroup = 16, kFactor = 4;
    static constexpr bool kMin = false;

    // Bits 2 to 5 of a byte from the low nibble, bits 6 and 7 from the high two bits, the top one flipped: 4 (q - 32).
    HQ_INLINE uint32_t integers(uint32_t low, uint32_t flipped) { return (low & 0x3C3C3C3C) | (flipped & 0xC0C0C0C0); }

    HQ_INLINE uint32_t word(const Block& b, int j) {
        const int h = j / 32, s = j / 8 % 4, i = j % 8;
        const uint32_t ql = load4(b.ql + 64 * h + 32 * (s % 2) + 4 * i),
                       flipped = load4(b.qh + 32 * h + 4 * i) ^ 0xAAAAAAAA;
        return integers(s < 2 ? ql << 2 : ql >> 2, rotate_left(flipped, 6 - 2 * s));
    }
    HQ_INLINE float scale(const Block& b, int g) { return half_to_float(b.d) * (float)b.scales[g] * (1.0f / kFactor); }
    HQ_INLINE float minimum(const Block&, int) { return 0; }

    // Half h, quarters p and p + 2, which share ql, bytes 16g to 16g + 15: strip s is sub-block 8h + 4s + 2p + g.
    static constexpr int kUnits = 8, kStrip = 16, kStep = 64, kSpan = 128;
    static constexpr bool kSub = true;
    struct Unit {
        uint32_t d;
        int scales[2];
        Words<16> ql, flipped;  // strip s in nibble s of ql, bits at + 4s, at + 4s + 1 of flipped
        uint32_t at;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t u) {
        const uint32_t at = block * 210, h = u / 4, p = u / 2 % 2, g = u % 2, k = at + 192 + 8 * h + 2 * p + g;
        Unit r;
        r.ql = inner_field<16>(row, at + 64 * h + 32 * p + 16 * g);
        r.flipped = inner_field<16>(row, at + 128 + 32 * h + 16 * g);
        r.d = field_half(row, at + 208);
        r.scales[0] = field_byte(row, k), r.scales[1] = field_byte(row, k + 4);
        r.at = 2 * p;
#pragma unroll
        for (int i = 0; i < 4; i++) r.flipped.w[i] ^= 0xAAAAAAAA;
        return r;
    }
    HQ_INLINE uint32_t position(uint32_t u) { return u / 4 * 128 + u / 2 % 2 * 32 + 16 * (u % 2); }
    HQ_INLINE uint32_t word(const Unit& v, int s, int i) {
        return integers(s == 0 ? v.ql.w[i] << 2 : v.ql.w[i] >> 2, rotate_left(v.flipped.w[i], 6 - v.at - 4 * s));
    }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.d); }
    HQ_INLINE float sub_scale(const Unit& v, int s) { return (float)v.scales[s]; }
};
