// A mixture of experts. `choose_experts_q8`: the experts of a token, by the router's logits.
// `sort_experts_q8`: columns of many tokens, sorted by expert. `mul_mat_vec_experts_*`: the weights of an expert times
// 1 or up to 8 of its columns, and what follows (mat_vec_epilogue.h). `mul_mat_vec_mixed_*`: those of all experts of a
// token, weighted and added; `add_experts_q8` does that with what there is for each.
#include "types.h"
#include "mat_vec_epilogue.h"
#include "mat_vec_weights.h"

// Columns `first` to `first` + `columns` - 1 are an expert's; there may be none.
struct alignas(16) ExpertGroup {
    int expert, first, columns, unused;
};

constexpr int kMaxExperts = 512, kMaxChoices = 512 * 32, kGroupColumns = 8;

// Block (token): the `n_used` experts of the greatest logits, of equal ones the first, and their weights: the softmax
// over those chosen. Each is a group of one column, which is the token's. The rank of an expert is how many come before
// it; NaN come last.
HQ_KERNEL(128)
choose_experts_q8(
    const float* logits, int* experts, float* weights, ExpertGroup* groups, int* token, int n_expert, int n_used) {
    HQ_SHARED struct {
        Float4 logits[kMaxExperts / 4];
        float chosen[32];
    } shared;
    let_next_begin();
    wait_for_inputs();
    const float* from = logits + (int64_t)block_x() * n_expert;
    const int fours = (n_expert + 3) / 4, column = (int)block_x() * n_used;
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
        experts[column + rank] = e, token[column + rank] = (int)block_x();
        groups[column + rank] = {e, column + rank, 1, 0};
    }
    barrier();
    const int j = thread_x();
    if (j >= 32) return;
    const float each = exp_(shared.chosen[j < n_used ? j : 0] - shared.chosen[0]), weight = j < n_used ? each : 0;
    const float total = team_sum(weight);
    if (j < n_used) weights[column + j] = weight / total;
}

// f(choice) for each of those in shared memory, whose number is filled up to a multiple of 8, that is of an expert.
template <class F> HQ_INLINE void each_choice(const uint16_t* chosen, int choices, int expert, F f) {
    for (int i = 0; i < choices; i += 8) {
        const Words<16> eight = load_shared<16, 16>(chosen + i);
#pragma unroll
        for (int j = 0; j < 8; j++)
            if ((int)(eight.w[j / 2] >> j % 2 * 16 & 0xFFFF) == expert) f(i + j);
    }
}

// One block, a thread an expert: groups of up to 8 columns, of the same expert, for `ntokens` tokens; those without
// columns are last. `column` is that of each choice of a token, `token` the way back.
HQ_KERNEL(kMaxExperts)
sort_experts_q8(
    const int* experts, ExpertGroup* groups, int* token, int* column, int n_used, int ntokens, int ngroups) {
    HQ_SHARED struct alignas(16) {
        uint16_t chosen[kMaxChoices];
        int columns[kMaxExperts], used;
    } shared;
    let_next_begin();
    const int expert = thread_x(), choices = n_used * ntokens;
    wait_for_inputs();
    for (int i = expert; i < (choices + 7) / 8 * 8; i += kMaxExperts)
        shared.chosen[i] = i < choices ? (uint16_t)experts[i] : 0xFFFF;
    barrier();
    int columns = 0, first = 0, group = 0;
    each_choice(shared.chosen, choices, expert, [&](int) { columns++; });
    shared.columns[expert] = columns;
    barrier();
    for (int e = 0; e < expert; e++) {
        first += shared.columns[e];
        group += (shared.columns[e] + kGroupColumns - 1) / kGroupColumns;
    }
    for (int at = 0; at < columns; at += kGroupColumns)
        groups[group++] = {expert, first + at, columns - at < kGroupColumns ? columns - at : kGroupColumns, 0};
    if (expert == kMaxExperts - 1) shared.used = group;
    barrier();
    for (int i = shared.used + expert; i < ngroups; i += kMaxExperts) groups[i] = {};
    each_choice(shared.chosen, choices, expert, [&](int i) { column[i] = first, token[first++] = i / n_used; });
}

// Rows of an expert that a team takes at once; a lane has units `lane`, `lane` + 32, ... of them, the first one of the
// next rows on its way.
template <class W, int kRows> struct ExpertRows {
    PlaneRow rows[kRows];
    typename W::Unit ahead[kRows];

    // Rows `first` and on of a block whose first pair is `begin`.
    HQ_MEMBER void start(const Product& p, uint32_t matrix_rows, int expert, int kind, int begin, int first) {
        const uint32_t units = (uint32_t)(p.ncols + kUnitWeights - 1) / kUnitWeights, lane = (uint32_t)thread_x();
        const BlockRows block(kind, begin, p.nrows);
        const uint32_t from = (uint32_t)expert * (uint32_t)p.nrows + block.first;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            rows[r] = {(uint8_t*)p.x, matrix_rows, units, from, block.row(first / 2 + r / 2, r % 2)};
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
    EpilogueThread<kExpertTeams, kColumns, kGeneral> behind{
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
    HQ_EXPERTS(suffix, W, 8)                                                                                     \
    HQ_KERNEL(128)                                                                                               \
    mul_mat_vec_mixed_##suffix(const void* x, const void* y, int ncols_x, int nrows_x, int n_expert, int n_used, \
        int n_padded, const int* experts, const float* weights, float* dst) {                                    \
        mul_mat_vec_mixed<W>(                                                                                    \
            {x, y, nullptr, 0, ncols_x, nrows_x, 1, n_padded}, dst, n_expert, n_used, experts, weights);         \
    }
#define HQ_QUANTIZED(suffix, Q) HQ_ENTRIES(suffix, QuantizedWeights<Q>)
HQ_PLANES(HQ_QUANTIZED)
HQ_ENTRIES(f32, FloatWeights<WordsF32>)
HQ_ENTRIES(f16, FloatWeights<WordsF16>)
HQ_ENTRIES(bf16, FloatWeights<WordsBF16>)
#undef HQ_EXPERTS
#undef HQ_ENTRIES
#undef HQ_QUANTIZED
