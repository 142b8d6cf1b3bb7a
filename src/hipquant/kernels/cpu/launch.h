// How a kernel of the CPU code object is entered: the launch, and the parameters of the wiring table by address.
#pragma once
#include <stddef.h>
#include <stdint.h>

extern "C" struct hq_launch {
    uint32_t grid[3], block[3];
    uint32_t shared_bytes;  // of the launch; the CPU's kernels keep what they share on their stack
    uint32_t thread;      // which thread of the pool this is
    uint64_t begin, end;  // the blocks to run, counted x first, then y, then z
};

#define HQ_ENTRY(name) extern "C" __attribute__((visibility("default"))) void name(const hq_launch* launch, void** params)

// One parameter: `const float* x = arg<const float*>(params, 0);`
template <class T> static inline T arg(void** params, int i) { return *(const T*)params[i]; }
