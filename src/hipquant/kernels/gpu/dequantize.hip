// `dequantize_block_*`: blocks to floats or halves, 4 weights a thread at a time.
#include "dequantize.h"

HQ_INLINE void store4(float* y, const float v[4]) {
    Words<16> w;
    for (int i = 0; i < 4; i++) w.w[i] = bits<uint32_t>(v[i]);
    store<4>(y, w);
}
HQ_INLINE void store4(uint16_t* y, const float v[4]) {
    Words<8> w;
    for (int i = 0; i < 2; i++) w.w[i] = float_to_half(v[2 * i]) | (uint32_t)float_to_half(v[2 * i + 1]) << 16;
    store<2>(y, w);
}

// Elements of a block of the grid, of which there are `count` in all.
template <class Q, int kElements, int kThreads, class T> HQ_INLINE void dequantize(const void* x, T* y, int64_t count) {
    const int64_t first = (int64_t)block_x() * kElements;
    for (int i = 4 * thread_x(); i < kElements; i += 4 * kThreads) {
        if (first + i >= count) return;
        float v[4];
        weights<Q>(v, (const typename Q::Block*)x + (first + i) / Q::kBlock, (int)((first + i) % Q::kBlock));
        store4(y + first + i, v);
    }
}

// How a kernel learns of the number of elements: a third argument, or the grid alone.
#define HQ_NB32 , int nb32
#define HQ_K , int k
#define HQ_GRID
#define HQ_NB32_COUNT (int64_t)nb32 * 32
#define HQ_K_COUNT k
#define HQ_GRID_COUNT (int64_t)(~0ull >> 1)

#define HQ_DEQUANTIZE(suffix, Q, elements, threads, arg)                                                               \
    HQ_KERNEL(threads) dequantize_block_##suffix##_f32(const void* x, float* y HQ_##arg) {                             \
        dequantize<Q, elements, threads>(x, y, HQ_##arg##_COUNT);                                                      \
    }                                                                                                                  \
    HQ_KERNEL(threads) dequantize_block_##suffix##_f16(const void* x, uint16_t* y HQ_##arg) {                          \
        dequantize<Q, elements, threads>(x, y, HQ_##arg##_COUNT);                                                      \
    }
HQ_DEQUANTIZE_TYPES(HQ_DEQUANTIZE)
