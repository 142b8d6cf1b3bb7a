// A mixture of experts: which ones a token has. `router_*`: the router's logits, of floats, and what
// `choose_experts_q8` does: the experts of a token by its logits. `sort_experts_q8`: columns of many tokens, sorted by
// expert. `add_experts_q8`: what the experts give is weighted and added.
#include "experts.h"
#include "mat_vec_epilogue.h"
#include "mat_vec_weights.h"

constexpr int kMaxExperts = 512, kChoosers = 128;

// Of tokens: the `n_used` experts of the greatest logits, of equal ones the first, and their weights: the softmax over
// those chosen. Each is a group of one column, which is the token's; or, where there are `counts`, of the columns of
// each expert, it is counted, and how many have been so before is its `column`.
struct Choice {
    int* experts;
    float* weights;
    ExpertGroup* groups;
    int *token, *counts, *column;
    int n_expert, n_used;
};
struct ChoiceMemory {
    struct alignas(16) {
        int v[4];
    } keys[kMaxExperts / 4];
    float chosen[32];
};

// Integers in the order of logits; NaN come last.
HQ_INLINE int key_of(float logit) {
    const int v = bits<int>(logit + 0);  // of 0 and -0 one
    return logit != logit ? (int)0x80000001 : v < 0 ? v ^ 0x7FFFFFFF : v;
}

// By kChoosers threads. The rank of an expert is how many come before it.
HQ_INLINE void choose_experts(const float* logits, const Choice& to, int of_token, ChoiceMemory& shared) {
    const int fours = (to.n_expert + 3) / 4, first = of_token * to.n_used;
    for (int e = thread_x(); e < 4 * fours; e += kChoosers)
        shared.keys[e / 4].v[e % 4] = e < to.n_expert ? key_of(logits[e]) : (int)0x80000000;
    barrier();
    for (int e = thread_x(); e < to.n_expert; e += kChoosers) {
        const int key = shared.keys[e / 4].v[e % 4];
        int rank = 0;
        for (int j = 0; j < e % 4; j++) rank += shared.keys[e / 4].v[j] == key;
#pragma unroll 4
        for (int i = 0; i < fours; i++) {
            const auto other = shared.keys[i];
            const int below = i < e / 4 ? key - 1 : key;  // of equal ones the first comes before
#pragma unroll
            for (int j = 0; j < 4; j++) rank += other.v[j] > below;
        }
        if (rank >= to.n_used) continue;
        shared.chosen[rank] = logits[e];
        const int choice = first + rank;
        to.experts[choice] = e;
        if (to.counts) to.column[choice] = add_atomic(to.counts + e, 1);
        else to.token[choice] = of_token, to.groups[choice] = {e, choice, 1, 0};
    }
    barrier();
    const int j = thread_x();
    if (j >= 32) return;
    const float each = exp_(shared.chosen[j < to.n_used ? j : 0] - shared.chosen[0]), weight = j < to.n_used ? each : 0;
    const float total = team_sum(weight);
    if (j < to.n_used) to.weights[first + j] = weight / total;
}

// Block (token).
HQ_KERNEL(kChoosers)
choose_experts_q8(const float* logits, int* experts, float* weights, ExpertGroup* groups, int* token, int* counts,
    int* column, int n_expert, int n_used) {
    HQ_SHARED ChoiceMemory memory;
    let_next_begin();
    wait_for_inputs();
    choose_experts(logits + (int64_t)block_x() * n_expert,
        {experts, weights, groups, token, counts, column, n_expert, n_used}, (int)block_x(), memory);
}

// Block (expert, token): a logit; the last block of a token, for which `counters` has an int, chooses.
template <class W> HQ_INLINE void route(const Product& p, float* logits, int* counters, const Choice& to) {
    constexpr int kAhead = 4, kTeams = kChoosers / 32;
    HQ_SHARED float sums[kTeams], squares[kTeams];
    HQ_SHARED int last;
    HQ_SHARED ChoiceMemory memory;
    let_next_begin();
    const int expert = (int)block_x(), token = (int)block_y(), team = thread_x() / 32, groups = (p.ncols + 31) / 32;
    const uint32_t units = (uint32_t)(p.ncols + kUnitWeights - 1) / kUnitWeights, count = W::count(units);
    const PlaneRow row{(uint8_t*)p.x, (uint32_t)p.nrows, units, (uint32_t)expert, 0};
    typename W::Unit ahead[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
        const uint32_t u = (uint32_t)(thread_x() + i * kChoosers);
        ahead[i] = W::load(row, u < count ? u : count - 1);
    }
    wait_for_inputs();
    float sum = 0, square = 0;
    if (p.squares)
        for (int i = thread_x(); i < groups; i += kChoosers) square += p.squares[(int64_t)token * groups + i];
#pragma unroll
    for (int i = 0; i < kAhead; i++) {
        const uint32_t u = (uint32_t)(thread_x() + i * kChoosers);
        if (u < count) sum = W::add(ahead[i], W::load_column(p.y, p.n_padded, token, u), sum);
    }
    for (uint32_t u = (uint32_t)(thread_x() + kAhead * kChoosers); u < count; u += kChoosers)
        sum = W::add(W::load(row, u), W::load_column(p.y, p.n_padded, token, u), sum);
    sum = team_sum(sum), square = team_sum(square);
    if (thread_x() % 32 == 0) sums[team] = sum, squares[team] = square;
    barrier();
    logits += (int64_t)token * to.n_expert;
    if (thread_x() == 0) {
        for (int i = 1; i < kTeams; i++) sum += sums[i], square += squares[i];
        logits[expert] = p.squares ? sum / square_root(square / (float)p.ncols + p.eps) : sum;
    }
    if (is_last_block(counters + token, to.n_expert, &last)) choose_experts(logits, to, token, memory);
}

#define HQ_ROUTER(suffix, F)                                                                                  \
    HQ_KERNEL(kChoosers)                                                                                      \
    router_##suffix(const void* x, const void* y, const float* squares, float eps, int ncols_x, int n_expert, \
        int n_padded, float* logits, int* counters, int* experts, float* weights, int* groups, int* token,    \
        int n_used) {                                                                                         \
        route<FloatWeights<F>>({x, y, squares, eps, ncols_x, n_expert, 1, n_padded}, logits, counters,        \
            {experts, weights, (ExpertGroup*)groups, token, nullptr, nullptr, n_expert, n_used});             \
    }
HQ_ROUTER(f32, WordsF32)
HQ_ROUTER(f16, WordsF16)
HQ_ROUTER(bf16, WordsBF16)
#undef HQ_ROUTER

// One block, a thread an expert: groups of up to `most` columns, of the same expert, for `ntokens` tokens; those
// without columns are last. The `column` of a choice of a token, so far counted from the first one of its expert,
// becomes that of all; `token` is the way back. In the end `counts` are 0 again.
HQ_KERNEL(kMaxExperts)
sort_experts_q8(const int* experts, int* counts, ExpertGroup* groups, int* token, int* column, int n_expert, int n_used,
    int ntokens, int most, int ngroups) {
    constexpr int kAtOnce = 8;
    struct Sums {  // of an expert, or of those before it
        int columns, groups;
    };
    HQ_SHARED Sums of[kMaxExperts];
    HQ_SHARED int before[kMaxExperts];
    let_next_begin();
    wait_for_inputs();
    const int expert = thread_x(), choices = n_used * ntokens;
    const int columns = expert < n_expert ? counts[expert] : 0;
    of[expert] = {columns, (columns + most - 1) / most};
    barrier();
    Sums sums = {};
    for (int e = 0; e < expert && e < n_expert; e++) sums.columns += of[e].columns, sums.groups += of[e].groups;
    before[expert] = sums.columns;
    for (int at = 0; at < columns; at += most)
        groups[sums.groups++] = {expert, sums.columns + at, columns - at < most ? columns - at : most, 0};
    if (expert < n_expert) counts[expert] = 0;
    HQ_SHARED int used;
    if (expert == kMaxExperts - 1) used = sums.groups;
    barrier();
    for (int i = used + expert; i < ngroups; i += kMaxExperts) groups[i] = {};
#pragma unroll 1
    for (int first = expert; first < choices; first += kAtOnce * kMaxExperts) {
        int at[kAtOnce], of_choice[kAtOnce];
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {  // all loads before the first store
            const int i = first + k * kMaxExperts < choices ? first + k * kMaxExperts : first;
            of_choice[k] = experts[i], at[k] = column[i];
        }
#pragma unroll
        for (int k = 0; k < kAtOnce; k++) {
            const int i = first + k * kMaxExperts;
            if (i >= choices) break;
            at[k] += before[of_choice[k]];
            column[i] = at[k], token[at[k]] = i / n_used;
        }
    }
}

// Block (256 values, token): dst = the sum of columns of x, those of the token's choices, weighted.
HQ_KERNEL(256) add_experts_q8(const float* x, const float* weights, const int* column, float* dst, int n, int n_used) {
    let_next_begin();
    wait_for_inputs();
    const int i = (int)block_x() * 256 + thread_x();
    if (i >= n) return;
    float sum = 0;
    for (int j = (int)block_y() * n_used, end = j + n_used; j < end; j++)
        sum = __builtin_fmaf(weights[j], x[(int64_t)column[j] * n + i], sum);
    dst[(int64_t)block_y() * n + i] = sum;
}
