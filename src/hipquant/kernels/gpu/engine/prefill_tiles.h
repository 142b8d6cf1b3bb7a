// Attention of long passes by AMD's matrix units (MatrixTiles in amd.h), which multiply 16 x 16 halves by as many.
//
// Everything is transposed: keys times queries gives scores whose columns are rows of queries, so that a lane has
// scores of one row alone; these are, rounded to halves, the columns that values times weights takes, where they are.
#pragma once
#include "prefill.h"

// The greatest weight is 2^15, the greatest power of 2 among halves: many small ones matter, of which CDNA2 takes those
// below 2^-14 for 0, and which other GPUs have with fewer bits.
constexpr float kGreatestWeight = 15;

// Values on their way to a tile in which a row is a dimension. A thread takes 8 dimensions of 4 keys at a time.
template <int kDims, int kKeys, bool kVectors, class Rows> struct TransposedCopy {
    static constexpr int kFours = kKeys / 4, kItems = kFours * kDims / 8;
    static constexpr int kEach = (kItems + kPrefillThreads - 1) / kPrefillThreads;
    int length, head_dim, thread;
    typename Rows::Piece ahead[kEach][4];

    HQ_MEMBER int item(int i) const { return i * kPrefillThreads + thread; }
    HQ_MEMBER bool there(int i) const { return kItems % kPrefillThreads == 0 || item(i) < kItems; }
    HQ_MEMBER void begin(TileRow<kKeys>*, const Rows& cache, int first) {
#pragma unroll
        for (int i = 0; i < kEach; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int key = there(i) ? first + item(i) % kFours * 4 + j : length;
                ahead[i][j] = load_piece<kVectors>(cache, key, item(i) / kFours * 8, length, head_dim);
            }
    }
    HQ_MEMBER void finish(TileRow<kKeys>* to, const Rows&, int) {
#pragma unroll
        for (int i = 0; i < kEach; i++) {
            if (!there(i)) continue;
            TileRow<kKeys>* rows = to + item(i) / kFours * 8;
            Words<16> halves[4];
#pragma unroll
            for (int j = 0; j < 4; j++) halves[j] = Rows::to_halves(ahead[i][j]);
#pragma unroll
            for (int d = 0; d < 8; d++) {
                uint32_t w[4];
#pragma unroll
                for (int j = 0; j < 4; j++) w[j] = halves[j].w[d / 2] >> d % 2 * 16 & 0xFFFF;
                store_vector<8>(rows[d].from(item(i) % kFours * 4), Words<8>{{w[0] | w[1] << 16, w[2] | w[3] << 16}});
            }
        }
    }
};

template <int kDims, class Tiles> struct PrefillByTiles {
    static constexpr int kRows = kPrefillRows, kKeys = kDims > 128 ? 16 : kDims > 64 ? 32 : 64;
    static constexpr int kPart = kDims > 128 ? 128 : kDims;  // of the values, at a time: registers run out
    static constexpr int kColumns = Tiles::kLanes / 32;      // times 16 rows of queries are a wave's
    static constexpr int kHeld = 256 / Tiles::kLanes;        // rows of a product that a lane has
    using Operand = Words<2 * Tiles::kDepth>;
    template <bool kVectors, class Rows> using ValuesCopy = TransposedCopy<kDims, kKeys, kVectors, Rows>;
    struct Tile {
        TileRow<kDims> keys[kKeys];
        TileRow<kKeys> values[kDims];
    };
    static constexpr bool kApart = true;  // keys and values lie in places of their own
    static_assert(kPrefillThreads / Tiles::kLanes * kColumns * 16 == kRows, "every wave has its rows");

    Operand query[kColumns][kDims / 16];
    float sum[kColumns][kPart / 16][kHeld], score[kColumns][kKeys / 16][kHeld], top[kColumns], weights[kColumns];
    int row, last[kColumns], lane, held, depth, part;
    Keys keys;

    HQ_MEMBER void begin(Tile&, const PrefillRows& rows, int first, int at) {
        part = at, lane = (int)opaque((uint32_t)thread_x()) % Tiles::kLanes, keys.begin(rows, first, kRows);
        row = first + thread_x() / Tiles::kLanes * kColumns * 16 + lane % 16;
        held = lane / 16 * kHeld, depth = lane / 16 * Tiles::kDepth % 16;
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
            const float* from = rows.query(row + 16 * c);
            top[c] = rows.sink(row + 16 * c), weights[c] = lane < 16 ? exp2_approximate(kGreatestWeight) : 0;
            last[c] = rows.last(row + 16 * c);
#pragma unroll
            for (int k = 0; k < kDims / 16; k++)
#pragma unroll
                for (int w = 0; w < Tiles::kDepth / 2; w++)
                    query[c][k].w[w] = rows.query_pair(from, 16 * k + depth + 2 * w);
#pragma unroll
            for (int n = 0; n < kPart / 16; n++)
                for (int i = 0; i < kHeld; i++) sum[c][n][i] = 0;
        }
    }
    // What the lane has of 16 rows of a tile, of 16 halves from `at` on.
    template <int kWide> HQ_MEMBER Operand load(const TileRow<kWide>* rows, int at) const {
        constexpr int kBytes = 2 * Tiles::kDepth;
        return load_shared<kBytes, (kBytes < 16 ? kBytes : 16)>(rows[Tiles::row(lane)].from(at + depth));
    }
    // Weights of the keys from `first` on.
    HQ_MEMBER void weigh(Tile& tile, int first) {
#pragma unroll
        for (int c = 0; c < kColumns; c++)
            for (int n = 0; n < kKeys / 16; n++)
                for (int i = 0; i < kHeld; i++) score[c][n][i] = 0;
#pragma unroll
        for (int k = 0; k < kDims / 16; k++)
#pragma unroll
            for (int n = 0; n < kKeys / 16; n++) {
                const Operand of_keys = load(tile.keys + 16 * n, 16 * k);
#pragma unroll
                for (int c = 0; c < kColumns; c++) multiply_tiles<Tiles>(score[c][n], of_keys, query[c][k]);
            }
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
            if (keys.cap != 0) soft_cap(c);
            if (!keys.all_seen(first, kKeys)) hide(c, first + held);
            rescale(c);
        }
    }
    HQ_MEMBER void hide(int c, int key) {
#pragma unroll
        for (int n = 0; n < kKeys / 16; n++)
            for (int i = 0; i < kHeld; i++)
                if (keys.hidden(key + 16 * n + i, last[c])) score[c][n][i] = kHidden;
    }
    HQ_MEMBER void soft_cap(int c) {
#pragma unroll
        for (int n = 0; n < kKeys / 16; n++)
            for (int i = 0; i < kHeld; i++) score[c][n][i] = soft_capped(score[c][n][i], keys.cap);
    }
    HQ_MEMBER static float other_team(float v) { return bits<float>(Tiles::other_team(bits<int>(v))); }
    // Scores of one of the lane's rows to weights.
    HQ_MEMBER void rescale(int c) {
        float greatest = top[c];
#pragma unroll
        for (int n = 0; n < kKeys / 16; n++)
            for (int i = 0; i < kHeld; i++) greatest = max2(greatest, score[c][n][i]);
        greatest = max2(greatest, shuffle_xor<16>(greatest));
        if constexpr (Tiles::kLanes == 64) greatest = max2(greatest, other_team(greatest));
        const float kept = exp2_approximate(top[c] - greatest);
        top[c] = greatest, weights[c] *= kept;
#pragma unroll
        for (int n = 0; n < kPart / 16; n++)
            for (int i = 0; i < kHeld; i++) sum[c][n][i] *= kept;
#pragma unroll
        for (int n = 0; n < kKeys / 16; n++)
            for (int i = 0; i < kHeld; i++)
                weights[c] += score[c][n][i] = exp2_approximate(score[c][n][i] - (greatest - kGreatestWeight));
    }
    // Weights as the lane's part of a column: its own, and where that is all 16, the other lane's of this column.
    HQ_MEMBER Operand column(const float* weight) const {
        Operand r;
#pragma unroll
        for (int i = 0; i < kHeld; i += 2) {
            const uint32_t own = pack_halves(weight[i], weight[i + 1]);
            if constexpr (Tiles::kDepth == kHeld) {
                r.w[i / 2] = own;
            } else {
                const uint32_t other = (uint32_t)shuffle_xor<16>((int)own);
                r.w[i / 2] = held ? other : own, r.w[(kHeld + i) / 2] = held ? own : other;
            }
        }
        return r;
    }
    HQ_MEMBER void add(Tile& tile) {
#pragma unroll
        for (int k = 0; k < kKeys / 16; k++) {
            Operand weight[kColumns];
#pragma unroll
            for (int c = 0; c < kColumns; c++) weight[c] = column(score[c][k]);
#pragma unroll
            for (int n = 0; n < kPart / 16; n++) {
                const Operand values = load(tile.values + part + 16 * n, 16 * k);
#pragma unroll
                for (int c = 0; c < kColumns; c++) multiply_tiles<Tiles>(sum[c][n], values, weight[c]);
            }
        }
    }
    HQ_MEMBER void finish(const PrefillRows& rows) {
        // Computed again, not kept since begin(): registers run out.
        const int row = (int)opaque((uint32_t)this->row), held = (int)opaque((uint32_t)this->held);
#pragma unroll
        for (int c = 0; c < kColumns; c++) {
            weights[c] += shuffle_xor<16>(weights[c]);
            if constexpr (Tiles::kLanes == 64) weights[c] += other_team(weights[c]);
            const float factor = 1 / weights[c];
#pragma unroll
            for (int n = 0; n < kPart / 16; n++)
                for (int i = 0; i < kHeld; i += 2)
                    rows.store_pair(
                        row + 16 * c, part + 16 * n + held + i, sum[c][n][i] * factor, sum[c][n][i + 1] * factor);
        }
    }
};
