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

    // A unit is a quarter of a block: three pieces, of whose word j byte b has weight 16p + 4j + b in bits 0 to 5,
    // where p is the piece, and in bits 6 and 7 two bits of weight 48 + 4j + b, the upper ones in the first; its 4
    // scales; d of the super-block, which 4 units share.
    struct Planes {
        static constexpr int kOffset = 32, kShift = 2, kSub = 16, kBytes = 210;
        static constexpr bool kMin = false;
        struct Unit {
            Words<16> q[3];
            Words<4> scales;
            uint32_t d;
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            return {{load_stream<16>(r.piece<3>(u, 0)), load_stream<16>(r.piece<3>(u, 1)),
                        load_stream<16>(r.piece<3>(u, 2))},
                load_stream<4>(r.at<48, 4>(u)), load_stream_half(r.at_super<52, 2>(u))};
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
            for (int p = 0; p < 3; p++) store_vector<16>(r.piece<3>(u, p), v.q[p]);
            store_vector<4>(r.at<48, 4>(u), v.scales);
            if (u % 4 == 0) *(uint16_t*)r.at_super<52, 2>(u) = (uint16_t)v.d;
        }
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int) {
            const Block& b = blocks[u / 4];
            const int c = (int)(u % 4);
            Unit r{{}, {load4(b.scales + 4 * c)}, b.d};
#pragma unroll
            for (int i = 0; i < 16; i++) {
                const uint32_t q = (Q6_K::word(b, 16 * c + i) ^ 0x80808080) >> 2 & 0x3F3F3F3F;
                if (i < 12) r.q[i / 4].w[i % 4] |= q;
                else
                    for (int p = 0; p < 3; p++) r.q[p].w[i % 4] |= q << (2 + 2 * p) & 0xC0C0C0C0;
            }
            r.q[0] = flipped(r.q[0]);
            return r;
        }
        // The last quarter is 4 times as much, less 32.
        HQ_INLINE constexpr int place(int g) { return g == 3 ? 2 : 0; }
        HQ_INLINE constexpr int centre(int g) { return g == 3 ? 32 : 0; }
        HQ_INLINE uint32_t placed(const Unit& v, int i) {
            const int j = i % 4;
            if (i < 12) return v.q[i / 4].w[j] & 0x3F3F3F3F;
            return (v.q[0].w[j] & 0xC0C0C0C0) | move_bits<2>(v.q[1].w[j], 6, 4) | move_bits<2>(v.q[2].w[j], 6, 2);
        }
        HQ_INLINE uint32_t word(const Unit& v, int i) { return unplaced<6>(placed(v, i), place(i / 4), centre(i / 4)); }
        HQ_INLINE float d(const Unit& v) { return half_to_float(v.d); }
        HQ_INLINE int sub_scale(const Unit& v, int g) { return signed_byte_at(v.scales.w[0], g); }
    };
};
