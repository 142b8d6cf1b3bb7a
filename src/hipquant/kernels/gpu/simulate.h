// The third branch of device.h: kernels as functions of the host. Each thread of a block is a fiber (simulate_fibers.h);
// barriers and what a team does together wait for all of them, and know from where each of them came. Whatever a GPU
// would not forgive, or would forgive only by chance, ends the simulation with a sentence.
#pragma once

#define HQ_INLINE static inline __attribute__((always_inline, unused))
#define HQ_MEMBER __attribute__((always_inline))
#define HQ_KERNEL(threads) extern "C" void
#define HQ_RESIDENT_KERNEL(threads, blocks) HQ_KERNEL(threads)
#define HQ_SHARED static __attribute__((section(".hq_shared")))  // filled with NaN between blocks
// HQ_MATRIX_UNITS: 0 none; 1 NVIDIA's; AMD's by how many halves a lane has: 16 RDNA3's, 8 RDNA4's, 4 CDNA's.
#if HQ_MATRIX_UNITS == 1
constexpr bool kMatrixUnits = true;
#define HQ_HALF_MATRICES 1
#define HQ_ASYNC_COPIES 1
#else
constexpr bool kMatrixUnits = false;
#define HQ_HALF_MATRICES 0
#define HQ_ASYNC_COPIES 0
#endif

// Whether lanes came together at one place is told by where they were called from: calls are not moved, copied, merged.
#define HQ_TOGETHER __attribute__((noinline, convergent, nomerge))
#define HQ_SITE int line = __builtin_LINE(), const char *file = __builtin_FILE()

extern "C" {
struct hq_thread {
    int x, y;
    uint32_t block_x, block_y;
    int wave;  // lanes of a wave: 32 or 64
};
extern hq_thread hq_now;  // the thread that runs
void hq_barrier(const char* file, int line) HQ_TOGETHER;
int hq_shuffle_xor(int v, int mask, int lanes, const char* file, int line) HQ_TOGETHER;
void hq_mma(int* c, const uint32_t* a, const uint32_t* b, int k, const char* file, int line) HQ_TOGETHER;
void hq_mma_f16(float* c, const uint32_t* a, const uint32_t* b, const char* file, int line) HQ_TOGETHER;
void hq_multiply_tiles(
    float* c, const uint32_t* a, const uint32_t* b, int lanes, int depth, const char* file, int line) HQ_TOGETHER;
void hq_load_matrices(uint32_t* r, const void* row, bool transposed, const char* file, int line) HQ_TOGETHER;
void hq_copy_async(void* to, const void* from, int size, int bytes);
void hq_wait_copies();
void hq_fault(const char* format, ...) __attribute__((noreturn, cold, format(printf, 1, 2)));
float hq_half_to_float(uint32_t bits);
uint16_t hq_float_to_half(float v);
}

HQ_INLINE int thread_x() { return hq_now.x; }
HQ_INLINE int thread_y() { return hq_now.y; }
HQ_INLINE uint32_t block_x() { return hq_now.block_x; }
HQ_INLINE uint32_t block_y() { return hq_now.block_y; }

HQ_INLINE void barrier(HQ_SITE) { hq_barrier(file, line); }
template <int kMask> HQ_INLINE int shuffle_xor(int v, HQ_SITE) {
    static_assert(kMask == 1 || kMask == 2 || kMask == 7 || kMask == 15 || kMask == 16, "a mask of a butterfly");
    return hq_shuffle_xor(v, kMask, 32, file, line);
}
// Across a whole wave, as kernels for one wave size do it: for tests of what comes of that.
HQ_INLINE int wave_size() { return hq_now.wave; }
HQ_INLINE float wave_shuffle_xor(float v, int mask, HQ_SITE) {
    return __builtin_bit_cast(float, hq_shuffle_xor(__builtin_bit_cast(int, v), mask, hq_now.wave, file, line));
}

constexpr bool kDotInstructions = kMatrixUnits;
HQ_INLINE int dot4(uint32_t a, uint32_t b, int c) {
    for (int i = 0; i < 32; i += 8) c += (int8_t)(a >> i) * (int8_t)(b >> i);
    return c;
}
HQ_INLINE int dot4_unsigned(uint32_t a, uint32_t b, int c) {
    for (int i = 0; i < 32; i += 8) c += (uint8_t)(a >> i) * (int8_t)(b >> i);
    return c;
}
HQ_INLINE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t n = selector >> 4 * i & 15, byte = (n & 4 ? b : a) >> 8 * (n & 3) & 0xFF;
        r |= (n & 8 ? (byte & 0x80 ? 0xFF : 0) : byte) << 8 * i;
    }
    return r;
}
HQ_INLINE uint32_t mul24(uint32_t a, uint32_t b) {
    if ((a | b) >> 24) hq_fault("mul24(%u, %u): more than 24 bits", a, b);
    return a * b;
}
HQ_INLINE uint32_t opaque(uint32_t v) { return v; }
HQ_INLINE uint8_t* opaque(uint8_t* p) { return p; }
HQ_INLINE float computed_here(float v) { return v; }
HQ_INLINE void keep_order() {}

HQ_INLINE float half_to_float(uint32_t bits) { return hq_half_to_float(bits); }
HQ_INLINE uint16_t float_to_half(float v) { return hq_float_to_half(v); }
// 2^v without the C library's help: 2^(v - n) by its series, n the nearest whole number. Rounded, below 2^-126 0.
HQ_INLINE float exp2_approximate(float v) {
    if (v >= 128) return __builtin_inff();
    if (v < -126) return 0;
    if (v != v) return v;
    const int n = (int)(v < 0 ? v - 0.5f : v + 0.5f);
    const double x = (v - (double)n) * 0.693147180559945309;
    double term = 1, sum = 1;
    for (int i = 1; i < 12; i++) sum += term *= x / i;
    return (float)(sum * __builtin_bit_cast(double, (uint64_t)(1023 + n) << 52));
}
HQ_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
HQ_INLINE float reciprocal(float v) { return 1 / v; }

HQ_INLINE uint32_t join_halves(uint32_t a, uint32_t b, bool high) { return permute(a, b, high ? 0x7632 : 0x5410); }
HQ_INLINE int byte_at(uint32_t v, int i) { return (int)(v >> 8 * i & 0xFF); }
HQ_INLINE int signed_byte_at(uint32_t v, int i) { return (int8_t)(v >> 8 * i); }
HQ_INLINE int dot2(uint32_t halves, uint32_t bytes, int pair, int c) {
    return c + (int16_t)halves * byte_at(bytes, 2 * pair) + ((int)halves >> 16) * byte_at(bytes, 2 * pair + 1);
}
HQ_INLINE uint32_t middle(uint32_t a, uint32_t b) { return a >> 16 | b << 16; }

HQ_INLINE const void* aligned_to(int bytes, const void* p, const char* what) {
    if ((uint64_t)p % (uint32_t)bytes) hq_fault("%s at an address that is not a multiple of %d", what, bytes);
    return p;
}

template <int N, int kAlign> HQ_INLINE Words<N> load_vectors(const void* p) {
    Words<N> r;
    __builtin_memcpy(r.w, aligned_to(kAlign, p, "a load"), N);
    return r;
}

template <int kAlign> struct Row {
    const uint8_t* p;
};
// With matrix units as on NVIDIA: rows of such blocks are aligned as far as their sizes allow.
constexpr int row_alignment(int block_bytes) {
    return !kMatrixUnits ? 2 : block_bytes % 16 == 0 ? 16 : block_bytes % 8 == 0 ? 8 : block_bytes % 4 == 0 ? 4 : 2;
}
template <int N, int kAlign> HQ_INLINE Words<N> field(Row<kAlign> row, uint32_t at) {
    static_assert(N % 8 == 0, "pairs of words");
    return load_vectors<N, (kAlign == 16 && N < 16 ? 8 : kAlign)>(row.p + at);
}
template <int N, int kAlign> HQ_INLINE Words<N> inner_field(Row<kAlign> row, uint32_t at) { return field<N>(row, at); }
template <int kAlign> HQ_INLINE uint32_t field_word(Row<kAlign> row, uint32_t at) {
    return load_vectors<4, (kAlign < 4 ? 2 : 4)>(row.p + at).w[0];
}
template <int kAlign> HQ_INLINE uint32_t field_half(Row<kAlign> row, uint32_t at) {
    return *(const uint16_t*)aligned_to(2, row.p + at, "a load");
}
template <int kAlign> HQ_INLINE int field_byte(Row<kAlign> row, uint32_t at) { return (int8_t)row.p[at]; }

template <int N> HQ_INLINE Words<N> load_words(const void* p) { return load_vectors<N, 4>(p); }
template <int N> HQ_INLINE Words<N> load_words_in_pairs(const void* p) { return load_words<N>(p); }
HQ_INLINE uint32_t load4(const void* p) { return load_vectors<4, 2>(p).w[0]; }
template <int kAlign, int N> HQ_INLINE void store(void* p, const Words<N>& v) {
    __builtin_memcpy((void*)aligned_to(kAlign, p, "a store"), v.w, N);
}

template <int N> HQ_INLINE Words<N> load_vector(const void* p) { return load_vectors<N, N>(p); }
template <int N> HQ_INLINE Words<N> load_stream(const void* p) { return load_vectors<N, N>(p); }
HQ_INLINE uint32_t load_stream_half(const void* p) { return *(const uint16_t*)aligned_to(2, p, "a load"); }
template <int N> HQ_INLINE void store_vector(void* p, const Words<N>& v) { store<N>(p, v); }
HQ_INLINE void wait_for_inputs() {}
HQ_INLINE void let_next_begin() {}
constexpr bool kFenceOfOneWillDo = true;
HQ_INLINE void fence_release() {}
HQ_INLINE void fence_acquire() {}
HQ_INLINE int add_atomic(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }

template <int N, int kAlign> HQ_INLINE Words<N> load_shared(const void* p) { return load_vectors<N, kAlign>(p); }
template <int N> HQ_INLINE void copy_async(void* to, const void* from, int bytes) {
    hq_copy_async((void*)aligned_to(N, to, "a copy"), aligned_to(N, from, "a copy"), N, bytes);
}
HQ_INLINE void wait_copies() { hq_wait_copies(); }
HQ_INLINE uint32_t multiprocessors() { return 2; }

HQ_INLINE void mma_k16(int c[4], const uint32_t a[2], uint32_t b, HQ_SITE) { hq_mma(c, a, &b, 16, file, line); }
HQ_INLINE void mma_k32(int c[4], const uint32_t a[4], const uint32_t b[2], HQ_SITE) { hq_mma(c, a, b, 32, file, line); }
HQ_INLINE void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2], HQ_SITE) {
    hq_mma_f16(c, a, b, file, line);
}
HQ_INLINE void load_matrices(uint32_t r[4], const void* row, HQ_SITE) {
    hq_load_matrices(r, aligned_to(16, row, "a matrix"), false, file, line);
}
HQ_INLINE void load_matrices_transposed(uint32_t r[4], const void* row, HQ_SITE) {
    hq_load_matrices(r, aligned_to(16, row, "a matrix"), true, file, line);
}

HQ_INLINE uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r = 0;
    for (int i = 0; i < 32; i += 16) {
        const double product = (double)half_to_float(a >> i & 0xFFFF) * half_to_float(b >> i & 0xFFFF);
        r |= (uint32_t)float_to_half((float)(product + half_to_float(c >> i & 0xFFFF))) << i;
    }
    return r;
}
HQ_INLINE void show_to_matrix_units(const void*) {}
#define HQ_WARPGROUPS 0

#if HQ_MATRIX_UNITS > 1
#define HQ_MATRIX_TILES 1
struct MatrixTiles {
    static constexpr int kDepth = HQ_MATRIX_UNITS, kLanes = kDepth == 4 ? 64 : 32;
    HQ_MEMBER static int row(int lane) { return kDepth == 16 ? lane % 2 * 8 + lane % 16 / 2 : lane % 16; }
    HQ_MEMBER static int other_team(int v, HQ_SITE) { return hq_shuffle_xor(v, 32, 64, file, line); }
};
template <class Tiles>
HQ_INLINE void multiply_tiles(
    float* c, const Words<2 * Tiles::kDepth>& a, const Words<2 * Tiles::kDepth>& b, HQ_SITE) {
    hq_multiply_tiles(c, a.w, b.w, Tiles::kLanes, Tiles::kDepth, file, line);
}
#endif
