// `add_rms_norm_q8`: x += residual; x / rms(x) * weight as floats and in planes. `add_normed_rms_norm_q8`: the same,
// and what is added is normed itself before. `add_layer_norm_q8`: x += residual; (x - mean) / deviation * weight +
// bias. A block takes a row, a lane 4 values at a time, of which it keeps the first in registers: in a decode step this
// is one row, and all that counts is how often it waits for memory.
#include "rows.h"

constexpr int kNormThreads = 1024, kNormStep = 4 * kNormThreads, kKept = 2;

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

// Values i to i + 3 of x, after the residual is added to them.
HQ_INLINE Float4 add_residual(float* x, const float* residual, int i, int n, bool vectors) {
    Float4 v = load_values(x, i, n, vectors);
    if (!residual) return v;
    const Float4 r = load_values(residual, i, n, vectors);
    for (int j = 0; j < 4; j++) v.v[j] += r.v[j];
    store_values(x, i, n, vectors, v);
    return v;
}
HQ_INLINE float add_squares(const Float4& v, float sum) {
    for (int j = 0; j < 4; j++) sum = __builtin_fmaf(v.v[j], v.v[j], sum);
    return sum;
}
// Whole teams come here.
HQ_INLINE void store_normed(
    Float4 v, const Float4& w, float scale, float* y, uint8_t* q, int i, int n, int n_padded, bool vectors) {
    for (int j = 0; j < 4; j++) v.v[j] = i + j < n ? v.v[j] * scale * w.v[j] : 0;
    if (y) store_values(y, i, n_padded, vectors, v);
    if (q) store_activations<4>(q, n_padded, i, v.v, i < n_padded);
}
// Over all threads of the block, in each of them. `partial` is used once.
HQ_INLINE float block_sum(float v, float* partial) {
    v = team_sum(v);
    if (thread_x() % 32 == 0) partial[thread_x() / 32] = v;
    barrier();
    return team_sum(partial[thread_x() % 32]);
}

HQ_KERNEL(1024)
add_rms_norm_q8(
    float* x, const float* residual, const float* weight, float* y, void* q, int n, int n_padded, float eps) {
    HQ_SHARED float partial[kNormThreads / 32];
    let_next_begin();
    wait_for_inputs();
    const uint64_t row = block_x();
    const bool vectors = n % 4 == 0 && aligned16((uint64_t)x | (uint64_t)residual | (uint64_t)weight | (uint64_t)y);
    const int first = 4 * thread_x();
    x += row * n;
    if (residual) residual += row * n;
    if (y) y += row * n_padded;
    uint8_t* to = q ? (uint8_t*)q + row * column_bytes(n_padded) : nullptr;

    Float4 kept[kKept], weights[kKept];
#pragma unroll
    for (int k = 0; k < kKept; k++) weights[k] = load_values(weight, first + k * kNormStep, n, vectors);
#pragma unroll
    for (int k = 0; k < kKept; k++) kept[k] = add_residual(x, residual, first + k * kNormStep, n, vectors);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kKept; k++) sum = add_squares(kept[k], sum);
    for (int i = first + kKept * kNormStep; i < n; i += kNormStep)
        sum = add_squares(add_residual(x, residual, i, n, vectors), sum);
    const float scale = 1 / square_root(block_sum(sum, partial) / (float)n + eps);

    const int begin = first / 128 * 128;  // teams stay together
#pragma unroll
    for (int k = 0; k < kKept; k++)
        if (begin + k * kNormStep < n_padded)
            store_normed(kept[k], weights[k], scale, y, to, first + k * kNormStep, n, n_padded, vectors);
    for (int i = begin + kKept * kNormStep; i < n_padded; i += kNormStep) {
        const int at = i + first % 128;  // what this thread has written
        store_normed(load_values(x, at, n, vectors), load_values(weight, at, n, vectors), scale, y, to, at, n, n_padded,
            vectors);
    }
}

HQ_KERNEL(1024)
add_normed_rms_norm_q8(float* x, const float* branch, const float* post, const float* weight, float* y, void* q, int n,
    int n_padded, float eps) {
    HQ_SHARED float partial[2][kNormThreads / 32];
    let_next_begin();
    wait_for_inputs();
    const uint64_t row = block_x();
    const bool vectors =
        n % 4 == 0 && aligned16((uint64_t)x | (uint64_t)branch | (uint64_t)post | (uint64_t)weight | (uint64_t)y);
    const int first = 4 * thread_x();
    x += row * n, branch += row * n;
    if (y) y += row * n_padded;
    uint8_t* to = q ? (uint8_t*)q + row * column_bytes(n_padded) : nullptr;

    Float4 kept[kKept], branches[kKept], posts[kKept], weights[kKept];
#pragma unroll
    for (int k = 0; k < kKept; k++) {
        const int i = first + k * kNormStep;
        branches[k] = load_values(branch, i, n, vectors), kept[k] = load_values(x, i, n, vectors);
        posts[k] = load_values(post, i, n, vectors), weights[k] = load_values(weight, i, n, vectors);
    }
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kKept; k++) sum = add_squares(branches[k], sum);
    for (int i = first + kKept * kNormStep; i < n; i += kNormStep)
        sum = add_squares(load_values(branch, i, n, vectors), sum);
    const float shrink = 1 / square_root(block_sum(sum, partial[0]) / (float)n + eps);

    sum = 0;
#pragma unroll
    for (int k = 0; k < kKept; k++) {
        for (int j = 0; j < 4; j++) kept[k].v[j] += branches[k].v[j] * shrink * posts[k].v[j];
        store_values(x, first + k * kNormStep, n, vectors, kept[k]);
        sum = add_squares(kept[k], sum);
    }
    for (int i = first + kKept * kNormStep; i < n; i += kNormStep) {
        Float4 v = load_values(x, i, n, vectors);
        const Float4 b = load_values(branch, i, n, vectors), w = load_values(post, i, n, vectors);
        for (int j = 0; j < 4; j++) v.v[j] += b.v[j] * shrink * w.v[j];
        store_values(x, i, n, vectors, v);
        sum = add_squares(v, sum);
    }
    const float scale = 1 / square_root(block_sum(sum, partial[1]) / (float)n + eps);

    const int begin = first / 128 * 128;  // teams stay together
#pragma unroll
    for (int k = 0; k < kKept; k++)
        if (begin + k * kNormStep < n_padded)
            store_normed(kept[k], weights[k], scale, y, to, first + k * kNormStep, n, n_padded, vectors);
    for (int i = begin + kKept * kNormStep; i < n_padded; i += kNormStep) {
        const int at = i + first % 128;  // what this thread has written
        store_normed(load_values(x, at, n, vectors), load_values(weight, at, n, vectors), scale, y, to, at, n, n_padded,
            vectors);
    }
}

// Squares of the differences from the mean, of values i to i + 3 of n.
HQ_INLINE float add_differences(const Float4& v, float mean, int i, int n, float sum) {
    for (int j = 0; j < 4; j++)
        if (i + j < n) sum = __builtin_fmaf(v.v[j] - mean, v.v[j] - mean, sum);
    return sum;
}

// Only adds, where neither y nor q is wanted.
HQ_KERNEL(1024)
add_layer_norm_q8(float* x, const float* residual, const float* weight, const float* bias, float* y, void* q, int n,
    int n_padded, float eps) {
    HQ_SHARED float partial[2][kNormThreads / 32];
    let_next_begin();
    wait_for_inputs();
    const uint64_t row = block_x();
    const bool vectors =
        n % 4 == 0 && aligned16((uint64_t)x | (uint64_t)residual | (uint64_t)weight | (uint64_t)bias | (uint64_t)y);
    const int first = 4 * thread_x();
    x += row * n;
    if (residual) residual += row * n;
    if (y) y += row * n_padded;
    uint8_t* to = q ? (uint8_t*)q + row * column_bytes(n_padded) : nullptr;

    Float4 kept[kKept];
#pragma unroll
    for (int k = 0; k < kKept; k++) kept[k] = add_residual(x, residual, first + k * kNormStep, n, vectors);
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kKept; k++)
        for (int j = 0; j < 4; j++) sum += kept[k].v[j];
    for (int i = first + kKept * kNormStep; i < n; i += kNormStep) {
        const Float4 v = add_residual(x, residual, i, n, vectors);
        for (int j = 0; j < 4; j++) sum += v.v[j];
    }
    if (!y && !q) return;
    const float mean = block_sum(sum, partial[0]) / (float)n;

    sum = 0;
#pragma unroll
    for (int k = 0; k < kKept; k++) sum = add_differences(kept[k], mean, first + k * kNormStep, n, sum);
    for (int i = first + kKept * kNormStep; i < n; i += kNormStep)
        sum = add_differences(load_values(x, i, n, vectors), mean, i, n, sum);
    const float scale = 1 / square_root(block_sum(sum, partial[1]) / (float)n + eps);

    const int begin = first / 128 * 128;  // teams stay together
#pragma unroll 1
    for (int i = begin; i < n_padded; i += kNormStep) {
        const int at = i + first % 128, k = (i - begin) / kNormStep;
        Float4 v = k == 0 ? kept[0] : k == 1 ? kept[1] : load_values(x, at, n, vectors);
        const Float4 w = load_values(weight, at, n, vectors), b = load_values(bias, at, n, vectors);
        for (int j = 0; j < 4; j++) v.v[j] = at + j < n ? (v.v[j] - mean) * scale * w.v[j] + b.v[j] : 0;
        if (y) store_values(y, at, n_padded, vectors, v);
        if (to) store_activations<4>(to, n_padded, at, v.v, at < n_padded);
    }
}
