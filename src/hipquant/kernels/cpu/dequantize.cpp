// `quantize_q8_1`, `dequantize_block_*` and `get_rows_*`: between blocks and floats, on the table's own geometry.
#include "launch.h"
#include "q8_1.h"
#include "types.h"

// Block (part of 256 values, row): a row of kx floats to kx_padded / 32 blocks of q8_1, zero beyond kx.
HQ_ENTRY(quantize_q8_1) {
    const auto* x = arg<const float*>(params, 0);
    auto* y = arg<q8_1*>(params, 1);
    const int64_t kx = arg<int>(params, 2), padded = arg<int>(params, 3);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const int64_t row = block / launch->grid[0], at = 256 * (int64_t)(block % launch->grid[0]);
        for (int64_t i = at; i < at + 256 && i < padded; i += 32) {
            float v[32], biggest = 0, total = 0;
            for (int j = 0; j < 32; j++) {
                v[j] = i + j < kx ? x[row * kx + i + j] : 0;
                biggest = __builtin_fmaxf(biggest, __builtin_fabsf(v[j]));
                total += v[j];
            }
            q8_1& out = y[(row * padded + i) / 32];
            const float d = biggest / 127;
            for (int j = 0; j < 32; j++) out.qs[j] = d == 0 ? 0 : (int8_t)__builtin_roundf(v[j] / d);
            out.d = float_to_half(d);
            out.s = float_to_half(total);
        }
    }
}

HQ_INLINE void put(float* y, f32x8 v) { store(y, v); }
HQ_INLINE void put(uint16_t* y, f32x8 v) { store(y, __builtin_convertvector(v, vec<half_t, 8>)); }

template <class Q, class T> static void dequantize(const hq_launch* launch, void** params, int per_block, int64_t count) {
    const auto* x = arg<const typename Q::Block*>(params, 0);
    auto* y = arg<T*>(params, 1);
    const int64_t begin = launch->begin * per_block, end = launch->end * per_block;
    for (int64_t i = begin; i < end && i < count; i += 32) {
        f32x8 v[4];
        slice_to_floats<Q>(v, Q::slice(x[i / Q::kBlock], (int)(i % Q::kBlock / 32)));
        for (int j = 0; j < 4; j++) put(y + i + 8 * j, v[j]);
    }
}

// How the kernel learns where the elements end: quants.py, DequantizeArgs.
#define HQ_COUNT_NB32 (int64_t)arg<int>(params, 2) * 32
#define HQ_COUNT_K arg<int>(params, 2)
#define HQ_COUNT_GRID INT64_MAX
#define HQ_DEQUANTIZE(suffix, Q, elements, count)                                                                     \
    HQ_ENTRY(dequantize_block_##suffix##_f32) { dequantize<Q, float>(launch, params, elements, HQ_COUNT_##count); }   \
    HQ_ENTRY(dequantize_block_##suffix##_f16) { dequantize<Q, uint16_t>(launch, params, elements, HQ_COUNT_##count); }
HQ_DEQUANTIZE_TYPES(HQ_DEQUANTIZE)

// Block (id, part of the row): parts repeat with the height of the grid where a row has more of them.
template <class F> HQ_INLINE void each_part(const hq_launch* launch, void** params, int per_block, F f) {
    const auto* x = arg<const char*>(params, 0);
    const auto* ids = arg<const uint32_t*>(params, 1);
    auto* dst = arg<float*>(params, 2);
    const auto k = arg<int64_t>(params, 3);
    const auto row_bytes = arg<size_t>(params, 4);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const uint64_t n = block % launch->grid[0];
        for (int64_t part = block / launch->grid[0]; part * per_block < k; part += launch->grid[1]) {
            const int64_t last = (part + 1) * per_block < k ? (part + 1) * per_block : k;
            f(x + ids[n] * row_bytes, dst + n * k, part * per_block, last);
        }
    }
}

template <class Q> static void get_rows(const hq_launch* launch, void** params) {
    each_part(launch, params, Q::kBlock == 256 ? 256 : 512, [](const char* row, float* y, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i += 32) {
            f32x8 v[4];
            slice_to_floats<Q>(v, Q::slice(((const typename Q::Block*)row)[i / Q::kBlock], (int)(i % Q::kBlock / 32)));
            for (int j = 0; j < 4; j++) store(y + i + 8 * j, v[j]);
        }
    });
}
template <class F> static void get_rows_float(const hq_launch* launch, void** params) {
    each_part(launch, params, 256, [](const char* row, float* y, int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i++) y[i] = F::load_one(row + i * F::kBytes);
    });
}

#define HQ_GET_ROWS(suffix, Q) \
    HQ_ENTRY(get_rows_##suffix) { get_rows<Q>(launch, params); }
HQ_WEIGHT_TYPES(HQ_GET_ROWS)
#define HQ_GET_ROWS_FLOAT(suffix, F) \
    HQ_ENTRY(get_rows_##suffix) { get_rows_float<F>(launch, params); }
HQ_FLOAT_TYPES(HQ_GET_ROWS_FLOAT)
