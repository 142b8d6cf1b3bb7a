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

HQ_INLINE float silu(float v) { return v / (1 + exp_(-v)); }
// In its tanh form: v / 2 (1 + tanh t) is v / (1 + e^-2t), where t is sqrt(2 / pi) (v + 0.044715 v^3).
HQ_INLINE float gelu(float v) { return v / (1 + exp_(-2 * v * (0.797884560802865f + 0.0356774081363f * v * v))); }
// One of the two. Chosen are coefficients: of two branches, clang 22 mixes up lanes on AMD, where a kernel has others.
HQ_INLINE float silu_or_gelu(bool is_silu, float v) {
    const float linear = is_silu ? -1 : -1.59576912160573f, cubic = is_silu ? 0 : -0.0713548162726f;
    const float square = v * v < 1e30f ? v * v : 1e30f;  // 0 times infinity is none
    return v / (1 + exp_(v * (linear + cubic * square)));
}

// kValues values from value i of a column on, a multiple of kValues, to the column's planes (planes.h), which take
// n_padded values: 32 / kValues neighbouring lanes make a block of 32 with one d. All lanes of the team take part;
// `inside` says whether the lane's values belong to the column.
template <int kValues>
HQ_INLINE void store_activations(uint8_t* column, int n_padded, int i, const float* v, bool inside) {
    static_assert(kValues == 1 || kValues == 4, "values of a lane");
    float biggest = 0, all = 0;
#pragma unroll
    for (int j = 0; j < kValues; j++) biggest = max2(biggest, v[j] < 0 ? -v[j] : v[j]), all += v[j];
    biggest = group_max<32 / kValues>(biggest), all = group_sum<32 / kValues>(all);
    const float d = all != all ? all : biggest / 127;  // NaN stays
    int quants[kValues], sum = 0;
#pragma unroll
    for (int j = 0; j < kValues; j++) {
        float q = d > 0 ? __builtin_rintf(v[j] / d) : 0;
        q = q < 127 ? q : 127;
        q = q > -127 ? q : -127;
        sum += quants[j] = (int)q;
    }
    sum += shuffle_xor<1>(sum), sum += shuffle_xor<2>(sum);  // over 16 values
    if constexpr (kValues == 1) sum += shuffle_xor<7>(sum), sum += shuffle_xor<15>(sum);
    if (!inside) return;
    const uint32_t units = (uint32_t)n_padded / kUnitWeights, u = (uint32_t)i / kUnitWeights, at = (uint32_t)i % 64;
    uint8_t* piece = column + (at / 16 * units + u) * 16 + at % 16;
    if constexpr (kValues == 4)
        *(uint32_t*)piece =
            (quants[0] & 0xFF) | (quants[1] & 0xFF) << 8 | (quants[2] & 0xFF) << 16 | (uint32_t)quants[3] << 24;
    else *piece = (uint8_t)quants[0];
    uint8_t* scales = column + (4 * units + u) * 16 + at / 32 * 8;
    if (at % 32 == 0) *(float*)scales = d;
    if (at % 16 == 0) *(int16_t*)(scales + 4 + at % 32 / 8) = (int16_t)sum;
}

// Bytes of a column of activations in planes.
HQ_INLINE uint64_t column_bytes(int n_padded) {
    return (uint64_t)((uint32_t)n_padded / kUnitWeights) * kActivationBytes;
}

// Values i to i + 3 of row `row`, as floats and in planes, where they are wanted; whole teams come here, up to
// n_padded.
HQ_INLINE void store_four(const Float4& v, float* y, void* q, uint64_t row, int i, int n_padded) {
    if (y && i < n_padded)
        for (int j = 0; j < 4; j++) y[row * n_padded + i + j] = v.v[j];
    if (q) store_activations<4>((uint8_t*)q + row * column_bytes(n_padded), n_padded, i, v.v, i < n_padded);
}
