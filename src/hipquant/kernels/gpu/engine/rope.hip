// `rope_store_kv_*`: queries and keys are normed, where there is a weight for it, and rotated by their position; keys
// and values go to the cache. Block (4 heads, token): the heads of queries, then those of keys, then those of values. A
// team takes a head, of at most 256 values; a lane has pairs that are 64 values apart.
#include "kv_cache.h"

constexpr int kPairsOfLane = 4;

// A team's head: pairs behind its end are 0.
struct Head {
    float first[kPairsOfLane], second[kPairsOfLane];
    int head_dim;
    HQ_MEMBER static int at(int j) { return 2 * thread_x() + 64 * j; }
    HQ_MEMBER bool has(int j) const { return at(j) < head_dim; }

    HQ_MEMBER void load(const float* from) {
#pragma unroll
        for (int j = 0; j < kPairsOfLane; j++) {
            const Words<8> pair = has(j) ? load_vector<8>(from + at(j)) : Words<8>{};
            first[j] = bits<float>(pair.w[0]), second[j] = bits<float>(pair.w[1]);
        }
    }
    // Divided by its root mean square, times the weights.
    HQ_MEMBER void norm(const Head& weight, float eps) {
        float squares = 0;
#pragma unroll
        for (int j = 0; j < kPairsOfLane; j++) squares += first[j] * first[j] + second[j] * second[j];
        const float scale = 1 / square_root(team_sum(squares) / (float)head_dim + eps);
#pragma unroll
        for (int j = 0; j < kPairsOfLane; j++)
            first[j] *= scale * weight.first[j], second[j] *= scale * weight.second[j];
    }
    // Of the first n_rot values; `angles` are cosine and sine of each pair.
    HQ_MEMBER void rotate(const float* angles, int n_rot) {
#pragma unroll
        for (int j = 0; j < kPairsOfLane; j++) {
            if (at(j) >= n_rot) continue;
            const float c = angles[at(j)], s = angles[at(j) + 1], a = first[j], b = second[j];
            first[j] = a * c - b * s, second[j] = a * s + b * c;
        }
    }
    HQ_MEMBER void store(float* to) const {
#pragma unroll
        for (int j = 0; j < kPairsOfLane; j++)
            if (has(j)) store_vector<8>(to + at(j), Words<8>{{bits<uint32_t>(first[j]), bits<uint32_t>(second[j])}});
    }
};

// What a kernel is given, beside the cache.
struct RopePass {
    float* qkv;
    const float *rope, *q_norm, *k_norm;
    const int *position, *slot;
    int n_head, n_head_kv, head_dim, n_rot, n_context;
    float eps;
};

template <class Rows> HQ_INLINE void rotate_and_store(const RopePass& p, const Rows& k_cache, const Rows& v_cache) {
    const int head = (int)block_x() * 4 + thread_y(), heads = p.n_head + 2 * p.n_head_kv;
    const bool there = head < heads, query = head < p.n_head, value = head >= p.n_head + p.n_head_kv;
    const float* norm = !there || value ? nullptr : query ? p.q_norm : p.k_norm;
    Head of_head, weight;
    of_head.head_dim = weight.head_dim = p.head_dim;
    let_next_begin();
    if (norm) weight.load(norm);
    wait_for_inputs();
    if (!there) return;
    const int64_t token = block_y();
    const int at = p.position[token];
    float* from = p.qkv + (token * heads + head) * p.head_dim;
    of_head.load(from);
    if (norm) of_head.norm(weight, p.eps);
    if (!value) of_head.rotate(p.rope + (int64_t)at * p.n_rot, p.n_rot);
    if (query) return of_head.store(from);
    const int kv_head = head - p.n_head - (value ? p.n_head_kv : 0);
    const int64_t row = (((int64_t)p.slot[token] * p.n_head_kv + kv_head) * p.n_context + at) * p.head_dim;
    const Rows to = (value ? v_cache : k_cache).from(row);
#pragma unroll
    for (int j = 0; j < kPairsOfLane; j++)
        to.store_pair(Head::at(j), of_head.first[j], of_head.second[j], of_head.has(j));
}

HQ_KERNEL(128)
rope_store_kv_f16(float* qkv, uint16_t* k_cache, uint16_t* v_cache, const float* rope, const int* position,
    const int* slot, int n_head, int n_head_kv, int head_dim, int n_rot, int n_context, const float* q_norm,
    const float* k_norm, float eps) {
    const RopePass pass{qkv, rope, q_norm, k_norm, position, slot, n_head, n_head_kv, head_dim, n_rot, n_context, eps};
    rotate_and_store(pass, HalfRows{k_cache}, HalfRows{v_cache});
}

HQ_KERNEL(128)
rope_store_kv_q8_0(float* qkv, int8_t* k_cache, int8_t* v_cache, uint16_t* k_scales, uint16_t* v_scales,
    const float* rope, const int* position, const int* slot, int n_head, int n_head_kv, int head_dim, int n_rot,
    int n_context, const float* q_norm, const float* k_norm, float eps) {
    const RopePass pass{qkv, rope, q_norm, k_norm, position, slot, n_head, n_head_kv, head_dim, n_rot, n_context, eps};
    rotate_and_store(pass, Q8Rows{k_cache, k_scales}, Q8Rows{v_cache, v_scales});
}
