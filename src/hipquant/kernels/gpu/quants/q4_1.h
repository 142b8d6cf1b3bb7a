// Q4_1: | d half | m half | qs 16 bytes |   32 weights = d q + m. Byte j of qs: weight j in the low, j + 16 in the high
// nibble.
#pragma once
#include "../blocks.h"

struct Q4_1 {
    struct Block {
        uint16_t d, m;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 20, "20 bytes");
    static constexpr int kBlock = 32, kGroup = 32, kFactor = 1;
    static constexpr bool kMin = true;

    HQ_INLINE uint32_t integers(uint32_t q, bool high) { return (high ? q >> 4 : q) & 0x0F0F0F0F; }

    HQ_INLINE uint32_t word(const Block& b, int j) { return integers(load4(b.qs + 4 * (j % 4)), j >= 4); }
    HQ_INLINE float scale(const Block& b, int) { return half_to_float(b.d); }
    HQ_INLINE float minimum(const Block& b, int) { return -half_to_float(b.m); }

    static constexpr int kUnits = 1, kStrip = 32, kStep = 32, kSpan = 32;
    static constexpr bool kSub = false;
    struct Unit {
        Words<16> q;
        uint32_t dm;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t) {
        return {field<16>(row, block * 20 + 4), field_word(row, block * 20)};
    }
    HQ_INLINE uint32_t position(uint32_t) { return 0; }
    HQ_INLINE uint32_t word(const Unit& v, int, int i) { return integers(v.q.w[i % 4], i >= 4); }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.dm); }
    HQ_INLINE float dmin(const Unit& v) { return -half_to_float(v.dm >> 16); }

    // A unit is two blocks: pieces | qs of the first | qs of the second |, then | d | m | d | m |.
    struct Planes {
        static constexpr int kOffset = 0, kShift = 0, kSub = 0, kBytes = 160;
        static constexpr bool kMin = true;
        struct Unit {
            Words<16> q[2];
            Words<8> dm;
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            return {
                {load_stream<16>(r.piece<2>(u, 0)), load_stream<16>(r.piece<2>(u, 1))}, load_stream<8>(r.at<32, 8>(u))};
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
            store_vector<16>(r.piece<2>(u, 0), v.q[0]), store_vector<16>(r.piece<2>(u, 1), v.q[1]);
            store_vector<8>(r.at<32, 8>(u), v.dm);
        }
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int halves) {
            Unit r{};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (h == halves) break;
                const Block& b = blocks[2 * u + h];
                r.q[h] = flipped(load_halves<16>(b.qs));
                r.dm.w[h] = b.d | (uint32_t)b.m << 16;
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
        HQ_INLINE float d(const Unit& v, int h) { return half_to_float(v.dm.w[h] & 0xFFFF); }
        HQ_INLINE float minimum(const Unit& v, int h) { return -half_to_float(v.dm.w[h] >> 16); }
    };
};
