// The scale of a sub-block of weights, x = a q + m in least squares: sixteen sub-blocks at a time, one a lane.
//
// For given quants q the best a and m have a closed form, and so has what they explain of sum(w x^2), the *gain*. So a
// candidate costs one pass over the sub-block: round, and keep three sums. From the best candidate on, quants and
// scales take turns (Lloyd's algorithm).
//
// A type's header says: kSub, weights of a sub-block; kTop, the greatest quant; kScaleTop, the greatest whole scale of a
// sub-block, 0 where blocks have one scale; kCandidates, of which number i is kStep (i - kBefore) of the range away from
// the one that just holds every value.
#pragma once
#include "slice.h"
#pragma clang diagnostic ignored "-Wpsabi"  // vectors wider than registers, passed within this object only

constexpr int kLanes = 16;
using f32x16 = vec<float, kLanes>;
using i32x16 = vec<int32_t, kLanes>;

// Value j of sub-block i is x[j][i]; an error there weighs w[j][i].
template <int N> struct Tile {
    f32x16 x[N], w[N];
};

// The quants that a sub-block may have, from zero.
template <class Q> constexpr float kLow = Q::kSigned ? -Q::kTop : -Q::kOffset;
template <class Q> constexpr float kHigh = Q::kTop - Q::kOffset;

// Added and taken away again, it rounds to an integer.
constexpr float kRounder = 12582912;  // 1.5 * 2^23
HQ_INLINE f32x16 least(f32x16 a, f32x16 b) { return a < b ? a : b; }
HQ_INLINE f32x16 most(f32x16 a, f32x16 b) { return a > b ? a : b; }
HQ_INLINE f32x16 magnitude(f32x16 v) { return __builtin_elementwise_abs(v); }
// round(x scale + shift), within [low, high].
HQ_INLINE f32x16 round_(f32x16 x, f32x16 scale, f32x16 shift, float low, float high) {
    return least(most(fma(x, scale, shift) + kRounder - kRounder, low), high);
}
HQ_INLINE f32x16 inverse(f32x16 v) { return v != 0 ? 1 / v : 0; }
// What a half holds of it.
HQ_INLINE f32x16 as_half(f32x16 v) {
    return __builtin_convertvector((__builtin_convertvector(v, vec<half_t, kLanes>)), f32x16);
}

// The sums that least squares needs for quants q: of w q, w q^2 and w q x.
struct Sums {
    f32x16 q, qq, qx;
};
template <class Q, int N> HQ_INLINE Sums sums(const Tile<N>& t, f32x16 scale, f32x16 shift) {
    Sums s = {};
    for (int j = 0; j < N; j++) {
        const f32x16 q = round_(t.x[j], scale, shift, kLow<Q>, kHigh<Q>), wq = t.w[j] * q;
        if constexpr (Q::kMin) s.q += wq;
        s.qq = fma(wq, q, s.qq);
        s.qx = fma(wq, t.x[j], s.qx);
    }
    return s;
}

// The error of x = a q + m, quants rounded for it.
template <class Q, int N> HQ_INLINE f32x16 error(const Tile<N>& t, f32x16 a, f32x16 m) {
    const f32x16 scale = inverse(a), shift = -m * scale;
    f32x16 sum = 0;
    for (int j = 0; j < N; j++) {
        const f32x16 e = fma(round_(t.x[j], scale, shift, kLow<Q>, kHigh<Q>), a, m - t.x[j]);
        sum = fma(t.w[j] * e, e, sum);
    }
    return sum;
}

// A fit of each lane: x = a q + m.
struct Fit {
    f32x16 a, m, gain;
};

// x = a q.
HQ_INLINE Fit fit(const Sums& s) {
    const f32x16 a = s.qx * inverse(s.qq);
    return {a, 0, a * s.qx};
}
// x = a q + m with m <= 0, or of any sign where a block has an m of its own. `w` and `x` are sums of w and w x.
template <class Q> HQ_INLINE Fit fit(const Sums& s, f32x16 w, f32x16 x) {
    const f32x16 determinant = fma(w, s.qq, -s.q * s.q);
    const f32x16 a = determinant > 0 ? fma(w, s.qx, -x * s.q) / determinant : 0;
    const f32x16 m = fma(-a, s.q, x) * inverse(w);
    Fit both = {a, m, fma(a, s.qx, m * x)};
    if constexpr (Q::kScaleTop > 0) {
        const Fit one = fit(s);
        const auto above = m > 0;
        both.a = above ? one.a : both.a;
        both.m = above ? 0 : both.m;
        both.gain = above ? one.gain : both.gain;
    }
    return both;
}
HQ_INLINE void keep_better(Fit& best, const Fit& f) {
    const auto better = f.gain > best.gain;
    best.a = better ? f.a : best.a;
    best.m = better ? f.m : best.m;
    best.gain = better ? f.gain : best.gain;
}

constexpr int kTurns = 2;  // four lower the error by less than 0.01 %

// Types without a minimum. The greatest value goes to either end of the quants, and beyond it.
template <class Q, int N> static Fit search_scale(const Tile<N>& t) {
    f32x16 peak = 0, greatest = 0;
    for (int j = 0; j < N; j++) {
        const f32x16 size = magnitude(t.x[j]);
        peak = size > greatest ? t.x[j] : peak;
        greatest = most(size, greatest);
    }
    const f32x16 unit = inverse(peak);
    Fit best = {};
    for (int i = 0; i < Q::kCandidates; i++)
        for (int end = 0; end < 2; end++) {
            const float from = end ? kHigh<Q> : kLow<Q>;
            const f32x16 scale = unit * (from * (1 + Q::kStep * (i - Q::kBefore)));
            keep_better(best, fit(sums<Q>(t, scale, 0)));
        }
    for (int i = 0; i < kTurns; i++) keep_better(best, fit(sums<Q>(t, inverse(best.a), 0)));
    return best;
}

// Types with a minimum. Quants begin and end within the range of the values, by as much as the candidate says.
template <class Q, int N> static Fit search_range(const Tile<N>& t, f32x16 w, f32x16 x) {
    f32x16 low = t.x[0], high = low;
    for (int j = 1; j < N; j++) {
        low = least(low, t.x[j]);
        high = most(high, t.x[j]);
    }
    if (Q::kScaleTop > 0) low = least(low, 0);
    const f32x16 range = high - low;
    Fit best = {0, least(x * inverse(w), Q::kScaleTop > 0 ? 0 : 3.4e38f), 0};
    best.gain = best.m * x;
    for (int i = 0; i < Q::kCandidates; i++)
        for (int j = 0; j < Q::kCandidates; j++) {
            const float before = Q::kStep * (i - Q::kBefore), after = Q::kStep * (j - Q::kBefore);
            const f32x16 scale = Q::kTop * inverse(range * (1 - before - after));
            keep_better(best, fit<Q>(sums<Q>(t, scale, -(low + range * before) * scale), w, x));
        }
    for (int i = 0; i < kTurns; i++) {
        const f32x16 scale = inverse(best.a);
        keep_better(best, fit<Q>(sums<Q>(t, scale, -best.m * scale), w, x));
    }
    return best;
}
