// `sample_best_f32`, `sample_bins_f32`, `sample_draw_f32`, one after the other: the next token of each row of logits,
// by the chain of sampling.py. A block takes 1024 logits. The first gives each block's best one; the second counts
// logits by their distance from the best one, and sums probabilities; the third gathers those that top-k or top-p may
// keep, of which its last block sorts the list, cuts it, and draws. Probabilities are integers, whose sums do not
// depend on their order: the same logits and the same seed give the token that sampling.py draws.
#include "rows.h"

constexpr int kSampleThreads = 256, kLogits = 4, kBlockLogits = kSampleThreads * kLogits;
constexpr int kBins = 2048, kBinsOfUnit = 64;  // the last bin is of all that are 32 and more below the best logit
constexpr int kSortedShared = 4096;            // keys that are sorted in shared memory; more are sorted where they lie
constexpr int kSamples = 4;                    // tokens of a sequence that wait to be read
constexpr int kWorkHeader = 16;                // words in front of a row's work: keys listed, blocks that are done

// A logit and its token as one number: the better one is the greater one, of equals the one with the lower id.
typedef uint64_t LogitKey;
HQ_INLINE LogitKey key_of(uint32_t rank, int id) { return (LogitKey)rank << 32 | (uint32_t)~id; }
HQ_INLINE int token_of(LogitKey key) { return (int)~(uint32_t)key; }
constexpr uint32_t kUnusable = 0xFFFFFFFF, kLowest = 0x007FFFFF;  // ranks: of NaN and infinity; of -infinity
HQ_INLINE uint32_t rank_of(float v) {
    if (!(v < infinity())) return kUnusable;
    const uint32_t b = bits<uint32_t>(v + 0.0f);  // -0 becomes 0, which it equals
    return b >> 31 ? ~b : b | 0x80000000u;
}
HQ_INLINE float value_of(LogitKey key) {
    const uint32_t rank = (uint32_t)(key >> 32);
    return bits<float>(rank >> 31 ? rank & 0x7FFFFFFFu : ~rank);
}

// e^x for x <= 0 as a multiple of 2^-40, the same bits on every processor: no fused products, no library. What is left
// of the power of 2 is at most log(2) / 2, of which seven terms of the series are enough.
HQ_INLINE uint64_t probability(float x) {
    if (!(x > -28)) return 0;
    const int n = (int)(x * 1.44269504f - 0.5f);
    const float r = (x - (float)n * 0.693359375f) - (float)n * -2.12194440e-4f;
    float e = 1.0f / 5040;
    e = e * r + 1.0f / 720, e = e * r + 1.0f / 120, e = e * r + 1.0f / 24, e = e * r + 1.0f / 6;
    e = e * r + 0.5f, e = e * r + 1.0f, e = e * r + 1.0f;
    return (uint64_t)(uint32_t)(e * 16777216.0f) << 16 >> -n;
}

// The high half of a product.
HQ_INLINE uint64_t multiply_high(uint64_t a, uint64_t b) {
    const uint64_t a0 = (uint32_t)a, a1 = a >> 32, b0 = (uint32_t)b, b1 = b >> 32;
    const uint64_t middle = a1 * b0 + (a0 * b0 >> 32), other = a0 * b1 + (uint32_t)middle;
    return a1 * b1 + (middle >> 32) + (other >> 32);
}

// 64 random bits for a number of a seed's sequence: Philox 4x32-10 (Salmon et al., SC 2011).
HQ_INLINE uint64_t random_bits(uint32_t k0, uint32_t k1, uint32_t number) {
    uint32_t c0 = number, c1 = 0, c2 = 0, c3 = 0;
    for (int i = 0; i < 10; i++, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t a = 0xD2511F53ull * c0, b = 0xCD9E8D57ull * c2;
        c0 = (uint32_t)(b >> 32) ^ c1 ^ k0, c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)b, c3 = (uint32_t)a;
    }
    return (uint64_t)c1 << 32 | c0;
}

// How a sequence's tokens are drawn: sampling.state() writes it.
struct SamplingState {
    int position;  // of the next token, which counts up; the first one that was drawn
    int first;
    int top_k, window;                                 // 0: all, none
    float penalty, inverse_temperature, least, spare;  // 0: the best token; log(min_p)
    uint32_t seed[2];
    uint64_t top_p;  // in 2^-64
    uint32_t rest[4];

    HQ_MEMBER bool greedy() const { return inverse_temperature == 0; }
    HQ_MEMBER bool keeps_all_p() const { return top_p == ~0ull; }
    HQ_MEMBER bool cuts() const { return top_k > 0 || !keeps_all_p(); }
    HQ_MEMBER uint64_t random() const { return random_bits(seed[0], seed[1], (uint32_t)(position - first)); }
    // How probable a logit that is so far from the best one is to be drawn, of those that top-k and top-p have left.
    HQ_MEMBER uint64_t chance(float x) const { return x >= least ? probability(x * inverse_temperature) : 0; }
    // What the probabilities that top-p keeps must exceed.
    HQ_MEMBER uint64_t nucleus(uint64_t total) const {
        const uint64_t wanted = multiply_high(total, top_p);
        return wanted ? wanted - 1 : 0;
    }
};
static_assert(sizeof(SamplingState) == 64, "16 words");

struct SamplingShared {
    uint64_t sums[kSampleThreads / 32];  // of teams
    uint64_t rest;
    int at, base;
    uint32_t recent[kBlockLogits / 4];  // a byte a token
};

template <int kMask> HQ_INLINE uint64_t shuffle_xor(uint64_t v) {
    const int low = shuffle_xor<kMask>((int)(uint32_t)v), high = shuffle_xor<kMask>((int)(uint32_t)(v >> 32));
    return (uint64_t)(uint32_t)high << 32 | (uint32_t)low;
}
HQ_INLINE uint64_t greater(uint64_t a, uint64_t b) { return a > b ? a : b; }
// The greatest value of the block, in every thread.
HQ_INLINE uint64_t greatest(uint64_t v, SamplingShared& shared) {
    v = greater(v, shuffle_xor<1>(v)), v = greater(v, shuffle_xor<2>(v)), v = greater(v, shuffle_xor<7>(v));
    v = greater(v, shuffle_xor<15>(v)), v = greater(v, shuffle_xor<16>(v));
    barrier();  // what was read before is not needed any more
    if (thread_x() % 32 == 0) shared.sums[thread_x() / 32] = v;
    barrier();
    for (int i = 0; i < kSampleThreads / 32; i++) v = greater(v, shared.sums[i]);
    return v;
}

// One step of a running sum over a team: lanes whose bit kBit is set have the other half's sum in front of theirs.
// Lanes of a half agree on its sum, so that it does not matter which of the other half is asked.
template <int kMask, int kBit> HQ_INLINE void take_before(uint64_t& until, uint64_t& all) {
    const uint64_t other = shuffle_xor<kMask>(all);
    if (thread_x() & kBit) until += other;
    all += other;
}
// The sum of each thread's value and those of the threads before it, and the sum of all.
HQ_INLINE uint64_t running_sum(uint64_t v, uint64_t& total, SamplingShared& shared) {
    uint64_t until = v, all = v;
    take_before<1, 1>(until, all), take_before<2, 2>(until, all), take_before<7, 4>(until, all);
    take_before<15, 8>(until, all), take_before<16, 16>(until, all);
    barrier();  // what was read before is not needed any more
    if (thread_x() % 32 == 0) shared.sums[thread_x() / 32] = all;
    barrier();
    total = 0;
    for (int i = 0; i < kSampleThreads / 32; i++) {
        if (i == thread_x() / 32) until += total;
        total += shared.sums[i];
    }
    return until;
}

// The first of `count` weights at which their running sum exceeds the target, which is found for the sum of all; the
// last one if none does. shared.rest is then by how much the sum before it falls short.
template <class Weight, class Target>
HQ_INLINE int first_above(int count, SamplingShared& shared, Weight weight, Target target_of) {
    const int each = (count + kSampleThreads - 1) / kSampleThreads;
    const int from = each * thread_x(), begin = from < count ? from : count;
    const int end = begin + each < count ? begin + each : count;
    uint64_t sum = 0;
    for (int i = begin; i < end; i++) sum += weight(i);
    uint64_t total;
    const uint64_t until = running_sum(sum, total, shared), target = target_of(total);
    if (thread_x() == 0) shared.at = count - 1, shared.rest = 0;
    barrier();
    uint64_t before = until - sum;
    if (before <= target && target < until) {
        int at = begin;
        for (uint64_t w = weight(at); before + w <= target; w = weight(++at)) before += w;
        shared.at = at, shared.rest = target - before;
    }
    barrier();
    return shared.at;
}

// A block's part of a row of logits, and the row's work.
struct SampledRow {
    const SamplingState* state;
    const int* history;
    const float* logits;
    int *listed, *done, *bins;
    LogitKey *best, *list;  // of each block; of tokens that may remain
    uint64_t* sums;         // of each block
    int n, blocks;

    HQ_MEMBER SampledRow(
        const float* all, const int* slot, const int* states, const int* tokens, int* work, int n_vocab, int n_context)
        : n(n_vocab), blocks((n_vocab + kBlockLogits - 1) / kBlockLogits) {
        const uint64_t row = block_y(), sequence = (uint64_t)slot[row];
        state = (const SamplingState*)states + sequence;
        history = tokens + sequence * n_context;
        logits = all + row * n;
        listed = work + row * (kWorkHeader + kBins + 4 * (uint64_t)blocks + 2 * (uint64_t)n);
        done = listed + 1, bins = listed + kWorkHeader;
        best = (LogitKey*)(bins + kBins), sums = best + blocks, list = sums + blocks;
    }

    HQ_MEMBER int first(int block) const { return block * kBlockLogits; }
    // Logit i of a thread's is that of token first(block) + thread + 256 i.
    HQ_MEMBER int id(int block, int i) const { return first(block) + thread_x() + kSampleThreads * i; }

    // A block's logits, after the penalty of recent tokens; -infinity behind the end.
    HQ_MEMBER void load(float* v, int block, SamplingShared& shared) const {
        for (int i = 0; i < kLogits; i++) v[i] = id(block, i) < n ? logits[id(block, i)] : -infinity();
        const int window = state->window, end = state->position;
        if (window == 0) return;
        const int begin = end > window ? end - window : 0;
        uint8_t* recent = (uint8_t*)shared.recent;
        for (int i = thread_x(); i < kBlockLogits / 4; i += kSampleThreads) shared.recent[i] = 0;
        barrier();
        for (int i = begin + thread_x(); i < end; i += kSampleThreads) {
            const uint32_t at = (uint32_t)(history[i] - first(block));
            if (at < kBlockLogits) recent[at] = 1;
        }
        barrier();
        for (int i = 0; i < kLogits; i++)
            if (recent[thread_x() + kSampleThreads * i]) v[i] = penalized(v[i]);
    }
    // Finite logits stay finite.
    HQ_MEMBER float penalized(float v) const {
        constexpr float kGreatest = 3.40282347e38f;
        if (!(v <= kGreatest && v >= -kGreatest)) return v;
        v = v > 0 ? v / state->penalty : v * state->penalty;
        return v > kGreatest ? kGreatest : v < -kGreatest ? -kGreatest : v;
    }

    HQ_MEMBER LogitKey best_of_all(SamplingShared& shared) const {
        LogitKey key = 0;
        for (int i = thread_x(); i < blocks; i += kSampleThreads) key = greater(best[i], key);
        return greatest(key, shared);
    }
    HQ_MEMBER int bin(float x) const {
        const float at = -x * kBinsOfUnit;
        return at < kBins - 1 ? (int)at : kBins - 1;
    }
    // The last bin that holds tokens which top-k or, without it, top-p may keep. For top-p no more may be left out than
    // what is not wanted, which is counted with the best logit of each bin.
    HQ_MEMBER int last_bin(uint64_t total, SamplingShared& shared) const {
        if (state->top_k > 0)
            return first_above(
                kBins, shared, [&](int i) { return (uint64_t)bins[i]; }, [&](uint64_t) { return state->top_k - 1; });
        const uint64_t spare = total - state->nucleus(total) - 1;
        const auto at_most = [&](int i) {
            return probability(i < kBins - 1 ? -(float)(kBins - 2 - i) / kBinsOfUnit : 0) * bins[kBins - 1 - i];
        };
        return kBins - 1 - first_above(kBins, shared, at_most, [&](uint64_t) { return spare; });
    }
    HQ_MEMBER uint64_t sum_of_all(SamplingShared& shared) const {
        uint64_t sum = 0, all;
        for (int i = thread_x(); i < blocks; i += kSampleThreads) sum += sums[i];
        running_sum(sum, all, shared);
        return all;
    }
    // Adds the block's tokens of the bins up to `last` to the list, in any order.
    HQ_MEMBER void gather(const float* v, float top, int last, SamplingShared& shared) const {
        int mine = 0;
        for (int i = 0; i < kLogits; i++) mine += id(block_x(), i) < n && bin(v[i] - top) <= last;
        uint64_t all;
        int to = (int)running_sum(mine, all, shared) - mine;
        if (thread_x() == 0) shared.base = add_atomic(listed, (int)all);
        barrier();
        to += shared.base;
        for (int i = 0; i < kLogits; i++)
            if (id(block_x(), i) < n && bin(v[i] - top) <= last) list[to++] = key_of(rank_of(v[i]), id(block_x(), i));
    }
};

// Between accesses to keys that lie in shared memory, or in global memory.
template <bool kShared> HQ_INLINE void barrier_of_keys() {
    if constexpr (!kShared) fence_release();
    barrier();
    if constexpr (!kShared) fence_acquire();
}

// Best first: a bitonic network whose steps all put the greater key in front, so that what is missing behind the end
// would stay there (Batcher 1968).
template <bool kShared> HQ_INLINE void sort(LogitKey* keys, int count) {
#pragma unroll 1
    for (int half = 1; half < count; half *= 2)
#pragma unroll 1
        for (int step = half; step > 0; step /= 2) {
            for (int i = thread_x(); i < (count + step) / 2; i += kSampleThreads) {
                const int low = 2 * i - (i & (step - 1)), high = step == half ? low ^ (2 * half - 1) : low + step;
                if (high >= count) continue;
                const LogitKey a = keys[low], b = keys[high];
                if (a < b) keys[low] = b, keys[high] = a;
            }
            barrier_of_keys<kShared>();
        }
}

// Of a list that holds all that top-k and top-p keep: sorts, cuts, draws. `total` is the sum of all probabilities where
// top-k is off.
template <bool kShared>
HQ_INLINE int draw_from_list(
    LogitKey* keys, int count, uint64_t total, const SamplingState& state, SamplingShared& shared) {
    sort<kShared>(keys, count);
    const float top = value_of(keys[0]);
    const auto distance = [&](int i) { return value_of(keys[i]) - top; };
    if (state.top_k > 0 && state.top_k < count) count = state.top_k;
    if (!state.keeps_all_p()) {
        const auto weight = [&](int i) { return probability(distance(i)); };
        const auto wanted = [&](uint64_t sum) { return state.nucleus(state.top_k > 0 ? sum : total); };
        count = first_above(count, shared, weight, wanted) + 1;
    }
    const auto drawn = [&](uint64_t sum) { return multiply_high(sum, state.random()); };
    const int at = first_above(count, shared, [&](int i) { return state.chance(distance(i)); }, drawn);
    if (thread_x() == 0) shared.sums[0] = keys[at];
    barrier_of_keys<kShared>();
    return token_of(shared.sums[0]);
}

// Of all tokens in the order of their ids, by the sums of the blocks: nothing is cut, so nothing is sorted.
HQ_INLINE int draw_from_all(const SampledRow& row, float top, uint64_t* chances, SamplingShared& shared) {
    const auto drawn = [&](uint64_t sum) { return multiply_high(sum, row.state->random()); };
    const int block = first_above(row.blocks, shared, [&](int i) { return row.sums[i]; }, drawn);
    const uint64_t rest = shared.rest;
    float v[kLogits];
    row.load(v, block, shared);
    for (int i = 0; i < kLogits; i++) chances[thread_x() + kSampleThreads * i] = row.state->chance(v[i] - top);
    barrier();
    const int at = first_above(kBlockLogits, shared, [&](int i) { return chances[i]; }, [&](uint64_t) { return rest; });
    return row.first(block) + at;
}

HQ_KERNEL(256)
sample_best_f32(
    const float* logits, const int* slot, const int* state, const int* history, int* work, int n, int n_context) {
    HQ_SHARED SamplingShared shared;
    let_next_begin();
    wait_for_inputs();
    const SampledRow row(logits, slot, state, history, work, n, n_context);
    float v[kLogits];
    row.load(v, block_x(), shared);
    LogitKey best = 0;
    for (int i = 0; i < kLogits; i++) {
        const LogitKey key = row.id(block_x(), i) < n ? key_of(rank_of(v[i]), row.id(block_x(), i)) : 0;
        best = greater(key, best);
    }
    best = greatest(best, shared);
    if (thread_x() == 0) row.best[block_x()] = best;
}

HQ_INLINE bool unusable(LogitKey best) { return best >> 32 == kUnusable || best >> 32 == kLowest; }

HQ_KERNEL(256)
sample_bins_f32(
    const float* logits, const int* slot, const int* state, const int* history, int* work, int n, int n_context) {
    HQ_SHARED SamplingShared shared;
    let_next_begin();
    wait_for_inputs();
    const SampledRow row(logits, slot, state, history, work, n, n_context);
    const LogitKey best = row.best_of_all(shared);
    if (row.state->greedy() || unusable(best)) return;
    float v[kLogits];
    row.load(v, block_x(), shared);
    const bool cuts = row.state->cuts();
    uint64_t sum = 0, all;
    for (int i = 0; i < kLogits; i++) {
        const float x = v[i] - value_of(best);
        sum += cuts ? probability(x) : row.state->chance(x);
        if (cuts && row.bin(x) < kBins - 1) add_atomic(row.bins + row.bin(x), 1);
    }
    running_sum(sum, all, shared);
    if (thread_x() == 0) row.sums[block_x()] = all;
}

HQ_KERNEL(256)
sample_draw_f32(const float* logits, const int* slot, int* state, int* history, int* work, int* token, int* position,
    int* samples, int n, int n_context) {
    HQ_SHARED SamplingShared shared;
    HQ_SHARED LogitKey keys[kSortedShared];
    let_next_begin();
    wait_for_inputs();
    const SampledRow row(logits, slot, state, history, work, n, n_context);
    const LogitKey best = row.best_of_all(shared);
    const bool bad = unusable(best), cuts = !bad && !row.state->greedy() && row.state->cuts();
    int drawn = bad ? ~token_of(best) : token_of(best);
    if (cuts) {
        float v[kLogits];
        row.load(v, block_x(), shared);
        const uint64_t total = row.state->top_k > 0 ? 0 : row.sum_of_all(shared);
        row.gather(v, value_of(best), row.last_bin(total, shared), shared);
        if (!is_last_block(row.done, row.blocks, &shared.at)) return;
        const int count = *row.listed;
        if (count <= kSortedShared) {
            for (int i = thread_x(); i < count; i += kSampleThreads) keys[i] = row.list[i];
            barrier();
            drawn = draw_from_list<true>(keys, count, total, *row.state, shared);
        } else drawn = draw_from_list<false>(row.list, count, total, *row.state, shared);
        for (int i = thread_x(); i < kBins; i += kSampleThreads) row.bins[i] = 0;
    } else {
        if (block_x()) return;
        if (!bad && !row.state->greedy()) drawn = draw_from_all(row, value_of(best), keys, shared);
    }
    if (thread_x()) return;
    const int sequence = slot[block_y()], at = row.state->position;
    *row.listed = 0;
    samples[sequence * kSamples + at % kSamples] = drawn;
    token[block_y()] = drawn < 0 ? 0 : drawn;
    position[block_y()] = at;
    if (at < n_context) history[(uint64_t)sequence * n_context + at] = drawn < 0 ? 0 : drawn;
    ((SamplingState*)state + sequence)->position = at + 1;
}
