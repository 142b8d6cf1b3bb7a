// device.h for NVIDIA: clang, nvcc.
#pragma once

#define HQ_INLINE static inline __attribute__((device, always_inline))
#define HQ_MEMBER __attribute__((device, always_inline))
#define HQ_KERNEL(threads) extern "C" __attribute__((global, launch_bounds(threads))) void
#define HQ_RESIDENT_KERNEL(threads, blocks) extern "C" __attribute__((global, launch_bounds(threads, blocks))) void
#define HQ_SHARED static __attribute__((shared))
constexpr bool kMatrixUnits = true;
#define HQ_HALF_MATRICES 1
#define HQ_ASYNC_COPIES (__CUDA_ARCH__ >= 900)  // from sm_80 on, measured from sm_90 on

#if defined(__clang__)
HQ_INLINE int thread_x() { return __nvvm_read_ptx_sreg_tid_x(); }
HQ_INLINE int thread_y() { return __nvvm_read_ptx_sreg_tid_y(); }
HQ_INLINE uint32_t block_x() { return (uint32_t)__nvvm_read_ptx_sreg_ctaid_x(); }
HQ_INLINE uint32_t block_y() { return (uint32_t)__nvvm_read_ptx_sreg_ctaid_y(); }
#else
HQ_INLINE int thread_x() { return (int)threadIdx.x; }
HQ_INLINE int thread_y() { return (int)threadIdx.y; }
HQ_INLINE uint32_t block_x() { return blockIdx.x; }
HQ_INLINE uint32_t block_y() { return blockIdx.y; }
#endif
HQ_INLINE void barrier() { asm volatile("bar.sync 0;" ::: "memory"); }

template <int kMask> HQ_INLINE int shuffle_xor(int v) {
    int r;
    asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;" : "=r"(r) : "r"(v), "n"(kMask));
    return r;
}
constexpr bool kDotInstructions = true;
HQ_INLINE int dot4(uint32_t a, uint32_t b, int c) {
    int r;
    asm("dp4a.s32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
// The same of uint8 and int8.
HQ_INLINE int dot4_unsigned(uint32_t a, uint32_t b, int c) {
    int r;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}
HQ_INLINE uint32_t opaque(uint32_t v) {
    asm("" : "+r"(v));
    return v;
}
HQ_INLINE uint8_t* opaque(uint8_t* p) {
    asm("" : "+l"(p));
    return p;
}
HQ_INLINE float computed_here(float v) {
    asm volatile("" : "+f"(v));
    return v;
}
HQ_INLINE void keep_order() { asm volatile("" ::: "memory"); }
HQ_INLINE uint32_t mul24(uint32_t a, uint32_t b) { return a * b; }

HQ_INLINE float half_to_float(uint32_t bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"((uint16_t)bits));
    return r;
}
HQ_INLINE uint16_t float_to_half(float v) {
    uint16_t r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
HQ_INLINE float exp2_approximate(float v) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
HQ_INLINE float square_root(float v) {
    float r;
    asm("sqrt.rn.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
HQ_INLINE float reciprocal(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
// Bytes of a | b << 32, by nibbles of the selector: a number from 0 to 7, plus 8 for 8 times its sign.
HQ_INLINE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}
HQ_INLINE uint32_t join_halves(uint32_t a, uint32_t b, bool high) { return permute(a, b, high ? 0x7632 : 0x5410); }
// A byte of a word.
HQ_INLINE int byte_at(uint32_t v, int i) { return (int)permute(v, 0, 0x4440 + (uint32_t)i); }
HQ_INLINE int signed_byte_at(uint32_t v, int i) { return (int)permute(v, 0, 0x8880 + 0x1111 * (uint32_t)i); }
// c + two int16 times bytes 2 * pair and the next.
HQ_INLINE int dot2(uint32_t halves, uint32_t bytes, int pair, int c) {
    int r;
    if (pair) asm("dp2a.hi.s32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(halves), "r"(bytes), "r"(c));
    else asm("dp2a.lo.s32.u32 %0, %1, %2, %3;" : "=r"(r) : "r"(halves), "r"(bytes), "r"(c));
    return r;
}
HQ_INLINE uint32_t middle(uint32_t a, uint32_t b) { return permute(a, b, 0x5432); }

HQ_INLINE uint32_t load_u16(const void* p) {
    uint16_t r;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(r) : "l"(p));
    return r;
}
HQ_INLINE uint32_t load_u32(const void* p) {
    uint32_t r;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(r) : "l"(p));
    return r;
}
HQ_INLINE void load_u64(uint32_t* to, const void* p) {
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "l"(p));
}

HQ_INLINE void load_u128(uint32_t* to, const void* p) {
    asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "l"(p));
}

// A load under a condition, without a branch; 0 otherwise.
HQ_INLINE uint32_t load_u32_if(uint32_t condition, const void* p) {
    uint32_t r;
    asm("{ .reg .pred q; setp.ne.u32 q, %2, 0; mov.u32 %0, 0; @q ld.global.nc.u32 %0, [%1]; }"
        : "=r"(r)
        : "l"(p), "r"(condition));
    return r;
}
HQ_INLINE uint32_t load_u16_if(uint32_t condition, const void* p) {
    uint16_t r;
    asm("{ .reg .pred q; setp.ne.u32 q, %2, 0; mov.u16 %0, 0; @q ld.global.nc.u16 %0, [%1]; }"
        : "=h"(r)
        : "l"(p), "r"(condition));
    return r;
}

// Fields of a row of weights, which is aligned to kAlign.
template <int kAlign> struct Row {
    const uint8_t* p;
};
constexpr int row_alignment(int block_bytes) {
    return block_bytes % 16 == 0 ? 16 : block_bytes % 8 == 0 ? 8 : block_bytes % 4 == 0 ? 4 : 2;
}

// Loads must be aligned here. Of what is aligned to 2, the words inside are loaded, and the two halves that remain.
template <int N> HQ_INLINE Words<N> load_halves_and_words(const uint8_t* from) {
    const uint32_t odd = (uint32_t)(uint64_t)from & 2;
    const uint8_t *inside = from + odd, *half = odd ? from : from + N - 4;
    uint32_t v[N / 4 + 1];
    const uint32_t a = load_u16(half), b = load_u16(from + N - 2);
    v[0] = a << 16;
#pragma unroll
    for (int i = 0; i < N / 4 - 1; i++) v[i + 1] = load_u32(inside + 4 * i);
    v[N / 4] = permute(a, b, odd ? 0x3254 : 0x5410);
    const uint32_t selector = odd ? 0x5432 : 0x7654;
    Words<N> r;
#pragma unroll
    for (int i = 0; i < N / 4; i++) r.w[i] = permute(v[i], v[i + 1], selector);
    return r;
}
// Fewer loads, more shifting: 8 bytes at a time from the multiple of 8 before, which no allocation begins behind, then
// what is left of the end, exactly.
template <int N> HQ_INLINE Words<N> load_pairs(const uint8_t* from) {
    const uint32_t shift = (uint32_t)(uint64_t)from & 6, odd = shift & 2;
    const uint8_t* aligned = from - shift;
    uint32_t v[N / 4 + 2];
#pragma unroll
    for (int i = 0; i < N / 8; i++) load_u64(v + 2 * i, aligned + 8 * i);
    const uint32_t end = load_u32_if(shift & 4, aligned + N), last = load_u16_if(odd, from + N - 2);
    v[N / 4] = shift == 2 ? last : end;
    v[N / 4 + 1] = last;
    Words<N> r;
    uint32_t low = shift & 4 ? v[1] : v[0];
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const uint32_t high = shift & 4 ? v[i + 2] : v[i + 1];
        r.w[i] = permute(low, high, odd ? 0x5432 : 0x3210);
        low = high;
    }
    return r;
}
template <int N, int kAlign> HQ_INLINE Words<N> field(Row<kAlign> row, uint32_t at) {
    const uint8_t* from = row.p + at;
    if constexpr (kAlign == 2) {
        if constexpr (N >= 32) return load_pairs<N>(from);
        return load_halves_and_words<N>(from);
    }
    constexpr int kStep = kAlign < N ? kAlign : N % 16 ? 8 : 16;
    Words<N> r;
#pragma unroll
    for (int i = 0; i < N; i += kStep)
        if constexpr (kStep == 16) load_u128(r.w + i / 4, from + i);
        else if constexpr (kStep == 8) load_u64(r.w + i / 4, from + i);
        else r.w[i / 4] = load_u32(from + i);
    return r;
}
// The same, of bytes that other bytes of the block follow: all words that it touches are loaded.
template <int N, int kAlign> HQ_INLINE Words<N> inner_field(Row<kAlign> row, uint32_t at) {
    if constexpr (kAlign > 2) return field<N>(row, at);
    const uint8_t* from = row.p + at;
    const uint32_t odd = (uint32_t)(uint64_t)from & 2, selector = odd ? 0x5432 : 0x3210;
    const uint8_t* aligned = from - odd;
    Words<N> r;
    uint32_t word = load_u32(aligned);
#pragma unroll
    for (int i = 0; i < N / 4; i++) {
        const uint32_t next = load_u32(aligned + 4 * i + 4);
        r.w[i] = permute(word, next, selector);
        word = next;
    }
    return r;
}
template <int kAlign> HQ_INLINE uint32_t field_half(Row<kAlign> row, uint32_t at) { return load_u16(row.p + at); }
template <int kAlign> HQ_INLINE uint32_t field_word(Row<kAlign> row, uint32_t at) {
    if constexpr (kAlign >= 4) return load_u32(row.p + at);
    return field_half(row, at) | field_half(row, at + 2) << 16;
}
template <int kAlign> HQ_INLINE int field_byte(Row<kAlign> row, uint32_t at) {
    int r;
    asm("ld.global.nc.s8 %0, [%1];" : "=r"(r) : "l"(row.p + at));
    return r;
}

template <int N> HQ_INLINE Words<N> load_words(const void* p) {
    Words<N> r;
#pragma unroll
    for (int i = 0; i < N / 4; i++) r.w[i] = load_u32((const uint8_t*)p + 4 * i);
    return r;
}

HQ_INLINE uint32_t load4(const void* p) { return load_u16(p) | load_u16((const uint8_t*)p + 2) << 16; }

// The same in fewer loads: pairs of words where they are aligned to 8.
template <int N> HQ_INLINE Words<N> load_words_in_pairs(const void* p) {
    const uint8_t* from = (const uint8_t*)p;
    const uint32_t odd = (uint32_t)(uint64_t)p & 4;
    uint32_t v[N / 4 - 2];
#pragma unroll
    for (int i = 0; i < N / 8 - 1; i++) load_u64(v + 2 * i, from + odd + 8 * i);
    const uint32_t apart = load_u32(from + (odd ? 0 : N - 8));
    Words<N> r;
#pragma unroll
    for (int i = 0; i < N / 4 - 1; i++)
        r.w[i] = odd ? (i == 0 ? apart : v[i > 0 ? i - 1 : 0]) : i == N / 4 - 2 ? apart : v[i < N / 4 - 2 ? i : 0];
    r.w[N / 4 - 1] = load_u32(from + N - 4);
    return r;
}

template <int kAlign, int N> HQ_INLINE void store(void* p, const Words<N>& v) {
    static_assert(N == 8 || N == 16, "a vector");
    if (((uint64_t)p & (N - 1)) == 0) {
        if constexpr (N == 16)
            asm volatile(
                "st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]), "r"(v.w[2]), "r"(v.w[3])
                : "memory");
        else asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.w[0]), "r"(v.w[1]) : "memory");
    } else {
        for (int i = 0; i < N / kAlign; i++)
            if constexpr (kAlign == 4) ((uint32_t*)p)[i] = v.w[i];
            else ((uint16_t*)p)[i] = (uint16_t)(v.w[i / 2] >> 16 * (i % 2));
    }
}

// N bytes of shared memory, aligned to kAlign.
template <int N, int kAlign> HQ_INLINE Words<N> load_shared(const void* p) {
    Words<N> r;
    __builtin_memcpy(r.w, __builtin_assume_aligned(p, kAlign), N);
    return r;
}
HQ_INLINE uint32_t shared_address(const void* p) {
#if defined(__clang__)
    return (uint32_t)(uint64_t)(__attribute__((address_space(3))) const void*)p;
#else
    return (uint32_t)__cvta_generic_to_shared(p);
#endif
}
#if HQ_ASYNC_COPIES
HQ_INLINE uint32_t multiprocessors() {
    uint32_t r;
    asm("mov.u32 %0, %%nsmid;" : "=r"(r));
    return r;
}
// N bytes to shared memory: so many of them from global memory, zeros behind. Done when wait_copies() returns; other
// threads see them behind a barrier. Both addresses are multiples of N.
template <int N> HQ_INLINE void copy_async(void* to, const void* from, int bytes) {
    const uint32_t at = shared_address(to);
    if constexpr (N == 4)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
    else asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}
HQ_INLINE void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

// Four matrices of 8 x 8 halves from shared memory: lane l has the address of row l % 8 of matrix l / 8, a multiple of
// 16, and gets of each matrix row l / 4, halves 2 (l % 4), + 1; or, transposed, these rows of column l / 4.
HQ_INLINE void load_matrices(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}
HQ_INLINE void load_matrices_transposed(uint32_t r[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row)));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
// c[4] + a (16 rows x 16) * b (16 x 8 columns) of int8. Lane l has rows l / 4 (a[0]; c[0], c[1]) and l / 4 + 8 (a[1];
// c[2], c[3]), k from 4 (l % 4) of a and b, column l / 4 of b and columns 2 (l % 4), + 1 of c.
HQ_INLINE void mma_k16(int c[4], const uint32_t a[2], uint32_t b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}
// The same with k = 32: a[2], a[3] and b[1] are k from 16 + 4 (l % 4).
HQ_INLINE void mma_k32(int c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The same of halves, with k = 16: a[0] and a[1] are k from 2 (l % 4), a[2] and a[3] from 8 + 2 (l % 4), and so is b.
HQ_INLINE void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#else
HQ_INLINE void mma_k16(int c[4], const uint32_t a[2], uint32_t b) {  // sm_75 has the half of it
    for (int i = 0; i < 2; i++)
        asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
            : "+r"(c[2 * i]), "+r"(c[2 * i + 1])
            : "r"(a[i]), "r"(b));
}
HQ_INLINE void mma_k32(int c[4], const uint32_t a[4], const uint32_t b[2]) {
    mma_k16(c, a, b[0]);
    mma_k16(c, a + 2, b[1]);
}
HQ_INLINE void mma_f16(float c[4], const uint32_t a[4], const uint32_t b[2]) {
    for (int i = 0; i < 2; i++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
}
#endif

// N bytes aligned to N; weights, which are read once, and anything.
template <int N> HQ_INLINE Words<N> load_vector(const void* p) {
    Words<N> r;
    __builtin_memcpy(r.w, __builtin_assume_aligned(p, N), N);
    return r;
}
// Volatile, and not by the way of what no kernel writes (.nc): or it would be moved behind wait_for_inputs().
template <int N> HQ_INLINE Words<N> load_stream(const void* p) {
    static_assert(N == 4 || N == 8 || N == 16, "a vector");
    Words<N> r;
    if constexpr (N == 16) {
#if __CUDA_ARCH__ >= 900
        asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r.w[0]), "=r"(r.w[1]), "=r"(r.w[2]), "=r"(r.w[3])
                     : "l"(p));
#else
        load_u128(r.w, p);
#endif
    } else if constexpr (N == 8)
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(r.w[0]), "=r"(r.w[1]) : "l"(p));
    else asm volatile("ld.global.u32 %0, [%1];" : "=r"(r.w[0]) : "l"(p));
    return r;
}
HQ_INLINE uint32_t load_stream_half(const void* p) {
    uint16_t r;
    asm volatile("ld.global.u16 %0, [%1];" : "=h"(r) : "l"(p));
    return r;
}
template <int N> HQ_INLINE void store_vector(void* p, const Words<N>& v) {
    __builtin_memcpy(__builtin_assume_aligned(p, N), v.w, N);
}

// A kernel that is launched to overlap with the one before begins early. Behind wait_for_inputs(), which all threads
// call, it sees what that one has written; before, it may read what no kernel writes. It calls let_next_begin() as soon
// as the kernel behind may take what room is left.
HQ_INLINE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
HQ_INLINE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What a block has written in front of a barrier is seen by who learns of it by a thread's add_atomic() behind. What
// others have written is seen behind fence_acquire(), which empties the first-level cache, and by the other threads
// behind the next barrier.
constexpr bool kFenceOfOneWillDo = true;
HQ_INLINE void fence_release() {}
HQ_INLINE void fence_acquire() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
HQ_INLINE int add_atomic(int* p, int v) {
    int r;
    asm volatile("atom.release.gpu.global.add.s32 %0, [%1], %2;" : "=r"(r) : "l"(p), "r"(v) : "memory");
    return r;
}

// Two halves each: a * b + c, rounded once.
HQ_INLINE uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

#if __CUDA_ARCH_FEAT_SM90_ALL
#define HQ_WARPGROUPS 1
#define HQ_ROW_OF_SUMS(how, n) how(c[n][0]), how(c[n][1]), how(c[n][2]), how(c[n][3])
#define HQ_FOUR_ROWS(how, n) \
    HQ_ROW_OF_SUMS(how, n), HQ_ROW_OF_SUMS(how, n + 1), HQ_ROW_OF_SUMS(how, n + 2), HQ_ROW_OF_SUMS(how, n + 3)
#define HQ_32_SUMS(how) HQ_FOUR_ROWS(how, 0), HQ_FOUR_ROWS(how, 4)
#define HQ_64_SUMS(how) HQ_32_SUMS(how), HQ_FOUR_ROWS(how, 8), HQ_FOUR_ROWS(how, 12)
#define HQ_32_REGISTERS \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define HQ_64_REGISTERS \
    HQ_32_REGISTERS ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, " \
    "%50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define HQ_WRITTEN(v) "=&f"(v)
#define HQ_KEPT(v) "+f"(v)
// Two steps along k of c = a * b, for `columns` columns. Of the operands behind the sums: those of a, where b's chunks
// of each step are, and a 0.
#define HQ_BEGIN_PRODUCTS(columns, registers, sums, a0, a1, b0, b1, zero)                                           \
    asm volatile(                                                                                                   \
        "{ .reg .pred none, all; setp.ne.u32 none, " zero ", " zero "; setp.eq.u32 all, " zero ", " zero            \
        "; wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.f16.f16 {" registers       \
        "}, {" a0 "}, " b0 ", none, 1, 1, 0; wgmma.mma_async.sync.aligned.m64n" columns "k16.f32.f16.f16 {"         \
        registers "}, {" a1 "}, " b1 ", all, 1, 1, 0; wgmma.commit_group.sync.aligned; }"                           \
        : sums(HQ_WRITTEN)                                                                                          \
        : "r"(a[0][0]), "r"(a[0][1]), "r"(a[0][2]), "r"(a[0][3]), "r"(a[1][0]), "r"(a[1][1]), "r"(a[1][2]),         \
          "r"(a[1][3]), "l"(first), "l"(first + 2 * chunk / 16), "r"(0)                                             \
        : "memory")
// c (16 rows a team x 64 or 128 columns) = a (x 32) * b (32 x kColumns) of halves, by 4 teams that each have 16 rows,
// as mma_f16() has them: c[n] is columns from 8n, a[s] is k from 16s. b is shared memory, 4 chunks [column][8 of k]
// that are `chunk` bytes apart. c may be touched from finish_products() on.
template <int kColumns>
HQ_INLINE void begin_products(float (*c)[4], const uint32_t a[2][4], const void* b, uint32_t chunk) {
    static_assert(kColumns == 64 || kColumns == 128, "columns of a product");
    // In units of 16 bytes: the address, the distance of chunks, that of 8 columns from the next.
    const uint64_t first = (shared_address(b) & 0x3FFFF) >> 4 | (uint64_t)(chunk / 16) << 16 | (uint64_t)8 << 32;
    if constexpr (kColumns == 64)
        HQ_BEGIN_PRODUCTS("64", HQ_32_REGISTERS, HQ_32_SUMS, "%32, %33, %34, %35", "%36, %37, %38, %39", "%40", "%41",
            "%42");
    else
        HQ_BEGIN_PRODUCTS("128", HQ_64_REGISTERS, HQ_64_SUMS, "%64, %65, %66, %67", "%68, %69, %70, %71", "%72", "%73",
            "%74");
}
template <int kColumns> HQ_INLINE void finish_products(float (*c)[4]) {
    if constexpr (kColumns == 64)
        asm volatile("wgmma.wait_group.sync.aligned 0;" : HQ_32_SUMS(HQ_KEPT)::"memory");
    else asm volatile("wgmma.wait_group.sync.aligned 0;" : HQ_64_SUMS(HQ_KEPT)::"memory");
}
// What this thread has written to shared memory is seen by begin_products() behind the next barrier.
HQ_INLINE void show_to_matrix_units(const void*) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
HQ_INLINE void show_to_matrix_units(const void*) {}
#define HQ_WARPGROUPS 0
#endif
