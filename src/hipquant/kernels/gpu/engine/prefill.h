// What the ways through attention_prefill_f16 share: rows of queries, tiles of keys and values, and copies to them.
#pragma once
#include "rows.h"

constexpr int kPrefillThreads = 128, kPrefillRows = 64;

struct alignas(16) Halves8 : Words<16> {
    HQ_MEMBER float value(int i) const { return half_to_float(w[i / 2] >> 16 * (i % 2) & 0xFFFF); }
};
// A row of a tile: 8 of them are in banks of their own.
template <int kDims> struct TileRow {
    Halves8 halves[kDims / 8 + 1];
    HQ_MEMBER uint32_t* from(int at) { return halves[at / 8].w + at % 8 / 2; }
    HQ_MEMBER const uint32_t* from(int at) const { return halves[at / 8].w + at % 8 / 2; }
};

// The rows that there are, by number: token * group + head.
struct PrefillRows {
    const float* queries;  // of token 0, of the first head of the group
    float* y;
    int query_stride, y_stride;           // from token to token
    int group, head_dim, rows, position;  // position: of token 0
    float scale;
    HQ_MEMBER int token(int row) const { return (row < rows ? row : rows - 1) / group; }
    HQ_MEMBER int64_t head(int row) const {
        return (int64_t)((row < rows ? row : rows - 1) - token(row) * group) * head_dim;
    }
    HQ_MEMBER const float* query(int row) const { return queries + (int64_t)token(row) * query_stride + head(row); }
    HQ_MEMBER float* result(int row) const { return y + (int64_t)token(row) * y_stride + head(row); }
    HQ_MEMBER int last(int row) const { return position + token(row); }  // position that it sees
    // Values i and i + 1 of the query of a row as halves, or zeros.
    HQ_MEMBER uint32_t query_pair(const float* query, int i) const {
        if (i >= head_dim) return 0;
        const Words<8> pair = load_vector<8>(query + i);
        return pack_halves(bits<float>(pair.w[0]) * scale, bits<float>(pair.w[1]) * scale);
    }
    // Values i and i + 1 of the result.
    HQ_MEMBER void store_pair(int row, int i, float a, float b) const {
        if (row < rows && i < head_dim) store<4>(result(row) + i, Words<8>{{bits<uint32_t>(a), bits<uint32_t>(b)}});
    }
};

// 8 halves of a key from half `at` on: zeros behind `length` keys and behind head_dim.
template <bool kVectors>
HQ_INLINE Words<16> load_piece(const uint16_t* cache, int key, int at, int length, int head_dim) {
    const uint16_t* from = cache + (uint32_t)key * (uint32_t)head_dim + at;
    Words<16> r{};
    if (key >= length) return r;
    if constexpr (kVectors) {
        if (at < head_dim) r = load_vector<16>(from);
    } else {
#pragma unroll
        for (int w = 0; w < 4; w++)
            if (at + 2 * w < head_dim) r.w[w] = load_vector<4>(from + 2 * w).w[0];
    }
    return r;
}

// Rows of the cache on their way to a tile in shared memory: zeros behind `length` positions and behind head_dim.
// Where copies are asynchronous, or registers allow, they are under way from begin() to finish().
template <int kDims, int kKeys, bool kVectors> struct PrefillCopy {
    static constexpr int kInRow = kDims / 8, kEach = kKeys * kInRow / kPrefillThreads;
    static constexpr bool kAhead = !kMatrixUnits || kDims < 128;
#if HQ_ASYNC_COPIES
    static constexpr bool kAsynchronous = kVectors;
#else
    static constexpr bool kAsynchronous = false;
#endif
    static_assert(kKeys * kInRow % kPrefillThreads == 0, "every thread copies as much");
    int length, head_dim;
    Words<16> ahead[kEach];

    HQ_MEMBER static int piece(int i) { return i * kPrefillThreads + thread_x(); }
    HQ_MEMBER Words<16> load(const uint16_t* cache, int first, int i) const {
        return load_piece<kVectors>(cache, first + piece(i) / kInRow, piece(i) % kInRow * 8, length, head_dim);
    }
    HQ_MEMBER void begin([[maybe_unused]] TileRow<kDims>* to, const uint16_t* cache, int first) {
#if HQ_ASYNC_COPIES
        if constexpr (kAsynchronous) {
#pragma unroll 2  // no more: registers run out
            for (int i = 0; i < kEach; i++) {
                const int key = first + piece(i) / kInRow, at = piece(i) % kInRow;
                const bool inside = key < length && at * 8 < head_dim;
                const uint32_t from = inside ? (uint32_t)key * (uint32_t)head_dim + at * 8 : 0;
                copy_async<16>(&to[piece(i) / kInRow].halves[at], cache + from, inside ? 16 : 0);
            }
        }
#endif
        if constexpr (kAhead && !kAsynchronous)
#pragma unroll
            for (int i = 0; i < kEach; i++) ahead[i] = load(cache, first, i);
    }
    HQ_MEMBER void finish(TileRow<kDims>* to, const uint16_t* cache, int first) {
#if HQ_ASYNC_COPIES
        if constexpr (kAsynchronous) wait_copies();
#endif
        constexpr int kAtOnce = kAhead ? kEach : 2;
        if constexpr (!kAsynchronous)
#pragma unroll kAtOnce
            for (int i = 0; i < kEach; i++) {
                const Words<16> v = kAhead ? ahead[i] : load(cache, first, i);
                to[piece(i) / kInRow].halves[piece(i) % kInRow] = {v};
            }
    }
};
