// Products of raw GGUF blocks with one column: `mul_mat_vec_*_hip1` of q8_1, `dequantize_mul_mat_vec_*` of floats; and
// `mul_mat_float_*` of float weights with float columns, `mul_mat_experts_*` of those of experts. More columns of q8_1:
// mat_mat.cpp.
#include "experts.h"
#include "launch.h"
#include "q8_1.h"
#include "types.h"

template <class Q> HQ_INLINE float row_times_q8_1(const typename Q::Block* row, const q8_1* y, int nblocks) {
    constexpr int kSlices = Q::kBlock / 32;
    const u8x32 ones = 1;
    f32x8 acc = 0;
    for (int b = 0; b < nblocks; b++) {
        prefetch<sizeof(row[b])>(&row[b]);
        for (int s = 0; s < kSlices; s++) {
            const Slice w = Q::slice(row[b], s);
            const q8_1& block = y[b * kSlices + s];
            const i8x32 q = load<i8x32>(block.qs);
            i32x8 dot;
            if constexpr (Q::kSigned)
                dot = dot4(i32x8(0), (i8x32)w.q, q);
            else
                dot = dot4(i32x8(0), w.q, q);
            if constexpr (Q::kOffset) dot -= dot4(i32x8(0), ones, q) * Q::kOffset;
            f32x8 v = to_float(dot) * w.scale;
            if constexpr (Q::kMin) v = fma(to_float(dot4(i32x8(0), ones, q)), w.min, v);
            acc = fma(v, f32x8(half_to_float(block.d)), acc);
        }
    }
    return sum(acc);
}

template <class Q> static void mul_mat_vec(const hq_launch* launch, void** params) {
    const auto* x = arg<const typename Q::Block*>(params, 0);
    const auto* y = arg<const q8_1*>(params, 1);
    auto* dst = arg<float*>(params, 2);
    const int nblocks = arg<int>(params, 3) / Q::kBlock;
    const uint64_t nrows = arg<int>(params, 4);
    for (uint64_t row = launch->begin; row < launch->end && row < nrows; row++)
        dst[row] = row_times_q8_1<Q>(x + row * nblocks, y, nblocks);
}

template <class Q> static void dequantize_mul_mat_vec(const hq_launch* launch, void** params) {
    const auto* x = arg<const typename Q::Block*>(params, 0);
    const auto* y = arg<const float*>(params, 1);
    auto* dst = arg<float*>(params, 2);
    const int nblocks = arg<int>(params, 3) / Q::kBlock;
    const uint64_t nrows = arg<int>(params, 4);
    for (uint64_t row = launch->begin; row < launch->end && row < nrows; row++) {
        f32x8 acc[2] = {};
        for (int b = 0; b < nblocks; b++)
            for (int s = 0; s < Q::kBlock / 32; s++) {
                f32x8 v[4];
                slice_to_floats<Q>(v, Q::slice(x[row * nblocks + b], s));
                for (int i = 0; i < 4; i++)
                    acc[i % 2] = fma(v[i], load<f32x8>(y + b * Q::kBlock + 32 * s + 8 * i), acc[i % 2]);
            }
        dst[row] = sum(acc[0] + acc[1]);
    }
}

#define HQ_MAT_VEC(suffix, Q) \
    HQ_ENTRY(mul_mat_vec_##suffix##_q8_1_hip1) { mul_mat_vec<Q>(launch, params); }
HQ_WEIGHT_TYPES(HQ_MAT_VEC)

#define HQ_DEQUANTIZE_MAT_VEC(name, Q) \
    HQ_ENTRY(name) { dequantize_mul_mat_vec<Q>(launch, params); }
HQ_DEQUANTIZE_MAT_VEC_NAMES(HQ_DEQUANTIZE_MAT_VEC)

// Float weights: W at a time, a block of the grid is 16 rows; up to 4 columns share a load of the weights.
template <class F, int B> HQ_INLINE void row_times_floats(float* dst, int64_t nrows_dst, const char* row, const float* y, int k) {
    vf acc[B] = {};
    float sums[B] = {};
    int i = 0;
    for (; i + W <= k; i += W) {
        const vf w = F::load_vector(row + i * F::kBytes);
        for (int c = 0; c < B; c++) acc[c] = fma(w, load<vf>(y + (int64_t)c * k + i), acc[c]);
    }
    for (; i < k; i++)
        for (int c = 0; c < B; c++) sums[c] += F::load_one(row + i * F::kBytes) * y[(int64_t)c * k + i];
    for (int c = 0; c < B; c++) dst[c * nrows_dst] = sums[c] + sum(acc[c]);
}

template <class F> static void mul_mat_float(const hq_launch* launch, void** params) {
    const auto* x = arg<const char*>(params, 0);
    const auto* y = arg<const float*>(params, 1);
    auto* dst = arg<float*>(params, 2);
    const int64_t k = arg<int>(params, 3), nrows = arg<int>(params, 4), ncols = arg<int>(params, 5), nrows_dst = arg<int>(params, 6);
    const int64_t last = (int64_t)launch->end * 16 < nrows ? (int64_t)launch->end * 16 : nrows;
    for (int64_t c = 0; c < ncols; c += c + 4 <= ncols ? 4 : 1)
        for (int64_t row = launch->begin * 16; row < last; row++) {
            const char* w = x + row * k * F::kBytes;
            if (c + 4 <= ncols)
                row_times_floats<F, 4>(dst + c * nrows_dst + row, nrows_dst, w, y + c * k, (int)k);
            else
                row_times_floats<F, 1>(dst + c * nrows_dst + row, nrows_dst, w, y + c * k, (int)k);
        }
}

// Block (16 rows, group): dst[column][nrows] of columns that are rows `rows[column]` of y; their own, where it is null.
template <class F> static void mul_mat_experts_float(const hq_launch* launch, void** params) {
    const auto* x = arg<const char*>(params, 0);
    const auto* y = arg<const float*>(params, 1);
    const auto* rows = arg<const int*>(params, 2);
    const auto* groups = arg<const ExpertGroup*>(params, 3);
    auto* dst = arg<float*>(params, 4);
    const int k = arg<int>(params, 5), nrows = arg<int>(params, 6);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const auto group = groups[block / launch->grid[0]];
        const int first = 16 * (int)(block % launch->grid[0]), last = first + 16 < nrows ? first + 16 : nrows;
        for (int row = first; row < last; row++) {
            const char* w = x + ((int64_t)group.expert * nrows + row) * k * F::kBytes;
            for (int64_t c = group.first; c < group.first + group.count; c++)
                row_times_floats<F, 1>(dst + c * nrows + row, nrows, w, y + (rows ? rows[c] : c) * k, k);
        }
    }
}

#define HQ_MAT_FLOAT(suffix, F)                                             \
    HQ_ENTRY(mul_mat_float_##suffix) { mul_mat_float<F>(launch, params); } \
    HQ_ENTRY(mul_mat_experts_##suffix) { mul_mat_experts_float<F>(launch, params); }
HQ_FLOAT_TYPES(HQ_MAT_FLOAT)
