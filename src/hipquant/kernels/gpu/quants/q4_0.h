// Q4_0: | d half | qs 16 bytes |   32 weights = d (q - 8). Byte j of qs: weight j in the low, j + 16 in the high
// nibble.
#pragma once
#include "../blocks.h"

struct Q4_0 {
    struct Block {
        uint16_t d;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 18, "18 bytes");
    static constexpr int kBlock = 32, kGroup = 32, kFactor = 16;
    static constexpr bool kMin = false;

    // A nibble with its top bit flipped, at the top of a byte, is 16 (q - 8).
    HQ_INLINE uint32_t integers(uint32_t flipped, bool high) { return (high ? flipped : flipped << 4) & 0xF0F0F0F0; }

    HQ_INLINE uint32_t word(const Block& b, int j) { return integers(load4(b.qs + 4 * (j % 4)) ^ 0x88888888, j >= 4); }
    HQ_INLINE float scale(const Block& b, int) { return half_to_float(b.d) * (1.0f / kFactor); }
    HQ_INLINE float minimum(const Block&, int) { return 0; }

    static constexpr int kUnits = 1, kStrip = 32, kStep = 32, kSpan = 32;
    static constexpr bool kSub = false;
    struct Unit {
        Words<16> q;
        uint32_t d;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t) {
        Unit r{field<16>(row, block * 18 + 2), field_half(row, block * 18)};
#pragma unroll
        for (int i = 0; i < 4; i++) r.q.w[i] ^= 0x88888888;
        return r;
    }
    HQ_INLINE uint32_t position(uint32_t) { return 0; }
    HQ_INLINE uint32_t word(const Unit& v, int, int i) { return integers(v.q.w[i % 4], i >= 4); }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.d); }

    // A unit is two blocks: pieces | qs of the first | qs of the second |, then | d | d |.
    struct Planes {
        static constexpr int kOffset = 8, kShift = 4, kSub = 0, kBytes = 144;
        static constexpr bool kMin = false;
        struct Unit {
            Words<16> q[2];
            Words<4> d;
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            return {
                {load_stream<16>(r.piece<2>(u, 0)), load_stream<16>(r.piece<2>(u, 1))}, load_stream<4>(r.at<32, 4>(u))};
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
            store_vector<16>(r.piece<2>(u, 0), v.q[0]), store_vector<16>(r.piece<2>(u, 1), v.q[1]);
            store_vector<4>(r.at<32, 4>(u), v.d);
        }
        // Of blocks 2u and 2u + 1; `halves` is 1 where the row ends with the first.
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int halves) {
            Unit r{};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (h == halves) break;
                const Block& b = blocks[2 * u + h];
                r.q[h] = flipped(load_halves<16>(b.qs));
                r.d.w[0] |= (uint32_t)b.d << 16 * h;
            }
            return r;
        }
        // Low nibbles stay in place, with the high ones less 8 as 16 times as much.
        HQ_INLINE constexpr int place(int g) { return g % 2 ? 4 : 0; }
        HQ_INLINE constexpr int centre(int g) { return g % 2 ? 8 : 0; }
        HQ_INLINE uint32_t placed(const Unit& v, int i) {
            return v.q[i / 8].w[i % 4] & (i & 4 ? 0xF0F0F0F0 : 0x0F0F0F0F);
        }
        HQ_INLINE uint32_t word(const Unit& v, int i) { return unplaced<4>(placed(v, i), place(i / 4), centre(i / 4)); }
        HQ_INLINE float d(const Unit& v, int h) { return half_to_float(v.d.w[0] >> 16 * h & 0xFFFF); }
    };
};
