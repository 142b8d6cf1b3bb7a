// How a lane of a mat-vec takes weights, in planes or as floats, and multiplies them with activations.
#pragma once
#include "rows.h"

// A lane's unit of a row times its unit of a column.
template <class Q> struct QuantizedWeights {
    using P = typename Q::Planes;
    using Unit = typename P::Unit;
    using Column = ActivationUnit;

    HQ_INLINE uint32_t count(uint32_t units) { return units; }
    HQ_INLINE Unit load(const PlaneRow& row, uint32_t u) { return P::load(row, u); }
    HQ_INLINE Column load_column(const void* y, int n_padded, int column, uint32_t u) {
        return load_activations(
            (const uint8_t*)y + column * column_bytes(n_padded), (uint32_t)n_padded / kUnitWeights, u);
    }
    // 2^place times the sum of weights 16g to 16g + 15 times their activations.
    HQ_INLINE int dot16(const Unit& w, const Column& y, int g) {
        int sum = (P::centre(g) - P::kOffset) * (1 << P::place(g)) * y.sum16(g);
#pragma unroll
        for (int i = 0; i < 4; i++) sum = dot4(P::placed(w, 4 * g + i), y.q[g].w[i], sum);
        return sum;
    }
    HQ_INLINE float add(const Unit& w, const Column& y, float acc) {
        float sum = 0, low = 0;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int a = 2 * h, b = a + 1, top = P::place(a) > P::place(b) ? P::place(a) : P::place(b);
            const float d = y.d(h) * (1.0f / (1 << top));
            int first = dot16(w, y, a), second = dot16(w, y, b);
            if constexpr (P::kSub == 16) first *= P::sub_scale(w, a), second *= P::sub_scale(w, b);
            int product = first * (1 << (top - P::place(a))) + second * (1 << (top - P::place(b)));
            if constexpr (P::kSub == 32) product *= P::sub_scale(w, h);
            if constexpr (P::kSub == 0) {
                acc = __builtin_fmaf((float)product, P::d(w, h) * d, acc);
                if constexpr (P::kMin) acc = __builtin_fmaf(y.sum32(h), -P::minimum(w, h), acc);
                continue;
            }
            sum = __builtin_fmaf((float)product, d, sum);
            if constexpr (P::kMin && P::kSub == 16)
                low = __builtin_fmaf((float)dot2(y.sums(h), P::sub_minimums(w), h, 0), y.d(h), low);
            if constexpr (P::kMin && P::kSub == 32) low = __builtin_fmaf((float)P::sub_minimum(w, h), y.sum32(h), low);
        }
        if constexpr (P::kSub) acc = __builtin_fmaf(P::d(w), sum, acc);
        if constexpr (P::kSub && P::kMin) acc = __builtin_fmaf(-P::dmin(w), low, acc);
        return acc;
    }
};

// Rows of floats, halves or bfloat16, filled up with zeros to units, and columns of floats: 8 of them at a time.
template <class F> struct FloatWeights {
    static constexpr int kWords = 8 / F::kInWord;
    struct Unit {
        Words<16> w[kWords / 4];
    };
    struct Column {
        Words<16> v[2];
    };
    HQ_INLINE uint32_t count(uint32_t units) { return 8 * units; }
    HQ_INLINE Unit load(const PlaneRow& row, uint32_t u) {
        const uint64_t begin = (uint64_t)row.first * row.units * 8;
        const uint8_t* from = row.x + (begin + (row.row * row.units * 8 + u)) * (4 * kWords);
        Unit r;
#pragma unroll
        for (int i = 0; i < kWords / 4; i++) r.w[i] = load_stream<16>(from + 16 * i);
        return r;
    }
    HQ_INLINE Column load_column(const void* y, int n_padded, int column, uint32_t u) {
        const float* from = (const float*)y + (int64_t)column * n_padded + 8 * u;
        return {load_vector<16>(from), load_vector<16>(from + 4)};
    }
    HQ_INLINE float add(const Unit& w, const Column& y, float acc) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t word = w.w[i / F::kInWord / 4].w[i / F::kInWord % 4];
            acc = __builtin_fmaf(F::value(word, i % F::kInWord), bits<float>(y.v[i / 4].w[i % 4]), acc);
        }
        return acc;
    }
};
struct WordsF32 {
    struct IsFloat {};
    static constexpr int kInWord = 1;
    HQ_INLINE float value(uint32_t w, int) { return bits<float>(w); }
};
struct WordsF16 {
    struct IsFloat {};
    static constexpr int kInWord = 2;
    HQ_INLINE float value(uint32_t w, int i) { return half_to_float(w >> 16 * i & 0xFFFF); }
};
struct WordsBF16 {
    struct IsFloat {};
    static constexpr int kInWord = 2;
    HQ_INLINE float value(uint32_t w, int i) { return bits<float>(i ? w & 0xFFFF0000 : w << 16); }
};
