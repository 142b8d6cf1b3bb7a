// Weights in planes times up to 8 columns by matrix units of halves: dot products of so many columns would take longer
// than the weights need to come. A block has 32 rows, of which its 8 teams take 4 units at a time in turn: a lane has a
// unit of four rows and of one column, as fragments of mma_f16() want it. Which weights meet where along k is all the
// same, as long as the activations agree.
#pragma once
#include "halves.h"
#include "mat_vec_epilogue.h"

constexpr int kTileRows = 32, kTileColumns = 8, kTileTeams = 8;

// Bytes 0 and 2 of a word of int8 or, `odd`, 1 and 3 as halves.
HQ_INLINE uint32_t int8_to_halves(uint32_t word, int odd) {
    return fma_halves(bytes_to_halves(word ^ 0x80808080, odd), kOne, kMinus1024 + both(128));
}

// Word i of a unit as weights, in two pairs of halves; of its group: the scale, and what is added behind.
template <class P> struct GroupOfHalves {
    uint32_t scale, add;
    HQ_MEMBER GroupOfHalves(const typename P::Unit& w, int g) {
        const float s = kRaise * group_scale<P>(w, g), placed = s * (1.0f / (1 << P::place(g)));
        const float rest = s * (float)(P::centre(g) - P::kOffset) - kRaise * group_minimum<P>(w, g);
        scale = pack_halves(placed, placed), add = pack_halves(rest, rest);
    }
    HQ_MEMBER uint32_t weights(uint32_t placed, int odd) const {
        return fma_halves(int8_to_halves(placed, odd), scale, add);
    }
};

template <class Q> struct TileProduct {
    using P = typename Q::Planes;
    PlaneRow rows[4];
    typename P::Unit ahead[4];

    HQ_MEMBER uint32_t unit(uint32_t step) const { return 4 * step + (uint32_t)thread_x() % 4; }
    HQ_MEMBER void load(int r, uint32_t step) {
        const uint32_t u = unit(step), last = rows[r].units - 1;
        ahead[r] = P::load(rows[r], u < last ? u : last);
    }
    // Rows `first` and on of a block, 8 of them a lane's own apart.
    HQ_MEMBER void begin_rows(const Product& p, uint32_t units, const BlockRows& block, int first) {
        const int own = first + thread_x() / 4;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            rows[r] = {(uint8_t*)p.x, (uint32_t)p.nrows, units, block.first, block.row(own / 2 + 4 * r, own % 2)};
            load(r, (uint32_t)thread_y());
        }
    }
    // Units of the step, whose activations are 0 behind the last one; the next ones are loaded.
    HQ_MEMBER void multiply(float (*acc)[4], const uint8_t* column, float scale, uint32_t y_units, uint32_t step,
        uint32_t next, uint32_t end) {
        const ActivationUnit y = load_activations(column, y_units, unit(step));
#pragma unroll
        for (int g = 0; g < 4; g++) {
            const float d = y.d(g / 2) * scale;
            uint32_t b[4][2];
            for (int i = 0; i < 4; i++)
                for (int j = 0; j < 2; j++) b[i][j] = fma_halves(int8_to_halves(y.q[g].w[i], j), pack_halves(d, d), 0);
#pragma unroll
            for (int m = 0; m < 2; m++) {
                const auto &low = ahead[2 * m], &high = ahead[2 * m + 1];
                const GroupOfHalves<P> first(low, g), second(high, g);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const uint32_t u = P::placed(low, 4 * g + i), v = P::placed(high, 4 * g + i);
                    const uint32_t a[4] = {
                        first.weights(u, 0), second.weights(v, 0), first.weights(u, 1), second.weights(v, 1)};
                    mma_f16(acc[m], a, b[i]);
                }
            }
        }
        if (next < end)
#pragma unroll
            for (int r = 0; r < 4; r++) load(r, next);
    }
};

// kColumns is there for each kernel to have shared memory of its own. Inputs that are yet to be normed are multiplied
// by 1 / rms first: a residual stream may be greater than halves are. Others become infinite from 4e6 on.
template <class Q, int kColumns, int kForm>
HQ_INLINE void mul_mat_vec_tiles(const Product& p, const Epilogue& epilogue) {
    HQ_SHARED float partial[kTileTeams][kTileRows * kTileColumns];
    HQ_SHARED BlockResults<kTileTeams, kTileColumns> results;
    let_next_begin();
    const uint32_t units = (uint32_t)(p.ncols + kUnitWeights - 1) / kUnitWeights, steps = (units + 3) / 4;
    const int team = thread_y(), lane = thread_x(), thread = team * 32 + lane, pairs = (p.nrows + 1) / 2;
    const int to_block = epilogue.pairs_to_block, begin = (int)block_x() * to_block;
    TileProduct<Q> product;
    const BlockRows block(epilogue.rows_of<kForm>(), begin, p.nrows);
    product.begin_rows(p, units, block, 0);
    EpilogueThread<kTileTeams, kTileColumns, kForm> behind{p, epilogue, 0, p.columns, begin, to_block, 0, {}, {}, 0, 0};
    behind.load_constants();
    wait_for_inputs();
    behind.load_inputs();

    const int column = lane / 4 < p.columns ? lane / 4 : p.columns - 1;
    float scale = 1.0f / kRaise;
    if (p.squares) {
        behind.store_squares(results.squares);
        barrier();
        scale *= behind.scale(results.squares, column);
    }
    const uint8_t* y = (const uint8_t*)p.y + column * column_bytes(p.n_padded);
#pragma unroll 1
    for (int first = 0; first < 2 * to_block; first += kTileRows) {
        float acc[2][4] = {};
        for (uint32_t step = (uint32_t)team; step < steps; step += kTileTeams)
            product.multiply(acc, y, scale, (uint32_t)p.n_padded / kUnitWeights, step, step + kTileTeams, steps);
        const int next = first + kTileRows;
        if (next < 2 * to_block) product.begin_rows(p, units, block, next);
#pragma unroll
        for (int m = 0; m < 2; m++)
            for (int i = 0; i < 4; i++)
                partial[team][(16 * m + 8 * (i / 2) + lane / 4) * kTileColumns + 2 * (lane % 4) + i % 2] = acc[m][i];
        barrier();
        float v = 0;
        for (int t = 0; t < kTileTeams; t++) v += partial[t][thread];
        results.v[first + thread / kTileColumns][thread % kTileColumns] = v;
        if (begin + next / 2 >= pairs) break;
        if (next < 2 * to_block) barrier();
    }
    barrier();
    behind.store(results, true);
}
