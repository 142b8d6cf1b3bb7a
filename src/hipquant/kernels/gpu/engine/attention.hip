// `attention_split_f16`, `attention_combine_q8_1`: attention over a share of the positions, and the shares together.
//
// A block takes the heads of queries that share a head of keys and values, 4 at a time. Groups of 8, 16 or 32 lanes, as
// a row of the cache needs with 16 bytes a lane, go over positions of their own, each with a softmax of its own, whose
// sums are put together at the end. Scores are multiples of log(2) inside, so that a weight is a power of 2.
#include "rows.h"

constexpr int kAttentionThreads = 128, kLaneValues = 8;
constexpr float kLog2 = 0.693147180559945f;

// What each group of lanes has found for one head.
struct GroupSums {
    Float4 values[kAttentionThreads * kLaneValues / 4];  // floats [group][8 * lanes]
    float top[kAttentionThreads / 8], weights[kAttentionThreads / 8];
};

// Heads of queries, and positions begin to end of the cache's head that belongs to them.
struct Share {
    const float* queries;
    const uint16_t *keys, *values;
    float* partial;  // of the first head; the next one is `stride` behind
    int stride;
    int head_dim, begin, end;
    float scale;
};

// 8 halves of a row of the cache from half i on, or what is left of it.
template <bool kVectors> HQ_INLINE Words<16> load_halves(const uint16_t* cache, uint32_t row, int i, int head_dim) {
    if constexpr (kVectors) {
        return field<16>(Row<16>{(const uint8_t*)cache}, 2 * (row + i));
    } else {
        Words<16> r;
#pragma unroll
        for (int w = 0; w < 4; w++, i += 2) r.w[w] = i < head_dim ? load_words<4>(cache + row + i).w[0] : 0;
        return r;
    }
}
HQ_INLINE void unpack_halves(float* v, const Words<16>& w) {
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = half_to_float(w.w[i / 2] >> 16 * (i % 2) & 0xFFFF);
}

// The weight of a sum whose greatest score is `score`, where `top` is the greatest of all, which may be -infinity.
HQ_INLINE float weight_of(float score, float top) { return score == top ? 1 : exp2_approximate(score - top); }

// Puts the sums of the groups for one head together.
template <int kLanes> HQ_INLINE void store_partial(const GroupSums& found, float* partial, int head_dim) {
    constexpr int kGroups = kAttentionThreads / kLanes;
    float top = found.top[0], total = 0, weight[kGroups];
#pragma unroll
    for (int g = 1; g < kGroups; g++) top = max2(top, found.top[g]);
#pragma unroll
    for (int g = 0; g < kGroups; g++) {
        weight[g] = weight_of(found.top[g], top);
        total = __builtin_fmaf(weight[g], found.weights[g], total);
    }
    for (int i = thread_x(); i < head_dim; i += kAttentionThreads) {
        float sum = 0;
#pragma unroll
        for (int g = 0; g < kGroups; g++)
            sum = __builtin_fmaf(weight[g], ((const float*)found.values)[g * kLanes * kLaneValues + i], sum);
        partial[i] = sum;
    }
    if (thread_x() == 0) partial[head_dim] = top * kLog2, partial[head_dim + 1] = total;
}

// The first `heads` of kHeads heads, kSteps positions at a time. `found` is used in turns: one barrier a head will do.
template <int kLanes, int kHeads, int kSteps, bool kVectors>
HQ_INLINE void attend(const Share& share, int heads, GroupSums* found, int& turn) {
    constexpr int kGroups = kAttentionThreads / kLanes;
    const int lane = thread_x() % kLanes, group = thread_x() / kLanes, head_dim = share.head_dim;
    const bool idle = kVectors && lane * kLaneValues >= head_dim;  // it takes the first part of the rows, times 0
    const int first = idle ? 0 : lane * kLaneValues;
    const float scale = idle ? 0 : share.scale * kLog2E;
    float query[kHeads][kLaneValues], sum[kHeads][kLaneValues], top[kHeads], weights[kHeads];
#pragma unroll
    for (int h = 0; h < kHeads; h++) {
        const float* from = share.queries + h * head_dim + first;  // behind `heads`, too: keys and values follow
        top[h] = -infinity(), weights[h] = 0;
#pragma unroll
        for (int i = 0; i < kLaneValues; i++) {
            query[h][i] = kVectors || first + i < head_dim ? from[i] * scale : 0;
            sum[h][i] = 0;
        }
    }
    for (int from = share.begin; from < share.end; from += kSteps * kGroups) {
        const int at = from + group;
        Words<16> keys[kSteps], values[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            const int position = at + s * kGroups;
            const uint32_t row = (uint32_t)(position < share.end ? position : share.end - 1) * (uint32_t)head_dim;
            keys[s] = load_halves<kVectors>(share.keys, row, first, head_dim);
            values[s] = load_halves<kVectors>(share.values, row, first, head_dim);
        }
        float score[kHeads][kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            float key[kLaneValues];
            unpack_halves(key, keys[s]);
#pragma unroll
            for (int h = 0; h < kHeads; h++) {
                float product = 0;
#pragma unroll
                for (int i = 0; i < kLaneValues; i++) product = __builtin_fmaf(query[h][i], key[i], product);
                product = group_sum<kLanes>(product);
                score[h][s] = at + s * kGroups < share.end ? product : -infinity();
            }
        }
#pragma unroll
        for (int h = 0; h < kHeads; h++) {
            const float before = top[h];
#pragma unroll
            for (int s = 0; s < kSteps; s++) top[h] = max2(top[h], score[h][s]);
            const float base = top[h] == -infinity() ? 0 : top[h], kept = exp2_approximate(before - base);
            weights[h] *= kept;
#pragma unroll
            for (int i = 0; i < kLaneValues; i++) sum[h][i] *= kept;
#pragma unroll
            for (int s = 0; s < kSteps; s++) weights[h] += score[h][s] = exp2_approximate(score[h][s] - base);
        }
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            float value[kLaneValues];
            unpack_halves(value, values[s]);
#pragma unroll
            for (int h = 0; h < kHeads; h++)
#pragma unroll
                for (int i = 0; i < kLaneValues; i++) sum[h][i] = __builtin_fmaf(score[h][s], value[i], sum[h][i]);
        }
    }
#pragma unroll
    for (int h = 0; h < kHeads; h++) {
        if (h < heads) {
            GroupSums& mine = found[turn];
            turn ^= 1;
#pragma unroll
            for (int i = 0; i < kLaneValues; i += 4) {
                const float* v = sum[h] + i;
                mine.values[(thread_x() * kLaneValues + i) / 4] = {v[0], v[1], v[2], v[3]};
            }
            if (lane == 0) mine.top[group] = top[h], mine.weights[group] = weights[h];
            barrier();
            store_partial<kLanes>(mine, share.partial + h * share.stride, head_dim);
        }
    }
}

template <int kHeads, int kSteps>
HQ_INLINE void attend_aligned(const Share& share, int heads, GroupSums* found, int& turn) {
    if (share.head_dim <= 64) attend<8, kHeads, kSteps, true>(share, heads, found, turn);
    else if (share.head_dim <= 128) attend<16, kHeads, kSteps, true>(share, heads, found, turn);
    else attend<32, kHeads, kSteps, true>(share, heads, found, turn);
}

// Block (head of keys and split, token).
HQ_RESIDENT_KERNEL(128, 3)  // 4 would leave 128 registers, which is a few too little
attention_split_f16(const float* qkv, const uint16_t* k_cache, const uint16_t* v_cache, float* partial,
                    const int* position, const int* slot, int n_head, int n_head_kv, int head_dim, int n_context,
                    int splits, float scale) {
    HQ_SHARED GroupSums found[2];
    const uint32_t token = block_y();
    const int head_kv = (int)block_x() / splits, split = (int)block_x() % splits;
    const int group = n_head / n_head_kv, length = position[token] + 1;
    const int each = ((length + 31) / 32 + splits - 1) / splits * 32, begin = split * each;
    const int64_t cache = ((int64_t)slot[token] * n_head_kv + head_kv) * n_context * head_dim;
    Share share;
    share.keys = k_cache + cache, share.values = v_cache + cache;
    share.queries = qkv + ((int64_t)token * (n_head + 2 * n_head_kv) + head_kv * group) * head_dim;
    share.stride = splits * (head_dim + 2);
    share.partial = partial + ((int64_t)token * n_head + head_kv * group) * share.stride + split * (head_dim + 2);
    share.head_dim = head_dim, share.scale = scale;
    share.begin = begin, share.end = begin + each < length ? begin + each : length;
    const bool aligned = head_dim % 8 == 0;
    int turn = 0;
    for (int done = 0, heads; done < group; done += heads) {
        heads = !aligned ? 1 : group - done < 4 ? group - done : 4;
        if (!aligned) attend<32, 1, 1, false>(share, 1, found, turn);
        else if (heads == 1) attend_aligned<1, 4>(share, 1, found, turn);
        else attend_aligned<4, 2>(share, heads, found, turn);
        share.queries += heads * head_dim, share.partial += heads * share.stride;
    }
}

// The parts of a head: their sums, each followed by its greatest score and the sum of its weights.
struct Parts {
    const float* sums;
    int splits, stride, head_dim;
    HQ_MEMBER float top(int s) const { return sums[s * stride + head_dim]; }
    HQ_MEMBER float total(int s) const { return sums[s * stride + head_dim + 1]; }
};
HQ_INLINE float part_weight(float top, float greatest) { return top == greatest ? 1 : exp_(top - greatest); }

// Value i of a head, by one lane.
HQ_INLINE float combine(const Parts& parts, int i) {
    float greatest = -infinity(), sum = 0, total = 0;
    for (int s = 0; s < parts.splits; s++) greatest = max2(greatest, parts.top(s));
    for (int s = 0; s < parts.splits; s++) {
        const float weight = part_weight(parts.top(s), greatest);
        sum = __builtin_fmaf(weight, parts.sums[s * parts.stride + i], sum);
        total = __builtin_fmaf(weight, parts.total(s), total);
    }
    return sum / total;
}

// The weights of the parts, divided by their total, by the lanes of a team that is within a head.
HQ_INLINE void team_weights(const Parts& parts, float* weights) {
    const int lane = thread_x() % 32;
    float greatest = -infinity(), total = 0;
    for (int s = lane; s < parts.splits; s += 32) greatest = max2(greatest, parts.top(s));
    greatest = team_max(greatest);
    for (int s = lane; s < parts.splits; s += 32) {
        weights[s] = part_weight(parts.top(s), greatest);
        total = __builtin_fmaf(weights[s], parts.total(s), total);
    }
    total = 1 / team_sum(total);
    for (int s = lane; s < parts.splits; s += 32) weights[s] *= total;
}

constexpr int kMaxSplits = 64;

// Row (token): a thread takes a value of a head.
HQ_KERNEL(256)
attention_combine_q8_1(const float* partial, float* y, void* q, int n_head, int head_dim, int splits, int n_padded) {
    HQ_SHARED float weights[8][kMaxSplits];
    const int i = (int)block_x() * 256 + thread_x(), n = n_head * head_dim, inside = i < n ? i : n - 1;
    const int head = inside / head_dim, at = inside - head * head_dim;
    const uint64_t token = block_y();
    const Parts parts{partial + (token * n_head + head) * splits * (head_dim + 2), splits, head_dim + 2, head_dim};
    float v = 0;
    if (head_dim % 32 == 0 && splits <= kMaxSplits) {
        float* mine = weights[thread_x() / 32];
        team_weights(parts, mine);
        barrier();
#pragma unroll 4
        for (int s = 0; s < splits; s++) v = __builtin_fmaf(mine[s], parts.sums[s * parts.stride + at], v);
    } else {
        v = combine(parts, at);
    }
    store_activation(i < n ? v : 0, y, q, token, i, n, n_padded);
}
