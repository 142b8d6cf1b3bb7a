// The engine's matrix product: weights packed 16 rows together times activations in q8 tiles.
//
// An accumulator register holds W rows of one column, so that no sum across lanes is ever needed; four bytes of a
// column are broadcast to all rows. Weights are unpacked once for the T columns of a tile.
#pragma once
#include "simd.h"

// 32 values of each of T columns of activations: value = d q. `s` are sums times d: of all 32, and of the last 16.
template <int T> struct Q8Tile {
    float d[T], s[2][T];
    int8_t q[T][32];
};
constexpr int kTileColumns = 16;

// Calls f(Width<T>, first column) for each tile of n columns: 16 wide, the last one by the smallest power of two.
template <int T> struct Width {
    static constexpr int value = T;
};
template <class F> HQ_INLINE void each_tile(int n, F f) {
    int at = 0;
    for (; n - at > 8; at += kTileColumns) f(Width<16>(), at);
    if (n - at > 4)
        f(Width<8>(), at);
    else if (n - at > 2)
        f(Width<4>(), at);
    else if (n - at > 1)
        f(Width<2>(), at);
    else if (n - at > 0)
        f(Width<1>(), at);
}

// One slice of one tile into Q8Tile<T>; columns beyond n are zero.
template <int T> HQ_INLINE void quantize_column(Q8Tile<T>* tile, int t, const float* x) {
    f32x8 v[4];
    f32x8 biggest = 0, sums = 0;
    for (int i = 0; i < 4; i++) {
        v[i] = load<f32x8>(x + 8 * i);
        biggest = __builtin_elementwise_max(biggest, __builtin_elementwise_abs(v[i]));
        sums += v[i];
    }
    // The maximum passes NaN over; 0 * sums brings it, or an infinity, into the scale, so that it reaches the result.
    const float d = max(biggest) / 127 + sum(sums * 0), inverse = d != 0 ? 1 / d : 0;
    i32x8 total[2] = {0, 0};
    for (int i = 0; i < 4; i++) {
        const i32x8 q = __builtin_convertvector(__builtin_elementwise_roundeven(v[i] * inverse), i32x8);
        total[i / 2] += q;
        store(tile->q[t] + 8 * i, __builtin_convertvector(q, vec<int8_t, 8>));
    }
    const int first = __builtin_reduce_add(total[0]), last = __builtin_reduce_add(total[1]);
    tile->d[t] = d;
    tile->s[0][t] = d * (float)(first + last);
    tile->s[1][t] = d * (float)last;
}

// acc[t] += the product of one slice of W rows with T columns.
template <class Q, int T>
HQ_INLINE void multiply_slice(vf acc[T], const typename Q::Packed& p, int s, int at, const Q8Tile<T>& y) {
    constexpr bool kFlip = Q::kSigned && kSignedBytes;
    constexpr int kOffset = Q::kSigned ? (kFlip ? 0 : 128) : Q::kOffset;
    vb w[8];
    vf scale[2], min[2];
    Q::weights(p, s, at, w);
    Q::scales(p, s, at, scale, min);
    if constexpr (kFlip)
        for (int g = 0; g < 8; g++) w[g] ^= 128;
    if constexpr (!Q::kMin)
        for (int g = 0; g < Q::kGroups; g++) min[g] = scale[g] * (float)-kOffset;
    if constexpr (Q::kGroups == 2) min[1] -= min[0];  // the sums of y are of all 32 and of the last 16
#pragma clang loop unroll(full)
    for (int t = 0; t < T; t++) {
        vi dot[2] = {0, 0};
#pragma clang loop unroll(full)
        for (int g = 0; g < 8; g++) {
            vi& i = dot[Q::kGroups == 2 && g >= 4];
            i = kFlip ? dot4_broadcast_signed(i, w[g], y.q[t] + 4 * g) : dot4_broadcast(i, w[g], y.q[t] + 4 * g);
        }
        vf v = to_float(dot[0]) * scale[0];
        if constexpr (Q::kGroups == 2) v = fma(to_float(dot[1]), scale[1], v);
        acc[t] = fma(v, (vf)y.d[t], acc[t]);
        if constexpr (kOffset || Q::kMin) acc[t] = fma(min[0], (vf)y.s[0][t], acc[t]);
        if constexpr (Q::kGroups == 2) acc[t] = fma(min[1], (vf)y.s[1][t], acc[t]);
    }
}

// acc[t][row] += 16 packed rows times a tile of T columns, over `nblocks` blocks of the type.
template <class Q, int T>
HQ_INLINE void multiply_tile(float acc[T][16], const typename Q::Packed* p, const Q8Tile<T>* y, int nblocks) {
    constexpr int kSlices = Q::kBlock / 32;
    for (int at = 0; at < 16; at += W) {
        vf sums[T];
        for (int t = 0; t < T; t++) sums[t] = load<vf>(acc[t] + at);
        for (int b = 0; b < nblocks; b++)
            for (int s = 0; s < kSlices; s++) {
                if (at == 0)
                    prefetch<sizeof(p[b]) / kSlices>((const char*)&p[b] + sizeof(p[b]) / kSlices * s);
                multiply_slice<Q, T>(sums, p[b], s, at, y[b * kSlices + s]);
            }
        for (int t = 0; t < T; t++) store(acc[t] + at, sums[t]);
    }
}
