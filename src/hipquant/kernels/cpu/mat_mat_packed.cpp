// The engine's products: `pack_*` interleaves 16 rows of weights once, `mul_mat_packed_*` multiplies them with q8
// tiles, `quantize_q8_tiles` makes those. A block of the grid is 16 rows and all columns. Of experts,
// `mul_mat_experts_*` multiplies each one's weights with the columns of its tokens.
#include "experts.h"
#include "launch.h"
#include "tile.h"
#include "types.h"

template <class Q> static void pack(const hq_launch* launch, void** params) {
    const auto* x = arg<const typename Q::Block*>(params, 0);
    auto* y = arg<typename Q::Packed*>(params, 1);
    const int nblocks = arg<int>(params, 2) / Q::kBlock, nrows = arg<int>(params, 3);
    static const typename Q::Block zero = {};
    for (uint64_t tile = launch->begin; tile < launch->end; tile++)
        for (int b = 0; b < nblocks; b++)
            for (int r = 0; r < 16; r++) {
                const uint64_t row = tile * 16 + r;
                const auto& block = row < (uint64_t)nrows ? x[row * nblocks + b] : zero;
                prefetch<sizeof(block)>(&block);
                Q::pack(y[tile * nblocks + b], block, r);
            }
}

// dst[column][row] = n rows, at most 16, of k weights, times `ncols` columns in q8 tiles.
template <class Q>
static void multiply_rows(
    float* dst, int64_t nrows_dst, int n, const typename Q::Packed* rows, const char* columns, int k, int ncols) {
    each_tile(ncols, [&](auto width, int at) {
        constexpr int T = decltype(width)::value;
        float acc[T][16] = {};
        multiply_tile<Q, T>(acc, rows, (const Q8Tile<T>*)columns, k / Q::kBlock);
        for (int t = 0; t < T && at + t < ncols; t++)
            __builtin_memcpy(dst + (at + t) * nrows_dst, acc[t], sizeof(float) * n);
        columns += sizeof(Q8Tile<T>) * (k / 32);
    });
}

template <class Q> static void mul_mat_packed(const hq_launch* launch, void** params) {
    const auto* x = arg<const typename Q::Packed*>(params, 0);
    const auto* y = arg<const char*>(params, 1);
    auto* dst = arg<float*>(params, 2);
    const int k = arg<int>(params, 3), nrows = arg<int>(params, 4), ncols = arg<int>(params, 5);
    const int nrows_dst = arg<int>(params, 6);
    for (uint64_t tile = launch->begin; tile < launch->end; tile++) {
        const int n = nrows - (int)(16 * tile) < 16 ? nrows - (int)(16 * tile) : 16;
        multiply_rows<Q>(dst + 16 * tile, nrows_dst, n, x + tile * (k / Q::kBlock), y, k, ncols);
    }
}

// Block (16 rows, group): dst[column][nrows].
template <class Q> static void mul_mat_experts(const hq_launch* launch, void** params) {
    const auto* x = arg<const typename Q::Packed*>(params, 0);
    const auto* y = arg<const char*>(params, 1);
    const auto* groups = arg<const ExpertGroup*>(params, 3);
    auto* dst = arg<float*>(params, 4);
    const int k = arg<int>(params, 5), nrows = arg<int>(params, 6);
    const uint64_t tiles = launch->grid[0];  // of an expert
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const auto group = groups[block / tiles];
        const int64_t row = 16 * (int64_t)(block % tiles), tile = group.expert * tiles + block % tiles;
        const int n = nrows - row < 16 ? (int)(nrows - row) : 16;
        const char* columns = y + (size_t)group.tile * sizeof(Q8Tile<1>) * (k / 32);
        multiply_rows<Q>(
            dst + (int64_t)group.first * nrows + row, nrows, n, x + tile * (k / Q::kBlock), columns, k, group.count);
    }
}

#define HQ_PACKED(suffix, Q)                                                 \
    HQ_ENTRY(pack_##suffix) { pack<Q>(launch, params); }                     \
    HQ_ENTRY(mul_mat_packed_##suffix) { mul_mat_packed<Q>(launch, params); } \
    HQ_ENTRY(mul_mat_experts_##suffix) { mul_mat_experts<Q>(launch, params); }
HQ_WEIGHT_TYPES(HQ_PACKED)

// Block (tile, part of 1024 values): floats [ncols][k] to q8 tiles.
HQ_ENTRY(quantize_q8_tiles) {
    const auto* x = arg<const float*>(params, 0);
    auto* y = arg<char*>(params, 1);
    const int k = arg<int>(params, 2), ncols = arg<int>(params, 3);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const int first = kTileColumns * (int)(block % launch->grid[0]), part = (int)(block / launch->grid[0]);
        const int last = 32 * (part + 1) < k / 32 ? 32 * (part + 1) : k / 32;
        const int n = ncols - first < kTileColumns ? ncols - first : kTileColumns;
        each_tile(n, [&](auto width, int) {
            constexpr int T = decltype(width)::value;
            static const float zero[32] = {};
            auto* tiles = (Q8Tile<T>*)(y + (size_t)(first / kTileColumns) * sizeof(Q8Tile<kTileColumns>) * (k / 32));
            for (int s = 32 * part; s < last; s++)
                for (int t = 0; t < T; t++)
                    quantize_column(&tiles[s], t, t < n ? x + (int64_t)(first + t) * k + 32 * s : zero);
        });
    }
}
