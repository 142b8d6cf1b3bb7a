// Q2_K: | scales 16 bytes | qs 64 bytes | d half | dmin half |   256 weights in 16 sub-blocks of 16.
// weight = d (scale & 15) q - dmin (scale >> 4). Slice s (32 weights) is bits 2 (s % 4) of bytes 32 (s / 4) ...
#pragma once
#include "../slice.h"

struct Q2_K {
    static constexpr int kBlock = 256, kOffset = 0, kGroups = 2;
    static constexpr bool kMin = true, kSigned = false;
    static constexpr int kTop = 3, kScaleTop = 15, kSub = 16, kCandidates = 6, kBefore = 1;
    static constexpr float kStep = 0.06f;
    struct Block {
        uint8_t scales[16];
        uint8_t qs[64];
        uint16_t d, dmin;
    };
    static_assert(sizeof(Block) == 84);

    HQ_INLINE u8x32 quants(const Block& b, int s) { return (load<u8x32>(b.qs + 32 * (s / 4)) >> 2 * (s % 4)) & 3; }
    HQ_INLINE Slice slice(const Block& b, int s) {
        const float d = half_to_float(b.d), dmin = half_to_float(b.dmin);
        const uint8_t* sc = b.scales + 2 * s;
        return {quants(b, s), halves(d * (sc[0] & 15), d * (sc[1] & 15)),
                halves(-(dmin * (sc[0] >> 4)), -(dmin * (sc[1] >> 4)))};
    }

    struct Packed {
        uint16_t d[16], dmin[16];
        uint8_t scales[16][16];  // [sub-block][row]
        Pairs qs[8];
    };
    static_assert(sizeof(Packed) == 16 * sizeof(Block));
    HQ_INLINE void pack(Packed& p, const Block& b, int row) {
        p.d[row] = b.d;
        p.dmin[row] = b.dmin;
        for (int i = 0; i < 16; i++) p.scales[i][row] = b.scales[i];
        for (int s = 0; s < 8; s++) p.qs[s].pack(quants(b, s), row);
    }
    HQ_INLINE void weights(const Packed& p, int s, int at, vb w[8]) { p.qs[s].unpack(at, w); }
    HQ_INLINE void scales(const Packed& p, int s, int at, vf* scale, vf* min) {
        const vf d = load_halves(p.d + at), dmin = -load_halves(p.dmin + at);
        for (int g = 0; g < 2; g++) {
            const vi sc = bytes_to_ints(p.scales[2 * s + g] + at);
            scale[g] = d * to_float(sc & 15);
            min[g] = dmin * to_float(sc >> 4);
        }
    }

    HQ_INLINE void write(Block& b, const Parts<kBlock>& p) {
        b.d = p.d;
        b.dmin = p.e;
        for (int i = 0; i < 16; i++) b.scales[i] = (uint8_t)(p.scale[i] | p.minimum[i] << 4);
        for (int i = 0; i < 2; i++) {
            u8x32 four = 0;
            for (int s = 0; s < 4; s++) four |= p.slice(4 * i + s) << 2 * s;
            store(b.qs + 32 * i, four);
        }
    }
};
