// Rows of the KV cache, keys or values of a head: how they are stored, and loaded 8 values at a time.
#pragma once
#include "rows.h"

// Halves [position][head_dim].
struct HalfRows {
    uint16_t* halves;
    using Piece = Words<16>;
    static constexpr bool kScaled = false;

    HQ_MEMBER HalfRows from(int64_t i) const { return {halves + i}; }
    // Values i to i + 7 of the row whose first value is number `row`; those behind head_dim, which vectors do not
    // reach, are 0.
    template <bool kVectors> HQ_MEMBER Piece load(uint32_t row, int i, int head_dim) const {
        if constexpr (kVectors) {
            return load_vector<16>((const uint8_t*)halves + 2 * (row + i));
        } else {
            Piece r;
#pragma unroll
            for (int w = 0; w < 4; w++, i += 2) r.w[w] = i < head_dim ? load_vector<4>(halves + row + i).w[0] : 0;
            return r;
        }
    }
    HQ_MEMBER static void unpack(float* v, const Piece& piece) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = half_to_float(piece.w[i / 2] >> 16 * (i % 2) & 0xFFFF);
    }
    HQ_MEMBER static float scale(const Piece&) { return 1; }
    // Values i and i + 1 of a row that this one begins at, where `inside`.
    HQ_MEMBER void store_pair(int i, float a, float b, bool inside) const {
        if (inside) *(uint32_t*)(halves + i) = pack_halves(a, b);
    }
    HQ_MEMBER static Words<16> to_halves(const Piece& piece) { return piece; }
};

// A score, in multiples of log(2) as the cap is, soft-capped where there is a cap.
HQ_INLINE float soft_capped(float score, float cap) { return cap * tanh_(score * reciprocal(cap)); }
