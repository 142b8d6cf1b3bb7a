// The only file that may ask which vendor or target, with the three that it chooses from: AMD (amd.h), NVIDIA
// (nvidia.h), and the host's simulation (simulate.h). Kernels are written for *teams* of 32 lanes: a wave of 32 is one,
// a wave of 64 holds two. No header of HIP or CUDA is needed.
#pragma once

typedef __INT8_TYPE__ int8_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __INT16_TYPE__ int16_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;

// N bytes in registers.
template <int N> struct Words {
    static_assert(N % 4 == 0, "whole words");
    uint32_t w[N / 4];
};

#if defined(HQ_SIMULATE)
#include "simulate.h"

#elif defined(__AMDGCN__)
#include "amd.h"

#elif defined(__CUDA__) || defined(__CUDACC__)
#include "nvidia.h"

#else
#error "compile for AMD (clang -x hip, hipcc --genco), for NVIDIA (clang -x cuda, nvcc -x cu) or with -DHQ_SIMULATE"
#endif

template <class To, class From> HQ_INLINE To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To r;
    __builtin_memcpy(&r, &v, sizeof r);
    return r;
}
template <int kMask> HQ_INLINE float shuffle_xor(float v) { return bits<float>(shuffle_xor<kMask>(bits<int>(v))); }

HQ_INLINE float max2(float a, float b) { return a > b ? a : b; }

// Two floats as halves, the first one in the low bits.
HQ_INLINE uint32_t pack_halves(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return float_to_half(low) | (uint32_t)float_to_half(high) << 16;
#endif
}

constexpr float kLog2E = 1.44269502162933349609375f, kLog2ERest = 1.9259629911e-8f;  // their sum is log2(e)

// e^v, relative error below 1e-6: of v log2(e), what does not fit a float is multiplied behind.
HQ_INLINE float exp_(float v) {
    v = v < -104 ? -104 : v > 89 ? 89 : v;  // 0 and infinity from there on; NaN stays
    const float t = v * kLog2E, rest = __builtin_fmaf(v, kLog2ERest, __builtin_fmaf(v, kLog2E, -t));
    return exp2_approximate(t) * __builtin_fmaf(rest, 0.693147180559945f, 1);
}

// tanh v, relative error below 3e-6: by its series near 0, where 1 - 2 / (1 + e^2v) would lose digits.
HQ_INLINE float tanh_(float v) {
    const float square = v * v, series = __builtin_fmaf(square, __builtin_fmaf(square, 2.0f / 15, -1.0f / 3), 1);
    const float far = 1 - 2 * reciprocal(1 + exp2_approximate(v * (2 * kLog2E)));
    return square < 0.015625f ? v * series : far;
}

// Over the 32 lanes of a team, in every lane.
HQ_INLINE float team_sum(float v) {
    v += shuffle_xor<1>(v), v += shuffle_xor<2>(v), v += shuffle_xor<7>(v), v += shuffle_xor<15>(v);
    return v + shuffle_xor<16>(v);
}
HQ_INLINE float team_max(float v) {
    v = max2(v, shuffle_xor<1>(v)), v = max2(v, shuffle_xor<2>(v)), v = max2(v, shuffle_xor<7>(v));
    v = max2(v, shuffle_xor<15>(v));
    return max2(v, shuffle_xor<16>(v));
}

// How many sums team_sums() makes of n: the next power of 2.
constexpr int team_width(int n) { return n <= 1 ? 1 : 2 * team_width((n + 1) / 2); }

// One step of it: lanes whose bit kBit is set keep the second half of the sums, the others the first.
template <int kMask, int kBit, int kSums> HQ_INLINE void exchange_sums(float* v, int& which, int& spare) {
    const bool upper = (thread_x() & kBit) != 0;
    if constexpr (kSums == 1) {
        v[0] += shuffle_xor<kMask>(v[0]);
        spare |= upper;
    } else {
#pragma unroll
        for (int i = 0; i < kSums / 2; i++) {
            const float mine = upper ? v[i + kSums / 2] : v[i], other = upper ? v[i] : v[i + kSums / 2];
            v[i] = mine + shuffle_xor<kMask>(other);
        }
        which += upper ? kSums / 2 : 0;
    }
}
constexpr int half_of(int n) { return n > 1 ? n / 2 : 1; }

// Sums v[0], ... v[kSums - 1], each over the 32 lanes of a team: v[0] becomes the sum whose number is returned; lanes
// that have the same one get -1 but for one of them. kSums is a power of 2, at most 32.
template <int kSums> HQ_INLINE int team_sums(float* v) {
    if constexpr (kSums == 1) {
        v[0] = team_sum(v[0]);
        return thread_x() == 0 ? 0 : -1;
    }
    int which = 0, spare = 0;
    constexpr int k2 = half_of(kSums), k4 = half_of(k2), k8 = half_of(k4), k16 = half_of(k8);
    exchange_sums<16, 16, kSums>(v, which, spare);
    exchange_sums<15, 8, k2>(v, which, spare);
    exchange_sums<7, 4, k4>(v, which, spare);
    exchange_sums<2, 2, k8>(v, which, spare);
    exchange_sums<1, 1, k16>(v, which, spare);
    return spare ? -1 : which;
}

// Whether this block is the last one of `of` to come here; its threads then see what all of them have written. All
// threads come here. `counter` is 0 before and after; `last` lies in shared memory.
HQ_INLINE bool is_last_block(int* counter, int of, int* last) {
    fence_release();  // of each thread: on AMD a barrier orders shared memory alone
    barrier();
    if (of > 1) {
        if (thread_x() == 0 && thread_y() == 0) {
            *last = add_atomic(counter, 1) == of - 1;
            if (*last) *counter = 0, fence_acquire();
        }
        barrier();
        if (!*last) return false;
    }
    if constexpr (!kFenceOfOneWillDo) fence_acquire();
    return true;
}
