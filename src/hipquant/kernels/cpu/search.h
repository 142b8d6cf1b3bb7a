// Scales for weights: sixteen sub-blocks at a time, one a lane, so that no sum crosses lanes but those of super-blocks.
//
// A sub-block is x = a q + m in least squares. For given quants the best a and m have a closed form, and so has what
// they explain of sum(w x^2), the *gain*. So a candidate costs one pass over the sub-block: round, and keep three sums.
// From the best of some candidates, quants and scales take turns (Lloyd's algorithm) for a few steps.
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

// Joins the lanes of each group of G by an operation; every lane has the result of its group.
template <int G, class F> HQ_INLINE f32x16 across(f32x16 v, F join) {
    if constexpr (G >= 2)
        v = join(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    if constexpr (G >= 4)
        v = join(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    if constexpr (G >= 8)
        v = join(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    if constexpr (G >= 16)
        v = join(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    return v;
}
template <int G> HQ_INLINE f32x16 sum_across(f32x16 v) {
    return across<G>(v, [](f32x16 a, f32x16 b) { return a + b; });
}
template <int G> HQ_INLINE f32x16 most_across(f32x16 v) { return across<G>(v, most); }

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

constexpr int kTurns = 2, kRounds = 2;

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

// What a sub-block is written as: quants of x = d scale q - e minimum, d and e halves; no sub-scales: of x = d q - e.
struct Scales {
    f32x16 d, e, scale, minimum;
    inline f32x16 a() const { return d * scale; }
    inline f32x16 m() const { return -e * minimum; }
};
HQ_INLINE f32x16 whole(f32x16 v, float low, float high) { return round_(v, 1, 0, low, high); }

// Groups of G sub-blocks that share d, each with a whole scale of its own.
template <class Q, int G, int N> static Scales share_scale(const Tile<N>& t, Fit f) {
    constexpr float top = Q::kScaleTop, bottom = -top - 1;
    const f32x16 highest = most_across<G>(f.a), lowest = -most_across<G>(-f.a);
    f32x16 d = as_half((highest > -lowest ? highest : lowest) / bottom), best_total = __builtin_inff();
    Scales best = {};
    for (int round = 0; round < kRounds; round++) {
        const f32x16 middle = whole(f.a * inverse(d), bottom, top);
        f32x16 scale = middle, least_error = error<Q>(t, d * middle, 0);
        for (int step = -1; step < 2; step += 2) {
            const f32x16 other = least(most(middle + step, bottom), top), e = error<Q>(t, d * other, 0);
            scale = e < least_error ? other : scale;
            least_error = least(e, least_error);
        }
        const f32x16 total = sum_across<G>(least_error);
        const auto better = total < best_total;
        best.d = better ? d : best.d;
        best.scale = better ? scale : best.scale;
        best_total = least(total, best_total);
        const Sums s = sums<Q>(t, inverse(d * scale), 0);
        d = as_half(sum_across<G>(scale * s.qx) * inverse(sum_across<G>(scale * scale * s.qq)));
        f = fit(s);
    }
    return best;
}

// The same with a minimum. `w` and `x` are sums of w and w x.
template <class Q, int G, int N> static Scales share_range(const Tile<N>& t, Fit f, f32x16 w, f32x16 x) {
    constexpr float top = Q::kScaleTop;
    f32x16 d = as_half(most_across<G>(f.a) / top), e = as_half(most_across<G>(-f.m) / top);
    f32x16 best_total = __builtin_inff();
    Scales best = {};
    for (int round = 0; round < kRounds; round++) {
        const f32x16 middle = whole(f.a * inverse(d), 0, top), mean = x * inverse(w);
        f32x16 scale = 0, minimum = 0, least_error = __builtin_inff();
        for (int i = -1; i < 2; i++) {
            const f32x16 s = least(most(middle + i, 0), top);
            // The minimum that suits this scale, for the quants of the fit.
            const f32x16 m = fma((mean - f.m) * inverse(f.a), -d * s, mean);
            const f32x16 nearest = whole(-m * inverse(e), 0, top);
            for (int j = -1; j < 2; j++) {
                const f32x16 n = least(most(nearest + j, 0), top), found = error<Q>(t, d * s, -e * n);
                const auto better = found < least_error;
                scale = better ? s : scale;
                minimum = better ? n : minimum;
                least_error = better ? found : least_error;
            }
        }
        const f32x16 total = sum_across<G>(least_error);
        const auto better = total < best_total;
        best.d = better ? d : best.d;
        best.e = better ? e : best.e;
        best.scale = better ? scale : best.scale;
        best.minimum = better ? minimum : best.minimum;
        best_total = least(total, best_total);
        // d and e by least squares for these quants, scales and minima.
        const f32x16 one = inverse(d * scale);
        const Sums s = sums<Q>(t, one, e * minimum * one);
        const f32x16 uu = sum_across<G>(scale * scale * s.qq), uv = sum_across<G>(scale * minimum * s.q);
        const f32x16 vv = sum_across<G>(minimum * minimum * w), xu = sum_across<G>(scale * s.qx);
        const f32x16 xv = sum_across<G>(minimum * x), determinant = fma(uu, vv, -uv * uv);
        const auto regular = determinant > 1e-6f * uu * vv;
        d = as_half(regular ? fma(xu, vv, -xv * uv) / determinant : xu * inverse(uu));
        e = as_half(regular ? most(fma(xu, uv, -xv * uu) / determinant, 0) : 0);
        f = fit<Q>(s, w, x);
    }
    return best;
}

// The scales of a tile.
template <class Q, int N> HQ_INLINE Scales search(const Tile<N>& t) {
    constexpr int G = Q::kBlock / N;
    if constexpr (Q::kSigned) {
        f32x16 greatest = 0;
        for (int j = 0; j < N; j++) greatest = most(magnitude(t.x[j]), greatest);
        return {as_half(greatest / Q::kTop), 0, 1, 0};
    } else if constexpr (Q::kMin) {
        f32x16 w = 0, x = 0;
        for (int j = 0; j < N; j++) {
            w += t.w[j];
            x = fma(t.w[j], t.x[j], x);
        }
        const Fit f = search_range<Q>(t, w, x);
        if constexpr (Q::kScaleTop > 0) return share_range<Q, G>(t, f, w, x);
        return {as_half(f.a), as_half(-f.m), 1, 1};
    } else {
        const Fit f = search_scale<Q>(t);
        if constexpr (Q::kScaleTop > 0) return share_scale<Q, G>(t, f);
        return {as_half(f.a), 0, 1, 0};
    }
}
