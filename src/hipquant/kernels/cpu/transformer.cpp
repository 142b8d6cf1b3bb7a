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

// Block (token): rotates the pairs (2 i, 2 i + 1) of the first n_rot values of every head of q and k by the angles of
// the token's position, and writes k and v into the cache. `rope` is [position][n_rot / 2][cos, sin].
HQ_ENTRY(rope_store_kv) {
    const int n_head = arg<int>(params, 8), n_head_kv = arg<int>(params, 9), head_dim = arg<int>(params, 10);
    const int n_rot = arg<int>(params, 11), n_context = arg<int>(params, 12);
    for (uint64_t token = launch->begin; token < launch->end; token++) {
        auto* q = arg<float*>(params, 0) + token * n_head * head_dim;
        const auto* k = arg<const float*>(params, 1) + token * n_head_kv * head_dim;
        const auto* v = arg<const float*>(params, 2) + token * n_head_kv * head_dim;
        const int position = arg<const int*>(params, 6)[token], slot = arg<const int*>(params, 7)[token];
        const auto* rope = arg<const float*>(params, 5) + (int64_t)position * n_rot;
        for (int h = 0; h < n_head; h++, q += head_dim)
            for (int i = 0; i < n_rot; i += 2) {
                const float a = q[i], b = q[i + 1], c = rope[i], s = rope[i + 1];
                q[i] = a * c - b * s;
                q[i + 1] = a * s + b * c;
            }
        for (int h = 0; h < n_head_kv; h++, k += head_dim, v += head_dim) {
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

// Block (1024 values): y = gate / (1 + e^-gate) * up.
HQ_ENTRY(silu_mul_f32) {
    const auto* gate = arg<const float*>(params, 0);
    const auto* up = arg<const float*>(params, 1);
    auto* y = arg<float*>(params, 2);
    const int64_t n = arg<int>(params, 3), end = (int64_t)launch->end * 1024;
    for (int64_t i = launch->begin * 1024; i < end && i < n; i += 8) {
        f32x8 g = 0, u = 0;
        const int count = n - i < 8 ? (int)(n - i) : 8;
        __builtin_memcpy(&g, gate + i, 4 * count);
        __builtin_memcpy(&u, up + i, 4 * count);
        const f32x8 v = g / (1 + exp_(-g)) * u;
        __builtin_memcpy(y + i, &v, 4 * count);
    }
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
