// What the ways through attention_prefill_* share: rows of queries, tiles of keys and values, and copies to them.
#pragma once
#include "kv_cache.h"

constexpr int kPrefillThreads = 128, kPrefillRows = 64;
// The score of a key that a row does not see. It is finite: a row may see no key of its block's first ones.
constexpr float kHidden = -1e30f;

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
    float scale, cap;                     // cap: of scores, or 0; multiples of log(2), as they are
    uint32_t window;                      // how many keys a row sees at most
    const float* sinks;                   // of the group's heads: scores without values; or null
    HQ_MEMBER int token(int row) const { return (row < rows ? row : rows - 1) / group; }
    HQ_MEMBER int64_t head(int row) const {
        return (int64_t)((row < rows ? row : rows - 1) - token(row) * group) * head_dim;
    }
    HQ_MEMBER const float* query(int row) const { return queries + (int64_t)token(row) * query_stride + head(row); }
    HQ_MEMBER float* result(int row) const { return y + (int64_t)token(row) * y_stride + head(row); }
    HQ_MEMBER int last(int row) const { return position + token(row); }  // position that it sees
    HQ_MEMBER int first(int row) const {
        const uint32_t keys = (uint32_t)last(row) + 1;
        return keys > window ? (int)(keys - window) : 0;
    }
    // What a row's softmax begins with: its sink, whose weight is 1.
    HQ_MEMBER float sink(int row) const {
        return sinks ? sinks[(row < rows ? row : rows - 1) - token(row) * group] * kLog2E : -infinity();
    }
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

// Keys of a block's rows: those from `seen` to in front of `shown` are hidden from none of them.
struct Keys {
    int seen, shown;
    float cap;
    uint32_t window;
    HQ_MEMBER void begin(const PrefillRows& rows, int first, int count) {
        seen = rows.first(first + count - 1), shown = rows.last(first) + 1, cap = rows.cap, window = rows.window;
    }
    HQ_MEMBER bool all_seen(int first, int count) const { return first >= seen && first + count <= shown; }
    // From the row whose last key is number `last`.
    HQ_MEMBER bool hidden(int key, int last) const { return (uint32_t)(last - key) >= window; }
};

// 8 values of a key from value `at` on: zeros behind `length` keys and behind head_dim.
template <bool kVectors, class Rows>
HQ_INLINE typename Rows::Piece load_piece(const Rows& cache, int key, int at, int length, int head_dim) {
    if (key >= length || (kVectors && at >= head_dim)) return {};
    return cache.template load<kVectors>((uint32_t)key * (uint32_t)head_dim, at, head_dim);
}

// Rows of the cache on their way to a tile in shared memory: zeros behind `length` positions and behind head_dim.
// Where copies are asynchronous, or registers allow, they are under way from begin() to finish().
template <int kDims, int kKeys, bool kVectors, class Rows> struct PrefillCopy {
    static constexpr int kInRow = kDims / 8, kEach = kKeys * kInRow / kPrefillThreads;
    static constexpr bool kAhead = !kMatrixUnits || kDims < 128;
#if HQ_ASYNC_COPIES
    static constexpr bool kAsynchronous = kVectors && !Rows::kScaled;
#else
    static constexpr bool kAsynchronous = false;
#endif
    static_assert(kKeys * kInRow % kPrefillThreads == 0, "every thread copies as much");
    int length, head_dim, thread;
    typename Rows::Piece ahead[kEach];

    HQ_MEMBER int piece(int i) const { return i * kPrefillThreads + thread; }
    HQ_MEMBER typename Rows::Piece load(const Rows& cache, int first, int i) const {
        return load_piece<kVectors>(cache, first + piece(i) / kInRow, piece(i) % kInRow * 8, length, head_dim);
    }
    HQ_MEMBER void begin([[maybe_unused]] TileRow<kDims>* to, const Rows& cache, int first) {
#if HQ_ASYNC_COPIES
        if constexpr (kAsynchronous) {
#pragma unroll 2  // no more: registers run out
            for (int i = 0; i < kEach; i++) {
                const int key = first + piece(i) / kInRow, at = piece(i) % kInRow;
                const bool inside = key < length && at * 8 < head_dim;
                const uint32_t from = inside ? (uint32_t)key * (uint32_t)head_dim + at * 8 : 0;
                copy_async<16>(&to[piece(i) / kInRow].halves[at], cache.halves + from, inside ? 16 : 0);
            }
        }
#endif
        if constexpr (kAhead && !kAsynchronous)
#pragma unroll
            for (int i = 0; i < kEach; i++) ahead[i] = load(cache, first, i);
    }
    HQ_MEMBER void finish(TileRow<kDims>* to, const Rows& cache, int first) {
#if HQ_ASYNC_COPIES
        if constexpr (kAsynchronous) wait_copies();
#endif
        constexpr int kAtOnce = kAhead ? kEach : 2;
        if constexpr (!kAsynchronous)
#pragma unroll kAtOnce
            for (int i = 0; i < kEach; i++) {
                const typename Rows::Piece v = kAhead ? ahead[i] : load(cache, first, i);
                to[piece(i) / kInRow].halves[piece(i) % kInRow] = {Rows::to_halves(v)};
            }
    }
};
