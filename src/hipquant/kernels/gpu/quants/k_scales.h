// The 12 bytes in which Q4_K and Q5_K keep 8 scales and 8 minimums of 6 bits. Sub-block i < 4: scale in the low 6 bits
// of byte i, minimum in those of byte i + 4; sub-block i >= 4: low nibbles in byte i + 4, high two bits at the top of
// bytes i - 4 (scale) and i (minimum).
#pragma once
#include "../blocks.h"

// Scales and minimums of sub-blocks 2c and 2c + 1: byte 0 and 1 of each word.
struct KScales {
    uint32_t scales, minimums;
};
HQ_INLINE KScales k_scales(uint32_t a, uint32_t b, uint32_t c, uint32_t chunk) {
    const uint32_t shift = 16 * (chunk & 1);
    a >>= shift, b >>= shift, c >>= shift;
    if (chunk < 2) return {a & 0x3F3F, b & 0x3F3F};
    return {(c & 0x0F0F) | (a >> 2 & 0x3030), (c >> 4 & 0x0F0F) | (b >> 2 & 0x3030)};
}

// The same as one word: bytes 0 and 1 are the scales, 2 and 3 the minimums. Without a branch, as loops leave `chunk` as
// it is.
HQ_INLINE uint32_t packed_k_scales(uint32_t a, uint32_t b, uint32_t c, uint32_t chunk) {
    const uint32_t later = opaque(0u - (chunk >> 1 & 1));
    const uint32_t first = join_halves(a, b, chunk & 1), nibbles = join_halves(c, c, chunk & 1);
    const uint32_t second = (first >> 2 & 0x30303030) | (nibbles & 0x00000F0F) | (nibbles >> 4 & 0x0F0F0000);
    return (second & later) | (first & 0x3F3F3F3F & ~later);
}

// Scale and minimum of sub-block g, from the 12 bytes of its block.
HQ_INLINE KScales k_scales_of(const uint8_t* scales, int g) {
    const KScales pair = k_scales(load4(scales), load4(scales + 4), load4(scales + 8), g / 2);
    return {pair.scales >> 8 * (g % 2) & 63, pair.minimums >> 8 * (g % 2) & 63};
}
