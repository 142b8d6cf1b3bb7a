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

    // A unit is a quarter of a block. Of the piece's word j, byte b has weight 4j + b in bits 0 to 2, weight 16 + 4j +
    // b in bits 3 to 5, and the upper two bits of weight 48 + 4j + b. Two words more: word j has weight 32 + 8j + b in
    // bits 0 to 2, weight 36 + 8j + b in bits 3 to 5, and in bits 6 and 7 the lowest bits of weights 48 + 8j + b and 52
    // + 8j + b. | scales 12 bytes | d | 0 | are of the super-block, which 4 units share.
    struct Planes {
        static constexpr int kOffset = 4, kShift = 5, kSub = 16, kBytes = 112;
        static constexpr bool kMin = false;
        struct Unit {
            Words<16> q, head;
            Words<8> more;
            uint32_t scales;  // those of the unit, as int8
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            const Words<16> head = load_stream<16>(r.at_super<24, 16>(u));
            const uint32_t c = u % 4, odd = opaque(0u - (c & 1));
            const uint32_t low = (head.w[0] ^ ((head.w[0] ^ head.w[1]) & odd)) >> 2 * (c & 2) & 0x0F0F0F0F;
            const uint32_t scales = (head.w[2] >> 2 * c & 0x03030303) << 4 | low;
            // 96 and 128 more are 32 less, and no byte overflows into the next.
            return {load_stream<16>(r.piece<1>(u, 0)), head, load_stream<8>(r.at<16, 8>(u)),
                (scales + 0x60606060) ^ 0x80808080};
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
            store_vector<16>(r.piece<1>(u, 0), v.q), store_vector<8>(r.at<16, 8>(u), v.more);
            if (u % 4 == 0) store_vector<16>(r.at_super<24, 16>(u), v.head);
        }
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int) {
            const Block& b = blocks[u / 4];
            Unit r{};
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const uint32_t q = (Q3_K::word(b, 16 * (int)(u % 4) + i) ^ 0x80808080) >> 5 & 0x07070707;
                if (i < 8) r.q.w[i % 4] |= q << 3 * (i / 4);
                else if (i < 12) r.more.w[i / 2 % 2] |= q << 3 * (i % 2);
                else r.q.w[i % 4] |= (q & 0x06060606) << 5, r.more.w[i / 2 % 2] |= move_bits(q, 0, 6 + i % 2);
            }
            r.q = flipped(r.q);
            r.head = {load4(b.scales), load4(b.scales + 4), load4(b.scales + 8), b.d};
            return r;
        }
        // All bits stay in place but those of two words; the last quarter is 32 times as much, less 4.
        HQ_INLINE constexpr int place(int g) { return g == 1 ? 3 : g == 3 ? 5 : 0; }
        HQ_INLINE constexpr int centre(int g) { return g == 3 ? 4 : 0; }
        HQ_INLINE uint32_t placed(const Unit& v, int i) {
            const uint32_t q = v.q.w[i % 4], more = v.more.w[i / 2 % 2];
            if (i < 8) return q & 0x07070707u << 3 * (i / 4);
            if (i < 12) return more >> 3 * (i % 2) & 0x07070707;
            return (q & 0xC0C0C0C0) | move_bits(more, 6 + i % 2, 5);
        }
        HQ_INLINE uint32_t word(const Unit& v, int i) { return unplaced<3>(placed(v, i), place(i / 4), centre(i / 4)); }
        HQ_INLINE float d(const Unit& v) { return half_to_float(v.head.w[3]); }
        HQ_INLINE int sub_scale(const Unit& v, int g) { return signed_byte_at(v.scales, g); }
    };
};
