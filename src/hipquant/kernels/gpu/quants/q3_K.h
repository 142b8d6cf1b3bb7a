// Q3_K: | hmask 32 bytes | qs 64 bytes | scales 12 bytes | d half |   256 weights = d (scale - 32) (q - 4), in 16
// sub-blocks of 16. The low two bits of q as in Q2_K; the third of weight 128h + 32s + j: bit 4h + s of hmask[j].
// Scale i: low nibble in nibble i / 8 of byte i % 8, high two bits in bits 2 (i / 4) of byte 8 + i % 4.
#pragma once
#include "../blocks.h"

struct Q3_K {
    struct Block {
        uint8_t hmask[32];
        uint8_t qs[64];
        uint8_t scales[12];
        uint16_t d;
    };
    static_assert(sizeof(Block) == 110, "110 bytes");
    static constexpr int kBlock = 256, kGroup = 16, kFactor = 32;
    static constexpr bool kMin = false;

    // Bits 5 and 6 of a byte from the low two bits, bit 7 from the third, flipped: 32 (q - 4).
    HQ_INLINE uint32_t integers(uint32_t low, uint32_t third) { return (low & 0x60606060) | (~third & 0x80808080); }

    HQ_INLINE uint32_t word(const Block& b, int j) {
        const int h = j / 32, s = j / 8 % 4, i = j % 8;
        return integers(
            rotate_left(load4(b.qs + 32 * h + 4 * i), 5 - 2 * s), rotate_left(load4(b.hmask + 4 * i), 7 - 4 * h - s));
    }
    HQ_INLINE float scale(const Block& b, int g) {
        const int k = (b.scales[g % 8] >> 4 * (g / 8) & 15) | (b.scales[8 + g % 4] >> 2 * (g / 4) & 3) << 4;
        return half_to_float(b.d) * (float)(k - 32) * (1.0f / kFactor);
    }
    HQ_INLINE float minimum(const Block&, int) { return 0; }

    // Half h, pair of quarters p, bytes 16g to 16g + 15: strip s is sub-block 8h + 4p + 2s + g.
    static constexpr int kUnits = 8, kStrip = 16, kStep = 32, kSpan = 64;
    static constexpr bool kSub = true;
    struct Unit {
        uint32_t d, scales;  // strip s: byte 2s
        Words<16> third, low;
        uint32_t third_at, low_at;  // strip s: bit third_at + s, bits low_at + 2s and one more
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t u) {
        const uint32_t at = block * 110, h = u / 4, p = u / 2 % 2, g = u % 2;
        Unit r;
        r.third = inner_field<16>(row, at + 16 * g);
        r.low = inner_field<16>(row, at + 32 + 32 * h + 16 * g);
        const uint32_t low = field_word(row, at + 96 + 4 * p), high = field_word(row, at + 104);
        r.d = field_half(row, at + 108);
        r.scales = ((low >> 4 * h & 0x0F0F0F0F) | (high >> (4 * h + 2 * p) & 0x03030303) << 4) >> 8 * g;
        r.third_at = 4 * h + 2 * p, r.low_at = 4 * p;
        return r;
    }
    HQ_INLINE uint32_t position(uint32_t u) { return u / 2 * 64 + 16 * (u % 2); }
    HQ_INLINE uint32_t word(const Unit& v, int s, int i) {
        return integers(rotate_left(v.low.w[i], 5 - v.low_at - 2 * s), rotate_left(v.third.w[i], 7 - v.third_at - s));
    }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.d); }
    HQ_INLINE float sub_scale(const Unit& v, int s) { return (float)(v.scales >> 16 * s & 0xFF) - 32.0f; }
};
