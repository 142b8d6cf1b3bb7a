// `mul_mat_vec_*` of one column by way of shared memory, for super-blocks that lie at any multiple of 2: the words and
// half-words that lanes load here and there keep the first-level cache busy for longer than their bytes the memory, and
// unpacking them the processor (32000 x 4096 on an H200, 2026-11-22: Q3_K 36 us, this way 24 us; Q6_K 36 and 34 us).
// Rows are copied in the background as they lie, in pieces of 16 bytes; activations so that a lane reads 16 at once.
//
// Half a team takes a row, 8 blocks of it at a time, 2 lanes to a block: half_dot(). While these are multiplied, the
// next are on their way. mat_vec.hip includes this where device.h has copies in the background.
#pragma once

HQ_INLINE int signed_byte(uint32_t v, int i) { return (int)permute(v, 0, 0x8880 + 0x1111 * (uint32_t)i); }

// A block in shared memory that lies at a multiple of 2: `odd` (0 or 2) behind `p`, which is a multiple of 4.
struct SharedBlock {
    const uint8_t* p;
    uint32_t odd;
    // N bytes from a multiple of 4 on, which the block does not end with.
    template <int N> HQ_MEMBER Words<N> field(uint32_t at) const {
        const Words<N + 4> v = load_shared<N + 4, 4>(p + at);
        Words<N> r;
#pragma unroll
        for (int i = 0; i < N / 4; i++) r.w[i] = permute(v.w[i], v.w[i + 1], odd ? 0x5432 : 0x3210);
        return r;
    }
    HQ_MEMBER uint32_t half(uint32_t at) const { return *(const uint16_t*)(p + odd + at); }
};

constexpr uint32_t kStagedBlocks = 8, kStagedRows = 8;

// Activations of 8 blocks of weights. Block i of the 8 of q8_1 that belong to block b: words 8b to 8b + 7 of quants[i],
// d and s in word 4b + i % 4 of ds[i / 4]. The rows are longer for the banks' sake.
struct alignas(16) StagedColumn {
    uint32_t quants[8][72], ds[2][48];
};

template <class Q> struct alignas(16) StagedRows {
    static constexpr uint32_t kBytes = kStagedBlocks * sizeof(typename Q::Block);  // of a row
    static_assert(kBytes % 16 == 0, "pieces of 16 bytes");
    uint8_t rows[kStagedRows][kBytes + 16 + 32];  // from a multiple of 16 on; and for the banks' sake
    StagedColumn y[2];                            // the second where two half teams share a row
};

// What a thread copies to a stage: pieces of a row, and words of the activations.
template <class Q> struct Copies {
    static constexpr uint32_t kBytes = StagedRows<Q>::kBytes;
    static constexpr uint32_t kColumnBytes = kStagedBlocks * Q::kBlock / 32 * sizeof(q8_1);
    const uint8_t *row, *quants, *ds;     // where the next ones come from
    uint8_t *row_to, *quants_to, *ds_to;  // where they go in the first stage
    int left, blocks;                     // bytes of the row from there on; blocks, of all that share the row
    uint32_t thread, piece, share;        // of the block; of the row; half teams to a row
    bool last;                            // no row follows

    HQ_MEMBER void words(uint8_t* to, int i) {  // of two blocks of weights
        copy_async<4>(to + i / 4 * sizeof(StagedColumn) + i % 4 * 64, quants + i * 16 * sizeof(q8_1), 4);
    }
    HQ_MEMBER void copy(uint32_t stage) {
        uint8_t *to = row_to + stage, *words_to = quants_to + stage;
        const bool scales = thread < 64 * share;
        if (blocks >= (int)(kStagedBlocks * (share + last))) {
#pragma unroll
            for (uint32_t at = 0; at < kBytes + 16; at += 256)
                if (at + 256 <= kBytes + 16 || at + 16 * piece < kBytes + 16) copy_async<16>(to + at, row + at, 16);
#pragma unroll
            for (int i = 0; i < 4; i++) words(words_to, i);
            if (share == 2)
#pragma unroll
                for (int i = 4; i < 8; i++) words(words_to, i);
            if (scales) copy_async<4>(ds_to + stage, ds, 4);
        } else if (blocks > 0) {  // the last ones
            for (int at = 0; at < left && at + 16 * piece < kBytes + 16; at += 256)
                copy_async<16>(to + at, row + at, left - at < 16 ? left - at : 16);
            for (int i = 0; i < 4 * (int)share && (int)thread / 64 + 2 * i < blocks; i++) words(words_to, i);
            if (scales && (int)thread / 8 < blocks) copy_async<4>(ds_to + stage, ds, 4);
        }
        row += share * kBytes, quants += share * kColumnBytes, ds += share * kColumnBytes;
        left -= (int)(share * kBytes), blocks -= (int)(share * kStagedBlocks);
    }
};

// A lane's activations: those of bytes 16g to 16g + 15 of the blocks of q8_1 that belong to a block.
struct Activations {
    const uint8_t *from, *from_ds;
    HQ_MEMBER Words<16> quants(int i) const { return load_shared<16, 16>(from + i * sizeof(StagedColumn::quants[0])); }
    // d and s of blocks 4h to 4h + 3.
    HQ_MEMBER Words<16> ds(int h) const { return load_shared<16, 16>(from_ds + h * sizeof(StagedColumn::ds[0])); }
};

// kFactor times lane g's half of a block, times its activations: bytes 16g to 16g + 15 of hmask and of both halves of
// qs. The low two bits of the weights and the third, flipped, are multiplied where they lie in their bytes, as
// q - 4 = low - 4 flipped, and the sums give the powers of 2 back. Quarter s of half h is sub-block 8h + 2s + g.
HQ_INLINE float half_dot(const Q3_K*, SharedBlock block, uint32_t g, const Activations& y) {
    const Words<16> third = block.field<16>(16 * g);
    const Words<12> scales = block.field<12>(96);
    // The quarters' scales are the bytes of one word: low nibbles of bytes g, 2 + g, 4 + g, 6 + g in each half; above
    // them fields 2h, 2h, 2h + 1, 2h + 1 of two bits of bytes 8 + g, 10 + g, 8 + g, 10 + g, flipped to subtract 32.
    const uint32_t nibbles = permute(scales.w[0], scales.w[1], g ? 0x7531 : 0x6420);
    const uint32_t fields = permute(scales.w[2] ^ 0xAAAAAAAA, 0, g ? 0x3131 : 0x2020);
    const uint32_t high = permute(fields, fields >> 2, 0x5410);
    float sum[5] = {};  // of 1, 4, 8, 16 and 64 times what is wanted, each with 4 times the scale
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const Words<16> low = block.field<16>(32 + 32 * h + 16 * g), ds = y.ds(h);
        const uint32_t scale = ((h ? nibbles >> 2 : nibbles << 2) & 0x3C3C3C3C) | (high << (6 - 4 * h) & 0xC0C0C0C0);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const Words<16> q = y.quants(4 * h + s);
            int flipped = 0, bits = 0;  // 2^(4h + s) times and 2^2s times their sums
#pragma unroll
            for (int i = 0; i < 4; i++) {
                flipped = dot4_unsigned(~third.w[i] & 0x01010101u << (4 * h + s), q.w[i], flipped);
                bits = dot4_unsigned(low.w[i] & 0x03030303u << 2 * s, q.w[i], bits);
            }
            constexpr int kTimes[2][4] = {{1, 1, 1, 1}, {4, 2, 1, 1}}, kLess[2][4] = {{4, 8, 16, 32}, {1, 1, 1, 2}};
            constexpr int kSum[2][4] = {{0, 1, 3, 4}, {1, 2, 3, 4}};
            const int product = kTimes[h][s] * bits - kLess[h][s] * flipped;
            float& to = sum[kSum[h][s]];
            to = __builtin_fmaf((float)(product * signed_byte(scale, s)), half_to_float(ds.w[s]), to);
        }
    }
    const float all = __builtin_fmaf(sum[1], 1.0f / 4, sum[0]) +
        __builtin_fmaf(sum[2], 1.0f / 8, __builtin_fmaf(sum[3], 1.0f / 16, sum[4] * (1.0f / 64)));
    return half_to_float(block.half(108)) * all * (Q3_K::kFactor / 4);
}

// The same of Q6_K: bytes 16g to 16g + 15 of each 32 of ql and qh. Weights are low + 16 high - 32, from nibbles and from
// fields of two bits where they lie. Quarter s of half h is sub-block 8h + 2s + g.
HQ_INLINE float half_dot(const Q6_K*, SharedBlock block, uint32_t g, const Activations& y) {
    const Words<16> scales = block.field<16>(192);
    const uint32_t odd = g ? 0x7531 : 0x6420;
    float sum[2] = {};  // of 1 and 16 times what is wanted
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const Words<16> high = block.field<16>(128 + 32 * h + 16 * g), ds = y.ds(h);
        const uint32_t scale = permute(scales.w[2 * h], scales.w[2 * h + 1], odd);
        Words<16> low[2];
#pragma unroll
        for (int p = 0; p < 2; p++) low[p] = block.field<16>(64 * h + 32 * p + 16 * g);
#pragma unroll
        for (int s = 0; s < 4; s++) {
            const Words<16> q = y.quants(4 * h + s);
            int lows = 0, highs = 0, ones = 0;  // 16^(s / 2) times, 4^s times and 1 times their sums
#pragma unroll
            for (int i = 0; i < 4; i++) {
                lows = dot4_unsigned(low[s % 2].w[i] & 0x0F0F0F0Fu << 4 * (s / 2), q.w[i], lows);
                highs = dot4_unsigned(high.w[i] & 0x03030303u << 2 * s, q.w[i], highs);
                ones = dot4(0x01010101, q.w[i], ones);
            }
            const int product = lows + (s % 2 ? 4 : 16) * highs - (s < 2 ? 32 : 512) * ones;
            sum[s / 2] = __builtin_fmaf((float)(product * signed_byte(scale, s)), half_to_float(ds.w[s]), sum[s / 2]);
        }
    }
    return half_to_float(block.half(208)) * __builtin_fmaf(sum[1], 1.0f / 16, sum[0]) * Q6_K::kFactor;
}

template <class Q>
HQ_INLINE void mul_mat_vec_staged(const void* x, const void* y, float* dst, uint32_t ncols, uint32_t nrows) {
    HQ_SHARED StagedRows<Q> stages[2];
    HQ_SHARED float partial[kStagedRows];
    // Two half teams share a row where rows are long but few.
    const uint32_t share = nrows < 8192 && ncols > 8192 ? 2 : 1, block_rows = kStagedRows / share;
    // A block takes more rows than the table gives it, and others have nothing to do. They come last where all that work
    // fit at once (8 blocks to a multiprocessor); in between otherwise, as they take 0.7 ns each.
    const uint32_t groups = (nrows + block_rows - 1) / block_rows;
    const bool at_once = groups <= 8 * multiprocessors();
    if (at_once ? block_x() >= groups : block_x() % block_rows != 0) return;
    const uint32_t group = at_once ? block_x() : block_x() / block_rows;

    constexpr uint32_t kBlockBytes = sizeof(typename Q::Block);
    const uint32_t lane = (uint32_t)thread_x(), team = (uint32_t)thread_y(), place = 2 * team + lane / 16;
    const uint32_t part = team & (share - 1), row = group * block_rows + team / share * 2 + lane / 16;
    const uint32_t nblocks = ncols / Q::kBlock, row_bytes = nblocks * kBlockBytes, used = row < nrows ? row : nrows - 1;
    const uint8_t* from = (const uint8_t*)x + (uint64_t)used * row_bytes;
    const uint32_t shift = (uint32_t)(uint64_t)from & 15;

    Copies<Q> copies;
    const uint32_t t = team * 32 + lane, skip = 16 * (lane % 16) + part * StagedRows<Q>::kBytes;
    copies.thread = t, copies.piece = lane % 16, copies.share = share, copies.last = used == nrows - 1;
    copies.row = from - shift + skip, copies.left = (int)(shift + row_bytes) - (int)skip, copies.blocks = (int)nblocks;
    copies.quants = (const uint8_t*)y + t / 8 * sizeof(q8_1) + 4 + 4 * (t % 8);
    copies.ds = (const uint8_t*)y + t * sizeof(q8_1);
    copies.row_to = stages[0].rows[place] + 16 * (lane % 16);
    copies.quants_to = (uint8_t*)&stages[0].y[0].quants[t / 8 % 8][8 * (t / 64) + t % 8];
    copies.ds_to = (uint8_t*)&stages[0].y[t / 64].ds[t % 8 / 4][t / 8 % 8 * 4 + t % 4];
    copies.copy(0);

    const uint32_t g = lane % 2, b = lane / 2 % 8, at = shift + b * kBlockBytes, odd = at & 2;
    const SharedBlock block{stages[0].rows[place] + at - odd, odd};
    const Activations activations{
        (const uint8_t*)&stages[0].y[part].quants[0][8 * b + 4 * g], (const uint8_t*)&stages[0].y[part].ds[0][4 * b]};
    float acc = 0;
    uint32_t stage = 0;
    for (uint32_t first = 0; first < nblocks; first += kStagedBlocks * share) {
        wait_copies();
        barrier();
        copies.copy(sizeof stages[0] - stage);
        if (first + part * kStagedBlocks + b < nblocks)
            acc += half_dot((const Q*)nullptr, SharedBlock{block.p + stage, odd}, g,
                Activations{activations.from + stage, activations.from_ds + stage});
        stage = sizeof stages[0] - stage;
    }
    acc += shuffle_xor<1>(acc), acc += shuffle_xor<2>(acc), acc += shuffle_xor<7>(acc), acc += shuffle_xor<15>(acc);
    acc *= 1.0f / Q::kFactor;
    if (share == 1) {
        if (lane % 16 == 0 && row < nrows) dst[row] = acc;
        return;
    }
    if (lane % 16 == 0) partial[place] = acc;
    barrier();
    if (t < block_rows && group * block_rows + t < nrows)
        dst[group * block_rows + t] = partial[t / 2 * 4 + t % 2] + partial[t / 2 * 4 + 2 + t % 2];
}

template <>
inline HQ_MEMBER void mul_mat_vec<Q6_K, 1>(const void* x, const void* y, float* dst, int ncols, int nrows, int, int) {
    mul_mat_vec_staged<Q6_K>(x, y, dst, (uint32_t)ncols, (uint32_t)nrows);
}

template <>
inline HQ_MEMBER void mul_mat_vec<Q3_K, 1>(const void* x, const void* y, float* dst, int ncols, int nrows, int, int) {
    mul_mat_vec_staged<Q3_K>(x, y, dst, (uint32_t)ncols, (uint32_t)nrows);
}
