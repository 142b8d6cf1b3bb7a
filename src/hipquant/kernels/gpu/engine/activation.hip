// `silu_mul_q8`: the gated activation; `quantize_q8`; `add_bias_rows_f32`. A thread takes four values.
#include "rows.h"

HQ_INLINE float silu(float v) { return v / (1 + exp_(-v)); }

HQ_KERNEL(256) silu_mul_q8(const float* gate_up, float* y, void* q, int n, int n_padded) {
    let_next_begin();
    wait_for_inputs();
    const int i = 4 * ((int)block_x() * 256 + thread_x());
    const uint64_t row = block_y();
    const float *gate = gate_up + row * 2 * n, *up = gate + n;
    Float4 v = {};
    if (i + 4 <= n && n % 4 == 0 && aligned16((uint64_t)gate_up)) {
        const Float4 a = *(const Float4*)(gate + i), b = *(const Float4*)(up + i);
        for (int j = 0; j < 4; j++) v.v[j] = silu(a.v[j]) * b.v[j];
    } else
        for (int j = 0; j < 4; j++)
            if (i + j < n) v.v[j] = silu(gate[i + j]) * up[i + j];
    store_four(v, y, q, row, i, n_padded);
}

HQ_KERNEL(256) quantize_q8(const float* x, void* q, int n_padded) {
    let_next_begin();
    wait_for_inputs();
    const int i = 4 * ((int)block_x() * 256 + thread_x());
    const uint64_t row = block_y();
    Float4 v = {};
    if (i < n_padded)
        for (int j = 0; j < 4; j++) v.v[j] = x[row * n_padded + i + j];
    store_four(v, nullptr, q, row, i, n_padded);
}

HQ_KERNEL(256) add_bias_rows_f32(float* x, const float* bias, int n, int stride) {
    let_next_begin();
    wait_for_inputs();
    const int i = (int)block_x() * 256 + thread_x();
    if (i < n) x[(int64_t)block_y() * stride + i] += bias[i];
}
