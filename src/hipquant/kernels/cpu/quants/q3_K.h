// Q3_K: | hmask 32 bytes | qs 64 bytes | scales 12 bytes | d half |   256 weights in 16 sub-blocks of 16.
// weight = d (scale - 32) (q - 4). q: low two bits as in Q2_K, third bit = bit s of hmask byte j for slice s.
// scales: sub-block i has its low nibble in nibble i / 8 of byte i % 8, its two high bits in byte 8 + i % 4.
#pragma once
#include "../slice.h"

struct Q3_K {
    static constexpr int kBlock = 256, kOffset = 4, kGroups = 2;
    static constexpr bool kMin = false, kSigned = false;
    static constexpr int kTop = 7, kScaleTop = 31, kSub = 16, kCandidates = 10, kBefore = 3;
    static constexpr float kStep = 0.07f;
    struct Block {
        uint8_t hmask[32];
        uint8_t qs[64];
        uint8_t scales[12];
        uint16_t d;
    };
    static_assert(sizeof(Block) == 110);

    HQ_INLINE int scale(const Block& b, int i) {
        return (b.scales[i % 8] >> 4 * (i / 8) & 15) | (b.scales[8 + i % 4] >> 2 * (i / 4) & 3) << 4;
    }
    HQ_INLINE u8x32 quants(const Block& b, int s) {
        const u8x32 low = (load<u8x32>(b.qs + 32 * (s / 4)) >> 2 * (s % 4)) & 3;
        return low | (((load<u8x32>(b.hmask) >> s) & 1) << 2);
    }
    HQ_INLINE Slice slice(const Block& b, int s) {
        const float d = half_to_float(b.d);
        return {quants(b, s), halves(d * (scale(b, 2 * s) - 32), d * (scale(b, 2 * s + 1) - 32)), {}};
    }

    struct Packed {
        uint16_t d[16];
        uint8_t scales_low[8][16];   // [slice][row]: low nibbles of its two sub-blocks
        uint8_t scales_high[4][16];  // [pair of slices][row]: high bits of its four sub-blocks
        struct {
            Bits high;
            Pairs low;
        } qs[8];
    };
    static_assert(sizeof(Packed) == 16 * sizeof(Block));
    HQ_INLINE void pack(Packed& p, const Block& b, int row) {
        p.d[row] = b.d;
        for (int s = 0; s < 8; s++) {
            const int a = scale(b, 2 * s), c = scale(b, 2 * s + 1);
            p.scales_low[s][row] = (uint8_t)((a & 15) | (c & 15) << 4);
            const int high = (a >> 4 | (c >> 4) << 2) << 4 * (s % 2);
            p.scales_high[s / 2][row] = (uint8_t)(s % 2 ? p.scales_high[s / 2][row] | high : high);
            p.qs[s].low.pack(quants(b, s) & 3, row);
            p.qs[s].high.pack(quants(b, s) >> 2, row);
        }
    }
    HQ_INLINE void weights(const Packed& p, int s, int at, vb w[8]) {
        p.qs[s].low.unpack(at, w);
        p.qs[s].high.add<2>(at, w);
    }
    HQ_INLINE void scales(const Packed& p, int s, int at, vf* scale, vf*) {
        const vf d = load_halves(p.d + at);
        const vi low = bytes_to_ints(p.scales_low[s] + at), high = bytes_to_ints(p.scales_high[s / 2] + at) >> 4 * (s % 2);
        scale[0] = d * to_float(((low & 15) | (high & 3) << 4) - 32);
        scale[1] = d * to_float((low >> 4 | (high & 12) << 2) - 32);
    }

    HQ_INLINE void write(Block& b, const Parts<kBlock>& p) {
        b.d = p.d;
        u8x32 high = 0;
        for (int i = 0; i < 2; i++) {
            u8x32 four = 0;
            for (int s = 0; s < 4; s++) {
                const u8x32 q = p.slice(4 * i + s);
                four |= (q & 3) << 2 * s;
                high |= (q >> 2) << (4 * i + s);
            }
            store(b.qs + 32 * i, four);
        }
        store(b.hmask, high);
        for (int i = 0; i < 12; i++) b.scales[i] = 0;
        for (int i = 0; i < 16; i++) {
            const int scale = p.scale[i] + 32;
            b.scales[i % 8] = (uint8_t)(b.scales[i % 8] | (scale & 15) << 4 * (i / 8));
            b.scales[8 + i % 4] = (uint8_t)(b.scales[8 + i % 4] | (scale >> 4) << 2 * (i / 4));
        }
    }
};
