// `silu_mul_q8`, `gelu_mul_q8`: gated activations; `gelu_q8`: without a gate; `quantize_q8`; `add_bias_rows_f32`;
// `scale_rows_f32`; `softcap_rows_f32`: x = cap tanh(x / cap). A thread takes four values, or one of a bias.
#include "rows.h"

template <float (*kActivation)(float), bool kGated>
HQ_INLINE void store_activated(const float* gate_up, float* y, void* q, int n, int n_padded) {
    const int i = 4 * ((int)block_x() * 256 + thread_x());
    const uint64_t row = block_y();
    const float *gate = gate_up + row * (kGated ? 2 : 1) * n, *up = gate + n;
    Float4 v = {};
    if (i + 4 <= n && n % 4 == 0 && aligned16((uint64_t)gate_up)) {
        const Float4 a = *(const Float4*)(gate + i), b = *(const Float4*)((kGated ? up : gate) + i);
        for (int j = 0; j < 4; j++) v.v[j] = kActivation(a.v[j]) * (kGated ? b.v[j] : 1);
    } else
        for (int j = 0; j < 4; j++)
            if (i + j < n) v.v[j] = kActivation(gate[i + j]) * (kGated ? up[i + j] : 1);
    store_four(v, y, q, row, i, n_padded);
}

HQ_KERNEL(256) silu_mul_q8(const float* gate_up, float* y, void* q, int n, int n_padded) {
    let_next_begin();
    wait_for_inputs();
    store_activated<silu, true>(gate_up, y, q, n, n_padded);
}

HQ_KERNEL(256) gelu_mul_q8(const float* gate_up, float* y, void* q, int n, int n_padded) {
    let_next_begin();
    wait_for_inputs();
    store_activated<gelu, true>(gate_up, y, q, n, n_padded);
}

HQ_KERNEL(256) gelu_q8(const float* x, float* y, void* q, int n, int n_padded) {
    let_next_begin();
    wait_for_inputs();
    store_activated<gelu, false>(x, y, q, n, n_padded);
}

HQ_KERNEL(256) scale_rows_f32(float* x, int n, float scale) {
    let_next_begin();
    wait_for_inputs();
    const int i = 4 * ((int)block_x() * 256 + thread_x());
    for (int j = 0; j < 4; j++)
        if (i + j < n) x[i + j] *= scale;
}

// cap tanh(v / cap); a series where e^2t - 1 would lose the digits of t.
HQ_INLINE float softcapped(float v, float cap) {
    const float t = v / cap, squared = t * t;
    if (squared < 0.04f) return v * (1 - squared * (1.0f / 3 - squared * (2.0f / 15 - squared * (17.0f / 315))));
    return cap * (1 - 2 / (exp_(2 * t) + 1));
}

HQ_KERNEL(256) softcap_rows_f32(float* x, int n, float cap) {
    let_next_begin();
    wait_for_inputs();
    const int i = 4 * ((int)block_x() * 256 + thread_x());
    for (int j = 0; j < 4; j++)
        if (i + j < n) x[i + j] = softcapped(x[i + j], cap);
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
