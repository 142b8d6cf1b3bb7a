// Weights and activations as halves, for products by matrix units of halves.
#pragma once
#include "device.h"

// Weights are so many times what they are, so that small ones keep their bits. Those of 1023 and more become infinite,
// which no sampler takes.
constexpr float kRaise = 64;

constexpr uint32_t both(uint32_t half) { return half | half << 16; }
constexpr uint32_t kOne = both(0x3C00), kMinus1024 = both(0xE400);  // and each n more, up to 1023, is n less

// Bytes 0 and 2 of a word or, `odd`, 1 and 3 as halves, plus 1024. A template, as AMD has no permute().
template <class Word> HQ_INLINE auto bytes_to_halves(Word v, int odd) {
    return permute(v, Word{0x64646464}, odd ? 0x4341u : 0x4240u);
}
