// `attention_prefill_*`: attention of the tokens of a long pass, which belong to one sequence.
//
// A block takes 64 rows (a row is a token and one of the heads of queries that share a head of keys and values) and
// goes over the keys in tiles through shared memory, with a softmax that is put right as greater scores come. Scores
// are multiples of log(2), so that a weight is a power of 2. Queries are rounded to halves, as keys and values are.
//
// A weight of 0 does not hide NaN: values of the pass's own tokens that are not finite also reach the tokens up to 63
// rows before.
#include "prefill.h"

// What a block does with kRows rows and kKeys keys at a time.
template <int kDims, bool kByMatrixUnits = kMatrixUnits> struct Prefill;

// By matrix units: a team takes 16 rows, lane l of it rows l / 4 and l / 4 + 8 and, of every 8 keys or values, those at
// 2 (l % 4) and behind.
template <int kDims> struct Prefill<kDims, true> {
    static constexpr int kRows = 64, kKeys = kDims > 128 ? 32 : 64;
    static constexpr int kPart = kDims > 128 ? 128 : kDims;  // of the values, at a time: registers run out
    struct Tile {
        TileRow<kDims> keys[kKeys], values[kKeys];
    };
    static constexpr bool kApart = true;  // keys and values lie in places of their own
    template <bool kVectors, class Rows> using ValuesCopy = PrefillCopy<kDims, kKeys, kVectors, Rows>;
    uint32_t query[kDims / 16][4];
    float sum[kPart / 8][4], score[kKeys / 8][4], top[2], weights[2];
    int row, last[2], lane, part;
    Keys keys;

    HQ_MEMBER void begin(Tile&, const PrefillRows& rows, int first, int at) {
        part = at, lane = thread_x() % 32, row = first + thread_x() / 32 * 16 + lane / 4;
        keys.begin(rows, first, kRows);
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float* from = rows.query(row + 8 * h);
            top[h] = rows.sink(row + 8 * h), weights[h] = lane % 4 == 0 ? 1 : 0, last[h] = rows.last(row + 8 * h);
#pragma unroll
            for (int i = 0; i < kDims / 8; i++)
                query[i / 2][i % 2 * 2 + h] = rows.query_pair(from, 8 * i + lane % 4 * 2);
        }
#pragma unroll
        for (int i = 0; i < kPart / 8; i++)
            for (int j = 0; j < 4; j++) sum[i][j] = 0;
    }
    // Weights of the keys from `first` on.
    HQ_MEMBER void weigh(Tile& tile, int first) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
            for (int j = 0; j < 4; j++) score[n][j] = 0;
        const TileRow<kDims>* of_keys = tile.keys + lane / 16 * 8 + lane % 8;
#pragma unroll
        for (int k = 0; k < kDims / 16; k++)
#pragma unroll
            for (int n = 0; n < kKeys / 8; n += 2) {
                uint32_t b[4];
                load_matrices(b, &of_keys[8 * n].halves[2 * k + lane / 8 % 2]);
                mma_f16(score[n], query[k], b);
                mma_f16(score[n + 1], query[k], b + 2);
            }
        if (keys.cap != 0) soft_cap();
        if (!keys.all_seen(first, kKeys)) hide(first + lane % 4 * 2);
        rescale(0), rescale(1);
    }
    HQ_MEMBER void hide(int key) {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
            for (int j = 0; j < 4; j++)
                if (keys.hidden(key + 8 * n + j % 2, last[j / 2])) score[n][j] = kHidden;
    }
    HQ_MEMBER void soft_cap() {
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
            for (int j = 0; j < 4; j++) score[n][j] = soft_capped(score[n][j], keys.cap);
    }
    // Scores of one of the lane's rows to weights.
    HQ_MEMBER void rescale(int h) {
        float greatest = top[h];
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) greatest = max2(greatest, max2(score[n][2 * h], score[n][2 * h + 1]));
        greatest = max2(greatest, shuffle_xor<1>(greatest));
        greatest = max2(greatest, shuffle_xor<2>(greatest));
        const float kept = exp2_approximate(top[h] - greatest);
        top[h] = greatest, weights[h] *= kept;
#pragma unroll
        for (int i = 0; i < kPart / 8; i++) sum[i][2 * h] *= kept, sum[i][2 * h + 1] *= kept;
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
            for (int j = 2 * h; j < 2 * h + 2; j++)
                weights[h] += score[n][j] = exp2_approximate(score[n][j] - greatest);
    }
    HQ_MEMBER void add(Tile& tile) {
        const TileRow<kDims>* values = tile.values + lane % 16;
#pragma unroll
        for (int k = 0; k < kKeys / 16; k++) {
            const float *left = score[2 * k], *right = score[2 * k + 1];
            const uint32_t weight[4] = {pack_halves(left[0], left[1]), pack_halves(left[2], left[3]),
                pack_halves(right[0], right[1]), pack_halves(right[2], right[3])};
#pragma unroll
            for (int n = 0; n < kPart / 8; n += 2) {
                uint32_t b[4];
                load_matrices_transposed(b, &values[16 * k].halves[part / 8 + n + lane / 16]);
                mma_f16(sum[n], weight, b);
                mma_f16(sum[n + 1], weight, b + 2);
            }
        }
    }
    HQ_MEMBER void finish(const PrefillRows& rows) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            weights[h] += shuffle_xor<1>(weights[h]);
            weights[h] += shuffle_xor<2>(weights[h]);
            const float factor = 1 / weights[h];
#pragma unroll
            for (int i = 0; i < kPart / 8; i++)
                rows.store_pair(
                    row + 8 * h, part + 8 * i + lane % 4 * 2, sum[i][2 * h] * factor, sum[i][2 * h + 1] * factor);
        }
    }
};

// By fused multiply-adds: 16 lanes take 4 rows; a lane has every 16th key, and every 16th pair of values.
template <int kDims> struct Prefill<kDims, false> {
    static constexpr int kRows = 32, kKeys = kDims > 128 ? 16 : 32, kLanes = 16, kMine = 4;
    static constexpr int kPart = kDims;
    struct Tile {
        TileRow<kDims> queries[kRows];
        union {  // in turns
            TileRow<kDims> keys[kKeys], values[kKeys];
        };
        alignas(16) float weights[kRows][kKeys + 4];
    };
    static constexpr bool kApart = false;
    template <bool kVectors, class Rows> using ValuesCopy = PrefillCopy<kDims, kKeys, kVectors, Rows>;
    float sum[kMine][kDims / kLanes], top[kMine], weights[kMine];
    int row, lane, mine, last[kMine];
    Keys keys;

    HQ_MEMBER void begin(Tile& tile, const PrefillRows& rows, int first, int) {
        lane = thread_x() % kLanes, mine = thread_x() / kLanes * kMine, row = first + mine;
        keys.begin(rows, first, kRows);
        for (int i = thread_x(); i < kRows * kDims / 2; i += kPrefillThreads) {
            const int at = i % (kDims / 2) * 2, r = i / (kDims / 2);
            tile.queries[r].halves[at / 8].w[at / 2 % 4] = rows.query_pair(rows.query(first + r), at);
        }
#pragma unroll
        for (int r = 0; r < kMine; r++) {
            top[r] = rows.sink(row + r), weights[r] = lane == 0 ? 1 : 0, last[r] = rows.last(row + r);
            for (int i = 0; i < kDims / kLanes; i++) sum[r][i] = 0;
        }
    }
    HQ_MEMBER void weigh(Tile& tile, int first) {
        float score[kMine][kKeys / kLanes] = {};
#pragma unroll 2
        for (int i = 0; i < kDims / 8; i++) {
            Halves8 of_keys[kKeys / kLanes];
            for (int k = 0; k < kKeys / kLanes; k++) of_keys[k] = tile.keys[lane + k * kLanes].halves[i];
#pragma unroll
            for (int r = 0; r < kMine; r++) {
                const Halves8 query = tile.queries[mine + r].halves[i];
                for (int j = 0; j < 8; j++)
                    for (int k = 0; k < kKeys / kLanes; k++)
                        score[r][k] = __builtin_fmaf(query.value(j), of_keys[k].value(j), score[r][k]);
            }
        }
        if (keys.cap != 0)
#pragma unroll
            for (int r = 0; r < kMine; r++)
                for (int k = 0; k < kKeys / kLanes; k++) score[r][k] = soft_capped(score[r][k], keys.cap);
        if (!keys.all_seen(first, kKeys))
#pragma unroll
            for (int r = 0; r < kMine; r++)
                for (int k = 0; k < kKeys / kLanes; k++)
                    if (keys.hidden(first + lane + k * kLanes, last[r])) score[r][k] = kHidden;
#pragma unroll
        for (int r = 0; r < kMine; r++) {
            float greatest = top[r];
            for (int k = 0; k < kKeys / kLanes; k++) greatest = max2(greatest, score[r][k]);
            greatest = group_max<kLanes>(greatest);
            const float kept = exp2_approximate(top[r] - greatest);
            top[r] = greatest, weights[r] *= kept;
            for (int i = 0; i < kDims / kLanes; i++) sum[r][i] *= kept;
            for (int k = 0; k < kKeys / kLanes; k++) {
                const float weight = exp2_approximate(score[r][k] - greatest);
                weights[r] += tile.weights[mine + r][lane + k * kLanes] = weight;
            }
        }
    }
    HQ_MEMBER void add(Tile& tile) {
#pragma unroll 1
        for (int k = 0; k < kKeys; k += 4) {
            Float4 weight[kMine];
            for (int r = 0; r < kMine; r++) weight[r] = *(const Float4*)&tile.weights[mine + r][k];
#pragma unroll
            for (int j = 0; j < 4; j++)
                for (int i = 0; i < kDims / kLanes; i += 2) {
                    const int at = 2 * lane + i * kLanes;
                    const uint32_t pair = tile.values[k + j].halves[at / 8].w[at / 2 % 4];
                    const float a = half_to_float(pair & 0xFFFF), b = half_to_float(pair >> 16);
                    for (int r = 0; r < kMine; r++) {
                        sum[r][i] = __builtin_fmaf(weight[r].v[j], a, sum[r][i]);
                        sum[r][i + 1] = __builtin_fmaf(weight[r].v[j], b, sum[r][i + 1]);
                    }
                }
        }
    }
    HQ_MEMBER void finish(const PrefillRows& rows) {
#pragma unroll
        for (int r = 0; r < kMine; r++) {
            const float factor = 1 / group_sum<kLanes>(weights[r]);
            for (int i = 0; i < kDims / kLanes; i += 2)
                rows.store_pair(row + r, 2 * lane + i * kLanes, sum[r][i] * factor, sum[r][i + 1] * factor);
        }
    }
};

#if HQ_MATRIX_TILES
#include "prefill_tiles.h"
// Queries stay in registers, which 256 dimensions would fill where a lane has all 16 halves.
template <int kDims, bool kByTiles = kDims * MatrixTiles::kDepth <= 128 * 16> struct ChosenWay {
    using Way = PrefillByTiles<kDims, MatrixTiles>;
};
template <int kDims> struct ChosenWay<kDims, false> {
    using Way = Prefill<kDims>;
};
template <int kDims> using Way = typename ChosenWay<kDims>::Way;
#else
template <int kDims> using Way = Prefill<kDims>;
#endif

// The rows from `first` on that a tile takes, values from `part` on. The copy of keys is under way while values are
// added, and theirs while keys are weighed.
template <int kDims, bool kVectors, class Rows>
HQ_INLINE void attend_rows(const PrefillRows& rows, const Rows& keys, const Rows& values, int first, int part,
    typename Way<kDims>::Tile& tile) {
    using P = Way<kDims>;
    const int begin = rows.first(first), length = rows.last(first + P::kRows - 1) + 1;
    PrefillCopy<kDims, P::kKeys, kVectors, Rows> key_copy;
    typename P::template ValuesCopy<kVectors, Rows> value_copy;
    key_copy.length = value_copy.length = length, key_copy.head_dim = value_copy.head_dim = rows.head_dim;
    // What is made of it is not kept for the rows that come next, where registers would run out.
    key_copy.thread = value_copy.thread = P::kApart ? (int)opaque((uint32_t)thread_x()) : thread_x();
    key_copy.begin(tile.keys, keys, begin);
    P product;
    product.begin(tile, rows, first, part);
#pragma unroll 1
    for (int from = begin; from < length; from += P::kKeys) {
        if (!P::kApart && from != begin) barrier();
        key_copy.finish(tile.keys, keys, from);
        barrier();
        value_copy.begin(tile.values, values, from);
        product.weigh(tile, from);
        if (!P::kApart) barrier();
        value_copy.finish(tile.values, values, from);
        barrier();
        if (from + P::kKeys < length) key_copy.begin(tile.keys, keys, from + P::kKeys);
        product.add(tile);
    }
    product.finish(rows);
}

template <int kDims, bool kVectors, class Rows>
HQ_INLINE void attend_block(
    const PrefillRows& rows, const Rows& keys, const Rows& values, int first, typename Way<kDims>::Tile& tile) {
    using P = Way<kDims>;
    constexpr int kParts = kDims / P::kPart;
#pragma unroll 1
    for (int i = 0; i < kPrefillRows / P::kRows * kParts; i++) {
        const int at = first + i / kParts * P::kRows, part = i % kParts * P::kPart;
        if (at >= rows.rows || part >= rows.head_dim) continue;
        if (i) barrier();
        attend_rows<kDims, kVectors>(rows, keys, values, at, part, tile);
    }
}

// Zeros behind the values of the tokens whose first row is one of the block's.
HQ_INLINE void fill_rest(float* y, int first, int group, int ntokens, int n, int n_padded) {
    for (int token = (first + group - 1) / group; token < ntokens && token * group < first + kPrefillRows; token++)
        for (int i = n + thread_x(); i < n_padded; i += kPrefillThreads) y[(int64_t)token * n_padded + i] = 0;
}

// What a kernel is given, beside the cache.
struct PrefillPass {
    const float* qkv;
    float* y;
    const int *position, *slot;
    int n_head, n_head_kv, head_dim, n_context, ntokens, n_padded;
    float scale, softcap;
    int window;
    const float* sinks;
};

// kDims: what heads may have, as whole vectors or not.
template <int kDims, bool kVectors, class Rows>
HQ_INLINE void attend_pass(
    const PrefillPass& p, const Rows& k_cache, const Rows& v_cache, typename Way<kDims>::Tile& tile) {
    static_assert(sizeof(tile) <= 48 << 10, "what every GPU has");
    const int head_kv = (int)block_x(), head_dim = p.head_dim, group = p.n_head / p.n_head_kv;
    const int nrows = p.ntokens * group;
    const int first = ((nrows - 1) / kPrefillRows - (int)block_y()) * kPrefillRows;
    const int64_t cache = ((int64_t)p.slot[0] * p.n_head_kv + head_kv) * p.n_context * head_dim;
    const int head = head_kv * group * head_dim;
    if (head_kv == p.n_head_kv - 1) fill_rest(p.y, first, group, p.ntokens, p.n_head * head_dim, p.n_padded);
    const PrefillRows rows{p.qkv + head, p.y + head, (p.n_head + 2 * p.n_head_kv) * head_dim, p.n_padded, group,
        head_dim, nrows, p.position[0], p.scale * kLog2E, p.softcap * kLog2E,
        p.window > 0 ? (uint32_t)p.window : 1u << 31, p.sinks ? p.sinks + head_kv * group : nullptr};
    attend_block<kDims, kVectors>(rows, k_cache.from(cache), v_cache.from(cache), first, tile);
}

// Block (head of keys, 64 rows): the last rows, which see most, come first. A token sees `window` positions up to its
// own, or all (0); `sinks` are scores of the heads of queries, without values, or null. Heads have at most as many
// values as the name says, a multiple of 8; or any number up to 256.
#define HQ_PREFILL_F16(suffix, kDims, kVectors)                                                                       \
    HQ_RESIDENT_KERNEL(128, 2)                                                                                        \
    attention_prefill_f16_##suffix(const float* qkv, const uint16_t* k_cache, const uint16_t* v_cache, float* y,      \
        const int* position, const int* slot, int n_head, int n_head_kv, int head_dim, int n_context, int ntokens,    \
        int n_padded, float scale, float softcap, int window, const float* sinks) {                                   \
        HQ_SHARED Way<kDims>::Tile tile;                                                                              \
        let_next_begin();                                                                                             \
        wait_for_inputs();                                                                                            \
        const PrefillPass pass{qkv, y, position, slot, n_head, n_head_kv, head_dim, n_context, ntokens, n_padded,     \
            scale, softcap, window, sinks};                                                                           \
        attend_pass<kDims, kVectors>(pass, HalfRows{(uint16_t*)k_cache}, HalfRows{(uint16_t*)v_cache}, tile);         \
    }
#define HQ_PREFILL_Q8_0(kDims)                                                                                        \
    HQ_RESIDENT_KERNEL(128, 2)                                                                                        \
    attention_prefill_q8_0_##kDims(const float* qkv, const int8_t* k_cache, const int8_t* v_cache,                    \
        const uint16_t* k_scales, const uint16_t* v_scales, float* y, const int* position, const int* slot,           \
        int n_head, int n_head_kv, int head_dim, int n_context, int ntokens, int n_padded, float scale,               \
        float softcap, int window, const float* sinks) {                                                              \
        HQ_SHARED Way<kDims>::Tile tile;                                                                              \
        let_next_begin();                                                                                             \
        wait_for_inputs();                                                                                            \
        const PrefillPass pass{qkv, y, position, slot, n_head, n_head_kv, head_dim, n_context, ntokens, n_padded,     \
            scale, softcap, window, sinks};                                                                           \
        const Q8Rows keys{(int8_t*)k_cache, (uint16_t*)k_scales}, values{(int8_t*)v_cache, (uint16_t*)v_scales};      \
        attend_pass<kDims, true>(pass, keys, values, tile);                                                           \
    }
HQ_PREFILL_F16(64, 64, true)
HQ_PREFILL_F16(96, 96, true)
HQ_PREFILL_F16(128, 128, true)
HQ_PREFILL_F16(256, 256, true)
HQ_PREFILL_F16(any, 256, false)
HQ_PREFILL_Q8_0(64)
HQ_PREFILL_Q8_0(96)
HQ_PREFILL_Q8_0(128)
HQ_PREFILL_Q8_0(256)
#undef HQ_PREFILL_F16
#undef HQ_PREFILL_Q8_0
