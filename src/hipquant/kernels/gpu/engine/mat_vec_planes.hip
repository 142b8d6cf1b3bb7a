// `mul_mat_vec_{planes,norm,gate}_*`: weights in planes times 1 to 8 columns of activations, and what follows
// (mat_vec_epilogue.h).
// One, two or four teams of a block share two or four rows; a lane takes a unit of each at a time, times all columns.
#include "types.h"
#include "mat_vec_epilogue.h"
#include "mat_vec_weights.h"

// Log2 of the teams that share a group of rows, of which all teams of a block would take `at_once`: as few as can be,
// up to four, with something to do for each team in `rows` rows.
HQ_INLINE int log2_share(uint32_t units, int rows, int at_once) {
    int log2 = 0;
    while (log2 < 2 && units > 32u << log2 && rows % (at_once >> log2)) log2++;
    return log2;
}

// Rows that share their columns, of which a thread takes units `lane`, `lane` + `lanes`, ... of `count`, loaded one in
// advance.
template <class W, int kRows> struct Rows {
    PlaneRow rows[kRows];
    uint32_t lane, lanes, count;
    typename W::Unit ahead[kRows];

    // Rows `first` and on of a block, the last one of the matrix again where it ends.
    HQ_MEMBER void begin_rows(const Product& p, uint32_t units, const BlockRows& block, int first) {
#pragma unroll
        for (int r = 0; r < kRows; r++) {
            const uint32_t row = kRows > 1 ? block.row(first / 2 + r / 2, r % 2) : block.row(first / 2, first % 2);
            rows[r] = {(uint8_t*)p.x, (uint32_t)p.nrows, units, block.first, row};
            ahead[r] = W::load(rows[r], lane < count ? lane : count - 1);
        }
    }
    // Adds the products with `columns` of kColumns columns from `first` on to acc[column][row].
    template <int kColumns> HQ_MEMBER void multiply(float* acc, const Product& p, int first, int columns) {
        for (uint32_t u = lane; u < count; u += lanes) {
#pragma unroll
            for (int c = 0; c < kColumns; c++) {
                const auto y = W::load_column(p.y, p.n_padded, first + (c < columns ? c : columns - 1), u);
#pragma unroll
                for (int r = 0; r < kRows; r++) {
                    float& sum = acc[kRows * c + r];
                    sum = W::add(ahead[r], y, sum);
                    if (kColumns > 1) sum = computed_here(sum);  // or all columns are loaded first
                }
            }
            if (u + lanes >= count) break;
#pragma unroll
            for (int r = 0; r < kRows; r++) ahead[r] = W::load(rows[r], u + lanes);
        }
    }
};

// Teams of a block: of what becomes 32 activations a row there are few blocks, and they shall be large.
constexpr int teams_of(int columns, Form form) { return columns > 2 || form == kGated ? 8 : form == kNormed ? 16 : 4; }
// Rows that share the loads of their columns, as registers allow: on older CDNA, those of 16 teams leave each thread
// 128. Where there are few blocks, more teams are better than more rows of each.
constexpr int rows_at_once(int columns, Form form) {
    const int rows = columns == 1 && kDotInstructions && form != kGated ? 4 : 2;
    return form == kNormed && columns <= 2 && !kMatrixUnits ? rows / 2 : rows;
}
// A block takes its rows in turns; the next turn's weights are on their way when the sums of one are put together.
template <class W, int kColumns, Form kForm>
HQ_INLINE void mul_mat_vec_planes(const Product& p, const Epilogue& epilogue) {
    constexpr int kTeams = teams_of(kColumns, kForm);
    constexpr int kRows = rows_at_once(kColumns, kForm);
    HQ_SHARED float partial[kTeams][kRows * kColumns];
    HQ_SHARED BlockResults<kTeams, kColumns> results;
    let_next_begin();
    const uint32_t units = (uint32_t)(p.ncols + kUnitWeights - 1) / kUnitWeights;
    const int to_block = epilogue.pairs_to_block, pairs = (p.nrows + 1) / 2, team = thread_y();
    const int log2 = log2_share(units, 2 * to_block, kTeams * kRows), share = 1 << log2;
    const int at_once = (kTeams >> log2) * kRows;
    const int skipped = (int)block_y() * kColumns, left = p.columns - skipped;
    const int columns = left < kColumns ? left : kColumns, begin = (int)block_x() * to_block;
    const int thread = team * 32 + thread_x(), c = thread % kColumns, at = thread / kColumns;
    Rows<W, kRows> weights;
    weights.lanes = 32u << log2, weights.lane = (uint32_t)((team & (share - 1)) * 32 + thread_x());
    weights.count = W::count(units);
    const BlockRows block(epilogue.rows_of<kForm>(), begin, p.nrows);
    weights.begin_rows(p, units, block, (team >> log2) * kRows);
    EpilogueThread<kTeams, kColumns, kForm> behind{p, epilogue, skipped, columns, begin, to_block, 0, {}, {}, 0, 0};
    behind.load_constants();
    wait_for_inputs();
    behind.load_inputs();
#pragma unroll 1
    for (int first = 0; first < 2 * to_block; first += at_once) {
        float acc[kRows * kColumns] = {};
        weights.template multiply<kColumns>(acc, p, skipped, columns);
        const int next = first + at_once;
        if (next < 2 * to_block) weights.begin_rows(p, units, block, next + (team >> log2) * kRows);
        const int which = team_sums<kRows * kColumns>(acc);
        if (share == 1) {
            if (which >= 0) results.v[first + team * kRows + which % kRows][which / kRows] = acc[0];
            if (begin + next / 2 >= pairs) break;
            continue;
        }
        if (which >= 0) partial[team][which] = acc[0];
        barrier();
        if (at < at_once) {
            float v = 0;
            for (int t = 0; t < share; t++) v += partial[(at / kRows << log2) + t][kRows * c + at % kRows];
            results.v[first + at][c] = v;
        }
        if (begin + next / 2 >= pairs) break;
        if (next < 2 * to_block) barrier();  // what is in shared memory has been read
    }
    behind.store_squares(results.squares);
    barrier();
    behind.store(results);
}

#if HQ_HALF_MATRICES
#include "mat_vec_tiles.h"
#endif

template <class Q, int kColumns, Form kForm> HQ_INLINE void mul_quantized(const Product& p, const Epilogue& epilogue) {
#if HQ_HALF_MATRICES
    if constexpr (kColumns > 2) return mul_mat_vec_tiles<Q, kColumns, kForm>(p, epilogue);
#endif
    mul_mat_vec_planes<QuantizedWeights<Q>, kColumns, kForm>(p, epilogue);
}
template <class F, int kColumns, Form kForm> HQ_INLINE void mul_floats(const Product& p, const Epilogue& epilogue) {
    mul_mat_vec_planes<FloatWeights<F>, kColumns, kForm>(p, epilogue);
}

template <class Q> constexpr int unit_bytes(typename Q::Planes* = nullptr) { return sizeof(typename Q::Planes::Unit); }
template <class F> constexpr int unit_bytes(typename F::IsFloat* = nullptr) { return 64; }

// Blocks that shall be resident on an NVIDIA multiprocessor (H200, 2026-11-23): registers for 16 teams, for 20 where
// they suffice, for 24 of two rows; of many columns whose products are normed there is one block anyway.
// wiring/gpu_engine.py knows it, too.
template <class W> constexpr int resident(int columns, Form form) {
    if (form == kGated) return 3;
    if (columns > 2) return form == kNormed ? 1 : 2;
    return form == kNormed ? 1 : columns == 1 && unit_bytes<W>() <= 40 ? 5 : 4;
}
#define HQ_MAT_VEC_KERNEL(W, columns, form) HQ_RESIDENT_KERNEL(32 * teams_of(columns, form), resident<W>(columns, form))
#define HQ_ENTRY(suffix, multiply, W, columns)                                                                        \
    HQ_MAT_VEC_KERNEL(W, columns, kGeneral)                                                                           \
    mul_mat_vec_planes_##suffix##_##columns(const void* x, const void* y, const float* squares, float eps,            \
        int ncols_x, int nrows_x, int ncols_y, int n_padded, const float* bias, float* dst, int first, int nrows_dst, \
        int epilogue, int rows_to_block, void* q, int n_padded_q, uint16_t* k_cache, uint16_t* v_cache,               \
        const float* rope, const int* position, const int* slot, int n_head, int n_head_kv, int head_dim, int n_rot,  \
        int n_context) {                                                                                              \
        multiply<W, columns, kGeneral>({x, y, squares, eps, ncols_x, nrows_x, ncols_y, n_padded},                     \
            {epilogue, bias, dst, first, nrows_dst, nullptr, nullptr, (uint8_t*)q, nullptr, n_padded_q, k_cache,      \
                v_cache, rope, position, slot, n_head, n_head_kv, head_dim, n_rot, n_context, rows_to_block / 2});    \
    }                                                                                                                 \
    HQ_MAT_VEC_KERNEL(W, columns, kNormed)                                                                            \
    mul_mat_vec_norm_##suffix##_##columns(const void* x, const void* y, const float* squares, float eps, int ncols_x, \
        int nrows_x, int ncols_y, int n_padded, const float* bias, float* dst, int nrows_dst, const float* weight,    \
        float* normed, void* q, float* sums, int n_padded_q) {                                                        \
        multiply<W, columns, kNormed>({x, y, squares, eps, ncols_x, nrows_x, ncols_y, n_padded},                      \
            {kAddAndNorm, bias, dst, 0, nrows_dst, weight, normed, (uint8_t*)q, sums, n_padded_q, nullptr, nullptr,   \
                nullptr, nullptr, nullptr, 0, 0, 1, 0, 0, kUnitHalf / 2});                                            \
    }
#define HQ_GATE(suffix, multiply, W)                                                                                  \
    HQ_MAT_VEC_KERNEL(W, 1, kGated)                                                                                   \
    mul_mat_vec_gate_##suffix##_1(const void* x, const void* y, const float* squares, float eps, int ncols_x,         \
        int nrows_x, int ncols_y, int n_padded, const float* bias, float* dst, int nrows_dst, int epilogue, void* q,  \
        int n_padded_q) {                                                                                             \
        multiply<W, 1, kGated>({x, y, squares, eps, ncols_x, nrows_x, ncols_y, n_padded},                             \
            {epilogue, bias, dst, 0, nrows_dst, nullptr, nullptr, (uint8_t*)q, nullptr, n_padded_q, nullptr, nullptr, \
                nullptr, nullptr, nullptr, 0, 0, 1, 0, 0, kUnitHalf});                                                \
    }
#define HQ_ENTRIES(suffix, multiply, W) \
    HQ_ENTRY(suffix, multiply, W, 1)    \
    HQ_ENTRY(suffix, multiply, W, 2)    \
    HQ_ENTRY(suffix, multiply, W, 4)    \
    HQ_ENTRY(suffix, multiply, W, 8)    \
    HQ_GATE(suffix, multiply, W)
#define HQ_QUANTIZED(suffix, Q) HQ_ENTRIES(suffix, mul_quantized, Q)
HQ_PLANES(HQ_QUANTIZED)
HQ_ENTRIES(f32, mul_floats, WordsF32)
HQ_ENTRIES(f16, mul_floats, WordsF16)
HQ_ENTRIES(bf16, mul_floats, WordsBF16)
#undef HQ_MAT_VEC_KERNEL
#undef HQ_ENTRY
#undef HQ_GATE
#undef HQ_ENTRIES
#undef HQ_QUANTIZED
