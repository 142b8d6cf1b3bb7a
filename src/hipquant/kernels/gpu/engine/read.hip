// `read_memory`: the sum of the words of each MiB, to measure how fast a device reads. A block takes one.
#include "rows.h"

template <int kMask> HQ_INLINE uint32_t add_other(uint32_t v) { return v + (uint32_t)shuffle_xor<kMask>((int)v); }

HQ_KERNEL(256) read_memory(const void* x, int* dst, int64_t nbytes) {
    constexpr uint32_t kThreads = 256, kAhead = 8;
    HQ_SHARED uint32_t partial[kThreads / 32];
    let_next_begin();
    wait_for_inputs();
    const uint64_t first = (uint64_t)block_x() << 20, left = (uint64_t)nbytes - first;
    const uint32_t vectors = (uint32_t)((left < 1 << 20 ? left : 1 << 20) / 16), thread = (uint32_t)thread_x();
    const Row<16> from{(const uint8_t*)x + first};
    uint32_t sum = 0;
    for (uint32_t i = thread; i < vectors; i += kThreads * kAhead) {
        Words<16> v[kAhead] = {};
#pragma unroll
        for (uint32_t j = 0; j < kAhead; j++)
            if (i + j * kThreads < vectors) v[j] = field<16>(from, 16 * (i + j * kThreads));
#pragma unroll
        for (uint32_t j = 0; j < kAhead; j++) sum += v[j].w[0] + v[j].w[1] + v[j].w[2] + v[j].w[3];
    }
    sum = add_other<1>(sum), sum = add_other<2>(sum), sum = add_other<7>(sum), sum = add_other<15>(sum);
    sum = add_other<16>(sum);
    if (thread % 32 == 0) partial[thread / 32] = sum;
    barrier();
    if (thread) return;
    sum = 0;
    for (uint32_t i = 0; i < kThreads / 32; i++) sum += partial[i];
    dst[block_x()] = (int)sum;
}
