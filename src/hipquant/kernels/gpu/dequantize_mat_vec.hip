// `dequantize_mul_mat_vec_*`: weights times one column of floats, in floats throughout. A team takes a row.
#include "types.h"

template <class Q>
HQ_INLINE void dequantize_mul_mat_vec(const void* x, const float* y, float* dst, int ncols, int nrows) {
    const int row = (int)block_x();
    const uint32_t row_bytes = (uint32_t)ncols / Q::kBlock * sizeof(typename Q::Block);
    const Row<2> weights{(const uint8_t*)x + (uint64_t)row * row_bytes};
    float acc = 0;
    const uint32_t u = thread_x() % Q::kUnits;
    for (uint32_t block = thread_x() / Q::kUnits; block < (uint32_t)ncols / Q::kBlock; block += 32 / Q::kUnits) {
        const typename Q::Unit w = Q::load(weights, block, u);
        float sum = 0, low = 0;
#pragma unroll
        for (int s = 0; s < strips<Q>(); s++) {
            const float* column = y + block * Q::kBlock + Q::position(u) + Q::kStep * s;
            float products = 0, total = 0;
#pragma unroll
            for (int i = 0; i < Q::kStrip / 4; i++) {
                const Words<16> v = load_words<16>(column + 4 * i);
                const uint32_t q = Q::word(w, s, i);
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    products = __builtin_fmaf((float)byte_of(q, j), bits<float>(v.w[j]), products);
                    if constexpr (Q::kMin) total += bits<float>(v.w[j]);
                }
            }
            if constexpr (Q::kSub) products *= Q::sub_scale(w, s);
            if constexpr (Q::kSub && Q::kMin) total *= Q::sub_minimum(w, s);
            sum += products, low += total;
        }
        acc = __builtin_fmaf(Q::d(w), sum, acc);
        if constexpr (Q::kMin) acc = __builtin_fmaf(-Q::dmin(w) * Q::kFactor, low, acc);
    }
    acc = team_sum(acc);
    if (thread_x() == 0 && row < nrows) dst[row] = acc * (1.0f / Q::kFactor);
}

#define HQ_ENTRY(name, Q)                                                                                              \
    HQ_KERNEL(32) name(const void* x, const float* y, float* dst, int ncols, int nrows) {                              \
        dequantize_mul_mat_vec<Q>(x, y, dst, ncols, nrows);                                                            \
    }
HQ_DEQUANTIZE_MAT_VEC(HQ_ENTRY)
#undef HQ_ENTRY
