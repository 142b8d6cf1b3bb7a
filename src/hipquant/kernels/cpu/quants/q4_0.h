// Q4_0: | d half | qs 16 bytes |   weight j = d (q_j - 8); byte j holds weight j (low) and j + 16 (high nibble).
#pragma once
#include "../slice.h"

struct Q4_0 {
    static constexpr int kBlock = 32, kOffset = 8, kGroups = 1;
    static constexpr bool kMin = false, kSigned = false;
    static constexpr int kTop = 15, kScaleTop = 0, kSub = 32, kCandidates = 5, kBefore = 1;
    static constexpr float kStep = 0.06f;
    struct Block {
        uint16_t d;
        uint8_t qs[16];
    };
    static_assert(sizeof(Block) == 18);

    HQ_INLINE Slice slice(const Block& b, int) {
        return {nibbles(b.qs), f32x8(half_to_float(b.d)), {}};
    }

    struct Packed {
        uint16_t d[16];
        Nibbles qs;
    };
    static_assert(sizeof(Packed) == 16 * sizeof(Block));
    HQ_INLINE void pack(Packed& p, const Block& b, int row) {
        p.d[row] = b.d;
        p.qs.pack(nibbles(b.qs), row);
    }
    HQ_INLINE void weights(const Packed& p, int, int at, vb w[8]) { p.qs.unpack(at, w); }
    HQ_INLINE void scales(const Packed& p, int, int at, vf* scale, vf*) { scale[0] = load_halves(p.d + at); }

    HQ_INLINE void write(Block& b, const Parts<kBlock>& p) {
        b.d = p.d;
        store(b.qs, pack_nibbles(p.slice(0)));
    }
};
