// What a transformer needs beside matrix products: norm, RoPE with the KV-cache write, gated activation, bias.
#include "kv_cache.h"
#include "launch.h"

// Block (row): x += residual (if there is one); y = x / rms(x) * weight.
HQ_ENTRY(add_rms_norm_f32) {
    const int n = arg<int>(params, 4);
    const auto* weight = arg<const float*>(params, 2);
    const float eps = arg<float>(params, 5);
    for (uint64_t row = launch->begin; row < launch->end; row++) {
        auto* x = arg<float*>(params, 0) + row * n;
        auto* y = arg<float*>(params, 3) + row * n;
        if (const auto* residual = arg<const float*>(params, 1))
            for (int i = 0; i < n; i++) x[i] += residual[row * n + i];
        double squares = 0;
        for (int i = 0; i < n; i += 256) {  // partial sums in float, their sum in double
            f32x8 part = 0;
            int j = i;
            for (; j + 8 <= n && j < i + 256; j += 8) part = fma(load<f32x8>(x + j), load<f32x8>(x + j), part);
            for (; j < n && j < i + 256; j++) part[0] += x[j] * x[j];
            squares += sum(part);
        }
        const float scale = 1 / __builtin_sqrtf((float)(squares / n) + eps);
        for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
    }
}

// Block (row): x += residual (if there is one); y (if it is wanted) = (x - mean) / standard deviation * weight + bias.
HQ_ENTRY(add_layer_norm_f32) {
    const int n = arg<int>(params, 5);
    const auto *weight = arg<const float*>(params, 2), *bias = arg<const float*>(params, 3);
    const float eps = arg<float>(params, 6);
    for (uint64_t row = launch->begin; row < launch->end; row++) {
        auto* x = arg<float*>(params, 0) + row * n;
        if (const auto* residual = arg<const float*>(params, 1))
            for (int i = 0; i < n; i++) x[i] += residual[row * n + i];
        auto* y = arg<float*>(params, 4);
        if (!y) continue;
        y += row * n;
        double sum = 0, squares = 0;
        for (int i = 0; i < n; i++) sum += x[i];
        const float mean = (float)(sum / n);
        for (int i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
        const float scale = 1 / __builtin_sqrtf((float)(squares / n) + eps);
        for (int i = 0; i < n; i++) y[i] = (x[i] - mean) * scale * weight[i] + bias[i];
    }
}

// x, n values, divided by its root mean square, times the weights.
HQ_INLINE void norm_head(float* x, const float* weight, int n, float eps) {
    float squares = 0;
    for (int i = 0; i < n; i++) squares += x[i] * x[i];
    const float scale = 1 / __builtin_sqrtf(squares / n + eps);
    for (int i = 0; i < n; i++) x[i] *= scale * weight[i];
}

// Block (token): norms every head of q and k where there are weights for it, rotates the pairs (2 i, 2 i + 1) of its
// first n_rot values by the angles of the token's position, and writes k and v into the cache. `rope` is
// [position][n_rot / 2][cos, sin].
HQ_ENTRY(rope_store_kv) {
    const int n_head = arg<int>(params, 8), n_head_kv = arg<int>(params, 9), head_dim = arg<int>(params, 10);
    const int n_rot = arg<int>(params, 11), n_context = arg<int>(params, 12);
    const auto *q_norm = arg<const float*>(params, 13), *k_norm = arg<const float*>(params, 14);
    const float eps = arg<float>(params, 15);
    for (uint64_t token = launch->begin; token < launch->end; token++) {
        auto* q = arg<float*>(params, 0) + token * n_head * head_dim;
        auto* k = arg<float*>(params, 1) + token * n_head_kv * head_dim;
        const auto* v = arg<const float*>(params, 2) + token * n_head_kv * head_dim;
        const int position = arg<const int*>(params, 6)[token], slot = arg<const int*>(params, 7)[token];
        const auto* rope = arg<const float*>(params, 5) + (int64_t)position * n_rot;
        for (int h = 0; h < n_head; h++, q += head_dim) {
            if (q_norm) norm_head(q, q_norm, head_dim, eps);
            for (int i = 0; i < n_rot; i += 2) {
                const float a = q[i], b = q[i + 1], c = rope[i], s = rope[i + 1];
                q[i] = a * c - b * s;
                q[i + 1] = a * s + b * c;
            }
        }
        for (int h = 0; h < n_head_kv; h++, k += head_dim, v += head_dim) {
            if (k_norm) norm_head(k, k_norm, head_dim, eps);
            const KVHead head = {slot * n_head_kv + h, head_dim, n_context};
            uint16_t* keys = arg<uint16_t*>(params, 3) + head.key(position);
            for (int i = 0; i < n_rot; i += 2) {
                const float a = k[i], b = k[i + 1], c = rope[i], s = rope[i + 1];
                keys[i * kKeyTile] = float_to_half(a * c - b * s);
                keys[(i + 1) * kKeyTile] = float_to_half(a * s + b * c);
            }
            for (int i = n_rot; i < head_dim; i++) keys[i * kKeyTile] = float_to_half(k[i]);
            uint16_t* values = arg<uint16_t*>(params, 4) + head.value(position);
            for (int i = 0; i < head_dim; i++) values[i] = float_to_half(v[i]);
        }
    }
}

// The values of blocks of 1024, of n in all: f(i) is called for 8 from i on, g(i) for one.
template <class F, class G> static void each_value(const hq_launch* launch, int64_t n, F f, G g) {
    const int64_t end = (int64_t)launch->end * 1024, last = end < n ? end : n;
    int64_t i = launch->begin * 1024;
    for (; i + 8 <= last; i += 8) f(i);
    for (; i < last; i++) g(i);
}

// y = activation(gate) * up; activation(gate) where there is no up.
template <class A> static void gated(const hq_launch* launch, void** params, A activation) {
    const auto* gate = arg<const float*>(params, 0);
    const auto* up = arg<const float*>(params, 1);
    auto* y = arg<float*>(params, 2);
    each_value(
        launch, arg<int>(params, 3),
        [=](int64_t i) { store(y + i, activation(load<f32x8>(gate + i)) * (up ? load<f32x8>(up + i) : (f32x8)1)); },
        [=](int64_t i) { y[i] = activation(f32x8(gate[i]))[0] * (up ? up[i] : 1); });
}

// Block (1024 values): y = gate / (1 + e^-gate) * up.
HQ_ENTRY(silu_mul_f32) {
    gated(launch, params, [](f32x8 g) { return g / (1 + exp_(-g)); });
}

// Block (1024 values): y = gelu(gate) * up, or gelu(gate). GELU in its tanh form: g / 2 (1 + tanh t), which is
// g / (1 + e^-2t).
HQ_ENTRY(gelu_mul_f32) {
    gated(launch, params, [](f32x8 g) {
        const f32x8 t = g * (0.797884560802865f + 0.0356774081363f * g * g);  // sqrt(2 / pi) (g + 0.044715 g^3)
        return g / (1 + exp_(-2 * t));
    });
}

// Block (1024 values): x *= scale.
HQ_ENTRY(scale_f32) {
    auto* x = arg<float*>(params, 0);
    const float scale = arg<float>(params, 2);
    each_value(
        launch, arg<int>(params, 1), [=](int64_t i) { store(x + i, load<f32x8>(x + i) * scale); },
        [=](int64_t i) { x[i] *= scale; });
}

// Block (1024 values): x = cap tanh(x / cap).
HQ_ENTRY(softcap_f32) {
    auto* x = arg<float*>(params, 0);
    const float cap = arg<float>(params, 2);
    const auto capped = [=](f32x8 v) {
        const f32x8 t = v / cap, squared = t * t;
        const f32x8 small = t * (1 - squared * (1.0f / 3 - squared * (2.0f / 15 - squared * (17.0f / 315))));
        return cap * (squared < 0.04f ? small : 1 - 2 / (exp_(2 * t) + 1));
    };
    each_value(
        launch, arg<int>(params, 1), [=](int64_t i) { store(x + i, capped(load<f32x8>(x + i))); },
        [=](int64_t i) { x[i] = capped(f32x8(x[i]))[0]; });
}

// Block (row): x += bias.
HQ_ENTRY(add_bias_f32) {
    const auto* bias = arg<const float*>(params, 1);
    const int n = arg<int>(params, 2);
    for (uint64_t row = launch->begin; row < launch->end; row++) {
        auto* x = arg<float*>(params, 0) + row * n;
        for (int i = 0; i < n; i++) x[i] += bias[i];
    }
}

// Block (1 MiB): dst[block] = the sum of its 32-bit words. Reads as fast as it can: the ceiling of what streams weights.
HQ_ENTRY(read_bytes) {
    const auto* x = arg<const char*>(params, 0);
    auto* dst = arg<int32_t*>(params, 1);
    const auto nbytes = arg<size_t>(params, 2);
    constexpr size_t kPart = 1 << 20, kStep = 4 * sizeof(vi);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const size_t end = (block + 1) * kPart < nbytes ? (block + 1) * kPart : nbytes;
        size_t i = block * kPart;
        vi sums[4] = {};
        for (; i + kStep <= end; i += kStep) {
            prefetch<kStep>(x + i);
            for (int j = 0; j < 4; j++) sums[j] += load<vi>(x + i + j * sizeof(vi));
        }
        int32_t total = __builtin_reduce_add(sums[0] + sums[1] + sums[2] + sums[3]);
        for (; i + 4 <= end; i += 4) total += load<int32_t>(x + i);
        dst[block] = total;
    }
}
