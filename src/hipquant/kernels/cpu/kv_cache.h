// The layout of the KV cache of one layer: halves, per slot and KV head a region of n_context positions.
//
// Values lie position by position. Keys lie transposed in tiles of 16 positions, [tile][head_dim][16], so that the
// scores of 16 positions fill a register and need no sum across lanes.
#pragma once
#include "simd.h"

constexpr int kKeyTile = 16;

struct KVHead {
    int64_t index;  // slot * n_head_kv + head
    int head_dim, n_context;  // n_context is a multiple of 16

    int64_t value(int64_t position) const { return (index * n_context + position) * head_dim; }
    int64_t key(int64_t position) const {  // of its first value; the next lies kKeyTile further
        return value(position / kKeyTile * kKeyTile) + position % kKeyTile;
    }
};
