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

    // A unit is two blocks: a piece for each, then a word of other bits for each, as q5_0.h has them, and
    // | d | m | d | m |.
    struct Planes {
        static constexpr int kOffset = 0, kShift = 0, kSub = 0, kBytes = 192;
        static constexpr bool kMin = true;
        struct Unit {
            Words<16> q[2], head;
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            return {{load_stream<16>(r.piece<2>(u, 0)), load_stream<16>(r.piece<2>(u, 1))},
                load_stream<16>(r.at<32, 16>(u))};
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
            store_vector<16>(r.piece<2>(u, 0), v.q[0]), store_vector<16>(r.piece<2>(u, 1), v.q[1]);
            store_vector<16>(r.at<32, 16>(u), v.head);
        }
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int halves) {
            Unit r{};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (h == halves) break;
                const Block& b = blocks[2 * u + h];
#pragma unroll
                for (int i = 0; i < 8; i++) put_five(r.q[h].w[i % 4], r.head.w[h], Q5_1::word(b, i), i, i & 4);
                r.head.w[2 + h] = b.d | (uint32_t)b.m << 16;
            }
            return r;
        }
        // The first half of a block is in bits 0 to 4, the second one, less 16, 8 times as much.
        HQ_INLINE constexpr int place(int g) { return g % 2 ? 3 : 0; }
        HQ_INLINE constexpr int centre(int g) { return g % 2 ? 16 : 0; }
        HQ_INLINE uint32_t placed(const Unit& v, int i) {
            return placed_five(v.q[i / 8].w[i % 4], v.head.w[i / 8], i, i & 4);
        }
        HQ_INLINE uint32_t word(const Unit& v, int i) { return unplaced<5>(placed(v, i), place(i / 4), centre(i / 4)); }
        HQ_INLINE float d(const Unit& v, int h) { return half_to_float(v.head.w[2 + h] & 0xFFFF); }
        HQ_INLINE float minimum(const Unit& v, int h) { return -half_to_float(v.head.w[2 + h] >> 16); }
    };
};
