// `mul_mat_planes_*`: weights in planes times any number of columns of activations in planes (planes.h). A block of the
// grid makes a tile of 128 rows and 128 columns, a stage of 64 weights of each row at a time: a half each of units 2p
// and 2p + 1, whose other halves are the next stage. So a thread, which has one of the two, loads its unit once and
// unpacks half of it a stage, and shares the sectors that it reads with its neighbour. Rows and columns beyond the last
// repeat it. `mul_mat_planes_experts_*`: the same of a mixture of experts, in tiles of 64 rows and up to 64 columns
// that have the same expert. Where rows are gated, a tile has 32 of the first half of them, and their partners of the
// second.
#include "experts.h"
#include "halves.h"
#include "rows.h"
#include "types.h"

constexpr int kWide = 128, kNarrow = 64;  // rows and columns of a tile, by twice as many threads
constexpr int kHalfWords = kUnitHalf / 4;

struct Problem {
    const uint8_t *x, *y;  // y: from the first column of the tile on
    const int* token;      // or null: of the tile's columns, which of those of y they are
    uint32_t units, y_units, nrows, first_row, columns;
    uint32_t above, all_rows;  // rows of x that lie above those of the product, and all of them
    bool gated;

    HQ_MEMBER uint32_t pairs_of_rows() const { return nrows / 2; }
    // The first row of the tile, and row r counted from there.
    HQ_MEMBER uint32_t begin() const { return above + (gated ? first_row / 2 : first_row); }
    HQ_MEMBER uint32_t row(uint32_t r) const {
        if (!gated) return first_row + r < nrows ? r : nrows - 1 - first_row;
        const uint32_t pair = r % (kNarrow / 2), last = pairs_of_rows() - 1 - first_row / 2;
        return (pair < last ? pair : last) + (r < kNarrow / 2 ? 0 : pairs_of_rows());
    }
    HQ_MEMBER uint32_t column(uint32_t c) const {  // where it begins, in bytes
        c = c < columns ? c : columns - 1;
        return (token ? (uint32_t)token[c] : c) * y_units * kActivationBytes;
    }
    HQ_MEMBER uint32_t pairs() const { return (units + 1) / 2; }
    HQ_MEMBER uint32_t behind(uint32_t pair) const { return pair + 1 < pairs() ? pair + 1 : pair; }
};

// The part of the result that the tile has: what is beyond the last row and column is not written.
struct Results {
    float* dst;  // the first result of the tile
    uint32_t stride, rows, columns;

    HQ_MEMBER void write(int r, int c, float v) const {
        if ((uint32_t)r < rows && (uint32_t)c < columns) dst[(uint64_t)c * stride + r] = v;
    }
    // Of rows r and r + 1.
    HQ_MEMBER void write(int r, int c, float v, float next) const {
        if ((uint32_t)r + 1 >= rows) return write(r, c, v);
        if ((uint32_t)c < columns)
            store<4>(dst + (uint64_t)c * stride + r, Words<8>{{bits<uint32_t>(v), bits<uint32_t>(next)}});
    }
};

// Of each column of a narrow tile whose rows are gated, 32 activations. Rows that are 36 apart lie in different banks.
struct GatedTile {
    Float4 v[kNarrow][kNarrow / 8 + 1];

    HQ_MEMBER void put(int r, int c, float gate, float up) { v[c][r / 4].v[r % 4] = silu(gate) * up; }
    // To columns q, in planes: a team has 16, its lanes 4 values each of 4 at a time.
    HQ_MEMBER void store(const Problem& p, uint8_t* q, int n_padded) const {
        const int lane = thread_x(), i = (int)p.first_row / 2 + lane % 8 * 4;
#pragma unroll 1
        for (int c = thread_y() * 16 + lane / 8, end = thread_y() * 16 + 16; c < end; c += 4) {
            const bool inside = (uint32_t)c < p.columns;
            Float4 four = v[c][lane % 8];
            for (int j = 0; j < 4; j++) four.v[j] = (uint32_t)(i + j) < p.pairs_of_rows() ? four.v[j] : 0;
            store_activations<4>(q + (inside ? c : 0) * column_bytes(n_padded), n_padded, i, four.v, inside);
        }
    }
};

// Of row thread / 2 the first or the second unit of a pair. Where a row ends with the first, the second repeats it, and
// meets activations that are 0.
template <class P> struct ThreadUnit {
    static constexpr int kGroup = P::kSub == 16 ? 16 : 32;        // weights that share a scale
    static constexpr bool kSigned = !P::kMin && P::kOffset == 0;  // whether q is
    typename P::Unit unit;
    PlaneRow from;
    uint32_t row, side, last;

    HQ_MEMBER ThreadUnit(const Problem& p, int thread) {
        row = (uint32_t)thread / 2, side = (uint32_t)thread % 2, last = p.units - 1;
        from = {const_cast<uint8_t*>(p.x), p.all_rows, p.units, p.begin(), p.row(row)};
    }
    HQ_MEMBER void load(uint32_t pair) {
        const uint32_t u = 2 * pair + side;
        unit = P::load(from, u < last ? u : last);
    }
    // Of group g of the unit, of kGroup weights.
    HQ_MEMBER float scale(int g) const { return group_scale<P>(unit, g * kGroup / 16); }
    HQ_MEMBER float minimum(int g) const { return group_minimum<P>(unit, g * kGroup / 16); }
};

// By matrix units of halves: weights become halves, scale and minimum included; activations stay integers; and what 32
// of them sum up to is multiplied by their scale in float. That is one operation a result for 32 weights of any type,
// where integers take three and more.
//
// Activations go straight to the registers of the team that has their columns; weights to shared memory. Which of 32
// weights is where suits the activations: words 2t and 2t + 1 are of lanes l % 4 = t, the first one for step 0 along k,
// the second for step 1; bytes 0 and 2 are of the step's first chunk, 1 and 3 of the other.
template <class Q, int kTile> struct ByMatrixUnits {
    using P = typename Q::Planes;
    struct Weights {  // a half of the units of all rows
        Words<16> chunk[4][kTile];
        uint32_t apart[16];  // lanes that store to the first and to the second unit of a pair meet different banks
    };
    struct Tile {
        alignas(16) Weights weights[2][2];  // of two stages, of two units
    };
    struct Sums {
        float v[kTile / 8][4];  // of 8 rows each, as mma_f16() has them
    };
    // A lane's part of the activations of a stage: 8 of each unit and of each of two columns.
    struct Columns {
        const uint8_t* y;
        uint32_t column[2], units, t;
        Words<8> q[2][2];
        float d[2][2];

        HQ_MEMBER void load(uint32_t pair, int half) {
            const uint32_t piece = ((2 * half + t / 2) * units + 2 * pair) * 16 + t % 2 * 8;
            const uint32_t scales = (4 * units + 2 * pair) * 16 + 8 * half;
#pragma unroll
            for (int u = 0; u < 2; u++)
                for (int c = 0; c < 2; c++) {
                    q[u][c] = load_vector<8>(y + (column[c] + piece + 16 * u));
                    d[u][c] = bits<float>(load_vector<4>(y + (column[c] + scales + 16 * u)).w[0]);
                }
        }
    };
    Sums acc = {};
    [[maybe_unused]] Sums sums;  // of a half of a unit
    float d[2][2];               // of the stage: of a unit and a column
    uint32_t a[2][2][4] = {};    // activations of the stage: of a unit and a step along k
    ThreadUnit<P> weights;
    Columns columns;
    int lane, column;
    bool has_columns;  // or what the team makes is not stored

    HQ_MEMBER ByMatrixUnits(const Problem& p, int thread) : weights(p, thread) {
        uint32_t place = (uint32_t)thread / 32;
        // Blocks take turns in which of their teams has no columns, as each has its quarter of a multiprocessor.
        if (kTile != kWide) place = (place + block_x()) % (kTile / 16);
        has_columns = kTile == kWide || place * 16 < p.columns;
        lane = thread % 32, column = (int)place * 16 + lane / 4;
        columns.column[0] = p.column(column), columns.column[1] = p.column(column + 8);
        columns.y = p.y, columns.units = p.y_units, columns.t = lane % 4;
    }
    template <int kHalf> HQ_MEMBER void store_weights(Weights* stage) const {
        using U = ThreadUnit<P>;
        constexpr uint32_t kMinus = kMinus1024 + both(U::kSigned ? 128 : P::kOffset);
        constexpr int kGroups = kUnitHalf / U::kGroup;
        uint32_t scale[kGroups], minimum[kGroups];
        for (int g = 0; g < kGroups; g++) {
            const float s = kRaise * weights.scale(kHalf * kGroups + g);
            const float m = -kRaise * weights.minimum(kHalf * kGroups + g);
            scale[g] = pack_halves(s, s), minimum[g] = P::kMin ? pack_halves(m, m) : 0;
        }
        Weights& to = stage[weights.side];
#pragma unroll
        for (int s = 0; s < 2; s++) {
            Words<16> chunk[2];
            for (int t = 0; t < 4; t++) {
                const int i = 2 * t + s, g = 4 * i / U::kGroup;
                auto q = P::word(weights.unit, kHalf * kHalfWords + i);
                if constexpr (U::kSigned) q ^= 0x80808080;
                for (int j = 0; j < 2; j++)
                    chunk[j].w[t] = fma_halves(fma_halves(bytes_to_halves(q, j), kOne, kMinus), scale[g], minimum[g]);
            }
            for (int j = 0; j < 2; j++) store_vector<16>(&to.chunk[2 * s + j][weights.row], chunk[j]);
        }
    }
    HQ_MEMBER void take_columns() {
        if (!has_columns) return;
        constexpr uint32_t kMinus = kMinus1024 + both(128);
#pragma unroll
        for (int u = 0; u < 2; u++)
            for (int c = 0; c < 2; c++) {
                d[u][c] = columns.d[u][c];
                for (int s = 0; s < 2; s++)
                    for (int j = 0; j < 2; j++)
                        a[u][s][2 * j + c] =
                            fma_halves(bytes_to_halves(columns.q[u][c].w[s] ^ 0x80808080, j), kOne, kMinus);
            }
    }
    // Adds the products with a half of unit u of the pair, from begin() to add().
#if HQ_WARPGROUPS
    HQ_MEMBER void begin(int u, const Weights& b) { begin_products<kTile>(sums.v, a[u], b.chunk, sizeof b.chunk[0]); }
    HQ_MEMBER void add(int u, const Weights&) {
        finish_products<kTile>(sums.v);
        if (!has_columns) return;
#pragma unroll
        for (int n = 0; n < kTile / 8; n++)
            for (int i = 0; i < 4; i++) acc.v[n][i] = __builtin_fmaf(sums.v[n][i], d[u][i / 2], acc.v[n][i]);
    }
#else
    HQ_MEMBER void begin(int, const Weights&) {}
    HQ_MEMBER void add(int u, const Weights& b) {
        if (!has_columns) return;
#pragma unroll
        for (int n = 0; n < kTile / 8; n += 2) {
            Sums two;
            for (int i = 0; i < 4; i++) two.v[0][i] = two.v[1][i] = 0;
            for (int s = 0; s < 2; s++) {
                uint32_t r[4];
                load_matrices(r, &b.chunk[2 * s + lane / 8 % 2][8 * n + lane / 16 * 8 + lane % 8]);
                mma_f16(two.v[0], a[u][s], r), mma_f16(two.v[1], a[u][s], r + 2);
            }
            for (int i = 0; i < 8; i++)
                acc.v[n + i / 4][i % 4] = __builtin_fmaf(two.v[i / 4][i % 4], d[u][i % 4 / 2], acc.v[n + i / 4][i % 4]);
        }
    }
#endif
    // A stage; meanwhile what the next ones need is loaded and unpacked.
    template <int kHalf> HQ_MEMBER void stage(Tile& tile, const Problem& p, uint32_t pair) {
        const Weights* b = tile.weights[kHalf];
        show_to_matrix_units(b);
        barrier();
        take_columns();
        if (has_columns) columns.load(kHalf ? p.behind(pair) : pair, !kHalf);
        begin(0, b[0]);
        store_weights<!kHalf>(tile.weights[!kHalf]);
        if (kHalf == 0) weights.load(p.behind(pair));
        add(0, b[0]);
        begin(1, b[1]);
        add(1, b[1]);
    }
    HQ_MEMBER void multiply(Tile& tile, const Problem& p) {
        weights.load(0);
        wait_for_inputs();
        columns.load(0, 0);
        store_weights<0>(tile.weights[0]);
#pragma unroll 1
        for (uint32_t pair = 0; pair < p.pairs(); pair++) {
            stage<0>(tile, p, pair);
            stage<1>(tile, p, pair);
        }
    }
    HQ_MEMBER void store(const Results& to) const {
#pragma unroll
        for (int n = 0; n < kTile / 8; n++)
            for (int i = 0; i < 4; i += 2)
                to.write(8 * n + lane % 4 * 2, column + 4 * i, acc.v[n][i] / kRaise, acc.v[n][i + 1] / kRaise);
    }
    HQ_MEMBER void gate(GatedTile& to) const {
#pragma unroll
        for (int n = 0; n < kTile / 16; n++)
            for (int i = 0; i < 4; i++)
                to.put(8 * n + lane % 4 * 2 + i % 2, column + i / 2 * 8, acc.v[n][i] / kRaise,
                    acc.v[n + kTile / 16][i] / kRaise);
    }
};

// By dot4, of integers: a thread takes rows that are 16 apart and columns that are kColumnStep apart.
template <class Q, int kTile> struct ByDots {
    using P = typename Q::Planes;
    static constexpr int kGroup = ThreadUnit<P>::kGroup, kGroups = 64 / kGroup, kGroupWords = kGroup / 4;
    static constexpr int kStride = 20;  // words from row to row: 8 rows of 4 words lie in different banks
    static constexpr int kM = kTile / 16, kN = 8, kColumnStep = kTile / kN, kAtOnce = 4;
    struct Tile {
        alignas(16) uint32_t x[kTile][kStride], y[kTile][kStride];
        float scale[kGroups][kTile], minimum[P::kMin ? kGroups : 1][kTile];
        float d[2][kTile], sum[P::kMin ? kGroups : 1][kTile];  // sum: of the activations of a group
    };
    float acc[kM][kN] = {};
    ThreadUnit<P> weights;
    const uint8_t* from;  // activations of column thread / 2: the thread copies those of the same unit
    uint32_t y_units, columns;
    int row, column;

    HQ_MEMBER ByDots(const Problem& p, int thread) : weights(p, thread) {
        from = p.y + p.column(weights.row), y_units = p.y_units, columns = p.columns;
        row = thread % 16, column = thread / 16;
    }
    template <int kHalf> HQ_MEMBER void store_weights(Tile& t) const {
        constexpr uint32_t kFlip = P::kOffset > 0 ? 0x80808080 : 0;
        const uint32_t r = weights.row, side = weights.side;
#pragma unroll
        for (int i = 0; i < kHalfWords; i += 4) {
            Words<16> q;
            for (int j = 0; j < 4; j++)
                q.w[j] = (P::word(weights.unit, kHalf * kHalfWords + i + j) << P::kShift) ^ kFlip;
            store_vector<16>(&t.x[r][side * kHalfWords + i], q);
        }
#pragma unroll
        for (int g = 0; g < kGroups / 2; g++) {
            t.scale[side * (kGroups / 2) + g][r] = weights.scale(kHalf * kGroups / 2 + g) * (1.0f / (1 << P::kShift));
            if constexpr (P::kMin) t.minimum[side * (kGroups / 2) + g][r] = weights.minimum(kHalf * kGroups / 2 + g);
        }
    }
    HQ_MEMBER void copy_columns(Tile& t, uint32_t pair, int half) const {
        const uint32_t c = weights.row, side = weights.side, u = 2 * pair + side;
#pragma unroll
        for (int i = 0; i < 2; i++)
            store_vector<16>(
                &t.y[c][side * kHalfWords + 4 * i], load_vector<16>(from + ((2 * half + i) * y_units + u) * 16));
        const auto scales = load_vector<8>(from + (4 * y_units + u) * 16 + 8 * half);
        const float d = bits<float>(scales.w[0]);
        const int first = (int)(scales.w[1] << 16) >> 16, second = (int)scales.w[1] >> 16;
        t.d[side][c] = d;
        if constexpr (P::kMin && kGroup == 32) t.sum[side][c] = d * (float)(first + second);
        if constexpr (P::kMin && kGroup == 16)
            t.sum[2 * side][c] = d * (float)first, t.sum[2 * side + 1][c] = d * (float)second;
    }
    HQ_MEMBER void multiply_rows(const Tile& t, int g, int first) {
        uint32_t x[kAtOnce][kGroupWords];
        float scale[kAtOnce], minimum[kAtOnce];
#pragma unroll
        for (int m = 0; m < kAtOnce; m++) {
            const int r = row + 16 * (first + m);
            for (int i = 0; i < kGroupWords; i++) x[m][i] = t.x[r][g * kGroupWords + i];
            scale[m] = t.scale[g][r];
            if constexpr (P::kMin) minimum[m] = t.minimum[g][r];
        }
#pragma unroll
        for (int n = 0; n < kN; n++) {
            if (kTile != kWide && kColumnStep * (uint32_t)n >= columns) break;
            const int c = column + kColumnStep * n;
            const float d = t.d[g * kGroup / 32][c];
            uint32_t y[kGroupWords];
            for (int i = 0; i < kGroupWords; i++) y[i] = t.y[c][g * kGroupWords + i];
#pragma unroll
            for (int m = 0; m < kAtOnce; m++) {
                float& sum = acc[first + m][n];
                int products = 0;
                for (int i = 0; i < kGroupWords; i++) products = dot4(x[m][i], y[i], products);
                sum = __builtin_fmaf((float)products, scale[m] * d, sum);
                if constexpr (P::kMin) sum = __builtin_fmaf(-minimum[m], t.sum[g][c], sum);
                if (kTile != kWide) sum = computed_here(sum);  // or it waits for who stores it, behind the branches
            }
            if (n % 4 == 3) keep_order();
        }
    }
    HQ_MEMBER void stage(Tile& t, uint32_t pair, int half) {
        barrier();
        if (half) store_weights<1>(t);
        else store_weights<0>(t);
        copy_columns(t, pair, half);
        barrier();
#pragma unroll 1
        for (int g = 0; g < kGroups; g++) {
#pragma unroll
            for (int m = 0; m < kM; m += kAtOnce) {
                multiply_rows(t, g, m);
                keep_order();  // or the loads of all rows come first, and registers run out
            }
        }
    }
    HQ_MEMBER void multiply(Tile& tile, const Problem& p) {
        wait_for_inputs();
#pragma unroll 1
        for (uint32_t i = 0; i < 2 * p.pairs(); i++) {
            if (i % 2 == 0) weights.load(i / 2);
            stage(tile, i / 2, i % 2);
        }
    }
    HQ_MEMBER void store(const Results& to) const {
#pragma unroll
        for (int m = 0; m < kM; m++)
#pragma unroll
            for (int n = 0; n < kN; n++) to.write(row + 16 * m, column + kColumnStep * n, acc[m][n]);
    }
    HQ_MEMBER void gate(GatedTile& to) const {
#pragma unroll
        for (int m = 0; m < kM / 2; m++)
#pragma unroll
            for (int n = 0; n < kN; n++) to.put(row + 16 * m, column + kColumnStep * n, acc[m][n], acc[m + kM / 2][n]);
    }
};

template <class Q, int kTile, bool = kMatrixUnits> struct Choose {
    using Type = ByMatrixUnits<Q, kTile>;
};
template <class Q, int kTile> struct Choose<Q, kTile, false> {
    using Type = ByDots<Q, kTile>;
};

template <class Q>
HQ_INLINE void mul_mat_planes(
    const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int ncols_y, int n_padded, int nrows_dst) {
    using Product = typename Choose<Q, kWide>::Type;
    HQ_SHARED typename Product::Tile tile;
    const uint32_t column = block_y() * kWide, nrows = (uint32_t)nrows_x;
    const Problem p{(const uint8_t*)x, (const uint8_t*)y + column * column_bytes(n_padded), nullptr,
        (uint32_t)(ncols_x + kUnitWeights - 1) / kUnitWeights, (uint32_t)n_padded / kUnitWeights, nrows,
        block_x() * kWide, (uint32_t)ncols_y - column, 0, nrows, false};
    Product product(p, thread_y() * 32 + thread_x());
    product.multiply(tile, p);
    const uint32_t stride = (uint32_t)nrows_dst;
    product.store({dst + (uint64_t)column * stride + p.first_row, stride, nrows - p.first_row, p.columns});
}

// Column c of the results, in q where they are gated, or else in dst, is column token[c] of y; c, where `token` is
// null.
template <class Q>
HQ_INLINE void mul_mat_planes_experts(const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int n_expert,
    int n_padded, const ExpertGroup& group, const int* token, int nrows_dst, uint8_t* q, int n_padded_q) {
    using Product = typename Choose<Q, kNarrow>::Type;
    HQ_SHARED union {
        typename Product::Tile tile;
        GatedTile gated;
    } shared;
    const uint32_t nrows = (uint32_t)nrows_x, first = (uint32_t)group.first;
    const Problem p{(const uint8_t*)x, (const uint8_t*)y + (token ? 0 : first * column_bytes(n_padded)),
        token ? token + first : nullptr, (uint32_t)(ncols_x + kUnitWeights - 1) / kUnitWeights,
        (uint32_t)n_padded / kUnitWeights, nrows, block_x() * kNarrow, (uint32_t)group.columns,
        (uint32_t)group.expert * nrows, (uint32_t)n_expert * nrows, q != nullptr};
    Product product(p, thread_y() * 32 + thread_x());
    product.multiply(shared.tile, p);
    if (q) {
        barrier();
        product.gate(shared.gated);
        barrier();
        return shared.gated.store(p, q + first * column_bytes(n_padded_q), n_padded_q);
    }
    const uint32_t stride = (uint32_t)nrows_dst;
    product.store({dst + (uint64_t)first * stride + p.first_row, stride, nrows - p.first_row, p.columns});
}

#define HQ_MUL_MAT(suffix, Q)                                                                                         \
    HQ_KERNEL(2 * kWide)                                                                                              \
    mul_mat_planes_##suffix(const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int ncols_y,          \
        int n_padded, int nrows_dst) {                                                                                \
        let_next_begin();                                                                                             \
        mul_mat_planes<Q>(x, y, dst, ncols_x, nrows_x, ncols_y, n_padded, nrows_dst);                                 \
    }                                                                                                                 \
    HQ_RESIDENT_KERNEL(2 * kNarrow, 3)                                                                                \
    mul_mat_planes_experts_##suffix(const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int n_expert, \
        int n_padded, const int* groups, const int* token, int nrows_dst, void* q, int n_padded_q) {                  \
        let_next_begin();                                                                                             \
        wait_for_inputs();                                                                                            \
        const ExpertGroup group = ((const ExpertGroup*)groups)[block_y()];                                            \
        if (group.columns == 0) return;                                                                               \
        mul_mat_planes_experts<Q>(                                                                                    \
            x, y, dst, ncols_x, nrows_x, n_expert, n_padded, group, token, nrows_dst, (uint8_t*)q, n_padded_q);       \
    }
HQ_PLANES(HQ_MUL_MAT)
#undef HQ_MUL_MAT
