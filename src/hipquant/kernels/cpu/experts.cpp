// A mixture of experts: some are chosen for each token by the router's logits (`choose_experts`), tokens are sorted by
// expert (`group_experts`), their activations become q8 tiles (`quantize_q8_experts`), and what experts give is added
// (`add_experts_f32`). The products are `mul_mat_experts_*`, in mat_mat_packed.cpp and mat_vec.cpp.
#include "experts.h"
#include "launch.h"
#include "tile.h"

// Block (token): the `n_used` experts of the greatest logits, of equal ones the first, and their weights: the softmax
// over those chosen.
HQ_ENTRY(choose_experts) {
    const int n = arg<int>(params, 3), n_used = arg<int>(params, 4);
    for (uint64_t token = launch->begin; token < launch->end; token++) {
        const auto* logits = arg<const float*>(params, 0) + token * n;
        auto* chosen = arg<int*>(params, 1) + token * n_used;
        auto* weights = arg<float*>(params, 2) + token * n_used;
        bool taken[kMaxExperts] = {};
        float total = 0;
        for (int i = 0; i < n_used; i++) {
            int best = -1;  // an expert in any case, also where logits are NaN
            for (int e = 0; e < n; e++)
                if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
            taken[best] = true;
            chosen[i] = best;
            weights[i] = exp_(f32x8(logits[best] - logits[chosen[0]]))[0];
            total += weights[i];
        }
        for (int i = 0; i < n_used; i++) weights[i] /= total;
    }
}

// One block: sorts the pairs of `ntokens` tokens by expert. groups[min(n_expert, pairs)]: those without columns are
// last. token[column], and column[pair] back.
HQ_ENTRY(group_experts) {
    const auto* chosen = arg<const int*>(params, 0);
    auto* groups = arg<ExpertGroup*>(params, 1);
    auto *token = arg<int*>(params, 2), *column = arg<int*>(params, 3);
    const int n_expert = arg<int>(params, 4), n_used = arg<int>(params, 5), pairs = n_used * arg<int>(params, 6);
    if (launch->begin == launch->end) return;
    int count[kMaxExperts] = {}, next[kMaxExperts], n = 0, first = 0, tile = 0;
    for (int i = 0; i < pairs; i++) count[chosen[i]]++;
    for (int e = 0; e < n_expert; e++) {
        if (!count[e]) continue;
        groups[n++] = {e, next[e] = first, count[e], tile};
        first += count[e];
        each_tile(count[e], [&](auto width, int) { tile += decltype(width)::value; });
    }
    for (; n < n_expert && n < pairs; n++) groups[n] = {};
    for (int i = 0; i < pairs; i++) {
        token[next[chosen[i]]] = i / n_used;
        column[i] = next[chosen[i]]++;
    }
}

// Block (group, part of 1024 values): floats to q8 tiles; a column is row `rows[column]` of x; its own, where that
// is null.
HQ_ENTRY(quantize_q8_experts) {
    const auto* x = arg<const float*>(params, 0);
    const auto* rows = arg<const int*>(params, 1);
    const auto* groups = arg<const ExpertGroup*>(params, 2);
    auto* y = arg<char*>(params, 3);
    const int k = arg<int>(params, 4);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const auto group = groups[block % launch->grid[0]];
        const int part = (int)(block / launch->grid[0]);
        const int last = 32 * (part + 1) < k / 32 ? 32 * (part + 1) : k / 32;
        each_tile(group.count, [&](auto width, int at) {
            constexpr int T = decltype(width)::value;
            static const float zero[32] = {};
            auto* tiles = (Q8Tile<T>*)(y + (size_t)(group.tile + at) * sizeof(Q8Tile<1>) * (k / 32));
            for (int t = 0; t < T; t++) {
                const int column = group.first + at + t;
                const auto* from = at + t < group.count ? x + (int64_t)(rows ? rows[column] : column) * k : nullptr;
                for (int s = 32 * part; s < last; s++) quantize_column(&tiles[s], t, from ? from + 32 * s : zero);
            }
        });
    }
}

// Block (token): dst = the sum of what its experts give, x[column], weighted.
HQ_ENTRY(add_experts_f32) {
    const auto* x = arg<const float*>(params, 0);
    const int n = arg<int>(params, 4), n_used = arg<int>(params, 5);
    for (uint64_t token = launch->begin; token < launch->end; token++) {
        const auto* weights = arg<const float*>(params, 1) + token * n_used;
        const auto* column = arg<const int*>(params, 2) + token * n_used;
        auto* dst = arg<float*>(params, 3) + token * n;
        for (int j = 0; j < n_used; j++) {
            const float* from = x + (int64_t)column[j] * n;
            for (int i = 0; i < n; i++) dst[i] = (j ? dst[i] : 0) + weights[j] * from[i];
        }
    }
}
