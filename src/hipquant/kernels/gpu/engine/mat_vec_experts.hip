// Products with the weights of a mixture of experts. `mul_mat_vec_experts_*`: those of an expert times 1 or, of floats,
// up to 8 of its columns, and what follows (mat_vec_epilogue.h); many columns are multiplied in mat_mat_planes.hip.
// `mul_mat_vec_mixed_*`: those of all experts of a token, their products weighted, added, and normed.
#include "experts.h"
#include "types.h"
#include "mat_vec_epilogue.h"
#include "mat_vec_weights.h"

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
// Rows of a team that share the loads of their columns, as registers allow: where all of them do, nothing waits.
template <class W> constexpr int expert_rows_at_once(int columns) {
    if (columns > 1 || !kDotInstructions) return 2;
    return kMatrixUnits && sizeof(typename W::Unit) <= 40 ? 2 * kExpertPairs / kExpertTeams : 4;
}

// Block (32 pairs of rows, group). Column c of the results is row token[c] of the activations; c, where `token` is
// null.
template <class W, int kColumns>
HQ_INLINE void mul_mat_vec_experts(
    Product p, Epilogue epilogue, int n_expert, const ExpertGroup* groups, const int* token) {
    constexpr int kRows = expert_rows_at_once<W>(kColumns);
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
// choice `j`, unit `u` of kRows rows.
template <class W, int kRows> struct MixedUnits {
    int j;
    uint32_t u;
    typename W::Unit w[kRows];

    // Goes on to unit u, counted from choice j on, of rows `first` and on of a block that begins with row `begin`;
    // false behind the last one.
    HQ_MEMBER bool load(const Product& p, uint32_t matrix_rows, int begin, int first, const int* experts, int n_used) {
        const uint32_t units = (uint32_t)(p.ncols + kUnitWeights - 1) / kUnitWeights, count = W::count(units);
        for (; u >= count && j < n_used; j++) u -= count;
        if (j >= n_used) return false;
        const uint32_t from = (uint32_t)experts[j] * (uint32_t)p.nrows + (uint32_t)begin;
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            const uint32_t row = (uint32_t)((first + r < p.nrows ? first + r : p.nrows - 1) - begin);
            w[r] = W::load({(uint8_t*)p.x, matrix_rows, units, from, row}, u);
        }
        return true;
    }
};

constexpr int kMixedTeams = 16, kMixedRows = 32;  // rows: as many as become activations that have one d
// Rows that share the loads of their columns, as registers allow: 16 teams leave each thread 128.
template <class W> constexpr int mixed_rows_at_once() { return kMatrixUnits && sizeof(typename W::Unit) <= 40 ? 4 : 2; }

// Block (32 rows, token): column token * n_used + j of the activations is that of the token's choice j.
template <class W>
HQ_INLINE void mul_mat_vec_mixed(
    const Product& p, const Epilogue& epilogue, int n_expert, int n_used, const int* experts, const float* weights) {
    constexpr int kRows = mixed_rows_at_once<W>(), kShare = kMixedTeams * kRows / kMixedRows;  // teams of the same rows
    HQ_SHARED float partial[kMixedTeams][kRows];
    HQ_SHARED BlockResults<kMixedTeams, 1> results;
    let_next_begin();
    const int token = (int)block_y(), column = token * n_used, team = thread_y(), begin = (int)block_x() * kMixedRows;
    const int first = begin + team / kShare * kRows;
    const uint32_t matrix_rows = (uint32_t)n_expert * (uint32_t)p.nrows;
    EpilogueThread<kMixedTeams, 1, kNormed> behind{p, epilogue, token, 1, begin / 2, kMixedRows / 2, 0, {}, {}, 0, 0};
    behind.load_constants();
    wait_for_inputs();
    float acc[kRows] = {};
    MixedUnits<W, kRows> here;
    here.j = 0, here.u = (uint32_t)(team % kShare * 32 + thread_x());
    bool more = here.load(p, matrix_rows, begin, first, experts + column, n_used);
    behind.load_inputs();
    while (more) {
        MixedUnits<W, kRows> ahead;
        ahead.j = here.j, ahead.u = here.u + 32 * kShare;
        more = ahead.load(p, matrix_rows, begin, first, experts + column, n_used);
        const auto y = W::load_column(p.y, p.n_padded, column + here.j, here.u);
        const float weight = weights[column + here.j];
#pragma unroll
        for (int r = 0; r < kRows; r++) acc[r] = __builtin_fmaf(W::add(here.w[r], y, 0), weight, acc[r]);
        here = ahead;
    }
    const int which = team_sums<kRows>(acc);
    if (which >= 0) partial[team][which] = acc[0];
    barrier();
    const int row = team * 32 + thread_x();
    if (row < kMixedRows) {
        float sum = 0;
        for (int t = 0; t < kShare; t++) sum += partial[row / kRows * kShare + t][row % kRows];
        results.v[row][0] = sum;
    }
    barrier();
    behind.store(results);
}

#define HQ_EXPERTS(suffix, W, columns)                                                                              \
    HQ_RESIDENT_KERNEL(32 * kExpertTeams, columns == 1 ? 2 : 1)                                                     \
    mul_mat_vec_experts_##suffix##_##columns(const void* x, const void* y, const float* squares, float eps,         \
        int ncols_x, int nrows_x, int n_expert, int n_padded, const int* groups, const int* token, float* dst,      \
        int first, int nrows_dst, int epilogue, void* q, int n_padded_q) {                                          \
        mul_mat_vec_experts<W, columns>({x, y, squares, eps, ncols_x, nrows_x, columns, n_padded},                  \
            {epilogue, nullptr, dst, first, nrows_dst, nullptr, nullptr, (uint8_t*)q, nullptr, n_padded_q, nullptr, \
                nullptr, nullptr, nullptr, nullptr, 0, 0, 1, 0, 0, kExpertPairs},                                   \
            n_expert, (const ExpertGroup*)groups, token);                                                           \
    }
#define HQ_ENTRIES(suffix, W)                                                                                          \
    HQ_EXPERTS(suffix, W, 1)                                                                                           \
    HQ_RESIDENT_KERNEL(32 * kMixedTeams, 1)                                                                            \
    mul_mat_vec_mixed_##suffix(const void* x, const void* y, int ncols_x, int nrows_x, int n_expert, int n_used,       \
        int n_padded, const int* experts, const float* weights, float* dst, int nrows_dst, const float* weight,        \
        float* normed, void* q, float* sums, int n_padded_q) {                                                         \
        mul_mat_vec_mixed<W>({x, y, nullptr, 0, ncols_x, nrows_x, 1, n_padded},                                        \
            {kAddAndNorm, nullptr, dst, 0, nrows_dst, weight, normed, (uint8_t*)q, sums, n_padded_q, nullptr, nullptr, \
                nullptr, nullptr, nullptr, 0, 0, 1, 0, 0, kMixedRows / 2},                                             \
            n_expert, n_used, experts, weights);                                                                       \
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
