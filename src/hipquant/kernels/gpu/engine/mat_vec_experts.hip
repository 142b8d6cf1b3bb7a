// A mixture of experts. `choose_experts_q8`: the experts of a token, by the router's logits.
// `sort_experts_q8`: columns of many tokens, sorted by expert. `mul_mat_vec_experts_*`: the weights of an expert times
// 1 or, of floats, up to 8 of its columns, and what follows (mat_vec_epilogue.h); many columns are multiplied in
// mat_mat_planes.hip. `mul_mat_vec_mixed_*`: the weights of all experts of a token, their products weighted and added;
// `add_experts_q8` does that with what there is for each.
#include "experts.h"
#include "types.h"
#include "mat_vec_epilogue.h"
#include "mat_vec_weights.h"

constexpr int kMaxExperts = 512;

// Block (token): the `n_used` experts of the greatest logits, of equal ones the first, and their weights: the softmax
// over those chosen. Each is a group of one column, which is the token's; or, where there are `counts`, of the columns
// of each expert, it is counted, and how many have been so before is its `column`. The rank of an expert is how many
// come before it; NaN come last.
HQ_KERNEL(128)
choose_experts_q8(const float* logits, int* experts, float* weights, ExpertGroup* groups, int* token, int* counts,
    int* column, int n_expert, int n_used) {
    HQ_SHARED struct {
        Float4 logits[kMaxExperts / 4];
        float chosen[32];
    } shared;
    let_next_begin();
    wait_for_inputs();
    const float* from = logits + (int64_t)block_x() * n_expert;
    const int fours = (n_expert + 3) / 4, first = (int)block_x() * n_used;
    for (int e = thread_x(); e < 4 * fours; e += 128) {
        const float v = e < n_expert ? from[e] : -infinity();
        shared.logits[e / 4].v[e % 4] = v == v ? v : -infinity();
    }
    barrier();
    for (int e = thread_x(); e < n_expert; e += 128) {
        const float v = shared.logits[e / 4].v[e % 4];
        int rank = 0;
        for (int i = 0; i < fours; i++) {
            const Float4 other = shared.logits[i];
#pragma unroll
            for (int j = 0; j < 4; j++) rank += other.v[j] > v || (other.v[j] == v && 4 * i + j < e);
        }
        if (rank >= n_used) continue;
        shared.chosen[rank] = from[e];
        const int choice = first + rank;
        experts[choice] = e;
        if (counts) column[choice] = add_atomic(counts + e, 1);
        else token[choice] = (int)block_x(), groups[choice] = {e, choice, 1, 0};
    }
    barrier();
    const int j = thread_x();
    if (j >= 32) return;
    const float each = exp_(shared.chosen[j < n_used ? j : 0] - shared.chosen[0]), weight = j < n_used ? each : 0;
    const float total = team_sum(weight);
    if (j < n_used) weights[first + j] = weight / total;
}

// One block, a thread an expert: groups of up to `most` columns, of the same expert, for `ntokens` tokens; those
// without columns are last. The `column` of a choice of a token, so far counted from the first one of its expert,
// becomes that of all; `token` is the way back. In the end `counts` are 0 again.
HQ_KERNEL(kMaxExperts)
sort_experts_q8(const int* experts, int* counts, ExpertGroup* groups, int* token, int* column, int n_expert, int n_used,
    int ntokens, int most, int ngroups) {
    constexpr int kAtOnce = 8;
    struct Sums {  // of an expert, or of those before it
        int columns, groups;
    };
    HQ_SHARED Sums of[kMaxExperts];
    HQ_SHARED int before[kMaxExperts];
    let_next_begin();
    wait_for_inputs();
    const int expert = thread_x(), choices = n_used * ntokens;
    const int columns = expert < n_expert ? counts[expert] : 0;
    of[expert] = {columns, (columns + most - 1) / most};
    barrier();
    Sums sums = {};
    for (int e = 0; e < expert && e < n_expert; e++) sums.columns += of[e].columns, sums.groups += of[e].groups;
    before[expert] = sums.columns;
    for (int at = 0; at < columns; at += most)
        groups[sums.groups++] = {expert, sums.columns + at, columns - at < most ? columns - at : most, 0};
    if (expert < n_expert) counts[expert] = 0;
    HQ_SHARED int used;
    if (expert == kMaxExperts - 1) used = sums.groups;
    barrier();
    for (int i = used + expert; i < ngroups; i += kMaxExperts) groups[i] = {};
#pragma unroll 1
    for (int first = expert; first < choices; first += kAtOnce * kMaxExperts) {
        int at[kAtOnce], of_choice[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {  // all loads before the first store
            const int i = first + k * kMaxExperts < choices ? first + k * kMaxExperts : first;
            of_choice[k] = experts[i], at[k] = column[i];
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
            const int i = first + k * kMaxExperts;
            if (i >= choices) break;
            at[k] += before[of_choice[k]];
            column[i] = at[k], token[at[k]] = i / n_used;
        }
    }
}

// Rows of an expert that a team takes at once; a lane has units `lane`, `lane` + 32, ... of them, the first one of the
// next rows on its way.
template <class W, int kRows> struct ExpertRows {
    PlaneRow rows[kRows];
    typename W::Unit ahead[kRows];

    // Rows `first` and on of a block whose first pair is `begin`.
    HQ_MEMBER void start(const Product& p, uint32_t matrix_rows, int expert, int kind, int begin, int first) {
        const uint32_t units = (uint32_t)(p.ncols + kUnitWeights - 1) / kUnitWeights, lane = (uint32_t)thread_x();
        const int pairs = (p.nrows + 1) / 2;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            const uint32_t row = row_of_block(kind, begin, first + r, pairs, p.nrows);
            rows[r] = {(uint8_t*)p.x, matrix_rows, units, (uint32_t)expert * (uint32_t)p.nrows + row};
            ahead[r] = W::load(rows[r], lane < W::count(units) ? lane : W::count(units) - 1);
        }
    }
    // Adds the products with columns from[c] to acc[column][row].
    template <int kColumns> HQ_MEMBER void multiply(float* acc, const Product& p, const int* from) {
        const uint32_t count = W::count(rows[0].units);
        for (uint32_t u = (uint32_t)thread_x(); u < count; u += 32) {
#pragma unroll
            for (int c = 0; c < kColumns; c++) {
                const auto y = W::load_column(p.y, p.n_padded, from[c], u);
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    float& sum = acc[kRows * c + r];
                    sum = W::add(ahead[r], y, sum);
                    if (kColumns > 1) sum = computed_here(sum);  // or all columns are loaded first
                }
            }
            if (u + 32 >= count) break;
#pragma unroll
            for (int r = 0; r < kRows; r++) ahead[r] = W::load(rows[r], u + 32);
        }
    }
};

constexpr int kExpertTeams = 8, kExpertPairs = 32;

// Block (32 pairs of rows, group). Column c of the results is row token[c] of the activations; c, where `token` is
// null.
template <class W, int kColumns>
HQ_INLINE void mul_mat_vec_experts(
    Product p, Epilogue epilogue, int n_expert, const ExpertGroup* groups, const int* token) {
    constexpr int kRows = kColumns == 1 && kDotInstructions ? 4 : 2;
    HQ_SHARED BlockResults<kExpertTeams, kColumns> results;
    let_next_begin();
    wait_for_inputs();
    const ExpertGroup group = groups[block_y()];
    if (group.columns == 0) return;
    const int begin = (int)block_x() * kExpertPairs, team = thread_y();
    int from[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; c++) {
        const int column = group.first + (c < group.columns ? c : group.columns - 1);
        from[c] = token ? token[column] : column;
    }
    if (p.squares) p.squares += (int64_t)from[0] * ((p.ncols + 31) / 32);  // of one column
    epilogue.dst += (int64_t)group.first * epilogue.nrows_dst;
    if (epilogue.q) epilogue.q += group.first * column_bytes(epilogue.n_padded);
    const uint32_t matrix_rows = (uint32_t)n_expert * (uint32_t)p.nrows;
    ExpertRows<W, kRows> weights;
    weights.start(p, matrix_rows, group.expert, epilogue.kind, begin, team * kRows);
    EpilogueThread<kExpertTeams, kColumns, false> behind{
        p, epilogue, 0, group.columns, begin, kExpertPairs, 0, {}, {}, 0, 0};
    behind.load_constants();
    behind.load_inputs();
#pragma unroll 1
    for (int first = team * kRows; first < 2 * kExpertPairs; first += kExpertTeams * kRows) {
        float acc[kRows * kColumns] = {};
        weights.template multiply<kColumns>(acc, p, from);
        const int next = first + kExpertTeams * kRows;
        if (next < 2 * kExpertPairs) weights.start(p, matrix_rows, group.expert, epilogue.kind, begin, next);
        const int which = team_sums<kRows * kColumns>(acc);
        if (which >= 0) results.v[first + which % kRows][which / kRows] = acc[0];
    }
    behind.store_squares(results.squares);
    barrier();
    behind.store(results);
}

// Units of the rows of a token's experts, one expert after the other, as those of one may be too few for a team: of
// choice `j`, unit `u` of two rows and of the column that is the choice's.
template <class W> struct MixedUnits {
    static constexpr int kRows = 2;
    int j;
    uint32_t u;
    typename W::Unit w[kRows];
    typename W::Column y;

    // Goes on to unit u, counted from choice j on; false behind the last one.
    HQ_MEMBER bool load(const Product& p, uint32_t matrix_rows, int first, int column, int n_used, const int* experts) {
        const uint32_t units = (uint32_t)(p.ncols + kUnitWeights - 1) / kUnitWeights, count = W::count(units);
        for (; u >= count && j < n_used; j++) u -= count;
        if (j >= n_used) return false;
        const uint32_t expert = (uint32_t)experts[column + j];
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            const uint32_t row = (uint32_t)(first + r < p.nrows ? first + r : p.nrows - 1);
            w[r] = W::load({(uint8_t*)p.x, matrix_rows, units, expert * (uint32_t)p.nrows + row}, u);
        }
        y = W::load_column(p.y, p.n_padded, column + j, u);
        return true;
    }
};

// Block (4 teams of 2 rows, token): column token * n_used + j of the activations is that of the token's choice j.
template <class W>
HQ_INLINE void mul_mat_vec_mixed(
    const Product& p, float* dst, int n_expert, int n_used, const int* experts, const float* weights) {
    constexpr int kRows = MixedUnits<W>::kRows;
    let_next_begin();
    wait_for_inputs();
    const int column = (int)block_y() * n_used, first = ((int)block_x() * 4 + thread_y()) * kRows;
    const uint32_t matrix_rows = (uint32_t)(n_expert * p.nrows);
    float acc[kRows] = {};
    MixedUnits<W> ahead;
    ahead.j = 0, ahead.u = (uint32_t)thread_x();
    bool more = ahead.load(p, matrix_rows, first, column, n_used, experts);
    while (more) {
        const MixedUnits<W> here = ahead;
        const float weight = weights[column + here.j];
        ahead.u += 32;
        more = ahead.load(p, matrix_rows, first, column, n_used, experts);
#pragma unroll
        for (int r = 0; r < kRows; r++) acc[r] = __builtin_fmaf(W::add(here.w[r], here.y, 0), weight, acc[r]);
    }
    const int which = team_sums<kRows>(acc);
    if (which >= 0 && first + which < p.nrows) dst[(int64_t)block_y() * p.nrows + first + which] = acc[0];
}

// Block (256 values, token): dst = the sum of columns of x, those of the token's choices, weighted.
HQ_KERNEL(256) add_experts_q8(const float* x, const float* weights, const int* column, float* dst, int n, int n_used) {
    let_next_begin();
    wait_for_inputs();
    const int i = (int)block_x() * 256 + thread_x();
    if (i >= n) return;
    float sum = 0;
    for (int j = (int)block_y() * n_used, end = j + n_used; j < end; j++)
        sum = __builtin_fmaf(weights[j], x[(int64_t)column[j] * n + i], sum);
    dst[(int64_t)block_y() * n + i] = sum;
}

// Blocks that shall be resident on an NVIDIA multiprocessor, as registers allow.
template <class W> constexpr int resident_experts(int columns) {
    return columns == 1 && sizeof(typename W::Unit) <= 44 ? 2 : 1;
}
#define HQ_EXPERTS(suffix, W, columns)                                                                              \
    HQ_RESIDENT_KERNEL(32 * kExpertTeams, resident_experts<W>(columns))                                             \
    mul_mat_vec_experts_##suffix##_##columns(const void* x, const void* y, const float* squares, float eps,         \
        int ncols_x, int nrows_x, int n_expert, int n_padded, const int* groups, const int* token, float* dst,      \
        int first, int nrows_dst, int epilogue, void* q, int n_padded_q) {                                          \
        mul_mat_vec_experts<W, columns>({x, y, squares, eps, ncols_x, nrows_x, columns, n_padded},                  \
            {epilogue, nullptr, dst, first, nrows_dst, nullptr, nullptr, (uint8_t*)q, nullptr, n_padded_q, nullptr, \
                nullptr, nullptr, nullptr, nullptr, 0, 0, 1, 0, 0, kExpertPairs},                                   \
            n_expert, (const ExpertGroup*)groups, token);                                                           \
    }
#define HQ_ENTRIES(suffix, W)                                                                                    \
    HQ_EXPERTS(suffix, W, 1)                                                                                     \
    HQ_KERNEL(128)                                                                                               \
    mul_mat_vec_mixed_##suffix(const void* x, const void* y, int ncols_x, int nrows_x, int n_expert, int n_used, \
        int n_padded, const int* experts, const float* weights, float* dst) {                                    \
        mul_mat_vec_mixed<W>(                                                                                    \
            {x, y, nullptr, 0, ncols_x, nrows_x, 1, n_padded}, dst, n_expert, n_used, experts, weights);         \
    }
#define HQ_QUANTIZED(suffix, Q) HQ_ENTRIES(suffix, QuantizedWeights<Q>)
#define HQ_FLOATS(suffix, F)            \
    HQ_ENTRIES(suffix, FloatWeights<F>) \
    HQ_EXPERTS(suffix, FloatWeights<F>, 8)
HQ_PLANES(HQ_QUANTIZED)
HQ_FLOATS(f32, WordsF32)
HQ_FLOATS(f16, WordsF16)
HQ_FLOATS(bf16, WordsBF16)
#undef HQ_EXPERTS
#undef HQ_ENTRIES
#undef HQ_QUANTIZED
#undef HQ_FLOATS
