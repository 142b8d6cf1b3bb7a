// Q5_0: | d half | qh 4 bytes | qs 16 bytes |   32 weights = d (q - 16). Byte j of qs: the low nibbles of weight j and
// j + 16; bit j of qh: the others bit of weight j.
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

    // A nibble in bits 3 to 6 of a byte and the others bit, flipped, in bit 7 are 8 (q - 16). j: which word of the 8.
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

    // A unit is two blocks: a piece for each, of whose word j byte b has weights 4j + b and 16 + 4j + b (planes.h),
    // then a word of other bits for each, then | d | d |.
    struct Planes {
        static constexpr int kOffset = 16, kShift = 3, kSub = 0, kBytes = 176;
        static constexpr bool kMin = false;
        struct Unit {
            Words<16> q[2];
            Words<8> others;
            Words<4> d;
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            return {{load_stream<16>(r.piece<2>(u, 0)), load_stream<16>(r.piece<2>(u, 1))},
                load_stream<8>(r.at<32, 8>(u)), load_stream<4>(r.at<40, 4>(u))};
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
            store_vector<16>(r.piece<2>(u, 0), v.q[0]), store_vector<16>(r.piece<2>(u, 1), v.q[1]);
            store_vector<8>(r.at<32, 8>(u), v.others), store_vector<4>(r.at<40, 4>(u), v.d);
        }
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int halves) {
            Unit r{};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (h == halves) break;
                const Block& b = blocks[2 * u + h];
#pragma unroll
                for (int i = 0; i < 8; i++)
                    put_five(r.q[h].w[i % 4], r.others.w[h], (Q5_0::word(b, i) ^ 0x80808080) >> 3, i, i & 4);
                r.d.w[0] |= (uint32_t)b.d << 16 * h;
            }
            return r;
        }
        // The first half of a block is in bits 0 to 4, the second one, less 16, 8 times as much.
        HQ_INLINE constexpr int place(int g) { return g % 2 ? 3 : 0; }
        HQ_INLINE constexpr int centre(int g) { return g % 2 ? 16 : 0; }
        HQ_INLINE uint32_t placed(const Unit& v, int i) {
            return placed_five(v.q[i / 8].w[i % 4], v.others.w[i / 8], i, i & 4);
        }
        HQ_INLINE uint32_t word(const Unit& v, int i) { return unplaced<5>(placed(v, i), place(i / 4), centre(i / 4)); }
        HQ_INLINE float d(const Unit& v, int h) { return half_to_float(v.d.w[0] >> 16 * h & 0xFFFF); }
    };
};
