// `quantize_*`: rows of float32 weights to blocks of a type, with the scales that search.h finds.
#include "launch.h"
#include "search.h"
#include "types.h"

constexpr int64_t kPart = 4096;  // weights of a block of the grid

// What the sub-blocks of a part are read from.
struct Source {
    const float *x, *importance;
    int64_t ncols;
};

// The sub-blocks of a tile, the last of them again where the part has fewer.
template <class Q> HQ_INLINE void read_tile(Tile<Q::kSub>& t, const Source& from, int64_t at, int lanes) {
    for (int lane = 0; lane < kLanes; lane++) {
        const int64_t begin = at + (lane < lanes ? lane : lanes - 1) * Q::kSub, column = begin % from.ncols;
        for (int j = 0; j < Q::kSub; j++) {
            t.x[j][lane] = from.x[begin + j];
            t.w[j][lane] = from.importance ? from.importance[column + j] : 1;
        }
    }
}

template <class Q> HQ_INLINE void write_tile(typename Q::Block* y, const Tile<Q::kSub>& t, const Scales& s, int lanes) {
    constexpr int G = Q::kBlock / Q::kSub;
    Parts<Q::kBlock> parts[kLanes / G];
    const f32x16 scale = inverse(s.d * s.scale), shift = s.e * s.minimum * scale;
    for (int lane = 0; lane < kLanes; lane++) {
        parts[lane / G].d = float_to_half(s.d[lane]);
        parts[lane / G].e = float_to_half(s.e[lane]);
        parts[lane / G].scale[lane % G] = (int8_t)s.scale[lane];
        parts[lane / G].minimum[lane % G] = (int8_t)s.minimum[lane];
    }
    for (int j = 0; j < Q::kSub; j++) {
        const f32x16 q = round_(t.x[j], scale, shift, kLow<Q>, kHigh<Q>) + Q::kOffset;
        const auto bytes = __builtin_convertvector(__builtin_convertvector(q, i32x16), vec<uint8_t, kLanes>);
        for (int lane = 0; lane < kLanes; lane++) parts[lane / G].q[lane % G * Q::kSub + j] = bytes[lane];
    }
    for (int i = 0; i < lanes / G; i++) Q::write(y[i], parts[i]);
}

// No half is a scale for values beyond: 65504 times the greatest scale and quant, and their squares have sums.
constexpr float kGreatest = 1e9f;

// Sixteen sub-blocks, or fewer at the end of a part. The first value that cannot be quantized, or -1.
template <class Q> static int64_t quantize_tile(typename Q::Block* y, const Source& from, int64_t at, int lanes) {
    Tile<Q::kSub> t;
    read_tile<Q>(t, from, at, lanes);
    f32x16 outside = 0;  // not below: NaN counts
    for (int j = 0; j < Q::kSub; j++) outside += magnitude(t.x[j]) < kGreatest ? (f32x16)0 : (f32x16)1;
    Scales s = {};
    if (sum(outside) == 0) {
        s = search<Q>(t);
        outside = magnitude(s.d) + magnitude(s.e) < kGreatest ? (f32x16)0 : (f32x16)1;
    }
    if (sum(outside) == 0) {
        write_tile<Q>(y, t, s, lanes);
        return -1;
    }
    for (float limit = kGreatest;; limit /= 2)
        for (int64_t i = at; i < at + lanes * Q::kSub; i++)
            if (!(__builtin_fabsf(from.x[i]) < limit)) return i;
}

// Blocks of a type. A block of the grid finds the first value that cannot be quantized, or -1.
template <class Q> struct Blocks {
    HQ_INLINE int64_t quantize(void* y, const Source& from, int64_t begin, int64_t end) {
        auto* blocks = (typename Q::Block*)y;
        for (int64_t at = begin; at < end; at += kLanes * Q::kSub) {
            const int64_t lanes = (end - at) / Q::kSub;
            const int64_t bad = quantize_tile<Q>(blocks + at / Q::kBlock, from, at, lanes < kLanes ? lanes : kLanes);
            if (bad >= 0) return bad;
        }
        return -1;
    }
};

// Floats of a type.
template <class F> struct Floats {
    HQ_INLINE int64_t quantize(void* y, const Source& from, int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i++) {
            char* to = (char*)y + i * F::kBytes;
            F::store_one(to, from.x[i]);
            if (!(__builtin_fabsf(from.x[i]) < __builtin_inff()) || __builtin_isinf(F::load_one(to))) return i;
        }
        return -1;
    }
};

// Block (4096 weights): invalid[block] = the first of them that is not finite or too large for the type, or -1.
template <class T> static void quantize(const hq_launch* launch, void** params) {
    const Source from = {arg<const float*>(params, 0), arg<const float*>(params, 1), arg<int>(params, 4)};
    const auto n = arg<int64_t>(params, 5);
    for (uint64_t block = launch->begin; block < launch->end; block++) {
        const int64_t begin = block * kPart, end = begin + kPart < n ? begin + kPart : n;
        arg<int64_t*>(params, 3)[block] = T::quantize(arg<void*>(params, 2), from, begin, end);
    }
}

#define HQ_QUANTIZE(suffix, Q) \
    HQ_ENTRY(quantize_##suffix) { quantize<Blocks<Q>>(launch, params); }
HQ_WEIGHT_TYPES(HQ_QUANTIZE)
#define HQ_QUANTIZE_FLOAT(suffix, F) \
    HQ_ENTRY(quantize_##suffix) { quantize<Floats<F>>(launch, params); }
HQ_FLOAT_TYPES(HQ_QUANTIZE_FLOAT)
