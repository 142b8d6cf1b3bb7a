// What the engine's kernels share: groups of lanes, vectors of floats, and activations as they leave a kernel.
#pragma once
#include "blocks.h"

struct alignas(16) Float4 {
    float v[4];
};

HQ_INLINE bool aligned16(uint64_t addresses) { return (addresses & 15) == 0; }  // all of those that are or-ed together
HQ_INLINE float infinity() { return bits<float>(0x7F800000u); }

// Over groups of 8, 16 or 32 neighbouring lanes, in each of them. All lanes of the team take part.
template <int kLanes> HQ_INLINE float group_sum(float v) {
    static_assert(kLanes == 8 || kLanes == 16 || kLanes == 32, "a group");
    v += shuffle_xor<1>(v), v += shuffle_xor<2>(v), v += shuffle_xor<7>(v);
    if constexpr (kLanes >= 16) v += shuffle_xor<15>(v);
    if constexpr (kLanes >= 32) v += shuffle_xor<16>(v);
    return v;
}
template <int kLanes> HQ_INLINE float group_max(float v) {
    static_assert(kLanes == 8 || kLanes == 16 || kLanes == 32, "a group");
    v = max2(v, shuffle_xor<1>(v)), v = max2(v, shuffle_xor<2>(v)), v = max2(v, shuffle_xor<7>(v));
    if constexpr (kLanes >= 16) v = max2(v, shuffle_xor<15>(v));
    if constexpr (kLanes >= 32) v = max2(v, shuffle_xor<16>(v));
    return v;
}

// kValues values from a multiple of kValues on: a block of q8_1 is 32 / kValues lanes, and is made as quantize_q8_1
// makes it. All lanes of the team take part; `inside` says whether the lane's values belong to the row.
template <int kValues> HQ_INLINE void store_q8_1(q8_1* row, int i, const float* v, bool inside) {
    constexpr int kLanes = 32 / kValues;
    float biggest = 0, sum = 0;
#pragma unroll
    for (int j = 0; j < kValues; j++) biggest = max2(biggest, v[j] < 0 ? -v[j] : v[j]), sum += v[j];
    biggest = group_max<kLanes>(biggest), sum = group_sum<kLanes>(sum);
    const float d = sum != sum ? sum : biggest / 127;
    q8_1* block = row + i / 32;
    if (!inside) return;
#pragma unroll
    for (int j = 0; j < kValues; j++) {
        float q = d > 0 ? __builtin_rintf(v[j] / d) : 0;
        q = q < 127 ? q : 127;
        q = q > -127 ? q : -127;
        block->qs[i % 32 + j] = (int8_t)q;
    }
    if (i % 32) return;
    block->d = float_to_half(d);
    block->s = float_to_half(sum);
}

// Value i of row `row`, of n, as a float and as one of q8_1, where they are wanted; 0 from n on. Whole teams come here.
HQ_INLINE void store_activation(float v, float* y, void* q, uint64_t row, int i, int n, int n_padded) {
    if (y && i < n) y[row * n + i] = v;
    if (q) store_q8_1<1>((q8_1*)q + row * (n_padded / 32), i, &v, i < n_padded);
}
