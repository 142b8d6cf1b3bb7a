// Causal attention over the KV cache. A block of the grid is one token and one KV head with the query heads that
// share it: each tile of keys and each value is loaded once for all of them.
//
// Scores go in parts of 128 positions with a running maximum (Milakov and Gimelshein, arXiv 1805.02867), so memory
// does not grow with the context. Positions that a window hides are not gone over.
#include "kv_cache.h"
#include "launch.h"

constexpr int kPart = 128;  // positions

struct Query {  // up to 8 query heads of one token
    const float* q;
    float* dst;
    int head_dim, begin, count;  // positions to attend to: from begin to in front of count
    float scale, softcap;        // softcap: 0 for none
    const float* sinks;          // of each head a score without a value, or null
};

// scores[h][i] = scale q_h . k_{from + i} for a part of the positions; those to which it does not attend are -inf.
template <int H> HQ_INLINE void part_scores(float scores[H][kPart], const Query& query, const uint16_t* keys, int from) {
    for (int i = 0; i < kPart && from + i < query.count; i += kKeyTile) {
        const uint16_t* tile = keys + (int64_t)(from + i) * query.head_dim;
        for (int lane = 0; lane < kKeyTile; lane += W) {
            vf acc[H] = {};
            for (int d = 0; d < query.head_dim; d++) {
                const vf k = load_halves(tile + d * kKeyTile + lane);
                for (int h = 0; h < H; h++) acc[h] = fma((vf)query.q[h * query.head_dim + d], k, acc[h]);
            }
            for (int h = 0; h < H; h++) {
                const vf score = acc[h] * query.scale, cap = query.softcap;
                store(scores[h] + i + lane, query.softcap ? cap * tanh_(score / cap) : score);
            }
        }
    }
    for (int h = 0; h < H; h++) {
        for (int i = 0; i < query.begin - from; i++) scores[h][i] = -__builtin_inff();
        for (int i = query.count - from; i < kPart; i++) scores[h][i] = -__builtin_inff();
    }
}

// out[h] += sum over the part of weight[h][i] * v_{from + i}.
template <int H> HQ_INLINE void add_values(float* out, const float weights[H][kPart], const Query& query, const uint16_t* values, int from) {
    const int n = query.count - from < kPart ? query.count - from : kPart, dim = query.head_dim;
    const int first = query.begin > from ? query.begin - from : 0;
    int d = 0;
    for (; d + W <= dim; d += W) {
        vf acc[H];
        for (int h = 0; h < H; h++) acc[h] = load<vf>(out + h * dim + d);
        for (int i = first; i < n; i++) {
            const vf v = load_halves(values + (int64_t)(from + i) * dim + d);
            for (int h = 0; h < H; h++) acc[h] = fma((vf)weights[h][i], v, acc[h]);
        }
        for (int h = 0; h < H; h++) store(out + h * dim + d, acc[h]);
    }
    for (; d < dim; d++)
        for (int i = first; i < n; i++)
            for (int h = 0; h < H; h++) out[h * dim + d] += weights[h][i] * half_to_float(values[(int64_t)(from + i) * dim + d]);
}

template <int H> static void attend(const Query& query, const uint16_t* keys, const uint16_t* values) {
    alignas(64) float scores[H][kPart];
    const int dim = query.head_dim;
    float biggest[H], total[H];
    for (int h = 0; h < H; h++) biggest[h] = query.sinks ? query.sinks[h] : -__builtin_inff(), total[h] = query.sinks ? 1 : 0;
    for (int i = 0; i < H * dim; i++) query.dst[i] = 0;
    for (int from = query.begin / kKeyTile * kKeyTile; from < query.count; from += kPart) {
        part_scores<H>(scores, query, keys, from);
        for (int h = 0; h < H; h++) {
            vf m = load<vf>(scores[h]), sums = 0;
            for (int i = W; i < kPart; i += W) m = __builtin_elementwise_max(m, load<vf>(scores[h] + i));
            const float now = __builtin_fmaxf(biggest[h], max(m));
            const float shrink = biggest[h] == now ? 1 : __builtin_isinf(biggest[h]) ? 0 : exp_(f32x8(biggest[h] - now))[0];
            for (int i = 0; i < kPart; i += W) {
                const vf s = load<vf>(scores[h] + i) - now;
                const vf w = s < -80.0f ? (vf)0 : exp_(s);  // before products with it become subnormal, which is slow
                store(scores[h] + i, w);
                sums += w;
            }
            if (shrink != 1)
                for (int d = 0; d < dim; d++) query.dst[h * dim + d] *= shrink;
            total[h] = total[h] * shrink + sum(sums);
            biggest[h] = now;
        }
        add_values<H>(query.dst, scores, query, values, from);
    }
    for (int h = 0; h < H; h++)
        for (int d = 0; d < dim; d++) query.dst[h * dim + d] /= total[h];
}

HQ_ENTRY(attention_f16) {
    const auto* position = arg<const int*>(params, 4);
    const auto* slot = arg<const int*>(params, 5);
    const int n_head = arg<int>(params, 6), n_head_kv = arg<int>(params, 7), head_dim = arg<int>(params, 8);
    const int n_context = arg<int>(params, 9), window = arg<int>(params, 12), shared = n_head / n_head_kv;
    const auto* sinks = arg<const float*>(params, 13);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const int kv = (int)(block % launch->grid[0]);
        const int64_t token = block / launch->grid[0];
        const KVHead head = {(int64_t)slot[token] * n_head_kv + kv, head_dim, n_context};
        const uint16_t* keys = arg<const uint16_t*>(params, 1) + head.value(0);
        const uint16_t* values = arg<const uint16_t*>(params, 2) + head.value(0);
        for (int h = 0; h < shared;) {
            const int64_t at = (token * n_head + kv * shared + h) * head_dim;
            const int count = position[token] + 1, begin = window > 0 && window < count ? count - window : 0;
            const Query query = {arg<const float*>(params, 0) + at, arg<float*>(params, 3) + at, head_dim, begin, count,
                                 arg<float>(params, 10), arg<float>(params, 11),
                                 sinks ? sinks + kv * shared + h : nullptr};
            if (shared - h >= 8)
                attend<8>(query, keys, values), h += 8;
            else if (shared - h >= 4)
                attend<4>(query, keys, values), h += 4;
            else if (shared - h >= 2)
                attend<2>(query, keys, values), h += 2;
            else
                attend<1>(query, keys, values), h += 1;
        }
    }
}
