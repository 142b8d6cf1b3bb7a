// Q8_0: | d half | qs int8[32] |   32 weights = d q.
#pragma once
#include "../blocks.h"

struct Q8_0 {
    struct Block {
        uint16_t d;
        uint8_t qs[32];
    };
    static_assert(sizeof(Block) == 34, "34 bytes");
    static constexpr int kBlock = 32, kGroup = 32, kFactor = 1;
    static constexpr bool kMin = false;

    HQ_INLINE uint32_t word(const Block& b, int j) { return load4(b.qs + 4 * j); }
    HQ_INLINE float scale(const Block& b, int) { return half_to_float(b.d); }
    HQ_INLINE float minimum(const Block&, int) { return 0; }

    static constexpr int kUnits = 1, kStrip = 32, kStep = 32, kSpan = 32;
    static constexpr bool kSub = false;
    struct Unit {
        Words<32> q;
        uint32_t d;
    };
    template <class R> HQ_INLINE Unit load(R row, uint32_t block, uint32_t) {
        return {field<32>(row, block * 34 + 2), field_half(row, block * 34)};
    }
    HQ_INLINE uint32_t position(uint32_t) { return 0; }
    HQ_INLINE uint32_t word(const Unit& v, int, int i) { return v.q.w[i]; }
    HQ_INLINE float d(const Unit& v) { return half_to_float(v.d); }

    // A unit is two blocks: their qs as four pieces, then | d | d |.
    struct Planes {
        static constexpr int kOffset = 0, kShift = 0, kSub = 0, kBytes = 272;
        static constexpr bool kMin = false;
        struct Unit {
            Words<16> q[4];
            Words<4> d;
        };
        HQ_INLINE Unit load(const PlaneRow& r, uint32_t u) {
            Unit v;
#pragma unroll
            for (int i = 0; i < 4; i++) v.q[i] = load_stream<16>(r.piece<4>(u, i));
            v.d = load_stream<4>(r.at<64, 4>(u));
            return v;
        }
        HQ_INLINE void store(const PlaneRow& r, uint32_t u, const Unit& v) {
#pragma unroll
            for (int i = 0; i < 4; i++) store_vector<16>(r.piece<4>(u, i), v.q[i]);
            store_vector<4>(r.at<64, 4>(u), v.d);
        }
        HQ_INLINE Unit gather(const Block* blocks, uint32_t u, int halves) {
            Unit r{};
#pragma unroll
            for (int h = 0; h < 2; h++) {
                if (h == halves) break;
                const Block& b = blocks[2 * u + h];
                r.q[2 * h] = load_halves<16>(b.qs), r.q[2 * h + 1] = load_halves<16>(b.qs + 16);
                r.d.w[0] |= (uint32_t)b.d << 16 * h;
            }
            return r;
        }
        HQ_INLINE constexpr int place(int) { return 0; }
        HQ_INLINE constexpr int centre(int) { return 0; }
        HQ_INLINE uint32_t placed(const Unit& v, int i) { return v.q[i / 4].w[i % 4]; }
        HQ_INLINE uint32_t word(const Unit& v, int i) { return placed(v, i); }
        HQ_INLINE float d(const Unit& v, int h) { return half_to_float(v.d.w[0] >> 16 * h & 0xFFFF); }
    };
};
