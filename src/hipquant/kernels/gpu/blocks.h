// What the quant headers and the kernels share: activations, and how a header describes its type.
//
//   Block                         the bytes, as ggml lays them out
//   kBlock, kGroup                weights of a block; weights that share a scale (16 or 32)
//   kFactor                       a power of 2: integers are this many times the quants, where that unpacks faster
//   word(b, j)                    weights 4j to 4j + 3 of a block as int8 integers
//   scale(b, g), minimum(b, g)    float scale and minimum of group g: weight = scale * q - minimum
//   Unit, load(row, block, u)     what a lane of a mat-vec takes at once, kUnits to a block: u = 0, 1, ...
//   kStrip, kStep, position(u)    strips of kStrip weights, kStep apart; position of the first within the block
//   kSpan                         the units that begin within kSpan weights cover these, and nothing else
//   word(unit, s, i)              weights 4i to 4i + 3 of a strip, as those of a block
//   d(unit), dmin(unit)           float scales of a unit; and where kSub:
//   sub_scale, sub_minimum        what they are multiplied by for a strip
//   Planes                        how the engine keeps it (planes.h)
#pragma once
#include "planes.h"

// | d half | s half | qs int8[32] |: x = d q, s = the sum of the 32 x. Aligned to 4 bytes.
struct q8_1 {
    uint16_t d, s;
    int8_t qs[32];
};
static_assert(sizeof(q8_1) == 36, "36 bytes");

// Bits 0 to 3 of v as the lowest bits of the 4 bytes of a word.
HQ_INLINE uint32_t spread_bits(uint32_t v) { return mul24(v & 15, 0x204081) & 0x01010101; }

// Byte i of a word, signed.
HQ_INLINE int byte_of(uint32_t v, int i) { return (int)(v << (24 - 8 * i)) >> 24; }

HQ_INLINE uint32_t rotate_left(uint32_t v, uint32_t n) { return v << (n & 31) | v >> (-n & 31); }

// Strips of a unit.
template <class Q> constexpr int strips() { return Q::kBlock / Q::kUnits / Q::kStrip; }
