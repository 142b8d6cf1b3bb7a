// The only file that may ask which vendor or target. Kernels are written for *teams* of 32 lanes: a wave of 32 is one,
// a wave of 64 holds two. Three branches: AMD (clang, hipcc), NVIDIA (clang, nvcc), and the host's simulation.
// No header of HIP or CUDA is needed.
#pragma once

typedef __INT8_TYPE__ int8_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __INT32_TYPE__ int32_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT64_TYPE__ uint64_t;

// N bytes in registers.
template <int N> struct Words {
    static_assert(N % 4 == 0, "whole words");
    uint32_t w[N / 4];
};

#if defined(HQ_SIMULATE)
#include "simulate.h"

#elif defined(__AMDGCN__)
#define HQ_INLINE static inline __attribute__((device, always_inline))
#define HQ_MEMBER __attribute__((device, always_inline))
#define HQ_KERNEL(threads) extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, threads))) void
#define HQ_RESIDENT_KERNEL(threads, blocks) HQ_KERNEL(threads)  // so many blocks shall fit on a unit at a time
#define HQ_SHARED static __attribute__((shared))
constexpr bool kMatrixUnits = false;  // mat_mat.hip: tiles through mma() or through dot4()
#define HQ_ASYNC_COPIES 0             // mat_vec_staged.h: copy_async()

HQ_INLINE int thread_x() { return (int)__builtin_amdgcn_workitem_id_x(); }
HQ_INLINE int thread_y() { return (int)__builtin_amdgcn_workitem_id_y(); }
HQ_INLINE uint32_t block_x() { return __builtin_amdgcn_workgroup_id_x(); }
HQ_INLINE uint32_t block_y() { return __builtin_amdgcn_workgroup_id_y(); }

// All threads of the block arrive, and see each other's shared memory (not global memory).
HQ_INLINE void barrier() {
#if __clang_major__ >= 20
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup", "local");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup", "local");
#else
    __builtin_amdgcn_fence(__ATOMIC_RELEASE, "workgroup");
    __builtin_amdgcn_s_barrier();
    __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "workgroup");
#endif
}

// The value of lane ^ kMask of the team. The masks are those that DPP moves without shared memory, and 16.
template <int kMask> HQ_INLINE int shuffle_xor(int v) {
    static_assert(kMask == 1 || kMask == 2 || kMask == 7 || kMask == 15 || kMask == 16, "a mask of a butterfly");
    if constexpr (kMask == 1) return __builtin_amdgcn_update_dpp(0, v, 0xB1, 0xF, 0xF, true);  // quad_perm [1,0,3,2]
    if constexpr (kMask == 2) return __builtin_amdgcn_update_dpp(0, v, 0x4E, 0xF, 0xF, true);  // quad_perm [2,3,0,1]
    if constexpr (kMask == 7) return __builtin_amdgcn_update_dpp(0, v, 0x141, 0xF, 0xF, true);  // row_half_mirror
    if constexpr (kMask == 15) return __builtin_amdgcn_update_dpp(0, v, 0x140, 0xF, 0xF, true);  // row_mirror
#if defined(__GFX9__)
    const int lane = (int)__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u));
    return __builtin_amdgcn_ds_bpermute((lane ^ 16) << 2, v);
#else
    return (int)__builtin_amdgcn_permlanex16((uint32_t)v, (uint32_t)v, 0x76543210u, 0xFEDCBA98u, false, false);
#endif
}

// c + the products of 4 pairs of int8.
HQ_INLINE int dot4(uint32_t a, uint32_t b, int c) {
#if defined(__GFX11__) || defined(__GFX12__)
    return __builtin_amdgcn_sudot4(true, (int)a, true, (int)b, c, false);
#elif defined(__gfx906__) || defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx942__) ||                      \
    defined(__gfx950__) || defined(__gfx9_4_generic__) || defined(__gfx1011__) || defined(__gfx1012__) ||              \
    defined(__gfx1030__) || defined(__gfx1031__) || defined(__gfx1032__) || defined(__gfx1033__) ||                    \
    defined(__gfx1034__) || defined(__gfx1035__) || defined(__gfx1036__) || defined(__gfx10_3_generic__)
    return __builtin_amdgcn_sdot4((int)a, (int)b, c, false);
#elif defined(__gfx900__) || defined(__gfx90c__) || defined(__gfx1010__) || defined(__gfx9_generic__) ||               \
    defined(__gfx10_1_generic__)
    asm("" : "+v"(a), "+v"(b));  // unpacked here, not kept unpacked: registers run out
    for (int i = 0; i < 32; i += 8) c += (int8_t)(a >> i) * (int8_t)(b >> i);
    return c;
#else
#error "which int8 dot product does this target have? Add it to dot4()"
#endif
}

// Memory accesses behind are not moved before.
HQ_INLINE void keep_order() {
    asm volatile("" ::: "memory");
    __builtin_amdgcn_sched_barrier(0);
}

// a * b for a, b < 2^24: the full 32-bit product takes four times as long.
HQ_INLINE uint32_t mul24(uint32_t a, uint32_t b) { return (a & 0xFFFFFF) * (b & 0xFFFFFF); }

HQ_INLINE float half_to_float(uint32_t bits) { return (float)__builtin_bit_cast(_Float16, (uint16_t)bits); }
HQ_INLINE uint16_t float_to_half(float v) {
    asm("" : "+v"(v));  // a product is rounded by itself: fused with the conversion, as a sum with 0, it loses the -0
    return __builtin_bit_cast(uint16_t, (_Float16)v);
}

// 2^v and the square root of v to 1 or 2 units in the last place; what is below 2^-126 may be 0.
#if __has_builtin(__builtin_amdgcn_exp2f)
HQ_INLINE float exp2_approximate(float v) { return __builtin_amdgcn_exp2f(v); }
#else
HQ_INLINE float exp2_approximate(float v) { return __builtin_exp2f(v); }  // one instruction, and care for small results
#endif
HQ_INLINE float square_root(float v) { return __builtin_amdgcn_sqrtf(v); }

// Bytes 2 to 5 of a | b << 32.
HQ_INLINE uint32_t middle(uint32_t a, uint32_t b) { return __builtin_amdgcn_alignbit(b, a, 16); }

// Unaligned loads of up to 16 bytes are one instruction.
template <int N, int kAlign> HQ_INLINE Words<N> load_vectors(const void* p) {
    Words<N> r;
    __builtin_memcpy(r.w, __builtin_assume_aligned(p, kAlign), N);
    return r;
}

// Fields of a row of weights, which is aligned to kAlign.
template <int kAlign> struct Row {
    const uint8_t* p;
};
constexpr int row_alignment(int) { return 2; }  // of blocks of so many bytes: more than 2 saves nothing
template <int N, int kAlign> HQ_INLINE Words<N> field(Row<kAlign> row, uint32_t at) {
    return load_vectors<N, kAlign>(row.p + at);
}
// The same, of bytes that other bytes of the block follow.
template <int N, int kAlign> HQ_INLINE Words<N> inner_field(Row<kAlign> row, uint32_t at) { return field<N>(row, at); }
template <int kAlign> HQ_INLINE uint32_t field_word(Row<kAlign> row, uint32_t at) {
    return load_vectors<4, kAlign>(row.p + at).w[0];
}
template <int kAlign> HQ_INLINE uint32_t field_half(Row<kAlign> row, uint32_t at) {
    return *(const uint16_t*)(row.p + at);
}
template <int kAlign> HQ_INLINE int field_byte(Row<kAlign> row, uint32_t at) { return *(const int8_t*)(row.p + at); }

// N bytes aligned to 4.
template <int N> HQ_INLINE Words<N> load_words(const void* p) { return load_vectors<N, 4>(p); }

template <int N> HQ_INLINE Words<N> load_words_in_pairs(const void* p) { return load_words<N>(p); }

// 4 bytes aligned to 2.
HQ_INLINE uint32_t load4(const void* p) { return load_vectors<4, 2>(p).w[0]; }

// N bytes to memory aligned to kAlign.
template <int kAlign, int N> HQ_INLINE void store(void* p, const Words<N>& v) {
    __builtin_memcpy(__builtin_assume_aligned(p, kAlign), v.w, N);
}

#elif defined(__CUDA__) || defined(__CUDACC__)
#define HQ_INLINE static inline __attribute__((device, always_inline))
#define HQ_MEMBER __attribute__((device, always_inline))
#define HQ_KERNEL(threads) extern "C" __attribute__((global, launch_bounds(threads))) void
#define HQ_RESIDENT_KERNEL(threads, blocks) extern "C" __attribute__((global, launch_bounds(threads, blocks))) void
#define HQ_SHARED static __attribute__((shared))
constexpr bool kMatrixUnits = true;
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
// Bytes of a | b << 32, by nibbles of the selector: a number from 0 to 7, plus 8 for 8 times its sign.
HQ_INLINE uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
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
#else
#error "compile for AMD (clang -x hip, hipcc --genco), for NVIDIA (clang -x cuda, nvcc -x cu) or with -DHQ_SIMULATE"
#endif

#if HQ_ASYNC_COPIES
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
#endif

template <class To, class From> HQ_INLINE To bits(From v) {
    static_assert(sizeof(To) == sizeof(From), "the same size");
    To r;
    __builtin_memcpy(&r, &v, sizeof r);
    return r;
}
template <int kMask> HQ_INLINE float shuffle_xor(float v) { return bits<float>(shuffle_xor<kMask>(bits<int>(v))); }

HQ_INLINE float max2(float a, float b) { return a > b ? a : b; }

// Two floats as halves, the first one in the low bits.
HQ_INLINE uint32_t pack_halves(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
#else
    return float_to_half(low) | (uint32_t)float_to_half(high) << 16;
#endif
}

constexpr float kLog2E = 1.44269502162933349609375f, kLog2ERest = 1.9259629911e-8f;  // their sum is log2(e)

// e^v, relative error below 1e-6: of v log2(e), what does not fit a float is multiplied behind.
HQ_INLINE float exp_(float v) {
    v = v < -104 ? -104 : v > 89 ? 89 : v;  // 0 and infinity from there on; NaN stays
    const float t = v * kLog2E, rest = __builtin_fmaf(v, kLog2ERest, __builtin_fmaf(v, kLog2E, -t));
    return exp2_approximate(t) * __builtin_fmaf(rest, 0.693147180559945f, 1);
}

// Over the 32 lanes of a team, in every lane.
HQ_INLINE float team_sum(float v) {
    v += shuffle_xor<1>(v), v += shuffle_xor<2>(v), v += shuffle_xor<7>(v), v += shuffle_xor<15>(v);
    return v + shuffle_xor<16>(v);
}
HQ_INLINE float team_max(float v) {
    v = max2(v, shuffle_xor<1>(v)), v = max2(v, shuffle_xor<2>(v)), v = max2(v, shuffle_xor<7>(v));
    v = max2(v, shuffle_xor<15>(v));
    return max2(v, shuffle_xor<16>(v));
}

// How many sums team_sums() makes of n: the next power of 2.
constexpr int team_width(int n) { return n <= 1 ? 1 : 2 * team_width((n + 1) / 2); }

// One step of it: lanes whose bit kBit is set keep the second half of the sums, the others the first.
template <int kMask, int kBit, int kSums> HQ_INLINE void exchange_sums(float* v, int& which, int& spare) {
    const bool upper = (thread_x() & kBit) != 0;
    if constexpr (kSums == 1) {
        v[0] += shuffle_xor<kMask>(v[0]);
        spare |= upper;
    } else {
#pragma unroll
        for (int i = 0; i < kSums / 2; i++) {
            const float mine = upper ? v[i + kSums / 2] : v[i], other = upper ? v[i] : v[i + kSums / 2];
            v[i] = mine + shuffle_xor<kMask>(other);
        }
        which += upper ? kSums / 2 : 0;
    }
}
constexpr int half_of(int n) { return n > 1 ? n / 2 : 1; }

// Sums v[0], ... v[kSums - 1], each over the 32 lanes of a team: v[0] becomes the sum whose number is returned; lanes
// that have the same one get -1 but for one of them. kSums is a power of 2, at most 32.
template <int kSums> HQ_INLINE int team_sums(float* v) {
    if constexpr (kSums == 1) {
        v[0] = team_sum(v[0]);
        return thread_x() == 0 ? 0 : -1;
    }
    int which = 0, spare = 0;
    constexpr int k2 = half_of(kSums), k4 = half_of(k2), k8 = half_of(k4), k16 = half_of(k8);
    exchange_sums<16, 16, kSums>(v, which, spare);
    exchange_sums<15, 8, k2>(v, which, spare);
    exchange_sums<7, 4, k4>(v, which, spare);
    exchange_sums<2, 2, k8>(v, which, spare);
    exchange_sums<1, 1, k16>(v, which, spare);
    return spare ? -1 : which;
}
