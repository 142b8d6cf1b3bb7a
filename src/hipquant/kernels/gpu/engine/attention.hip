// `attention_decode_f16`: attention over a share of the positions a block; the last block of a head puts them together.
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
        return load_vector<16>((const uint8_t*)cache + 2 * (row + i));
    } else {
        Words<16> r;
#pragma unroll
        for (int w = 0; w < 4; w++, i += 2) r.w[w] = i < head_dim ? load_vector<4>(cache + row + i).w[0] : 0;
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

// All heads of the share. Whole blocks come here.
HQ_INLINE void attend_heads(Share share, int heads, GroupSums* found) {
    const bool aligned = share.head_dim % 8 == 0;
    int turn = 0;
    for (int done = 0, now; done < heads; done += now) {
        now = !aligned ? 1 : heads - done < 4 ? heads - done : 4;
        if (!aligned) attend<32, 1, 1, false>(share, 1, found, turn);
        else if (now == 1) attend_aligned<1, 4>(share, 1, found, turn);
        else attend_aligned<4, 2>(share, now, found, turn);
        share.queries += now * share.head_dim, share.partial += now * share.stride;
    }
}

constexpr int kMaxSplits = 64, kHeadsAtOnce = 32;  // as many heads are whole blocks of 32 activations

// The parts of neighbouring heads: their sums, each followed by its greatest score and the sum of its weights.
struct Parts {
    const float* sums;
    int splits, stride, head_dim;  // splits: those that have positions; stride: from head to head
    HQ_MEMBER const float* part(int head, int s) const { return sums + head * stride + s * (head_dim + 2); }
    HQ_MEMBER float top(int head, int s) const { return part(head, s)[head_dim]; }
    HQ_MEMBER float total(int head, int s) const { return part(head, s)[head_dim + 1]; }
};

// The weights of a head's parts, divided by their total, by the lanes of a team.
HQ_INLINE void weigh_parts(const Parts& parts, int head, float* weights) {
    constexpr int kMine = kMaxSplits / 32;
    const int lane = thread_x() % 32;
    float top[kMine], total[kMine], greatest = -infinity(), sum = 0;
#pragma unroll
    for (int i = 0; i < kMine; i++) {
        const int s = lane + 32 * i;
        top[i] = s < parts.splits ? parts.top(head, s) : -infinity();
        total[i] = s < parts.splits ? parts.total(head, s) : 0;
    }
#pragma unroll
    for (int i = 0; i < kMine; i++) greatest = max2(greatest, top[i]);
    greatest = team_max(greatest);
#pragma unroll
    for (int i = 0; i < kMine; i++) {
        top[i] = top[i] == greatest ? 1 : exp_(top[i] - greatest);
        sum = __builtin_fmaf(top[i], total[i], sum);
    }
    sum = 1 / team_sum(sum);
#pragma unroll
    for (int i = 0; i < kMine; i++)
        if (lane + 32 * i < parts.splits) weights[lane + 32 * i] = top[i] * sum;
}

// Where the results of neighbouring heads go: n values of a column of n_padded, from `first` on, and zeros up to `end`.
struct Attended {
    float* y;    // null where it is not wanted
    uint8_t* q;  // the same
    int first, n, end, n_padded;
};

// Puts the parts of Attended::n / head_dim heads together: a thread takes values that are 128 apart.
HQ_INLINE void combine(const Parts& parts, const float* weights, const Attended& to) {
    constexpr int kValues = 4;
    const int lane = thread_x() % 32, end = to.end - to.first;
    for (int begin = thread_x() / 32 * 32; begin < end; begin += kValues * kAttentionThreads) {
        float v[kValues] = {};
        int from[kValues], weight[kValues];
#pragma unroll
        for (int j = 0; j < kValues; j++) {
            const int i = begin + j * kAttentionThreads + lane, inside = i < to.n ? i : to.n - 1;
            const int head = inside / parts.head_dim;
            from[j] = head * parts.stride + inside - head * parts.head_dim, weight[j] = head * kMaxSplits;
        }
#pragma unroll 8  // so many parts are under way at a time
        for (int s = 0; s < parts.splits; s++)
#pragma unroll
            for (int j = 0; j < kValues; j++)
                v[j] = __builtin_fmaf(weights[weight[j] + s], parts.sums[from[j] + s * (parts.head_dim + 2)], v[j]);
#pragma unroll
        for (int j = 0; j < kValues; j++) {
            const int i = begin + j * kAttentionThreads + lane, at = to.first + i;
            const float value = i < to.n ? v[j] : 0;
            if (to.y && i < end) to.y[at] = value;
            if (to.q && i - lane < end) store_activations<1>(to.q, to.n_padded, at, &value, true);
        }
    }
}

union AttentionMemory {
    GroupSums found[2];
    float weights[kHeadsAtOnce][kMaxSplits];  // of the parts, by the last block
};

// Block (head of keys and split, of at most 64, token); y and q are columns of n_padded values. Splits without
// positions, which come behind those that have some, do nothing. Where there is q, heads of queries that share a head
// of keys have a multiple of 32 values.
HQ_RESIDENT_KERNEL(128, 3)  // 4 would leave 128 registers, which is a few too little
attention_decode_f16(const float* qkv, const uint16_t* k_cache, const uint16_t* v_cache, float* partial, float* y,
    void* q, int* counters, const int* position, const int* slot, int n_head, int n_head_kv, int head_dim,
    int n_context, int splits, int n_padded, float scale) {
    HQ_SHARED int last;
    HQ_SHARED AttentionMemory memory;
    let_next_begin();
    wait_for_inputs();
    const int64_t token = block_y();
    const int head_kv = (int)block_x() / splits, split = (int)block_x() % splits;
    const int group = n_head / n_head_kv, length = position[token] + 1;
    const int each = ((length + 31) / 32 + splits - 1) / splits * 32, begin = split * each;
    if (begin >= length) return;
    const int64_t cache = ((int64_t)slot[token] * n_head_kv + head_kv) * n_context * head_dim;
    const int stride = splits * (head_dim + 2);
    float* parts_of_group = partial + (token * n_head + head_kv * group) * stride;
    Share share;
    share.keys = k_cache + cache, share.values = v_cache + cache;
    share.queries = qkv + (token * (n_head + 2 * n_head_kv) + head_kv * group) * head_dim;
    share.stride = stride, share.partial = parts_of_group + split * (head_dim + 2);
    share.head_dim = head_dim, share.scale = scale;
    share.begin = begin, share.end = begin + each < length ? begin + each : length;
    attend_heads(share, group, memory.found);

    const int found = (length + each - 1) / each;
    if (!is_last_block(counters + token * n_head_kv + head_kv, found, &last)) return;
    for (int done = 0, heads; done < group; done += heads) {
        heads = group - done < kHeadsAtOnce ? group - done : kHeadsAtOnce;
        const Parts parts{parts_of_group + done * stride, found, stride, head_dim};
        if (done) barrier();
        for (int h = thread_x() / 32; h < heads; h += kAttentionThreads / 32) weigh_parts(parts, h, memory.weights[h]);
        barrier();
        const int first = (head_kv * group + done) * head_dim, n = heads * head_dim;
        const int end = first + n == n_head * head_dim ? n_padded : first + n;
        const Attended to{y ? y + token * n_padded : nullptr,
            q ? (uint8_t*)q + token * column_bytes(n_padded) : nullptr, first, n, end, n_padded};
        combine(parts, memory.weights[0], to);
    }
}
