// The float types as rows of a matrix.
#pragma once
#include "simd.h"

struct F32 {
    static constexpr int kBytes = 4;
    HQ_INLINE vf load_vector(const char* p) { return load<vf>(p); }
    HQ_INLINE float load_one(const char* p) { return load<float>(p); }
    HQ_INLINE void store_one(char* p, float v) { store(p, v); }
};
struct F16 {
    static constexpr int kBytes = 2;
    HQ_INLINE vf load_vector(const char* p) { return load_halves(p); }
    HQ_INLINE float load_one(const char* p) { return load_half(p); }
    HQ_INLINE void store_one(char* p, float v) { store(p, float_to_half(v)); }
};
struct BF16 {
    static constexpr int kBytes = 2;
    HQ_INLINE vf load_vector(const char* p) {
        return (vf)(__builtin_convertvector((load<vec<uint16_t, W>>(p)), vec<uint32_t, W>) << 16);
    }
    HQ_INLINE float load_one(const char* p) { return __builtin_bit_cast(float, (uint32_t)load<uint16_t>(p) << 16); }
    HQ_INLINE void store_one(char* p, float v) {  // finite; to the nearest, ties to even
        const uint32_t bits = __builtin_bit_cast(uint32_t, v);
        store(p, (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16));
    }
};
