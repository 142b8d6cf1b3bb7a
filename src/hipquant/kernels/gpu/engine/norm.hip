// `add_rms_norm_q8_1`: x += residual; x / rms(x) * weight as floats and as q8_1. A block takes a row, a lane 4 values.
#include "rows.h"

constexpr int kNormThreads = 256, kNormStep = 4 * kNormThreads;

// Values i to i + 3 of a row of n; zeros behind it.
HQ_INLINE Float4 load_values(const float* row, int i, int n, bool vectors) {
    if (vectors && i < n) return *(const Float4*)(row + i);
    Float4 r;
    for (int j = 0; j < 4; j++) r.v[j] = i + j < n ? row[i + j] : 0;
    return r;
}
HQ_INLINE void store_values(float* row, int i, int n, bool vectors, const Float4& v) {
    if (vectors && i < n) *(Float4*)(row + i) = v;
    else
        for (int j = 0; j < 4; j++)
            if (i + j < n) row[i + j] = v.v[j];
}

HQ_KERNEL(256)
add_rms_norm_q8_1(float* x, const float* residual, const float* weight, float* y, void* q, int n, int n_padded,
                  float eps) {
    HQ_SHARED float partial[kNormThreads / 32];
    const uint64_t row = block_x();
    const bool vectors = n % 4 == 0 && aligned16((uint64_t)x | (uint64_t)residual | (uint64_t)weight | (uint64_t)y);
    const int thread = thread_x();
    x += row * n;
    float sum = 0;
    for (int i = 4 * thread; i < n; i += kNormStep) {
        Float4 v = load_values(x, i, n, vectors);
        if (residual) {
            const Float4 r = load_values(residual + row * n, i, n, vectors);
            for (int j = 0; j < 4; j++) v.v[j] += r.v[j];
            store_values(x, i, n, vectors, v);
        }
        for (int j = 0; j < 4; j++) sum = __builtin_fmaf(v.v[j], v.v[j], sum);
    }
    sum = team_sum(sum);
    if (thread % 32 == 0) partial[thread / 32] = sum;
    barrier();
    float squares = 0;
    for (int i = 0; i < kNormThreads / 32; i++) squares += partial[i];
    const float scale = 1 / square_root(squares / (float)n + eps);

    const int end = q ? n_padded : n;
    for (int first = 4 * thread / 128 * 128; first < end; first += kNormStep) {  // teams stay together
        const int i = first + 4 * (thread % 32);
        Float4 v = load_values(x, i, n, vectors);  // what this thread has written
        const Float4 w = load_values(weight, i, n, vectors);
        for (int j = 0; j < 4; j++) v.v[j] = i + j < n ? v.v[j] * scale * w.v[j] : 0;
        if (y) store_values(y + row * n, i, n, vectors, v);
        if (q) store_q8_1<4>((q8_1*)q + row * (n_padded / 32), i, v.v, i < n_padded);
    }
}
