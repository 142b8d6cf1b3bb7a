// Q5_K: | d half | dmin half | scales 12 bytes | qh 32 bytes | qs 128 bytes |   256 weights in 8 sub-blocks of 32.
// weight = d scale q - dmin min. q: nibble as in Q4_K, fifth bit = bit s of qh byte j for slice s.
#pragma once
#include "k_scales.h"

struct Q5_K {
    static constexpr int kBlock = 256, kOffset = 0, kGroups = 1;
    static constexpr bool kMin = true, kSigned = false;
    static constexpr int kTop = 31, kScaleTop = 63, kSub = 32, kCandidates = 6, kBefore = 2;
    static constexpr float kStep = 0.015f;
    struct Block {
        uint16_t d, dmin;
        uint8_t scales[12];
        uint8_t qh[32];
        uint8_t qs[128];
    };
    static_assert(sizeof(Block) == 176);

    HQ_INLINE u8x32 quants(const Block& b, int s) {
        const u8x32 low = (load<u8x32>(b.qs + 32 * (s / 2)) >> 4 * (s % 2)) & 15;
        return low | (((load<u8x32>(b.qh) >> s) & 1) << 4);
    }
    HQ_INLINE Slice slice(const Block& b, int s) {
        return {quants(b, s), f32x8(half_to_float(b.d) * k_scale(b.scales, s)),
                f32x8(-(half_to_float(b.dmin) * k_min(b.scales, s)))};
    }

    struct Packed {
        KScales scales;
        struct {
            Bits high;
            Nibbles low;
        } qs[8];
    };
    static_assert(sizeof(Packed) == 16 * sizeof(Block));
    HQ_INLINE void pack(Packed& p, const Block& b, int row) {
        KScales::pack(p.scales, b.d, b.dmin, b.scales, row);
        for (int s = 0; s < 8; s++) {
            p.qs[s].low.pack(quants(b, s) & 15, row);
            p.qs[s].high.pack(quants(b, s) >> 4, row);
        }
    }
    HQ_INLINE void weights(const Packed& p, int s, int at, vb w[8]) {
        p.qs[s].low.unpack(at, w);
        p.qs[s].high.add<4>(at, w);
    }
    HQ_INLINE void scales(const Packed& p, int s, int at, vf* scale, vf* min) {
        KScales::unpack(p.scales, s, at, scale, min);
    }

    HQ_INLINE void write(Block& b, const Parts<kBlock>& p) {
        b.d = p.d;
        b.dmin = p.e;
        write_k_scales(b.scales, p.scale, p.minimum);
        u8x32 high = 0;
        for (int s = 0; s < 8; s++) high |= (p.slice(s) >> 4) << s;
        store(b.qh, high);
        for (int s = 0; s < 8; s += 2) store(b.qs + 16 * s, (p.slice(s) & 15) | p.slice(s + 1) << 4);
    }
};
