// The float types as rows of a matrix.
#pragma once
#include "simd.h"

struct F32 {
    static constexpr int kBytes = 4;
    HQ_INLINE vf load_vector(const char* p) { return load<vf>(p); }
    HQ_INLINE float load_one(const char* p) { return load<float>(p); }
};
struct F16 {
    static constexpr int kBytes = 2;
    HQ_INLINE vf load_vector(const char* p) { return load_halves(p); }
    HQ_INLINE float load_one(const char* p) { return load_half(p); }
};
struct BF16 {
    static constexpr int kBytes = 2;
    HQ_INLINE vf load_vector(const char* p) {
        return (vf)(__builtin_convertvector((load<vec<uint16_t, W>>(p)), vec<uint32_t, W>) << 16);
    }
    HQ_INLINE float load_one(const char* p) { return __builtin_bit_cast(float, (uint32_t)load<uint16_t>(p) << 16); }
};
