// `mul_mat_*`: weights times any number of columns of q8_1. A block of the grid makes a tile of mmq_y rows and mmq_x
// columns: a stage of 64 or 128 weights of each row and the activations that belong to them are unpacked into shared
// memory, multiplied there by matrix units or by dot4, and so on along the rows.
#include "types.h"

constexpr int kThreads = 128;

// Four words of shared memory in one access.
struct alignas(16) Four {
    uint32_t w[4];
};

template <class Q, int kColumns, int kRows> struct Tile {
    // Weights of a row at a time: the longer, the fewer cache lines a load of many rows touches, where registers allow.
    static constexpr int kStage = kMatrixUnits && kColumns * kRows < 128 * 128 ? 128 : 64;
    static constexpr int kStride = kStage / 4 + 4;  // words from row to row: 8 rows of 4 words lie in different banks
    static constexpr int kGroups = kStage / Q::kGroup, kGroupWords = Q::kGroup / 4;
    alignas(16) uint32_t x[kRows][kStride];
    alignas(16) uint32_t y[kColumns][kStride];
    float scale[kGroups][kRows], minimum[Q::kMin ? kGroups : 1][kRows];
    float d[kStage / 32][kColumns], sum[Q::kMin ? kGroups : 1][kColumns];  // sum: of the activations of a group
};

struct Problem {
    const uint8_t *x, *y;
    uint64_t row_bytes, column_bytes;
    int k, first_row, first_column, nrows, ncols;
};

// What a thread puts into shared memory for a stage: units of weights and blocks of activations. They are loaded while
// the stage before is multiplied. Rows and columns beyond the last repeat it; beyond k scales are zero.
template <class Q, int kColumns, int kRows, int kAlign> struct Stage {
    using T = Tile<Q, kColumns, kRows>;
    static constexpr int kSpan =
        Q::kSpan > T::kStage ? Q::kSpan : T::kStage;  // units reach into the next stage, or not
    static constexpr int kToRow = kSpan * Q::kUnits / Q::kBlock, kToColumn = T::kStage / 32;
    static constexpr int kUnits = kToRow * kRows / kThreads, kBlocks = kToColumn * kColumns / kThreads;
    typename Q::Unit units[kUnits];
    Words<4> ds[kBlocks];
    Words<32> y[kBlocks];

    // Where unit i of a row lies: the number of its block, and of the unit in it.
    HQ_INLINE int block(int from, int i) { return from / Q::kBlock + (Q::kUnits == 1 ? i : 0); }
    HQ_INLINE uint32_t unit(int from, int i) {
        return Q::kUnits == 1 ? 0 : (uint32_t)from % Q::kBlock / kSpan * kToRow + i;
    }

    HQ_MEMBER void load(const Problem& p, int from, int thread) {
        const int u = thread % kToRow, b = thread % kToColumn, at = from + 32 * b;
#pragma unroll
        for (int i = 0; i < kUnits; i++) {
            const int r = p.first_row + (i * kThreads + thread) / kToRow, row = r < p.nrows ? r : p.nrows - 1;
            const bool inside = block(from, u) < p.k / Q::kBlock;
            units[i] = Q::load(Row<kAlign>{p.x + row * p.row_bytes}, inside ? block(from, u) : 0, unit(from, u));
        }
#pragma unroll
        for (int i = 0; i < kBlocks; i++) {
            const int c = p.first_column + (i * kThreads + thread) / kToColumn, column = c < p.ncols ? c : p.ncols - 1;
            const uint8_t* from_here =
                p.y + column * p.column_bytes + (at < p.k ? (uint32_t)at / 32 * sizeof(q8_1) : 0);
            ds[i] = load_words<4>(from_here);
            y[i] = load_words_in_pairs<32>(from_here + 4);
        }
    }
    HQ_MEMBER void store(T& t, int k, int from, int thread) const {
        store_units(t, k, from, thread % kToRow, thread / kToRow);
        store_blocks(t, from + 32 * (thread % kToColumn) < k, thread % kToColumn, thread / kToColumn);
    }
    HQ_MEMBER void store_units(T& t, int k, int from, int u, int row) const {
        const bool inside = block(from, u) < k / Q::kBlock;
#pragma unroll
        for (int i = 0; i < kUnits; i++) {
            const int r = i * (kThreads / kToRow) + row;
            const float d = inside ? Q::d(units[i]) * (1.0f / Q::kFactor) : 0;
#pragma unroll
            for (int s = 0; s < strips<Q>(); s++) {
                const uint32_t position = Q::kUnits == 1 ? 32 * u : Q::position(unit(from, u)) + Q::kStep * s;
                const uint32_t at = Q::kUnits == 1 ? position : position - (uint32_t)from % Q::kBlock;
                if (kSpan > T::kStage && at >= T::kStage) continue;  // of another stage
#pragma unroll
                for (int j = 0; j < Q::kStrip / 4; j += 4)
                    *(Four*)&t.x[r][at / 4 + j] = {Q::word(units[i], s, j), Q::word(units[i], s, j + 1),
                        Q::word(units[i], s, j + 2), Q::word(units[i], s, j + 3)};
                if (at % Q::kGroup) continue;
                float scale = d;
                if constexpr (Q::kSub) scale *= Q::sub_scale(units[i], s);
                t.scale[at / Q::kGroup][r] = scale;
                if constexpr (Q::kMin) {
                    float minimum = inside ? Q::dmin(units[i]) : 0;
                    if constexpr (Q::kSub) minimum *= Q::sub_minimum(units[i], s);
                    t.minimum[at / Q::kGroup][r] = minimum;
                }
            }
        }
    }
    HQ_MEMBER void store_blocks(T& t, bool inside, int b, int column) const {
#pragma unroll
        for (int i = 0; i < kBlocks; i++) {
            const int c = i * (kThreads / kToColumn) + column;
            const uint32_t* q = y[i].w;
            const float d = inside ? half_to_float(ds[i].w[0]) : 0;
#pragma unroll
            for (int j = 0; j < 8; j += 4) *(Four*)&t.y[c][8 * b + j] = {q[j], q[j + 1], q[j + 2], q[j + 3]};
            t.d[b][c] = d;
            if constexpr (Q::kMin && Q::kGroup == 32) t.sum[b][c] = inside ? half_to_float(ds[i].w[0] >> 16) : 0;
            if constexpr (Q::kMin && Q::kGroup == 16)
                for (int h = 0; h < 2; h++) {
                    int ones = 0;
                    for (int j = 0; j < 4; j++) ones = dot4(0x01010101, q[4 * h + j], ones);
                    t.sum[2 * b + h][c] = d * (float)ones;
                }
        }
    }
};

// Products by matrix units: warps lie in a grid over the tile, each with fragments of 16 rows and 8 columns.
template <class Q, int kColumns, int kRows> struct ByMatrixUnits {
    using T = Tile<Q, kColumns, kRows>;
    static constexpr int kDown = kRows >= 2 * kColumns ? 4 : 2, kAcross = 4 / kDown;  // warps
    static constexpr int kM = kRows / 16 / kDown, kN = kColumns / 8 / kAcross;  // fragments of a warp
    static constexpr int kBias = 0x4B400000;  // 1.5 * 2^23 as bits: a small integer added to it is the float's mantissa
    float acc[kM][kN][4] = {};
    int lane, row, column;

    HQ_MEMBER ByMatrixUnits() {
        lane = thread_x();
        row = thread_y() % kDown * kM * 16 + lane / 4;
        column = thread_y() / kDown * kN * 8;
    }
    HQ_MEMBER void multiply(const T& t) {
        constexpr int kHalves = Q::kGroup / 16;  // fragments along k in a group
#pragma unroll 1
        for (int g = 0; g < T::kGroups; g++) {
            uint32_t a[kM][2 * kHalves];
            float scale[kM][2], minimum[kM][2];
            const int word = g * T::kGroupWords + lane % 4;
#pragma unroll
            for (int m = 0; m < kM; m++)
                for (int h = 0; h < 2; h++) {
                    const int r = row + 16 * m + 8 * h;
                    for (int i = 0; i < kHalves; i++) a[m][2 * i + h] = t.x[r][word + 4 * i];
                    scale[m][h] = t.scale[g][r];
                    if constexpr (Q::kMin) minimum[m][h] = t.minimum[g][r];
                }
#pragma unroll
            for (int n = 0; n < kN; n++) {
                uint32_t b[kHalves];
                for (int i = 0; i < kHalves; i++) b[i] = t.y[column + 8 * n + lane / 4][word + 4 * i];
                const float* d = &t.d[g * Q::kGroup / 32][column + 8 * n + lane % 4 * 2];
#pragma unroll
                for (int m = 0; m < kM; m++) {
                    int c[4] = {kBias, kBias, kBias, kBias};
                    if constexpr (kHalves == 2) mma_k32(c, a[m], b);
                    else mma_k16(c, a[m], b[0]);
                    for (int i = 0; i < 4; i++) {
                        const float product = bits<float>(c[i]) - bits<float>(kBias);
                        acc[m][n][i] = __builtin_fmaf(product, scale[m][i / 2] * d[i % 2], acc[m][n][i]);
                        if constexpr (Q::kMin)
                            acc[m][n][i] = __builtin_fmaf(
                                -minimum[m][i / 2], t.sum[g][column + 8 * n + lane % 4 * 2 + i % 2], acc[m][n][i]);
                    }
                }
            }
        }
    }
    template <class F> HQ_MEMBER void results(F write) const {
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
            for (int n = 0; n < kN; n++)
                for (int i = 0; i < 4; i++)
                    write(row + 16 * m + i / 2 * 8, column + 8 * n + lane % 4 * 2 + i % 2, acc[m][n][i]);
    }
};

// Products by dot4: a thread takes rows 16 apart and columns 8 apart.
template <class Q, int kColumns, int kRows> struct ByDots {
    using T = Tile<Q, kColumns, kRows>;
    static constexpr int kM = kRows / 16, kN = kColumns / 8, kAtOnce = 4;
    float acc[kM][kN] = {};
    int row, column;

    HQ_MEMBER ByDots() {
        const int thread = thread_y() * 32 + thread_x();
        row = thread % 16;
        column = thread / 16;
    }
    HQ_MEMBER void multiply(const T& t) {
#pragma unroll 1
        for (int g = 0; g < T::kGroups; g++) {
#pragma unroll
            for (int m = 0; m < kM; m += kAtOnce) {
                multiply_rows(t, g, m);
                keep_order();  // or the loads of all rows come first, and registers run out
            }
        }
    }
    HQ_MEMBER void multiply_rows(const T& t, int g, int first) {
        uint32_t x[kAtOnce][T::kGroupWords];
        float scale[kAtOnce], minimum[kAtOnce];
#pragma unroll
        for (int m = 0; m < kAtOnce; m++) {
            const int r = row + 16 * (first + m);
            for (int i = 0; i < T::kGroupWords; i++) x[m][i] = t.x[r][g * T::kGroupWords + i];
            scale[m] = t.scale[g][r];
            if constexpr (Q::kMin) minimum[m] = t.minimum[g][r];
        }
#pragma unroll
        for (int n = 0; n < kN; n++) {
            const int c = column + 8 * n;
            const float d = t.d[g * Q::kGroup / 32][c];
            uint32_t y[T::kGroupWords];
            for (int i = 0; i < T::kGroupWords; i++) y[i] = t.y[c][g * T::kGroupWords + i];
#pragma unroll
            for (int m = 0; m < kAtOnce; m++) {
                float& sum = acc[first + m][n];
                int products = 0;
                for (int i = 0; i < T::kGroupWords; i++) products = dot4(x[m][i], y[i], products);
                sum = __builtin_fmaf((float)products, scale[m] * d, sum);
                if constexpr (Q::kMin) sum = __builtin_fmaf(-minimum[m], t.sum[g][c], sum);
            }
        }
    }
    template <class F> HQ_MEMBER void results(F write) const {
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
            for (int n = 0; n < kN; n++) write(row + 16 * m, column + 8 * n, acc[m][n]);
    }
};

template <bool> struct Choose {
    template <class A, class> using Type = A;
};
template <> struct Choose<false> {
    template <class, class B> using Type = B;
};

template <int kAlign, class Q, int kColumns, int kRows, class P>
HQ_INLINE void multiply(P& product, Tile<Q, kColumns, kRows>& tile, const Problem& p) {
    constexpr int kStage = Tile<Q, kColumns, kRows>::kStage;
    constexpr bool kAhead = kMatrixUnits && kColumns * kRows > 64 * 64;  // products by dot4 leave no registers for it
    const int thread = thread_y() * 32 + thread_x();
    Stage<Q, kColumns, kRows, kAlign> stage;
    if (kAhead) stage.load(p, 0, thread);
#pragma unroll 1
    for (int from = 0; from < p.k; from += kStage) {
        if (!kAhead) stage.load(p, from, thread);
        barrier();
        stage.store(tile, p.k, from, thread);
        barrier();
        if (kAhead && from + kStage < p.k) stage.load(p, from + kStage, thread);
        product.multiply(tile);
    }
}

template <class Q, int kColumns, int kRows> HQ_INLINE void mul_mat(
    const void* x, const void* y, float* dst, int k, int nrows, int ncols, int nrows_y, int nrows_dst) {
    HQ_SHARED Tile<Q, kColumns, kRows> tile;
    const Problem p{(const uint8_t*)x, (const uint8_t*)y,
        (uint64_t)((uint32_t)k / Q::kBlock) * sizeof(typename Q::Block),
        (uint64_t)((uint32_t)nrows_y / 32) * sizeof(q8_1), k, (int)block_x() * kRows, (int)block_y() * kColumns, nrows,
        ncols};
    typename Choose<kMatrixUnits>::template Type<ByMatrixUnits<Q, kColumns, kRows>, ByDots<Q, kColumns, kRows>> product;
    constexpr int kAlign = row_alignment(sizeof(typename Q::Block));
    if (kAlign == 2 || (uint64_t)x % kAlign == 0) multiply<kAlign>(product, tile, p);
    else multiply<2>(product, tile, p);
    product.results([&](int r, int c, float v) {
        const int64_t row = p.first_row + r, column = p.first_column + c;
        if (row < nrows && column < ncols) dst[column * nrows_dst + row] = v;
    });
}

#define HQ_ENTRY(suffix, Q, mmq_x, mmq_y)                                                                              \
    HQ_RESIDENT_KERNEL(128, mmq_x* mmq_y > 64 * 64 ? 2 : 4)                                                            \
    mul_mat_##suffix(                                                                                                  \
        const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int ncols_y, int nrows_y, int nrows_dst) { \
        mul_mat<Q, mmq_x, mmq_y>(x, y, dst, ncols_x, nrows_x, ncols_y, nrows_y, nrows_dst);                            \
    }
HQ_TILES(HQ_ENTRY)
#undef HQ_ENTRY
