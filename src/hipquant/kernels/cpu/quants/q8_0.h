// Q8_0: | d half | qs 32 int8 |   weight j = d q_j.
#pragma once
#include "../slice.h"

struct Q8_0 {
    static constexpr int kBlock = 32, kOffset = 0, kGroups = 1;
    static constexpr bool kMin = false, kSigned = true;
    static constexpr int kTop = 127, kScaleTop = 0, kSub = 32, kCandidates = 0, kBefore = 0;
    static constexpr float kStep = 0;
    struct Block {
        uint16_t d;
        int8_t qs[32];
    };
    static_assert(sizeof(Block) == 34);

    HQ_INLINE Slice slice(const Block& b, int) { return {load<u8x32>(b.qs), f32x8(half_to_float(b.d)), {}}; }

    struct Packed {
        uint16_t d[16];
        Bytes qs;  // offset by 128, so that they are unsigned
    };
    static_assert(sizeof(Packed) == 16 * sizeof(Block));
    HQ_INLINE void pack(Packed& p, const Block& b, int row) {
        p.d[row] = b.d;
        p.qs.pack(load<u8x32>(b.qs) ^ 128, row);
    }
    HQ_INLINE void weights(const Packed& p, int, int at, vb w[8]) { p.qs.unpack(at, w); }
    HQ_INLINE void scales(const Packed& p, int, int at, vf* scale, vf*) { scale[0] = load_halves(p.d + at); }

    HQ_INLINE void write(Block& b, const Parts<kBlock>& p) {
        b.d = p.d;
        store(b.qs, p.slice(0));
    }
};
