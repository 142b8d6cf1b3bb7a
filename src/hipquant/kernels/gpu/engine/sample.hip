// `argmax_f32`: the place of the greatest value of each row, the first of equals; NaN is never it. A block takes a row.
#include "rows.h"

// A value and its place; a place that is none comes behind all others.
struct Place {
    float value;
    int at;
    HQ_MEMBER void take(float v, int i) {
        if (v > value || (v == value && i < at)) value = v, at = i;
    }
    template <int kMask> HQ_MEMBER void take_from_lane() {
        const float v = shuffle_xor<kMask>(value);
        take(v, shuffle_xor<kMask>(at));
    }
};

HQ_KERNEL(256) argmax_f32(const float* x, int* ids, int n) {
    constexpr int kNone = 0x7FFFFFFF;
    HQ_SHARED float values[8];
    HQ_SHARED int places[8];
    const int thread = thread_x();
    x += (uint64_t)block_x() * n;
    Place best{-infinity(), kNone};
#pragma unroll 4
    for (int i = thread; i < n; i += 256) best.take(x[i], i);
    best.take_from_lane<1>(), best.take_from_lane<2>(), best.take_from_lane<7>();
    best.take_from_lane<15>(), best.take_from_lane<16>();
    if (thread % 32 == 0) values[thread / 32] = best.value, places[thread / 32] = best.at;
    barrier();
    if (thread) return;
    for (int i = 1; i < 8; i++) best.take(values[i], places[i]);
    ids[block_x()] = best.at == kNone ? 0 : best.at;
}
