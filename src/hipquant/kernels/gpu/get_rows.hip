// `get_rows_*`: rows of a matrix of any type by id, as floats. A block of the grid takes a part of a row.
#include "dequantize.h"

struct F32 {
    HQ_INLINE float value(const uint8_t* row, int64_t i) { return bits<float>(load4(row + 4 * i)); }
};
struct F16 {
    HQ_INLINE float value(const uint8_t* row, int64_t i) { return half_to_float(((const uint16_t*)row)[i]); }
};
struct BF16 {
    HQ_INLINE float value(const uint8_t* row, int64_t i) {
        return bits<float>((uint32_t)((const uint16_t*)row)[i] << 16);
    }
};

constexpr int64_t kMaxGridY = 65535;

// Elements from one turn of this block to its next: the grid's y is capped.
HQ_INLINE int64_t step(int64_t k, int elements) {
    const int64_t parts = (k + elements - 1) / elements;
    return (parts < kMaxGridY ? parts : kMaxGridY) * elements;
}

template <class F>
HQ_INLINE void get_rows_floats(const void* x, const uint32_t* ids, float* dst, int64_t k, uint64_t row_bytes) {
    const uint8_t* row = (const uint8_t*)x + ids[block_x()] * row_bytes;
    dst += block_x() * k;
    for (int64_t i = (int64_t)block_y() * 256 + thread_x(); i < k; i += step(k, 256)) dst[i] = F::value(row, i);
}

template <class Q, int kThreads>
HQ_INLINE void get_rows_blocks(const void* x, const uint32_t* ids, float* dst, int64_t k, uint64_t row_bytes) {
    constexpr int kElements = Q::kBlock == 32 ? 512 : 256;
    const auto* row = (const typename Q::Block*)((const uint8_t*)x + ids[block_x()] * row_bytes);
    dst += block_x() * k;
    for (int64_t first = (int64_t)block_y() * kElements; first < k; first += step(k, kElements))
        for (int i = 4 * thread_x(); i < kElements && first + i < k; i += 4 * kThreads) {
            float v[4];
            weights<Q>(v, row + (first + i) / Q::kBlock, i % Q::kBlock);
            Words<16> w;
            for (int j = 0; j < 4; j++) w.w[j] = bits<uint32_t>(v[j]);
            store<4>(dst + first + i, w);
        }
}

#define HQ_ARGUMENTS const void *x, const uint32_t *ids, float *dst, int64_t k, uint64_t row_bytes
#define HQ_GET_ROWS_OF_BLOCKS(suffix, Q, threads)                                                                      \
    HQ_KERNEL(threads) get_rows_##suffix(HQ_ARGUMENTS) { get_rows_blocks<Q, threads>(x, ids, dst, k, row_bytes); }
#define HQ_GET_ROWS_OF_FLOATS(suffix, F, threads)                                                                      \
    HQ_KERNEL(threads) get_rows_##suffix(HQ_ARGUMENTS) { get_rows_floats<F>(x, ids, dst, k, row_bytes); }
HQ_GET_ROWS_WEIGHTS(HQ_GET_ROWS_OF_BLOCKS)
HQ_GET_ROWS_FLOATS(HQ_GET_ROWS_OF_FLOATS)
