// `mul_mat_vec_*`: weights times 1 to 8 columns of q8_1. A block of the grid takes one row (one column) or two rows;
// its lanes take units of the rows in turn, all columns of each, and the sums meet in shared memory.
#include "types.h"

// Strip s of a unit times its part of a column, added to acc: sums of products scaled by d of q8_1 and the sub-scale.
// `y` is the block of activations of strip 0, `part` where the strip begins in its own.
template <class Q>
HQ_INLINE void add_strip(const typename Q::Unit& w, int s, const uint8_t* y, uint32_t part, float& acc, float& low) {
    const uint8_t* block = y + s * (Q::kStep / 32) * (int)sizeof(q8_1);
    const uint32_t ds = load_words<4>(block).w[0];
    const auto q = load_words<Q::kStrip>(y + part + (s * (Q::kStep / 32) * (int)sizeof(q8_1) + 4));
    int sum = 0;
#pragma unroll
    for (int i = 0; i < Q::kStrip / 4; i++) sum = dot4(Q::word(w, s, i), q.w[i], sum);
    float scale = half_to_float(ds);
    if constexpr (Q::kMin) {
        float total;
        if constexpr (Q::kGroup == 32) {  // of the whole block, once
            total = part == 0 ? half_to_float(ds >> 16) : 0;
        } else {
            int ones = 0;
#pragma unroll
            for (int i = 0; i < Q::kStrip / 4; i++) ones = dot4(0x01010101, q.w[i], ones);
            total = scale * (float)ones;
        }
        if constexpr (Q::kSub) total *= Q::sub_minimum(w, s);
        low += total;
    }
    if constexpr (Q::kSub) scale *= Q::sub_scale(w, s);
    acc = __builtin_fmaf((float)sum, scale, acc);
}

template <class Q> HQ_INLINE float dot(const typename Q::Unit& w, const uint8_t* y, uint32_t part, float acc) {
    float sum = 0, low = 0;
#pragma unroll
    for (int s = 0; s < strips<Q>(); s++) add_strip<Q>(w, s, y, part, sum, low);
    acc = __builtin_fmaf(Q::d(w), sum, acc);
    if constexpr (Q::kMin) acc = __builtin_fmaf(-Q::dmin(w) * Q::kFactor, low, acc);
    return acc;
}

// Rows that share a load of the activations. The table gives a block one or two rows; where it takes more, the blocks
// that follow have nothing to do.
constexpr int kRows = 2;

template <class Q, int kColumns, int kAlign> HQ_INLINE void add_rows(float* acc, const uint8_t* const* rows,
    const uint8_t* y, uint64_t stride, uint32_t nblocks, uint32_t lane, uint32_t lanes) {
    const uint32_t u = lane % Q::kUnits, first = Q::position(u) / 32, part = Q::position(u) % 32;
    for (uint32_t block = lane / Q::kUnits; block < nblocks; block += lanes / Q::kUnits) {
        typename Q::Unit w[kRows];
#pragma unroll
        for (int r = 0; r < kRows; r++) w[r] = Q::load(Row<kAlign>{rows[r]}, block, u);
#pragma unroll
        for (int c = 0; c < kColumns; c++)
#pragma unroll
            for (int r = 0; r < kRows; r++) {
                float& sum = acc[c * kRows + r];
                sum = dot<Q>(
                    w[r], y + c * stride + (block * (Q::kBlock / 32) + first) * (uint32_t)sizeof(q8_1), part, sum);
            }
    }
}

// Teams that share rows: all of a block, or half of them where rows are short but many, as beginning and ending a row
// costs as much as 1000 weights of it (H200, 2026-11-22).
template <int kColumns, int kTeams> HQ_INLINE int teams_to_a_row(int ncols, int nrows) {
    if (kColumns > 1) return kTeams;
    return ncols <= 8192 && nrows >= 8192 ? 2 : 4;
}

template <class Q, int kColumns>
HQ_INLINE void mul_mat_vec(const void* x, const void* y, float* dst, int ncols, int nrows, int nrows_y, int nrows_dst) {
    constexpr int kBlockRows = kColumns == 1 ? 1 : 2, kTeams = kColumns <= 4 ? 4 : 2, kOutputs = kRows * kColumns;
    constexpr int kSums = team_width(kOutputs);
    const int share = teams_to_a_row<kColumns, kTeams>(ncols, nrows), groups = kTeams / share;
    if (block_x() % (groups * kRows / kBlockRows)) return;  // a block before has these rows
    const int group = thread_y() / share, first = (int)block_x() * kBlockRows;
    const uint32_t nblocks = (uint32_t)ncols / Q::kBlock, row_bytes = nblocks * sizeof(typename Q::Block);
    const uint64_t stride = (uint64_t)((uint32_t)nrows_y / 32) * sizeof(q8_1);
    const uint8_t* rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; r++) {
        const int row = first + group * kRows + r;
        rows[r] = (const uint8_t*)x + (uint64_t)(row < nrows ? row : nrows - 1) * row_bytes;
    }
    float acc[kSums] = {};
    const uint32_t lane = (thread_y() - group * share) * 32 + thread_x(), lanes = 32 * share;
    constexpr int kAlign = row_alignment(sizeof(typename Q::Block));
    if (kAlign == 2 || (uint64_t)x % kAlign == 0)
        add_rows<Q, kColumns, kAlign>(acc, rows, (const uint8_t*)y, stride, nblocks, lane, lanes);
    else add_rows<Q, kColumns, 2>(acc, rows, (const uint8_t*)y, stride, nblocks, lane, lanes);
    HQ_SHARED float partial[kTeams][kSums];
    const int which = team_sums<kSums>(acc);
    if (which >= 0) partial[thread_y()][which] = acc[0];
    barrier();
    const int i = thread_y() * 32 + thread_x(), j = i % kOutputs, row = first + i / kOutputs * kRows + j % kRows;
    if (i >= groups * kOutputs || row >= nrows) return;
    float sum = 0;
    for (int t = 0; t < share; t++) sum += partial[i / kOutputs * share + t][j];
    dst[(uint64_t)(j / kRows) * nrows_dst + row] = sum * (1.0f / Q::kFactor);
}

#if HQ_ASYNC_COPIES
#include "mat_vec_staged.h"
#endif

// Blocks that shall be resident on an NVIDIA multiprocessor: at batch 1 the latency of memory is hidden by other blocks
// alone (H200, 2026-11-22).
template <class Q> constexpr int resident(int columns) {
    return columns > 1 ? 1 : sizeof(typename Q::Unit) <= 28 ? 10 : 8;
}

#define HQ_ENTRY(name, Q, columns)                                                                                     \
    HQ_RESIDENT_KERNEL(columns <= 4 ? 128 : 64, resident<Q>(columns))                                                  \
    name(const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int nrows_y, int nrows_dst) {             \
        mul_mat_vec<Q, columns>(x, y, dst, ncols_x, nrows_x, nrows_y, nrows_dst);                                      \
    }
HQ_MAT_VEC(HQ_ENTRY)
#undef HQ_ENTRY
