// Raw blocks times several columns of q8_1: `mul_mat_vec_*_hip{2..8}` and, for any number, `mul_mat_*`. The weights
// are packed 16 rows at a time on the stack and go through the engine's product (tile.h).
#include "launch.h"
#include "q8_1.h"
#include "tile.h"
#include "types.h"

constexpr int kPart = 512;  // columns of weights packed at a time: 16 rows of them stay in the first-level cache

// T columns of q8_1, `nslices` of them, as q8 tiles. Columns beyond n are zero.
template <int T> HQ_INLINE void gather(Q8Tile<T>* tiles, const q8_1* y, int64_t stride, int n, int nslices) {
    const u8x32 ones = 1;
    for (int s = 0; s < nslices; s++)
        for (int t = 0; t < T; t++) {
            static const q8_1 zero = {};
            const q8_1& block = t < n ? y[t * stride + s] : zero;
            const i8x32 q = load<i8x32>(block.qs);
            const i32x8 sums = dot4(i32x8(0), ones, q);
            const int first = __builtin_reduce_add(sums.lo), last = __builtin_reduce_add(sums.hi);
            const float d = half_to_float(block.d);
            tiles[s].d[t] = d;
            tiles[s].s[0][t] = d * (float)(first + last);
            tiles[s].s[1][t] = d * (float)last;
            store(tiles[s].q[t], q);
        }
}

// The product of `nrows` rows and `ncols` <= MAX columns, T columns at a time, the rest by narrower tiles.
template <class Q, int MAX> struct Product {
    static constexpr int kBlocks = kPart / Q::kBlock;
    const typename Q::Block* x;
    const q8_1* y;
    float* dst;
    int nblocks, nrows, ncols;
    int64_t stride, nrows_dst;

    template <int T> void columns(int col, const Q8Tile<T>* tiles, const typename Q::Packed* packed, int row, int n, bool first) const {
        float acc[T][16] = {};
        const int rows = nrows - row < 16 ? nrows - row : 16, last = ncols - col < T ? ncols - col : T;
        if (!first)
            for (int t = 0; t < last; t++) __builtin_memcpy(acc[t], dst + (col + t) * nrows_dst + row, 4 * rows);
        multiply_tile<Q, T>(acc, packed, tiles, n);
        for (int t = 0; t < last; t++) __builtin_memcpy(dst + (col + t) * nrows_dst + row, acc[t], 4 * rows);
    }

    void run() const {
        static const typename Q::Block zero = {};
        typename Q::Packed packed[kBlocks];
        alignas(64) char tiles[MAX * kPart / 32 * sizeof(Q8Tile<1>)];
        for (int b = 0; b < nblocks; b += kBlocks) {
            const int n = nblocks - b < kBlocks ? nblocks - b : kBlocks, nslices = n * Q::kBlock / 32;
            each_tile(ncols, [&](auto width, int col) {
                constexpr int T = decltype(width)::value;
                gather((Q8Tile<T>*)tiles + col / T * nslices, y + col * stride + b * Q::kBlock / 32, stride, ncols - col, nslices);
            });
            for (int row = 0; row < nrows; row += 16) {
                for (int i = 0; i < n; i++)
                    for (int r = 0; r < 16; r++) {
                        const auto& block = row + r < nrows ? x[(int64_t)(row + r) * nblocks + b + i] : zero;
                        prefetch<sizeof(block)>(&block);
                        Q::pack(packed[i], block, r);
                    }
                each_tile(ncols, [&](auto width, int col) {
                    constexpr int T = decltype(width)::value;
                    columns<T>(col, (const Q8Tile<T>*)tiles + col / T * nslices, packed, row, n, b == 0);
                });
            }
        }
    }
};

template <class Q, int MMQ_X, int MMQ_Y> static void mul_mat(const hq_launch* launch, void** params) {
    const int k = arg<int>(params, 3), nrows = arg<int>(params, 4), ncols = arg<int>(params, 5);
    const int64_t stride = arg<int>(params, 6) / 32, nrows_dst = arg<int>(params, 7);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const int64_t row = MMQ_Y * (int64_t)(block % launch->grid[0]), col = MMQ_X * (int64_t)(block / launch->grid[0]);
        const Product<Q, MMQ_X> product = {
            arg<const typename Q::Block*>(params, 0) + row * (k / Q::kBlock),
            arg<const q8_1*>(params, 1) + col * stride,
            arg<float*>(params, 2) + col * nrows_dst + row,
            k / Q::kBlock,
            (int)(nrows - row < MMQ_Y ? nrows - row : MMQ_Y),
            (int)(ncols - col < MMQ_X ? ncols - col : MMQ_X),
            stride,
            nrows_dst,
        };
        product.run();
    }
}

// A block of the grid is two rows; what a thread is given to run, many of them, is one product.
template <class Q> static void mul_mat_vec(const hq_launch* launch, void** params, int ncols) {
    const int nblocks = arg<int>(params, 3) / Q::kBlock;
    const int64_t nrows = arg<int>(params, 4), first = (int64_t)launch->begin * 2, last = (int64_t)launch->end * 2;
    const Product<Q, 8> product = {
        arg<const typename Q::Block*>(params, 0) + first * nblocks,
        arg<const q8_1*>(params, 1),
        arg<float*>(params, 2) + first,
        nblocks,
        (int)((last < nrows ? last : nrows) - first),
        ncols,
        arg<int>(params, 5) / 32,
        arg<int>(params, 6),
    };
    product.run();
}

#define HQ_MAT_VEC_BATCH(suffix, Q, B) \
    HQ_ENTRY(mul_mat_vec_##suffix##_q8_1_hip##B) { mul_mat_vec<Q>(launch, params, B); }
#define HQ_MAT_VEC(suffix, Q)                                                                    \
    HQ_MAT_VEC_BATCH(suffix, Q, 2) HQ_MAT_VEC_BATCH(suffix, Q, 3) HQ_MAT_VEC_BATCH(suffix, Q, 4) \
    HQ_MAT_VEC_BATCH(suffix, Q, 5) HQ_MAT_VEC_BATCH(suffix, Q, 6) HQ_MAT_VEC_BATCH(suffix, Q, 7) \
    HQ_MAT_VEC_BATCH(suffix, Q, 8)
HQ_WEIGHT_TYPES(HQ_MAT_VEC)

#define HQ_MAT_MAT(suffix, Q, mmq_x, mmq_y) \
    HQ_ENTRY(mul_mat_##suffix) { mul_mat<Q, mmq_x, mmq_y>(launch, params); }
HQ_TILES(HQ_MAT_MAT)
