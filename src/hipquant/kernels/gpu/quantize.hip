// `quantize_q8_1`: rows of floats to blocks of q8_1. A team makes a block, a lane one of its 32 values.
#include "blocks.h"

HQ_KERNEL(256) quantize_q8_1(const float* x, void* y, int kx, int kx_padded) {
    const int i = (int)block_x() * 256 + thread_x();
    if (i >= kx_padded) return;  // whole teams: rows are padded to whole blocks
    const uint64_t row = block_y();
    const float v = i < kx ? x[row * kx + i] : 0;
    const float biggest = team_max(v < 0 ? -v : v), sum = team_sum(v);
    const float d = sum != sum ? sum : biggest / 127;
    float q = d > 0 ? __builtin_rintf(v / d) : 0;
    q = q < 127 ? q : 127;
    q = q > -127 ? q : -127;
    q8_1* block = (q8_1*)y + (row * kx_padded + i) / 32;
    block->qs[i % 32] = (int8_t)q;
    if (i % 32 == 0) {
        block->d = float_to_half(d);
        block->s = float_to_half(sum);
    }
}
