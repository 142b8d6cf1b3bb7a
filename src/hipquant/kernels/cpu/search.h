// The scales that a block of weights is written with: those of its sub-blocks (least_squares.h), in the halves and
// whole numbers that the block has for them.
#pragma once
#include "least_squares.h"

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

// What a sub-block is written as: quants of x = d scale q - e minimum, d and e halves; no sub-scales: of x = d q - e.
struct Scales {
    f32x16 d, e, scale, minimum;
};
HQ_INLINE f32x16 whole(f32x16 v, float low, float high) { return round_(v, 1, 0, low, high); }

constexpr int kRounds = 2;  // four lower the error by 0.1 %

// Groups of G sub-blocks that share d, each with a whole scale of its own: the nearest or one of its neighbours, by the
// error; then d again by least squares, and so on. A d that is infinite as a half stays so: the caller refuses it.
template <class Q, int G, int N> static Scales share_scale(const Tile<N>& t, Fit f) {
    constexpr float top = Q::kScaleTop, bottom = -top - 1;
    const f32x16 highest = most_across<G>(f.a), lowest = -most_across<G>(-f.a);
    const f32x16 first = as_half((highest > -lowest ? highest : lowest) / bottom);
    f32x16 d = first, best_total = __builtin_inff();
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
    best.d = magnitude(first) < __builtin_inff() ? best.d : first;
    return best;
}

// The same with minima, which share e. `w` and `x` are sums of w and w x.
template <class Q, int G, int N> static Scales share_range(const Tile<N>& t, Fit f, f32x16 w, f32x16 x) {
    constexpr float top = Q::kScaleTop;
    const f32x16 first_d = as_half(most_across<G>(f.a) / top), first_e = as_half(most_across<G>(-f.m) / top);
    f32x16 d = first_d, e = first_e, best_total = __builtin_inff();
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
    best.d = first_d < __builtin_inff() ? best.d : first_d;
    best.e = first_e < __builtin_inff() ? best.e : first_e;
    return best;
}

// The scales of a tile.
template <class Q, int N> HQ_INLINE Scales search(const Tile<N>& t) {
    constexpr int G = Q::kBlock / N;
    if constexpr (Q::kSigned) {
        f32x16 greatest = 0;  // 8 bits: nothing is gained by a search
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
