// What every quant type gives the kernels: slices of 32 weights, and planes of 16 rows for the packed layout.
#pragma once
#include "simd.h"

// 32 weights: weight j = scale (q_j - kOffset) + min, scale and min of weight j in lane j / 4; q signed if kSigned.
struct Slice {
    u8x32 q;
    f32x8 scale, min;
};

HQ_INLINE f32x8 halves(float a, float b) { return {a, a, a, a, b, b, b, b}; }

// 16 bytes to 32 nibbles: the low ones, then the high ones.
HQ_INLINE u8x32 nibbles(const uint8_t* qs) {
    const u8x16 v = load<u8x16>(qs);
    return __builtin_shufflevector(v & 15, v >> 4, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19,
                                   20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}

// 32 bits to 32 bytes: all ones where the bit is set.
HQ_INLINE u8x32 bits(const uint8_t* qh) {
    const vec<uint8_t, 4> v = load<vec<uint8_t, 4>>(qh);
    const u8x32 mask = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128,
                        1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const u8x32 spread = __builtin_shufflevector(v, v, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2,
                                                 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
    return (u8x32)((spread & mask) != 0);
}

// Planes: bits of 32 columns of 16 rows. Columns go in 8 groups of 4; four columns of a row are one 32-bit lane, so a
// register holds one group of W rows. `at` is the first of those rows; w[g] takes group g.
struct Bytes {
    uint8_t b[8][64];
    HQ_INLINE void copy(uint8_t* to, const void* from) { __builtin_memcpy(to, from, 4); }
    inline void pack(u8x32 q, int row) {
        for (int g = 0; g < 8; g++) copy(b[g] + 4 * row, (const uint8_t*)&q + 4 * g);
    }
    inline void unpack(int at, vb w[8]) const {
        for (int g = 0; g < 8; g++) w[g] = load<vb>(b[g] + 4 * at);
    }
};

struct Nibbles {  // byte: group g low, group g + 4 high
    uint8_t b[4][64];
    inline void pack(u8x32 q, int row) {
        const u8x16 both = q.lo | q.hi << 4;
        for (int g = 0; g < 4; g++) Bytes::copy(b[g] + 4 * row, (const uint8_t*)&both + 4 * g);
    }
    __attribute__((always_inline)) inline void unpack(int at, vb w[8]) const {
        for (int g = 0; g < 4; g++) {
            const vb v = load<vb>(b[g] + 4 * at);
            w[g] = v & 15;
            w[g + 4] = shr<4>(v) & 15;
        }
    }
};

struct Pairs {  // byte: groups 4 u ... 4 u + 3, two bits each, lowest first
    uint8_t b[2][64];
    inline void pack(u8x32 q, int row) {
        const i32x8 v = (i32x8)q << i32x8{0, 2, 4, 6, 0, 2, 4, 6};  // a group is 32 bits of q
        store(b[0] + 4 * row, __builtin_reduce_or(v.lo));
        store(b[1] + 4 * row, __builtin_reduce_or(v.hi));
    }
    __attribute__((always_inline)) inline void unpack(int at, vb w[8]) const {
        for (int u = 0; u < 2; u++) {
            const vb v = load<vb>(b[u] + 4 * at);
            w[4 * u] = v & 3;
            w[4 * u + 1] = shr<2>(v) & 3;
            w[4 * u + 2] = shr<4>(v) & 3;
            w[4 * u + 3] = shr<6>(v) & 3;
        }
    }
    template <int S> __attribute__((always_inline)) inline void add(int at, vb w[8]) const {
        static_assert(S == 4);
        for (int u = 0; u < 2; u++) {
            const vb v = load<vb>(b[u] + 4 * at);
            w[4 * u] |= shl<4>(v) & 48;
            w[4 * u + 1] |= shl<2>(v) & 48;
            w[4 * u + 2] |= v & 48;
            w[4 * u + 3] |= shr<2>(v) & 48;
        }
    }
};

struct Bits {  // byte: bit g is group g
    uint8_t b[64];
    inline void pack(u8x32 q, int row) {
        store(b + 4 * row, __builtin_reduce_or((i32x8)q << i32x8{0, 1, 2, 3, 4, 5, 6, 7}));
    }
    // w[g] |= bit g moved to bit S.
    template <int S, int G = 0> __attribute__((always_inline)) inline void add(int at, vb w[8]) const {
        const vb v = load<vb>(b + 4 * at);
        if constexpr (G < S)
            w[G] |= shl<S - G>(v) & (1 << S);
        else
            w[G] |= shr<G - S>(v) & (1 << S);
        if constexpr (G < 7) add<S, G + 1>(at, w);
    }
};

// The way back. A block before its bits are packed: weight j = d scale (q - kOffset) - e minimum of its sub-block.
template <int N> struct Parts {
    uint16_t d, e;  // halves
    int8_t scale[16], minimum[16];
    uint8_t q[N];
    inline u8x32 slice(int s) const { return load<u8x32>(q + 32 * s); }
};
HQ_INLINE u8x16 pack_nibbles(u8x32 q) { return (q.lo & 15) | q.hi << 4; }
// 32 bits: bit j is bit B of q[j].
template <int B> HQ_INLINE uint32_t pack_bits(u8x32 q) {
    const u8x32 one = ((q >> B) & 1) << u8x32{0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7,
                                              0, 1, 2, 3, 4, 5, 6, 7};
    uint32_t bits = 0;
    for (int i = 0; i < 4; i++) {
        const auto eight = load<vec<uint8_t, 8>>((const uint8_t*)&one + 8 * i);
        bits |= (uint32_t)__builtin_reduce_or(eight) << 8 * i;
    }
    return bits;
}
