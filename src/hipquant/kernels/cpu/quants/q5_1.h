// Q5_1: | d half | m half | qh 4 bytes | qs 16 bytes |   weight j = d q_j + m; q_j as in Q5_0.
#pragma once
#include "../slice.h"

struct Q5_1 {
    static constexpr int kBlock = 32, kOffset = 0, kGroups = 1;
    static constexpr bool kMin = true, kSigned = false;
    static constexpr int kTop = 31, kScaleTop = 0, kSub = 32, kCandidates = 4, kBefore = 1;
    static constexpr float kStep = 0.015f;
    struct Block {
        uint16_t d, m;
        uint8_t qh[4];
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 24);

    HQ_INLINE u8x32 quants(const Block& b) { return nibbles(b.qs) | (bits(b.qh) & 16); }
    HQ_INLINE Slice slice(const Block& b, int) {
        return {quants(b), f32x8(half_to_float(b.d)), f32x8(half_to_float(b.m))};
    }

    struct Packed {
        uint16_t d[16], m[16];
        Bits qh;
        Nibbles qs;
    };
    static_assert(sizeof(Packed) == 16 * sizeof(Block));
    HQ_INLINE void pack(Packed& p, const Block& b, int row) {
        p.d[row] = b.d;
        p.m[row] = b.m;
        p.qs.pack(quants(b) & 15, row);
        p.qh.pack(quants(b) >> 4, row);
    }
    HQ_INLINE void weights(const Packed& p, int, int at, vb w[8]) {
        p.qs.unpack(at, w);
        p.qh.add<4>(at, w);
    }
    HQ_INLINE void scales(const Packed& p, int, int at, vf* scale, vf* min) {
        scale[0] = load_halves(p.d + at);
        min[0] = load_halves(p.m + at);
    }

    HQ_INLINE void write(Block& b, const Parts<kBlock>& p) {
        b.d = p.d;
        b.m = p.e ^ 0x8000;
        store(b.qs, pack_nibbles(p.slice(0)));
        store(b.qh, pack_bits<4>(p.slice(0)));
    }
};
