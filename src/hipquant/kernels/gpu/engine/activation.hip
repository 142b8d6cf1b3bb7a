// `silu_mul_q8`: the gated activation; `quantize_q8`; `add_bias_rows_f32`. A thread takes a value.
#include "rows.h"

HQ_KERNEL(256) silu_mul_q8(const float* gate_up, float* y, void* q, int n, int n_padded) {
    let_next_begin();
    wait_for_inputs();
    const int i = (int)block_x() * 256 + thread_x();
    const uint64_t row = block_y();
    float v = 0;
    if (i < n) {
        const float gate = gate_up[row * 2 * n + i], up = gate_up[row * 2 * n + n + i];
        v = gate / (1 + exp_(-gate)) * up;
    }
    store_activation(v, y, q, row, i, n_padded);
}

HQ_KERNEL(256) quantize_q8(const float* x, void* q, int n_padded) {
    let_next_begin();
    wait_for_inputs();
    const int i = (int)block_x() * 256 + thread_x();
    const uint64_t row = block_y();
    store_activation(i < n_padded ? x[row * n_padded + i] : 0, nullptr, q, row, i, n_padded);
}

HQ_KERNEL(256) add_bias_rows_f32(float* x, const float* bias, int n, int stride) {
    let_next_begin();
    wait_for_inputs();
    const int i = (int)block_x() * 256 + thread_x();
    if (i < n) x[(int64_t)block_y() * stride + i] += bias[i];
}
