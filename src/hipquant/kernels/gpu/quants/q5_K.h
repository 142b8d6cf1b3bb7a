// Q5_K: | d half | dmin half | scales 12 bytes | qh 32 bytes | qs 128 bytes |   256 weights = d scale q - dmin minimum,
// in 8 sub-blocks of 32 (k_scales.h). Chunk c, 32 bytes of qs: the low nibbles of sub-block 2c in the low nibbles,
// those of 2c + 1 in the high ones; bit i of qh[j]: the fifth bit of weight j of sub-block i.
#pragma once
#include "k_scales.h"

struct Q5_K {
    struct Block {
        uint16_t d, dmin;
        uint8_t scales[12];
        uint8_t qh[32];
        uint8_t qs[128];
    };
    static_assert(sizeof(Block) == 176, "176 bytes");
    static constexpr int kBlock = 256, kGroup = 32, kFactor = 1;
    static constexpr bool kMin = true;

    // `qh` with the fifth bits of the chunk in bits 0 and 1 of each byte.
    HQ_INLINE uint32_t integers(uint32_t q, uint32_t qh, int high) {
        return ((high ? q >> 4 : q) & 0x0F0F0F0F) | ((high ? qh << 3 : qh << 4) & 0x10101010);
    }

    HQ_INLINE uint32_t word(const Block& b, int j) {
        const int chunk = j / 16, i = j % 8;
        return integers(load4(b.qs + 32 * chunk + 4 * i), load4(b.qh + 4 * i) >> 2 * chunk, j / 8 % 2);
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
        Words<16> qh, q;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t u) {
        const uint32_t at = block * 176, chunk = u / 2, part = 16 * (u % 2);
        const Words<16> head = field<16>(row, at);
        Unit r{head.w[0], k_scales(head.w[1], head.w[2], head.w[3], chunk), field<16>(row, at + 16 + part),
            field<16>(row, at + 48 + 32 * chunk + part)};
#pragma unroll
        for (int i = 0; i < 4; i++) r.qh.w[i] >>= 2 * chunk;
        return r;
    }
    HQ_INLINE uint32_t position(uint32_t u) { return u / 2 * 64 + 16 * (u % 2); }
    HQ_INLINE uint32_t word(const Unit& v, int s, int i) { return integers(v.q.w[i], v.qh.w[i], s); }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.dm); }
    HQ_INLINE float dmin(const Unit& v) { return half_to_float(v.dm >> 16); }
    HQ_INLINE float sub_scale(const Unit& v, int s) { return (float)(v.k.scales >> 8 * s & 0xFF); }
    HQ_INLINE float sub_minimum(const Unit& v, int s) { return (float)(v.k.minimums >> 8 * s & 0xFF); }

    // A unit is a chunk: two pieces, of which byte b has weights b and 32 + b (planes.h); two words of other bits; d,
    // dmin and scales of the super-block, which 4 units share.
    struct Planes {
        static constexpr int kOffset = 0, kShift = 0, kSub = 32, kBytes = 176;
        static constexpr bool kMin = true;
        struct Unit {
            Words<16> q[2], head;
            Words<8> others;
            uint32_t scales;  // and minimums of the unit
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            const Words<16> head = load_stream<16>(r.at_super<40, 16>(u));
            return {{load_stream<16>(r.piece<2>(u, 0)), load_stream<16>(r.piece<2>(u, 1))}, head,
                load_stream<8>(r.at<32, 8>(u)), packed_k_scales(head.w[1], head.w[2], head.w[3], u % 4)};
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
            store_vector<16>(r.piece<2>(u, 0), v.q[0]), store_vector<16>(r.piece<2>(u, 1), v.q[1]);
            store_vector<8>(r.at<32, 8>(u), v.others);
            if (u % 4 == 0) store_vector<16>(r.at_super<40, 16>(u), v.head);
        }
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int) {
            const Block& b = blocks[u / 4];
            const int c = (int)(u % 4);
            Unit r{{}, load_halves<16>(&b), {}, {}};
#pragma unroll
            for (int i = 0; i < 16; i++)
                put_five(r.q[i / 4 % 2].w[i % 4], r.others.w[i / 4 % 2], Q5_K::word(b, 16 * c + i), i, i >= 8);
            return r;
        }
        // The first half of a chunk is in bits 0 to 4, the second one, less 16, 8 times as much.
        HQ_INLINE constexpr int place(int g) { return g >= 2 ? 3 : 0; }
        HQ_INLINE constexpr int centre(int g) { return g >= 2 ? 16 : 0; }
        HQ_INLINE uint32_t placed(const Unit& v, int i) {
            return placed_five(v.q[i / 4 % 2].w[i % 4], v.others.w[i / 4 % 2], i, i >= 8);
        }
        HQ_INLINE uint32_t word(const Unit& v, int i) { return unplaced<5>(placed(v, i), place(i / 4), centre(i / 4)); }
        HQ_INLINE float d(const Unit& v) { return half_to_float(v.head.w[0] & 0xFFFF); }
        HQ_INLINE float dmin(const Unit& v) { return half_to_float(v.head.w[0] >> 16); }
        HQ_INLINE int sub_scale(const Unit& v, int g) { return byte_at(v.scales, g); }
        HQ_INLINE int sub_minimum(const Unit& v, int g) { return byte_at(v.scales, 2 + g); }
    };
};
