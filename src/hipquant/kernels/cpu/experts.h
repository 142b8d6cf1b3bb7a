// A mixture of experts: which columns each expert multiplies. A *pair* is a token and one of its experts; pairs are
// sorted by expert, and are columns in that order.
#pragma once
#include <stdint.h>

// Columns `first` to `first` + `count` - 1, all of one expert. Their q8 tiles begin at column `tile`: those of a group
// are rounded up to a power of 2, so that all groups take less than twice as many as there are pairs.
struct ExpertGroup {
    int expert, first, count, tile;
};

constexpr int kMaxExperts = 512;
