// `mul_mat_vec_float_*`: rows of float weights times columns of floats. A team takes a row and up to 4 columns.
#include "rows.h"

// Weights of a type: `Value`s in memory, kWide of them in 16 bytes.
struct FloatF32 {
    typedef float Value;
    static constexpr int kWide = 4;
    HQ_MEMBER static float value(float v) { return v; }
    HQ_MEMBER static float lane(const Words<16>& w, int i) { return bits<float>(w.w[i]); }
};
struct FloatF16 {
    typedef uint16_t Value;
    static constexpr int kWide = 8;
    HQ_MEMBER static float value(uint16_t v) { return half_to_float(v); }
    HQ_MEMBER static float lane(const Words<16>& w, int i) {
        return half_to_float(w.w[i / 2] >> 16 * (i % 2) & 0xFFFF);
    }
};
struct FloatBF16 {
    typedef uint16_t Value;
    static constexpr int kWide = 8;
    HQ_MEMBER static float value(uint16_t v) { return bits<float>((uint32_t)v << 16); }
    HQ_MEMBER static float lane(const Words<16>& w, int i) {
        return bits<float>(i % 2 ? w.w[i / 2] & 0xFFFF0000 : w.w[i / 2] << 16);
    }
};

// kSteps times 16 bytes of a row from weight i on, 32 lanes' worth apart.
template <class F, int kColumns, int kSteps>
HQ_INLINE void multiply(float* sum, const typename F::Value* weights, const float* const* column, int i) {
    Words<16> w[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; s++) w[s] = field<16>(Row<16>{(const uint8_t*)(weights + i)}, s * 512);
#pragma unroll
    for (int s = 0; s < kSteps; s++)
#pragma unroll
        for (int c = 0; c < kColumns; c++)
#pragma unroll
            for (int part = 0; part < F::kWide / 4; part++) {
                const auto* from = (const uint8_t*)(column[c] + i + s * 32 * F::kWide + 4 * part);
                const Words<16> v = field<16>(Row<16>{from}, 0);
#pragma unroll
                for (int j = 0; j < 4; j++)
                    sum[c] = __builtin_fmaf(F::lane(w[s], 4 * part + j), bits<float>(v.w[j]), sum[c]);
            }
}

// One row times kColumns columns, of which `columns` are there.
template <class F, int kColumns>
HQ_INLINE void row_times_columns(const void* x, const float* y, float* dst, int ncols, int columns, int64_t row,
                                 int nrows_dst) {
    const auto* weights = (const typename F::Value*)x + row * ncols;
    const float* column[kColumns];
    float sum[kColumns];
    uint64_t addresses = (uint64_t)weights;
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
        column[c] = y + (int64_t)(c < columns ? c : columns - 1) * ncols;
        addresses |= (uint64_t)column[c];
        sum[c] = 0;
    }
    const int wide = aligned16(addresses) ? ncols / F::kWide * F::kWide : 0;
    constexpr int kStep = 32 * F::kWide;
    int i = thread_x() * F::kWide;
    for (; i + kStep < wide; i += 2 * kStep) multiply<F, kColumns, 2>(sum, weights, column, i);
    if (i < wide) multiply<F, kColumns, 1>(sum, weights, column, i);
    for (i = wide + thread_x(); i < ncols; i += 32) {
        const float w = F::value(weights[i]);
#pragma unroll
        for (int c = 0; c < kColumns; c++) sum[c] = __builtin_fmaf(w, column[c][i], sum[c]);
    }
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
        const float total = team_sum(sum[c]);
        if (thread_x() == 0 && c < columns) dst[(int64_t)c * nrows_dst + row] = total;
    }
}

template <class F>
HQ_INLINE void mul_mat_vec_float(const void* x, const float* y, float* dst, int ncols_x, int nrows_x, int ncols_y,
                                 int nrows_dst) {
    const int64_t row = (int64_t)block_x() * 4 + thread_y(), first = (int64_t)block_y() * 4;
    if (row >= nrows_x) return;
    y += first * ncols_x, dst += first * nrows_dst;
    const int columns = ncols_y - (int)first;
    if (columns == 1) row_times_columns<F, 1>(x, y, dst, ncols_x, 1, row, nrows_dst);
    else row_times_columns<F, 4>(x, y, dst, ncols_x, columns < 4 ? columns : 4, row, nrows_dst);
}

#define HQ_MUL_MAT_VEC_FLOAT(suffix, F)                                                                                \
    HQ_KERNEL(128)                                                                                                     \
    mul_mat_vec_float_##suffix(const void* x, const float* y, float* dst, int ncols_x, int nrows_x, int ncols_y,       \
                               int nrows_dst) {                                                                        \
        mul_mat_vec_float<F>(x, y, dst, ncols_x, nrows_x, ncols_y, nrows_dst);                                         \
    }
HQ_MUL_MAT_VEC_FLOAT(f32, FloatF32)
HQ_MUL_MAT_VEC_FLOAT(f16, FloatF16)
HQ_MUL_MAT_VEC_FLOAT(bf16, FloatBF16)
#undef HQ_MUL_MAT_VEC_FLOAT
