// Vectors of the CPU kernels: the only file that asks which instruction set this is.
//
// `vf`, `vi` and `vb` fill one register: W floats, W ints and 4 W bytes. The kernels are written in clang's vector
// types; only the dot product of bytes, half precision and broadcasts need a word per instruction set.
#pragma once
#include <stdint.h>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#else
#error "kernels/cpu is written for x86-64-v3, x86-64-v4 with VNNI, and aarch64 with dotprod"
#endif

#define HQ_INLINE static inline __attribute__((always_inline))

#if defined(__AVX512VNNI__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int W = 4;
#else
#error "the target lacks AVX-512 VNNI, AVX2 and dotprod"
#endif

template <class T, int N> using vec __attribute__((ext_vector_type(N))) = T;  // N values of T
using vf = vec<float, W>;
using vi = vec<int32_t, W>;
using vb = vec<uint8_t, 4 * W>;
using f32x8 = vec<float, 8>;
using i32x8 = vec<int32_t, 8>;
using u8x32 = vec<uint8_t, 32>;
using i8x32 = vec<int8_t, 32>;
using u8x16 = vec<uint8_t, 16>;
using half_t = _Float16;

template <class V> HQ_INLINE V load(const void* p) {
    V v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
template <class V> HQ_INLINE void store(void* p, V v) { __builtin_memcpy(p, &v, sizeof v); }
HQ_INLINE float half_to_float(uint16_t h) { return (float)__builtin_bit_cast(half_t, h); }
HQ_INLINE uint16_t float_to_half(float f) { return __builtin_bit_cast(uint16_t, (half_t)f); }
HQ_INLINE float load_half(const void* p) { return half_to_float(load<uint16_t>(p)); }

// Asks for N bytes that lie ahead in a stream of weights: far ahead into the second-level cache, nearer into the first.
// On two cores of a Xeon (Sapphire Rapids class, 2026-11-22) products read 32 GB/s with both, 30 with the far one alone,
// 17 with none. 4096 bytes ahead into the first level, beyond the page of the hardware's prefetcher, gave 24.
constexpr int kFar = 3072, kNear = 1024;
template <int N> HQ_INLINE void prefetch(const void* p) {
    for (int i = 0; i < N; i += 64) {
        __builtin_prefetch((const char*)p + kFar + i, 0, 2);
        __builtin_prefetch((const char*)p + kNear + i, 0, 3);
    }
}

// W halves to floats and back.
HQ_INLINE vf load_halves(const void* p) {
#if defined(__AVX512VNNI__)
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    return __builtin_convertvector((load<vec<half_t, W>>(p)), vf);
#endif
}
HQ_INLINE void store_halves(void* p, vf v) {
#if defined(__AVX512VNNI__)
    _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
#else
    store(p, __builtin_convertvector(v, vec<half_t, W>));
#endif
}
HQ_INLINE vi bytes_to_ints(const void* p) { return __builtin_convertvector((load<vec<uint8_t, W>>(p)), vi); }
HQ_INLINE vi signed_bytes_to_ints(const void* p) { return __builtin_convertvector((load<vec<int8_t, W>>(p)), vi); }
template <int N> HQ_INLINE vec<float, N> to_float(vec<int32_t, N> v) { return __builtin_convertvector(v, vec<float, N>); }

template <class V> HQ_INLINE V fma(V a, V b, V c) { return __builtin_elementwise_fma(a, b, c); }
template <class V> HQ_INLINE float sum(V v) {
    if constexpr (sizeof(V) > 16)
        return sum(v.lo + v.hi);
    else
        return (v[0] + v[2]) + (v[1] + v[3]);
}
template <class V> HQ_INLINE float max(V v) { return __builtin_reduce_max(v); }

// Bytes of a vector shifted as 16-bit lanes: the caller masks what crossed from the neighbour.
template <int N, class V> HQ_INLINE V shr(V v) {
    using u16 = vec<uint16_t, sizeof(V) / 2>;
    return (V)((u16)v >> N);
}
template <int N, class V> HQ_INLINE V shl(V v) {
    using u16 = vec<uint16_t, sizeof(V) / 2>;
    return (V)((u16)v << N);
}

// acc += dot products of four neighbouring bytes. `w` unsigned below 128, `y` signed.
HQ_INLINE i32x8 dot4(i32x8 acc, u8x32 w, i8x32 y) {
#if defined(__AVX512VNNI__)
    return (i32x8)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)w, (__m256i)y);
#elif defined(__AVX2__)
    __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)y);
    return acc + (i32x8)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    i32x8 r;
    r.lo = vdotq_s32(acc.lo, (int8x16_t)w.lo, y.lo);
    r.hi = vdotq_s32(acc.hi, (int8x16_t)w.hi, y.hi);
    return r;
#endif
}
// The same with `w` signed; `y` is never -128.
HQ_INLINE i32x8 dot4(i32x8 acc, i8x32 w, i8x32 y) {
#if defined(__AVX512VNNI__)
    i32x8 bias = (i32x8)_mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(-128), (__m256i)y);
    return (i32x8)_mm256_dpbusd_epi32((__m256i)acc, (__m256i)(w ^ (int8_t)-128), (__m256i)y) - bias;
#elif defined(__AVX2__)
    return dot4(acc, (u8x32)_mm256_abs_epi8((__m256i)w), (i8x32)_mm256_sign_epi8((__m256i)y, (__m256i)w));
#else
    return dot4(acc, (u8x32)w, y);
#endif
}

// acc += dot products of four bytes with the same four bytes at `y`, in every lane. Weights are held unsigned; where
// the hardware has only a signed product of full bytes, 8-bit weights are turned back by `kSignedBytes`.
#if defined(__AVX512VNNI__)
constexpr bool kSignedBytes = false;
HQ_INLINE vi dot4_broadcast(vi acc, vb w, const int8_t* y) {
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, _mm512_set1_epi32(load<int32_t>(y)));
}
#elif defined(__AVX2__)
constexpr bool kSignedBytes = true;
HQ_INLINE vi dot4_broadcast(vi acc, vb w, const int8_t* y) {
    return dot4(acc, w, (i8x32)_mm256_set1_epi32(load<int32_t>(y)));
}
HQ_INLINE vi dot4_broadcast_signed(vi acc, vb w, const int8_t* y) {
    return dot4(acc, (i8x32)w, (i8x32)_mm256_set1_epi32(load<int32_t>(y)));
}
#else
constexpr bool kSignedBytes = true;
HQ_INLINE vi dot4_broadcast(vi acc, vb w, const int8_t* y) {
    return vdotq_s32(acc, (int8x16_t)w, (int8x16_t)vdupq_n_s32(load<int32_t>(y)));
}
HQ_INLINE vi dot4_broadcast_signed(vi acc, vb w, const int8_t* y) { return dot4_broadcast(acc, w, y); }
#endif
#if defined(__AVX512VNNI__)
HQ_INLINE vi dot4_broadcast_signed(vi acc, vb w, const int8_t* y) { return dot4_broadcast(acc, w, y); }
#endif

// e^x, relative error below 2e-7: 2^n by the exponent bits, the rest by a polynomial on [-ln2/2, ln2/2].
template <class V> HQ_INLINE V exp_(V x) {
    using I = vec<int32_t, sizeof(V) / 4>;
    x = x > 88.0f ? (V)88.0f : x < -87.0f ? (V)-87.0f : x;  // NaN stays what it is
    V n = __builtin_elementwise_roundeven(x * 1.44269504088896341f);
    V r = fma(n, (V)-0.693359375f, x);
    r = fma(n, (V)2.12194440e-4f, r);  // ln 2 in two parts, so that n ln 2 is exact enough
    V p = (V)(1.0f / 5040);
    p = fma(p, r, (V)(1.0f / 720));
    p = fma(p, r, (V)(1.0f / 120));
    p = fma(p, r, (V)(1.0f / 24));
    p = fma(p, r, (V)(1.0f / 6));
    p = fma(p, r, (V)0.5f);
    p = fma(p, r, (V)1.0f);
    p = fma(p, r, (V)1.0f);
    return p * (V)((__builtin_convertvector(n, I) + 127) << 23);
}

// tanh x, relative error below 2e-6: by its series near 0, where 1 - 2 / (1 + e^2x) would lose digits.
template <class V> HQ_INLINE V tanh_(V x) {
    const V square = x * x, series = fma(square, fma(square, (V)(2.0f / 15), (V)(-1.0f / 3)), (V)1.0f);
    return square < 0.015625f ? x * series : 1 - 2 / (1 + exp_(2 * x));
}
