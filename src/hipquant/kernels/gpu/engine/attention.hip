// `attention_decode_*`: attention over a share of the positions a block; the last block of a head puts them together.
//
// A block takes the heads of queries that share a head of keys and values, 4 at a time. Groups of 8, 16 or 32 lanes, as
// a row of the cache needs with 16 bytes a lane, go over positions of their own, each with a softmax of its own, whose
// sums are put together at the end. Scores are multiples of log(2) inside, so that a weight is a power of 2.
#include "kv_cache.h"

constexpr int kAttentionThreads = 128, kLaneValues = 8;
constexpr float kLog2 = 0.693147180559945f;

// What each group of lanes has found for one head.
struct GroupSums {
    Float4 values[kAttentionThreads * kLaneValues / 4];  // floats [group][8 * lanes]
    float top[kAttentionThreads / 8], weights[kAttentionThreads / 8];
};

// Heads of queries, and positions begin to end of the cache's head that belongs to them.
template <class Rows> struct Share {
    const float* queries;
    Rows keys, values;
    float* partial;  // of the first head; the next one is `stride` behind
    int stride;
    int head_dim, begin, end;
    float scale, cap;  // cap: of scores, or 0
};

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
template <int kLanes, int kHeads, int kSteps, bool kVectors, class Rows>
HQ_INLINE void attend(const Share<Rows>& share, int heads, GroupSums* found, int& turn) {
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
        typename Rows::Piece keys[kSteps], values[kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            const int position = at + s * kGroups;
            const uint32_t row = (uint32_t)(position < share.end ? position : share.end - 1) * (uint32_t)head_dim;
            keys[s] = share.keys.template load<kVectors>(row, first, head_dim);
            values[s] = share.values.template load<kVectors>(row, first, head_dim);
        }
        float score[kHeads][kSteps];
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
            float key[kLaneValues];
            Rows::unpack(key, keys[s]);
#pragma unroll
            for (int h = 0; h < kHeads; h++) {
                float product = 0;
#pragma unroll
                for (int i = 0; i < kLaneValues; i++) product = __builtin_fmaf(query[h][i], key[i], product);
                if constexpr (Rows::kScaled) product *= Rows::scale(keys[s]);
                score[h][s] = group_sum<kLanes>(product);
            }
        }
        keep_order();  // values are loaded before, and are on their way meanwhile
        if (share.cap != 0)
#pragma unroll
            for (int h = 0; h < kHeads; h++)
                for (int s = 0; s < kSteps; s++) score[h][s] = soft_capped(score[h][s], share.cap);
#pragma unroll
        for (int s = 0; s < kSteps; s++)
            for (int h = 0; h < kHeads; h++) score[h][s] = at + s * kGroups < share.end ? score[h][s] : -infinity();
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
            Rows::unpack(value, values[s]);
#pragma unroll
            for (int h = 0; h < kHeads; h++) {
                const float weight = Rows::kScaled ? score[h][s] * Rows::scale(values[s]) : score[h][s];
#pragma unroll
                for (int i = 0; i < kLaneValues; i++) sum[h][i] = __builtin_fmaf(weight, value[i], sum[h][i]);
            }
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

// All heads of the share, 4 at a time where rows of the cache are whole vectors. Whole blocks come here.
template <int kLanes, class Rows> HQ_INLINE void attend_aligned(Share<Rows> share, int heads, GroupSums* found) {
    int turn = 0;
    for (int done = 0, now; done < heads; done += now) {
        now = heads - done < 4 ? heads - done : 4;
        if (now == 1) attend<kLanes, 1, 4, true>(share, 1, found, turn);
        else attend<kLanes, 4, 2, true>(share, now, found, turn);
        share.queries += now * share.head_dim, share.partial += now * share.stride;
    }
}
// The same of heads whose rows are not whole vectors.
template <class Rows> HQ_INLINE void attend_odd(Share<Rows> share, int heads, GroupSums* found) {
    for (int h = 0, turn = 0; h < heads; h++) {
        attend<32, 1, 1, false>(share, 1, found, turn);
        share.queries += share.head_dim, share.partial += share.stride;
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

// The weights of a head's parts, divided by their total, by the lanes of a team. A sink is a score without a value.
HQ_INLINE void weigh_parts(const Parts& parts, int head, const float* sink, float* weights) {
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
    if (sink) greatest = max2(greatest, *sink);
#pragma unroll
    for (int i = 0; i < kMine; i++) {
        top[i] = top[i] == greatest ? 1 : exp_(top[i] - greatest);
        sum = __builtin_fmaf(top[i], total[i], sum);
    }
    sum = team_sum(sum);
    if (sink) sum += exp_(*sink - greatest);
    sum = 1 / sum;
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

// What a kernel is given, beside the cache.
struct Decode {
    const float* qkv;
    float *partial, *y;
    uint8_t* q;
    int* counters;
    const int *position, *slot;
    int n_head, n_head_kv, head_dim, n_context, splits, n_padded;
    float scale, softcap;
    int window;
    const float* sinks;
};

// kDims: what heads may have; 0: any number of values up to 256.
template <int kDims, class Rows>
HQ_INLINE void attend_token(const Decode& d, const Rows& keys, const Rows& values, AttentionMemory& memory, int* last) {
    const int64_t token = block_y();
    const int head_kv = (int)block_x() / d.splits, split = (int)block_x() % d.splits;
    const int group = d.n_head / d.n_head_kv, length = d.position[token] + 1;
    const int start = d.window > 0 && d.window < length ? length - d.window : 0, count = length - start;
    const int each = ((count + 31) / 32 + d.splits - 1) / d.splits * 32, begin = start + split * each;
    if (begin >= length) return;
    const int64_t cache = ((int64_t)d.slot[token] * d.n_head_kv + head_kv) * d.n_context * d.head_dim;
    const int stride = d.splits * (d.head_dim + 2);
    float* parts_of_group = d.partial + (token * d.n_head + head_kv * group) * stride;
    Share<Rows> share;
    share.keys = keys.from(cache), share.values = values.from(cache);
    share.queries = d.qkv + (token * (d.n_head + 2 * d.n_head_kv) + head_kv * group) * d.head_dim;
    share.stride = stride, share.partial = parts_of_group + split * (d.head_dim + 2);
    share.head_dim = d.head_dim, share.scale = d.scale, share.cap = d.softcap * kLog2E;
    share.begin = begin, share.end = begin + each < length ? begin + each : length;
    if constexpr (kDims) attend_aligned<kDims / kLaneValues>(share, group, memory.found);
    else attend_odd(share, group, memory.found);

    const int found = (count + each - 1) / each;
    if (!is_last_block(d.counters + token * d.n_head_kv + head_kv, found, last)) return;
    for (int done = 0, heads; done < group; done += heads) {
        heads = group - done < kHeadsAtOnce ? group - done : kHeadsAtOnce;
        const int first_head = head_kv * group + done;
        const Parts parts{parts_of_group + done * stride, found, stride, d.head_dim};
        if (done) barrier();
        for (int h = thread_x() / 32; h < heads; h += kAttentionThreads / 32)
            weigh_parts(parts, h, d.sinks ? d.sinks + first_head + h : nullptr, memory.weights[h]);
        barrier();
        const int first = first_head * d.head_dim, n = heads * d.head_dim;
        const int end = first + n == d.n_head * d.head_dim ? d.n_padded : first + n;
        const Attended to{d.y ? d.y + token * d.n_padded : nullptr,
            d.q ? d.q + token * column_bytes(d.n_padded) : nullptr, first, n, end, d.n_padded};
        combine(parts, memory.weights[0], to);
    }
}

// Block (head of keys and split, of at most 64, token); y and q are columns of n_padded values. A token sees `window`
// positions up to its own, or all (0). Splits without positions, which come behind those that have some, do nothing.
// Where there is q, heads of queries that share a head of keys have a multiple of 32 values. Heads have at most as many
// values as the name says, a multiple of 8; or any number up to 256. 4 blocks would leave 128 registers: too few.
#define HQ_DECODE_F16(suffix, kDims)                                                                                  \
    HQ_RESIDENT_KERNEL(128, 3)                                                                                        \
    attention_decode_f16_##suffix(const float* qkv, const uint16_t* k_cache, const uint16_t* v_cache, float* partial, \
        float* y, void* q, int* counters, const int* position, const int* slot, int n_head, int n_head_kv,            \
        int head_dim, int n_context, int splits, int n_padded, float scale, float softcap, int window,                \
        const float* sinks) {                                                                                         \
        HQ_SHARED int last;                                                                                           \
        HQ_SHARED AttentionMemory memory;                                                                             \
        let_next_begin();                                                                                             \
        wait_for_inputs();                                                                                            \
        const Decode decode{qkv, partial, y, (uint8_t*)q, counters, position, slot, n_head, n_head_kv, head_dim,      \
            n_context, splits, n_padded, scale, softcap, window, sinks};                                              \
        attend_token<kDims>(decode, HalfRows{(uint16_t*)k_cache}, HalfRows{(uint16_t*)v_cache}, memory, &last);       \
    }
#define HQ_DECODE_Q8_0(kDims)                                                                                         \
    HQ_RESIDENT_KERNEL(128, 3)                                                                                        \
    attention_decode_q8_0_##kDims(const float* qkv, const int8_t* k_cache, const int8_t* v_cache,                     \
        const uint16_t* k_scales, const uint16_t* v_scales, float* partial, float* y, void* q, int* counters,         \
        const int* position, const int* slot, int n_head, int n_head_kv, int head_dim, int n_context, int splits,     \
        int n_padded, float scale, float softcap, int window, const float* sinks) {                                   \
        HQ_SHARED int last;                                                                                           \
        HQ_SHARED AttentionMemory memory;                                                                             \
        let_next_begin();                                                                                             \
        wait_for_inputs();                                                                                            \
        const Decode decode{qkv, partial, y, (uint8_t*)q, counters, position, slot, n_head, n_head_kv, head_dim,      \
            n_context, splits, n_padded, scale, softcap, window, sinks};                                              \
        const Q8Rows keys{(int8_t*)k_cache, (uint16_t*)k_scales}, values{(int8_t*)v_cache, (uint16_t*)v_scales};      \
        attend_token<kDims>(decode, keys, values, memory, &last);                                                     \
    }
HQ_DECODE_F16(64, 64)
HQ_DECODE_F16(128, 128)
HQ_DECODE_F16(256, 256)
HQ_DECODE_F16(any, 0)
HQ_DECODE_Q8_0(64)
HQ_DECODE_Q8_0(128)
HQ_DECODE_Q8_0(256)
#undef HQ_DECODE_F16
#undef HQ_DECODE_Q8_0
