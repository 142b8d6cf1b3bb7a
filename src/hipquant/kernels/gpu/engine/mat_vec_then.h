// What becomes of the products of a mat-vec: they are stored, added to the residual stream and normed, gated, or rotated
// and stored in the KV cache. What follows needs 32 neighbours, for one d of the activations in planes, is done by the
// last block to arrive of those that make them.
#pragma once
#include "rows.h"

struct Product {
    const void *x, *y;
    const float* squares;  // of the columns, [column][group of 32]; null: they are normed already
    float eps;
    int ncols, nrows, columns, n_padded;
};

enum ThenKind { kStore, kAddAndNorm, kGate, kRopeAndStore };

struct Then {
    int kind;
    const float* bias;      // or null
    float* dst;             // [column][nrows_dst]: the products from row `first` on; x, the gated ones, or queries
    int first, nrows_dst;
    const float* weight;    // kAddAndNorm: of the norm, whose division by rms is left to who reads its results
    float* normed;          // kAddAndNorm: [column][n_padded] floats, or null
    uint8_t* q;             // kAddAndNorm and kGate: columns in planes, or null
    float* sums;            // kAddAndNorm: [column][group of 32] sums of squares
    int* counters;          // one a group
    int n_padded;
    uint16_t *k_cache, *v_cache;
    const float* rope;
    const int *position, *slot;
    int n_head, n_head_kv, head_dim, n_rot, n_context;
};

// Values `row` and `row` + 1 of the queries, keys and values of a token.
HQ_INLINE void rope_and_store(const Then& t, int column, int row, float a, float b) {
    const int head = row / t.head_dim, i = row % t.head_dim, at = t.position[column];
    const bool query = head < t.n_head, value = head >= t.n_head + t.n_head_kv;
    if (!value && i < t.n_rot) {
        const float* angle = t.rope + (int64_t)at * t.n_rot + i;
        const float c = angle[0], s = angle[1], first = a * c - b * s;
        b = a * s + b * c, a = first;
    }
    if (query) {
        float* to = t.dst + (int64_t)column * t.nrows_dst + row;
        to[0] = a, to[1] = b;
        return;
    }
    const int kv_head = head - t.n_head - (value ? t.n_head_kv : 0);
    const int64_t cache_row = ((int64_t)t.slot[column] * t.n_head_kv + kv_head) * t.n_context + at;
    *(uint32_t*)((value ? t.v_cache : t.k_cache) + cache_row * t.head_dim + i) =
        float_to_half(a) | (uint32_t)float_to_half(b) << 16;
}

// What follows for a pair of rows, 2 pair and 2 pair + 1, or pair and pair + nrows / 2 where they are gated.
HQ_INLINE void store_pair(const Then& t, int column, int pair, int nrows, float a, float b) {
    float* dst = t.dst + (int64_t)column * t.nrows_dst;
    if (t.kind == kGate) {
        if (t.bias) a += t.bias[pair], b += t.bias[pair + nrows / 2];
        dst[pair] = a / (1 + exp_(-a)) * b;
        return;
    }
    const int row = t.first + 2 * pair;
    const bool both = 2 * pair + 1 < nrows;
    if (t.bias) a += t.bias[row], b += both ? t.bias[row + 1] : 0;
    if (t.kind == kRopeAndStore) return rope_and_store(t, column, row, a, b);
    if (t.kind == kAddAndNorm) a += dst[row], b += both ? dst[row + 1] : 0;
    dst[row] = a;
    if (both) dst[row + 1] = b;
}

// The group of 32 results that this block has `to_block` of, from `begin` on, of n, where it is complete now.
template <int kTeams> HQ_INLINE void finish_group(const Then& t, int columns, int begin, int to_block, int n) {
    HQ_SHARED int last;
    const int group = begin / 32, size = n - group * 32 < 32 ? n - group * 32 : 32;
    int count = 0;
    for (int done = 0; done < size; done += to_block) count++;
    if (!is_last_block(t.counters + group, count, &last)) return;
    const int i = group * 32 + thread_x();
    for (int c = thread_y(); c < columns; c += kTeams) {
        float v = i < n ? t.dst[(int64_t)c * t.nrows_dst + i] : 0;
        if (t.kind == kAddAndNorm) {
            const float sum = team_sum(v * v);
            if (thread_x() == 0) t.sums[(int64_t)c * ((n + 31) / 32) + group] = sum;
            if (i < n) v *= t.weight[i];
        }
        if (t.normed && i < n) t.normed[(int64_t)c * t.n_padded + i] = v;
        if (t.q) store_activations<1>(t.q + c * column_bytes(t.n_padded), t.n_padded, i, &v, true);
    }
}

// 1 / rms of a column, from the sums of squares of its groups.
HQ_INLINE float inverse_rms(const float* squares, int n, float eps) {
    float sum = 0;
    for (int i = thread_x(); i < (n + 31) / 32; i += 32) sum += squares[i];
    return 1 / square_root(team_sum(sum) / (float)n + eps);
}

// The factors of `columns` columns from `first` on, by which their products are multiplied.
template <int kTeams> HQ_INLINE void store_scales(float* scales, const Product& p, int first, int columns) {
    for (int c = thread_y(); c < columns; c += kTeams) {
        const float* squares = p.squares + (int64_t)(first + c) * ((p.ncols + 31) / 32);
        const float scale = p.squares ? inverse_rms(squares, p.ncols, p.eps) : 1;
        if (thread_x() == 0) scales[c] = scale;
    }
}
