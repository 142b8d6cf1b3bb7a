// Plain kernels under names of the table, right as they stand: test_simulated.py breaks them, one line at a time.
#include "device.h"

constexpr int kRows = 2, kColumns = 3, kTileRows = 128, kTileColumns = 64;

HQ_INLINE float scale(const uint8_t* p) { return half_to_float(p[0] | (uint32_t)p[1] << 8); }

// Blocks lane, lane + lanes, ... of a row of Q4_0 times a column of q8_1.
HQ_INLINE float dot(const uint8_t* row, const uint8_t* column, int blocks, int lane, int lanes) {
    float sum = 0;
    for (int b = lane; b < blocks; b += lanes) {
        const uint8_t *w = row + 18 * b, *y = column + 36 * b;
        int products = 0;
        for (int i = 0; i < 16; i++)
            products += ((w[2 + i] & 15) - 8) * (int8_t)y[4 + i] + ((w[2 + i] >> 4) - 8) * (int8_t)y[20 + i];
        sum += scale(w) * scale(y) * (float)products;
    }
    return sum;
}

HQ_KERNEL(128)
mul_mat_vec_q4_0_q8_1_hip3(const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int nrows_y,
                           int nrows_dst) {
    HQ_SHARED float partial[4][kRows * kColumns];
    const int first = (int)block_x() * kRows, lane = thread_y() * 32 + thread_x();
    for (int i = 0; i < kRows * kColumns; i++) {
        const int row = first + i % kRows, read = row < nrows_x ? row : nrows_x - 1;
        const uint8_t* weights = (const uint8_t*)x + read * (ncols_x / 32 * 18);
        const uint8_t* column = (const uint8_t*)y + i / kRows * (nrows_y / 32 * 36);
        float sum = dot(weights, column, ncols_x / 32, lane, 128);
        sum = team_sum(sum);
        if (thread_x() == 0) partial[thread_y()][i] = sum;
    }
    barrier();
    const int row = first + lane % kRows;
    if (lane >= kRows * kColumns) return;
    const float sum = partial[0][lane] + partial[1][lane] + partial[2][lane] + partial[3][lane];
    if (row < nrows_x) dst[lane / kRows * nrows_dst + row] = sum;
}

HQ_KERNEL(128)
mul_mat_q4_0(const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int ncols_y, int nrows_y,
             int nrows_dst) {
    for (int i = thread_y() * 32 + thread_x(); i < kTileRows * kTileColumns; i += 128) {
        const int row = (int)block_x() * kTileRows + i % kTileRows;
        const int column = (int)block_y() * kTileColumns + i / kTileRows;
        if (row >= nrows_x || column >= ncols_y) continue;
        const uint8_t* weights = (const uint8_t*)x + row * (ncols_x / 32 * 18);
        const uint8_t* activations = (const uint8_t*)y + column * (nrows_y / 32 * 36);
        dst[column * nrows_dst + row] = dot(weights, activations, ncols_x / 32, 0, 1);
    }
}

HQ_KERNEL(32) dequantize_mul_mat_vec_q4_0_hip(const void* x, const float* y, float* dst, int ncols, int nrows) {
    const uint8_t* row = (const uint8_t*)x + block_x() * (ncols / 32 * 18);
    float sum = 0;
    for (int i = thread_x(); i < ncols; i += 32) {
        const uint8_t* w = row + i / 32 * 18;
        sum += scale(w) * (float)((w[2 + i % 16] >> (i % 32 < 16 ? 0 : 4) & 15) - 8) * y[i];
    }
    sum = team_sum(sum);
    if (thread_x() == 0) dst[block_x()] = sum;
}

// Not in the table: the conversions of the simulator.
HQ_KERNEL(32) convert(const uint16_t* halves, const float* floats, float* to_floats, uint16_t* to_halves, int n) {
    for (int i = thread_x(); i < n; i += 32) {
        to_floats[i] = half_to_float(halves[i]);
        to_halves[i] = float_to_half(floats[i]);
    }
}

// Rows of a (16 x k) and of b (8 x k) as whole words, to c (16 x 8), in the lanes that device.h names.
HQ_KERNEL(32) matrix_units(const uint32_t* a, const uint32_t* b, int* c, int k) {
    const int l = thread_x(), words = k / 4;
    uint32_t x[4], y[2];
    for (int part = 0; part < k / 16; part++) {
        for (int h = 0; h < 2; h++) x[2 * part + h] = a[(l / 4 + 8 * h) * words + 4 * part + l % 4];
        y[part] = b[l / 4 * words + 4 * part + l % 4];
    }
    int sum[4] = {100, 100, 100, 100};
    if (k == 16) mma_k16(sum, x, y[0]);
    else mma_k32(sum, x, y);
    for (int i = 0; i < 4; i++) c[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = sum[i];
}
