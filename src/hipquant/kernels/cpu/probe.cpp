// `hq_probe`: a few products through every instruction that the kernels count on. Run in a child process at load.
#include "launch.h"
#include "simd.h"

extern "C" __attribute__((visibility("default"))) int hq_probe() {
    int8_t y[32] = {1, -2, 3, -4};
    uint16_t halves[W];
    for (int i = 0; i < W; i++) halves[i] = float_to_half(0.5f * i);
    __asm__ volatile("" : : "r"(y), "r"(halves) : "memory");  // so that nothing is computed at compile time
    const vi dot = dot4_broadcast(vi(7), vb(100), y);
    const i32x8 wide = dot4(i32x8(0), i8x32(-100), load<i8x32>(y));
    const vf h = fma(load_halves(halves), vf(2), vf(0));
    store_halves(halves, h);
    __asm__ volatile("" : : "r"(halves) : "memory");
    return dot[W - 1] == 7 - 200 && wide[0] == 200 && load_half(&halves[W - 1]) == W - 1;
}
