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

// int8 [position][head_dim] times a half for each 32 of them: scales [position][head_dim / 32].
struct Q8Rows {
    int8_t* quants;
    uint16_t* scales;
    struct Piece {
        Words<8> quants;
        uint32_t scale;
    };
    static constexpr bool kScaled = true;

    HQ_MEMBER Q8Rows from(int64_t i) const { return {quants + i, scales + i / 32}; }
    template <bool kVectors> HQ_MEMBER Piece load(uint32_t row, int i, int) const {
        static_assert(kVectors, "rows are whole blocks of 32");
        const uint32_t at = row + (uint32_t)i;
        return {load_vector<8>(quants + at), scales[at / 32]};
    }
    // Without the scale.
    HQ_MEMBER static void unpack(float* v, const Piece& piece) {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = (float)signed_byte_at(piece.quants.w[i / 4], i % 4);
    }
    HQ_MEMBER static float scale(const Piece& piece) { return half_to_float(piece.scale); }
    HQ_MEMBER static Words<16> to_halves(const Piece& piece) {
        const float d = scale(piece);
        float v[8];
        unpack(v, piece);
        Words<16> r;
#pragma unroll
        for (int i = 0; i < 4; i++) r.w[i] = pack_halves(v[2 * i] * d, v[2 * i + 1] * d);
        return r;
    }
    // 16 neighbouring lanes have a block of 32 values; all lanes of the team come here. Values that are not finite make
    // a block so.
    HQ_MEMBER void store_pair(int i, float a, float b, bool inside) const {
        const float biggest = group_max<16>(max2(a < 0 ? -a : a, b < 0 ? -b : b)), all = group_sum<16>(a + b);
        const uint16_t half = float_to_half(all != all ? all : biggest / 127);
        const float d = half_to_float(half);
        if (!inside) return;
        *(uint16_t*)(quants + i) = (uint16_t)(quantized(a, d) | quantized(b, d) << 8);
        if (i % 32 == 0) scales[i / 32] = half;
    }
    HQ_MEMBER static uint32_t quantized(float v, float d) {
        float q = d > 0 ? __builtin_rintf(v / d) : 0;
        q = q < 127 ? q : 127;
        q = q > -127 ? q : -127;
        return (uint32_t)(int)q & 0xFF;
    }
};

// A score, in multiples of log(2) as the cap is, soft-capped where there is a cap.
HQ_INLINE float soft_capped(float score, float cap) { return cap * tanh_(score * reciprocal(cap)); }
