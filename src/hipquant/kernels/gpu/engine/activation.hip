// `silu_mul_q8_1`: the gated activation as floats and as q8_1; `add_bias_rows_f32`. A thread takes a value.
#include "rows.h"

HQ_KERNEL(256) silu_mul_q8_1(const float* gate_up, float* y, void* q, int n, int n_padded) {
    const int i = (int)block_x() * 256 + thread_x();
    const uint64_t row = block_y();
    float v = 0;
    if (i < n) {
        const float gate = gate_up[row * 2 * n + i], up = gate_up[row * 2 * n + n + i];
        v = gate / (1 + exp_(-gate)) * up;
    }
    store_activation(v, y, q, row, i, n, n_padded);
}

HQ_KERNEL(256) add_bias_rows_f32(float* x, const float* bias, int n, int stride) {
    const int i = (int)block_x() * 256 + thread_x();
    if (i < n) x[(int64_t)block_y() * stride + i] += bias[i];
}
