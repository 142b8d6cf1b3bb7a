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

    // A unit is a quarter of a block: a piece, of whose word j byte b has weight 16s + 4j + b in bits 2s, 2s + 1; its
    // 4 bytes of scales; d and dmin of the super-block, which 4 units share.
    struct Planes {
        static constexpr int kOffset = 0, kShift = 0, kSub = 16, kBytes = 84;
        static constexpr bool kMin = true;
        struct Unit {
            Words<16> q;
            Words<4> scales, dm;
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            return {load_stream<16>(r.piece<1>(u, 0)), load_stream<4>(r.at<16, 4>(u)),
                load_stream<4>(r.at_super<20, 4>(u))};
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
            store_vector<16>(r.piece<1>(u, 0), v.q), store_vector<4>(r.at<16, 4>(u), v.scales);
            if (u % 4 == 0) store_vector<4>(r.at_super<20, 4>(u), v.dm);
        }
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int) {
            const Block& b = blocks[u / 4];
            const int c = (int)(u % 4);
            Unit r{{}, {load4(b.scales + 4 * c)}, {b.d | (uint32_t)b.dmin << 16}};
#pragma unroll
            for (int i = 0; i < 16; i++) r.q.w[i % 4] |= Q2_K::word(b, 16 * c + i) << 2 * (i / 4);
            r.q = flipped(r.q);
            return r;
        }
        // Each two bits stay in place: 4^g times as much, the last ones less 2.
        HQ_INLINE constexpr int place(int g) { return 2 * g; }
        HQ_INLINE constexpr int centre(int g) { return g == 3 ? 2 : 0; }
        HQ_INLINE uint32_t placed(const Unit& v, int i) { return v.q.w[i % 4] & 0x03030303u << 2 * (i / 4); }
        HQ_INLINE uint32_t word(const Unit& v, int i) { return unplaced<2>(placed(v, i), place(i / 4), centre(i / 4)); }
        HQ_INLINE float d(const Unit& v) { return half_to_float(v.dm.w[0] & 0xFFFF); }
        HQ_INLINE float dmin(const Unit& v) { return half_to_float(v.dm.w[0] >> 16); }
        HQ_INLINE int sub_scale(const Unit& v, int g) { return byte_at(v.scales.w[0] & 0x0F0F0F0F, g); }
        HQ_INLINE uint32_t sub_minimums(const Unit& v) { return v.scales.w[0] >> 4 & 0x0F0F0F0F; }
        HQ_INLINE int sub_minimum(const Unit& v, int g) { return byte_at(sub_minimums(v), g); }
    };
};
