// What becomes of the products of a mat-vec: they are stored, added to the residual stream and normed, gated, or
// rotated and stored in the KV cache. What is normed or gated becomes activations in planes, of which 32 have one d: a
// block makes all of them.
#pragma once
#include "rows.h"

struct Product {
    const void *x, *y;
    const float* squares;  // of the columns, [column][group of 32]; null: they are normed already
    float eps;
    int ncols, nrows, columns, n_padded;
};

enum EpilogueKind { kStore, kAddAndNorm, kGate, kRopeAndStore, kGateGelu };
// What a kernel is compiled for: any kind but kAddAndNorm, that one, or those that gate.
enum Form { kGeneral, kNormed, kGated };

struct Epilogue {
    int kind;
    const float* bias;  // or null
    float* dst;         // [column][nrows_dst]: the products from row `first` on; x, the gated ones, or queries
    int first, nrows_dst;
    const float* weight;  // kAddAndNorm: of the norm, whose division by rms is left to who reads its results
    float* normed;        // kAddAndNorm: [column][n_padded] floats, or null
    uint8_t* q;           // kAddAndNorm and kGate: columns in planes, or null
    float* sums;          // kAddAndNorm: [column][group of 32] sums of squares
    int n_padded;
    uint16_t *k_cache, *v_cache;
    const float* rope;
    const int *position, *slot;
    int n_head, n_head_kv, head_dim, n_rot, n_context;
    int pairs_to_block;  // pairs of rows that a block takes: of those that become activations, what makes 32

    HQ_MEMBER bool gates() const { return kind == kGate || kind == kGateGelu; }
    // Its kind, as far as rows go.
    template <int kForm> HQ_MEMBER int rows_of() const {
        return kForm == kNormed ? kAddAndNorm : kForm == kGated || gates() ? kGate : kStore;
    }
};

// The rows of a block whose first pair is `begin`, counted from its first one on: pairs are neighbours or, where they
// are gated, half a matrix apart. Behind the last row of the matrix it is repeated.
struct BlockRows {
    uint32_t first, last, second, step;  // second: of a pair; step: from pair to pair

    HQ_MEMBER BlockRows(int kind, int begin, int nrows) {
        const bool gated = kind == kGate;
        first = (uint32_t)(gated ? begin : 2 * begin), last = (uint32_t)nrows - 1 - first;
        second = gated ? (uint32_t)(nrows + 1) / 2 : 1, step = gated ? 1 : 2;
    }
    // The first or, `odd`, the second of a pair of the block.
    HQ_MEMBER uint32_t row(int pair, int odd) const {
        const uint32_t i = (uint32_t)pair * step + (odd ? second : 0);
        return i < last ? i : last;
    }
};

// A block's results, rows as BlockRows has them, and what follows.
template <int kTeams, int kColumns> struct BlockResults {
    float v[kColumns <= 2 ? 128 : 64][kColumns], stored[32][kColumns], squares[kTeams];
};

// What a thread does behind the products, for a pair of rows and a column: of `columns` columns from `first_column` on
// and `to_block` pairs from `begin` on. What that takes of memory is loaded ahead, as each wait for it would delay the
// kernel behind; it is little, as it takes registers while the products are made.
template <int kTeams, int kColumns, int kForm> struct EpilogueThread {
    static constexpr bool kNorm = kForm == kNormed;
    static_assert(kColumns <= kTeams, "a team takes a column");
    static constexpr int kLanes = kColumns == 1 ? 32 * kTeams : 32;  // to a column's sums of squares
    static constexpr int kAhead = kColumns == 1 ? 1 : 4;
    const Product& p;
    const Epilogue& epilogue;
    int first_column, columns, begin, to_block;
    float weight, squares[kAhead], other[2];  // other: the residual stream, or cosine and sine
    int at, slot;                             // of the token, in the KV cache

    HQ_MEMBER bool gates() const { return kForm == kGated || (kForm == kGeneral && epilogue.gates()); }
    HQ_MEMBER bool ropes() const { return kForm == kGeneral && epilogue.kind == kRopeAndStore; }
    HQ_MEMBER int thread() const { return thread_y() * 32 + thread_x(); }
    HQ_MEMBER int column() const { return thread() % kColumns; }
    HQ_MEMBER int pair() const { return begin + thread() / kColumns; }
    HQ_MEMBER int pairs() const { return (p.nrows + 1) / 2; }
    HQ_MEMBER bool has_pair() const { return pair() < begin + to_block && pair() < pairs() && column() < columns; }
    HQ_MEMBER int row() const { return epilogue.first + 2 * pair(); }
    HQ_MEMBER bool has_both() const { return 2 * pair() + 1 < p.nrows; }
    HQ_MEMBER float* results_of(int c) const { return epilogue.dst + (int64_t)(first_column + c) * epilogue.nrows_dst; }
    // Activation `lane` of 32 of a column that become so.
    HQ_MEMBER int activation() const { return (gates() ? begin : 2 * begin) + thread_x(); }
    HQ_MEMBER int activations() const { return gates() ? pairs() : p.nrows; }
    HQ_MEMBER int groups() const { return (p.ncols + 31) / 32; }
    HQ_MEMBER const float* sums_of_squares() const {  // of the thread's column
        const int c = kColumns == 1 ? 0 : thread_y();
        return p.squares && c < columns ? p.squares + (int64_t)(first_column + c) * groups() : nullptr;
    }

    HQ_MEMBER void load_constants() {
        weight = kNorm && activation() < activations() ? epilogue.weight[activation()] : 1;
    }
    // Behind wait_for_inputs().
    HQ_MEMBER void load_inputs() {
        other[0] = 1, other[1] = 0, at = slot = 0;
        if (has_pair() && kNorm) {
            other[0] = results_of(column())[row()], other[1] = has_both() ? results_of(column())[row() + 1] : 0;
        } else if (has_pair() && ropes()) {
            const int head = row() / epilogue.head_dim, i = row() % epilogue.head_dim;
            at = epilogue.position[first_column + column()], slot = epilogue.slot[first_column + column()];
            const float* angle = epilogue.rope + (int64_t)at * epilogue.n_rot + i;
            if (head < epilogue.n_head + epilogue.n_head_kv && i < epilogue.n_rot)
                other[0] = angle[0], other[1] = angle[1];
        }
        const float* sums = sums_of_squares();
#pragma unroll
        for (int i = 0; i < kAhead; i++) {
            const int group = thread() % kLanes + kLanes * i;
            squares[i] = sums && group < groups() ? sums[group] : 0;
        }
    }
    // The sums of squares of a column, in front of a barrier.
    HQ_MEMBER void store_squares(float* to) const {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < kAhead; i++) sum += squares[i];
        if (const float* sums = sums_of_squares())
            for (int i = thread() % kLanes + kLanes * kAhead; i < groups(); i += kLanes) sum += sums[i];
        sum = team_sum(sum);
        if (thread_x() == 0) to[thread_y()] = sum;
    }
    // What the products of a column are multiplied by: 1 / rms.
    HQ_MEMBER float scale(const float* sums, int c) const {
        if (!p.squares) return 1;
        float sum = 0;
        for (int i = 0; i < (kColumns == 1 ? kTeams : 1); i++) sum += sums[c + i];
        return 1 / square_root(sum / (float)p.ncols + p.eps);
    }
    // Behind the barrier; `scaled` says whether the products are multiplied already.
    HQ_MEMBER void store(BlockResults<kTeams, kColumns>& results, bool scaled = false) const {
        if (has_pair()) {
            const int i = pair() - begin, c = column();
            const float s = scaled ? 1 : scale(results.squares, c);
            float a = results.v[2 * i][c] * s, b = results.v[2 * i + 1][c] * s;
            store_pair(a, b);
            if (gates()) results.stored[i][c] = a;
            if (kNorm) results.stored[2 * i][c] = a, results.stored[2 * i + 1][c] = b;
        }
        if (!kNorm && !gates()) return;
        barrier();
        if (thread_y() < columns) store_activation(first_column + thread_y(), results.stored[thread_x()][thread_y()]);
    }
    // a and b, the products, become what is stored.
    HQ_MEMBER void store_pair(float& a, float& b) const {
        float* dst = results_of(column());
        if (gates()) {
            if (epilogue.bias) a += epilogue.bias[pair()], b += epilogue.bias[pair() + pairs()];
            dst[pair()] = a = silu_or_gelu(epilogue.kind == kGate, a) * b;
            return;
        }
        if (epilogue.bias) a += epilogue.bias[row()], b += has_both() ? epilogue.bias[row() + 1] : 0;
        if (kNorm) a += other[0], b += other[1];
        if (ropes()) {
            const float first = a * other[0] - b * other[1];
            b = a * other[1] + b * other[0], a = first;
            if (row() >= epilogue.n_head * epilogue.head_dim) return store_in_cache(a, b);
        }
        dst[row()] = a;
        if (has_both()) dst[row() + 1] = b;
    }
    HQ_MEMBER void store_in_cache(float a, float b) const {
        const int head = row() / epilogue.head_dim - epilogue.n_head, n_head_kv = epilogue.n_head_kv;
        const bool value = head >= n_head_kv;
        const int64_t cache_row =
            ((int64_t)slot * n_head_kv + (value ? head - n_head_kv : head)) * epilogue.n_context + at;
        *(uint32_t*)((value ? epilogue.v_cache : epilogue.k_cache) + cache_row * epilogue.head_dim +
                     row() % epilogue.head_dim) = float_to_half(a) | (uint32_t)float_to_half(b) << 16;
    }
    // One of 32 that a team has.
    HQ_MEMBER void store_activation(int column, float v) const {
        const int i = activation();
        v = i < activations() ? v : 0;
        if (kNorm) {
            const float sum = team_sum(v * v);
            if (thread_x() == 0) epilogue.sums[(int64_t)column * ((p.nrows + 31) / 32) + i / 32] = sum;
            v *= weight;
        }
        if (kNorm && epilogue.normed && i < activations()) epilogue.normed[(int64_t)column * epilogue.n_padded + i] = v;
        if (epilogue.q)
            store_activations<1>(epilogue.q + column * column_bytes(epilogue.n_padded), epilogue.n_padded, i, &v, true);
    }
};
