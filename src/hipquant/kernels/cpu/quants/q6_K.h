// Q6_K: | ql 128 bytes | qh 64 bytes | scales 16 int8 | d half |   256 weights in 16 sub-blocks of 16.
// weight = d scale (q - 32). Slice s of half h = s / 4, i = s % 4: low nibble i / 2 of ql bytes 64 h + 32 (i % 2) ...,
// two high bits 2 i of qh bytes 32 h ...
#pragma once
#include "../slice.h"

struct Q6_K {
    static constexpr int kBlock = 256, kOffset = 32, kGroups = 2;
    static constexpr bool kMin = false, kSigned = false;
    static constexpr int kTop = 63, kScaleTop = 127, kSub = 16, kCandidates = 12, kBefore = 4;
    static constexpr float kStep = 0.02f;
    struct Block {
        uint8_t ql[128];
        uint8_t qh[64];
        int8_t scales[16];
        uint16_t d;
    };
    static_assert(sizeof(Block) == 210);

    HQ_INLINE u8x32 quants(const Block& b, int s) {
        const int h = s / 4, i = s % 4;
        const u8x32 low = (load<u8x32>(b.ql + 64 * h + 32 * (i % 2)) >> 4 * (i / 2)) & 15;
        return low | (((load<u8x32>(b.qh + 32 * h) >> 2 * i) & 3) << 4);
    }
    HQ_INLINE Slice slice(const Block& b, int s) {
        const float d = half_to_float(b.d);
        return {quants(b, s), halves(d * b.scales[2 * s], d * b.scales[2 * s + 1]), {}};
    }

    struct Packed {
        uint16_t d[16];
        int8_t scales[16][16];  // [sub-block][row]
        struct {
            Pairs high;
            Nibbles low;
        } qs[8];
    };
    static_assert(sizeof(Packed) == 16 * sizeof(Block));
    HQ_INLINE void pack(Packed& p, const Block& b, int row) {
        p.d[row] = b.d;
        for (int i = 0; i < 16; i++) p.scales[i][row] = b.scales[i];
        for (int s = 0; s < 8; s++) {
            p.qs[s].low.pack(quants(b, s) & 15, row);
            p.qs[s].high.pack(quants(b, s) >> 4, row);
        }
    }
    HQ_INLINE void weights(const Packed& p, int s, int at, vb w[8]) {
        p.qs[s].low.unpack(at, w);
        p.qs[s].high.add<4>(at, w);
    }
    HQ_INLINE void scales(const Packed& p, int s, int at, vf* scale, vf*) {
        const vf d = load_halves(p.d + at);
        for (int g = 0; g < 2; g++) scale[g] = d * to_float(signed_bytes_to_ints(p.scales[2 * s + g] + at));
    }

    HQ_INLINE void write(Block& b, const Parts<kBlock>& p) {
        b.d = p.d;
        for (int i = 0; i < 16; i++) b.scales[i] = p.scale[i];
        for (int h = 0; h < 2; h++) {
            u8x32 q[4], high = 0;
            for (int i = 0; i < 4; i++) {
                q[i] = p.slice(4 * h + i);
                high |= (q[i] >> 4) << 2 * i;
            }
            store(b.qh + 32 * h, high);
            for (int i = 0; i < 2; i++) store(b.ql + 64 * h + 32 * i, (q[i] & 15) | q[i + 2] << 4);
        }
    }
};
