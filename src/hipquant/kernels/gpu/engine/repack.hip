// `repack_*`: rows of a file's blocks become rows of a matrix in planes; `get_rows_planes_*`: rows of such a matrix by
// id, as floats.
#include "rows.h"
#include "types.h"

// Rows `first` to `first` + nrows of a matrix of nrows_planes rows. A thread takes a unit.
template <class Q>
HQ_INLINE void repack(const void* x, void* planes, int ncols, int nrows, int first, int nrows_planes) {
    const uint32_t units = (uint32_t)(ncols + kUnitWeights - 1) / kUnitWeights;
    const uint32_t i = block_x() * 256 + (uint32_t)thread_x(), row = i / units, u = i % units;
    if (row >= (uint32_t)nrows) return;
    const auto* blocks = (const typename Q::Block*)x + (uint64_t)row * (uint32_t)(ncols / Q::kBlock);
    const int halves = ncols - (int)u * kUnitWeights > kUnitHalf ? 2 : 1;
    const PlaneRow to{(uint8_t*)planes, (uint32_t)nrows_planes, units, (uint32_t)first + row, 0};
    Q::Planes::store(to, u, Q::Planes::gather(blocks, u, halves));
}

// Word i of a unit as floats: bit for bit what the format's definition gives, a product and a difference.
template <class P> HQ_INLINE Float4 weights(const typename P::Unit& unit, int i) {
    const float scale = group_scale<P>(unit, i / 4), minimum = group_minimum<P>(unit, i / 4);
    const uint32_t q = P::word(unit, i);
    Float4 r;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        r.v[j] = scale * (float)(byte_of(q, j) - P::kOffset);
        if constexpr (P::kMin) r.v[j] -= minimum;
    }
    return r;
}

// Block (id, 16 units): a thread takes a word. A row that the matrix does not have is zeros.
template <class Q>
HQ_INLINE void get_rows_planes(const void* planes, const uint32_t* ids, float* dst, int k, int nrows) {
    typedef typename Q::Planes P;
    const uint32_t units = (uint32_t)(k + kUnitWeights - 1) / kUnitWeights;
    const uint32_t thread = (uint32_t)thread_x(), u = block_y() * 16 + thread / 16, word = thread % 16;
    const int first = (int)(u * kUnitWeights + 4 * word);
    if (first >= k) return;
    const uint32_t row = ids[block_x()];
    Float4 v{};
    if (row < (uint32_t)nrows) {
        const auto unit = P::load(PlaneRow{(uint8_t*)planes, (uint32_t)nrows, units, row, 0}, u);
#pragma unroll
        for (uint32_t i = 0; i < 16; i++)
            if (i == word) v = weights<P>(unit, (int)i);
    }
    *(Float4*)(dst + (uint64_t)block_x() * (uint32_t)k + first) = v;
}

#define HQ_KERNELS_OF_PLANES(suffix, Q)                                                                                \
    HQ_KERNEL(256)                                                                                                     \
    repack_##suffix(const void* x, void* planes, int ncols, int nrows, int first, int nrows_planes) {                  \
        let_next_begin();                                                                                              \
        wait_for_inputs();                                                                                             \
        repack<Q>(x, planes, ncols, nrows, first, nrows_planes);                                                       \
    }                                                                                                                  \
    HQ_KERNEL(256)                                                                                                     \
    get_rows_planes_##suffix(const void* planes, const uint32_t* ids, float* dst, int k, int nrows) {                  \
        let_next_begin();                                                                                              \
        wait_for_inputs();                                                                                             \
        get_rows_planes<Q>(planes, ids, dst, k, nrows);                                                                \
    }
HQ_PLANES(HQ_KERNELS_OF_PLANES)
#undef HQ_KERNELS_OF_PLANES
