// Weights and activations as the engine keeps them: the bits of the file's blocks, moved so that neighbouring lanes
// read neighbouring vectors. A row is cut into *units* of 64 weights (the last one may be half empty: scales of 0).
// Pieces of 16 bytes of a row's units lie in planes [row][piece][unit]; what else a unit has, in planes [row][unit]
// behind those of all rows, the wider the earlier, so that everything is aligned to its size.
//
// A quant header describes its type by `Planes`:
//   kOffset                          weight = scale * (q - kOffset) - minimum
//   kShift                           (q << kShift) ^ 0x80 is the signed byte (q - kOffset) << kShift; where kOffset > 0
//   kMin                             whether there are minimums
//   kSub                             weights that share a sub-scale, 16 or 32; 0: scales are floats, for 32 weights
//   kBytes                           of 4 units
//   Unit, load(row, u), store(row, u, unit), gather(blocks, u, halves)    a unit; the latter from the file's blocks
//   placed(unit, i)                  (q - centre(g)) << place(g) of weights 4i to 4i + 3 as int8, where g = i / 4: the
//                                    bits where they lie, the topmost of a byte flipped in memory
//   word(unit, i)                    q of these weights, bytes from 0 to 127 (int8 where kOffset is 0, no kMin)
//   d(unit, h), minimum(unit, h)     where !kSub: float scale and minimum of half h
//   d(unit), dmin(unit)              where kSub: float scales of the unit, and the integers that multiply them:
//   sub_scale(unit, g), sub_minimum(unit, g)    of group g of kSub weights
#pragma once
#include "device.h"

constexpr int kUnitWeights = 64, kUnitHalf = 32;

// Row `first` + `row` of a matrix of `rows` rows in planes. Where `first` is the same for a whole block, addresses are
// a base, of which there is one for each plane, and 32 bits.
struct PlaneRow {
    uint8_t* x;  // of the matrix
    uint32_t rows, units, first, row;

    // A piece of 16 bytes of kPieces.
    template <int kPieces> HQ_MEMBER uint8_t* piece(uint32_t u, int i) const {
        return x + ((uint64_t)first * kPieces + (uint32_t)i) * units * 16 + (row * kPieces * units + u) * 16;
    }
    // kSize bytes of a unit, where planes of kBefore bytes a unit come before.
    template <int kBefore, int kSize> HQ_MEMBER uint8_t* at(uint32_t u) const {
        return x + ((uint64_t)rows * kBefore + (uint64_t)first * kSize) * units + (row * units + u) * kSize;
    }
    // The same of 4 units, which are a super-block: kSize bytes for all of them.
    template <int kBefore, int kSize> HQ_MEMBER uint8_t* at_super(uint32_t u) const {
        return x + ((uint64_t)rows * kBefore * 4 + (uint64_t)first * kSize) * (units / 4) +
               (row * units + u) / 4 * kSize;
    }
};

// Columns of activations in planes: pieces of int8, d as floats, and the sums of the int8 of each 16.
// [piece][unit] 16 bytes, then [unit] | d0 float | s0, s1 int16 | d1 float | s2, s3 int16 |.
constexpr int kActivationBytes = 80;  // of a unit
struct ActivationUnit {
    Words<16> q[4];
    Words<16> scales;
    HQ_MEMBER float d(int h) const { return bits<float>(scales.w[2 * h]); }
    HQ_MEMBER uint32_t sums(int h) const { return scales.w[2 * h + 1]; }
    HQ_MEMBER int sum16(int g) const { return (int)(sums(g / 2) << (g % 2 ? 0 : 16)) >> 16; }
    HQ_MEMBER float sum32(int h) const { return d(h) * (float)(sum16(2 * h) + sum16(2 * h + 1)); }
};
HQ_INLINE ActivationUnit load_activations(const uint8_t* column, uint32_t units, uint32_t u) {
    ActivationUnit r;
    const uint32_t at = opaque(u * 16);  // or each piece of each column has a pointer of its own in a loop over units
#pragma unroll
    for (int i = 0; i < 4; i++) r.q[i] = load_vector<16>(column + i * (units * 16) + at);
    r.scales = load_vector<16>(column + 4 * (units * 16) + at);
    return r;
}

// N bytes of a file's blocks, aligned to 2.
template <int N> HQ_INLINE Words<N> load_halves(const void* p) {
    Words<N> r;
#pragma unroll
    for (int i = 0; i < N / 4; i++) r.w[i] = load4((const uint8_t*)p + 4 * i);
    return r;
}
// Bits `from` and on of each byte of v, kBits of them, as bits `to` and on of each byte.
template <int kBits = 1> HQ_INLINE uint32_t move_bits(uint32_t v, int from, int to) {
    return (from > to ? v >> (from - to) : v << (to - from)) & ((1 << kBits) - 1) * 0x01010101u << to;
}

// The topmost bit of each byte, flipped.
HQ_INLINE Words<16> flipped(Words<16> v) {
    for (int i = 0; i < 4; i++) v.w[i] ^= 0x80808080;
    return v;
}
// Quants of kBits from where placed() has them.
template <int kBits> HQ_INLINE uint32_t unplaced(uint32_t placed, int place, int centre) {
    return (placed >> place & ((1 << kBits) - 1) * 0x01010101u) ^ (uint32_t)centre * 0x01010101u;
}
// Quants of 5 bits: one is in bits 0 to 4 of a byte; of another one, the upper three bits are in bits 5 to 7, and the
// others in bits 2i, 2i + 1 of a byte that four of them share.
HQ_INLINE uint32_t placed_five(uint32_t q, uint32_t others, int i, bool upper) {
    return upper ? (q & 0xE0E0E0E0) | move_bits<2>(others, 2 * (i % 4), 3) : q & 0x1F1F1F1F;
}
HQ_INLINE void put_five(uint32_t& q, uint32_t& others, uint32_t five, int i, bool upper) {
    if (!upper) q |= five;
    else q |= (five << 3 & 0xE0E0E0E0) ^ 0x80808080, others |= (five & 0x03030303) << 2 * (i % 4);
}

// Scale and minimum of weights 16g to 16g + 15 of a unit of type P.
template <class P> HQ_INLINE float group_scale(const typename P::Unit& w, int g) {
    if constexpr (P::kSub == 0) return P::d(w, g / 2);
    else return P::d(w) * (float)P::sub_scale(w, g * 16 / P::kSub);
}
template <class P> HQ_INLINE float group_minimum(const typename P::Unit& w, int g) {
    if constexpr (!P::kMin) return 0;
    else if constexpr (P::kSub == 0) return P::minimum(w, g / 2);
    else return P::dmin(w) * (float)P::sub_minimum(w, g * 16 / P::kSub);
}
