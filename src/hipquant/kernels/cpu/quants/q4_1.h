// Q4_1: | d half | m half | qs 16 bytes |   weight j = d q_j + m; byte j holds weight j (low) and j + 16 (high nibble).
#pragma once
#include "../slice.h"

struct Q4_1 {
    static constexpr int kBlock = 32, kOffset = 0, kGroups = 1;
    static constexpr bool kMin = true, kSigned = false;
    static constexpr int kTop = 15, kScaleTop = 0, kSub = 32, kCandidates = 4, kBefore = 1;
    static constexpr float kStep = 0.03f;
    struct Block {
        uint16_t d, m;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 20);

    HQ_INLINE Slice slice(const Block& b, int) {
        return {nibbles(b.qs), f32x8(half_to_float(b.d)), f32x8(half_to_float(b.m))};
    }

    struct Packed {
        uint16_t d[16], m[16];
        Nibbles qs;
    };
    static_assert(sizeof(Packed) == 16 * sizeof(Block));
    HQ_INLINE void pack(Packed& p, const Block& b, int row) {
        p.d[row] = b.d;
        p.m[row] = b.m;
        p.qs.pack(nibbles(b.qs), row);
    }
    HQ_INLINE void weights(const Packed& p, int, int at, vb w[8]) { p.qs.unpack(at, w); }
    HQ_INLINE void scales(const Packed& p, int, int at, vf* scale, vf* min) {
        scale[0] = load_halves(p.d + at);
        min[0] = load_halves(p.m + at);
    }

    HQ_INLINE void write(Block& b, const Parts<kBlock>& p) {
        b.d = p.d;
        b.m = p.e ^ 0x8000;
        store(b.qs, pack_nibbles(p.slice(0)));
    }
};
