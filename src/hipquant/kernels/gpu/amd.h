// device.h for AMD: clang, hipcc.
#pragma once

#define HQ_INLINE static inline __attribute__((device, always_inline))
#define HQ_MEMBER __attribute__((device, always_inline))
#define HQ_KERNEL(threads) extern "C" __attribute__((global, amdgpu_flat_work_group_size(1, threads))) void
#define HQ_RESIDENT_KERNEL(threads, blocks) HQ_KERNEL(threads)  // so many blocks shall fit on a unit at a time
#define HQ_SHARED static __attribute__((shared))
constexpr bool kMatrixUnits = false;  // mat_mat.hip: tiles through mma() or through dot4()
#define HQ_HALF_MATRICES 0            // mat_vec_tiles.h: mma_f16()
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

#if defined(__gfx900__) || defined(__gfx90c__) || defined(__gfx1010__) || defined(__gfx9_generic__) ||               \
    defined(__gfx10_1_generic__)
#define HQ_DOT_INSTRUCTIONS 0
#else
#define HQ_DOT_INSTRUCTIONS 1
#endif
constexpr bool kDotInstructions = HQ_DOT_INSTRUCTIONS;  // whether dot4() is one

// c + the products of 4 pairs of int8.
HQ_INLINE int dot4(uint32_t a, uint32_t b, int c) {
#if defined(__GFX11__) || defined(__GFX12__)
    return __builtin_amdgcn_sudot4(true, (int)a, true, (int)b, c, false);
#elif defined(__gfx906__) || defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx942__) ||                      \
    defined(__gfx950__) || defined(__gfx9_4_generic__) || defined(__gfx1011__) || defined(__gfx1012__) ||              \
    defined(__gfx1030__) || defined(__gfx1031__) || defined(__gfx1032__) || defined(__gfx1033__) ||                    \
    defined(__gfx1034__) || defined(__gfx1035__) || defined(__gfx1036__) || defined(__gfx10_3_generic__)
    return __builtin_amdgcn_sdot4((int)a, (int)b, c, false);
#elif !HQ_DOT_INSTRUCTIONS
    asm("" : "+v"(a), "+v"(b));  // unpacked here, not kept unpacked: registers run out
    for (int i = 0; i < 32; i += 8) c += (int8_t)(a >> i) * (int8_t)(b >> i);
    return c;
#else
#error "which int8 dot product does this target have? Add it to dot4()"
#endif
}

// v, of which the compiler knows nothing: what is chosen by it does not become a branch around a copy of the loop.
HQ_INLINE uint32_t opaque(uint32_t v) {
    asm("" : "+v"(v));
    return v;
}

HQ_INLINE uint8_t* opaque(uint8_t* p) {
    auto* global = (__attribute__((address_space(1))) uint8_t*)p;  // known to be, or loads are flat ones
    asm("" : "+v"(global));
    return (uint8_t*)global;
}
// v, computed here: not later, where the compiler would sink it to, with what it is made of in registers.
HQ_INLINE float computed_here(float v) {
    asm volatile("" : "+v"(v));
    return v;
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

// 2^v, the square root of v and 1 / v to 1 or 2 units in the last place; what is below 2^-126 may be 0.
#if __has_builtin(__builtin_amdgcn_exp2f)
HQ_INLINE float exp2_approximate(float v) { return __builtin_amdgcn_exp2f(v); }
#else
HQ_INLINE float exp2_approximate(float v) { return __builtin_exp2f(v); }  // one instruction, and care for small results
#endif
HQ_INLINE float square_root(float v) { return __builtin_amdgcn_sqrtf(v); }
HQ_INLINE float reciprocal(float v) { return __builtin_amdgcn_rcpf(v); }

// The low halves of a and b in one word, or the high ones.
HQ_INLINE uint32_t join_halves(uint32_t a, uint32_t b, bool high) {
    return __builtin_amdgcn_perm(b, a, high ? 0x07060302 : 0x05040100);
}

// A byte of a word.
HQ_INLINE int byte_at(uint32_t v, int i) { return (int)(v >> 8 * i & 0xFF); }
HQ_INLINE int signed_byte_at(uint32_t v, int i) { return (int8_t)(v >> 8 * i); }
// c + two int16 times bytes 2 * pair and the next.
HQ_INLINE int dot2(uint32_t halves, uint32_t bytes, int pair, int c) {
    return c + (int16_t)halves * byte_at(bytes, 2 * pair) + ((int)halves >> 16) * byte_at(bytes, 2 * pair + 1);
}

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

// N bytes aligned to N; weights, which are read once, and anything.
template <int N> HQ_INLINE Words<N> load_vector(const void* p) { return load_vectors<N, N>(p); }
template <int N> HQ_INLINE Words<N> load_stream(const void* p) { return load_vectors<N, N>(p); }
HQ_INLINE uint32_t load_stream_half(const void* p) { return *(const uint16_t*)p; }
template <int N> HQ_INLINE void store_vector(void* p, const Words<N>& v) { store<N>(p, v); }

// Kernels of a stream run one after the other.
HQ_INLINE void wait_for_inputs() {}
HQ_INLINE void let_next_begin() {}

// What this thread has written is seen by who learns of it; and what others have written by this thread, no other one.
constexpr bool kFenceOfOneWillDo = false;
HQ_INLINE void fence_release() { __builtin_amdgcn_fence(__ATOMIC_RELEASE, "agent"); }
HQ_INLINE void fence_acquire() { __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "agent"); }
HQ_INLINE int add_atomic(int* p, int v) {
    return __hip_atomic_fetch_add(p, v, __ATOMIC_RELAXED, __HIP_MEMORY_SCOPE_AGENT);
}

#define HQ_WARPGROUPS 0  // mat_mat_planes.hip: begin_products()

// N bytes of shared memory, aligned to kAlign.
template <int N, int kAlign> HQ_INLINE Words<N> load_shared(const void* p) { return load_vectors<N, kAlign>(p); }

// Matrix units: c (16 x 16 floats) += a (16 x 16 halves) * b (16 x 16 halves), by kLanes lanes that come together. Of a,
// a lane has row(lane), of b column lane % 16, kDepth halves of each from kDepth (lane / 16) % 16 on; of this column of
// c, 256 / kLanes rows from 256 / kLanes (lane / 16) on.
#if defined(__GFX11__)
#define HQ_MATRIX_TILES 1
struct MatrixTiles {
    typedef float Sums __attribute__((ext_vector_type(8)));
    typedef _Float16 Halves __attribute__((ext_vector_type(16)));
    static constexpr int kLanes = 32, kDepth = 16;
    // Of c, the lower lanes get the even rows, and the upper ones the odd rows.
    HQ_MEMBER static int row(int lane) { return lane % 2 * 8 + lane % 16 / 2; }
    HQ_MEMBER static Sums product(Halves a, Halves b, Sums c) {
        return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32(a, b, c);
    }
};
#elif defined(__GFX12__) && !defined(__gfx1250__)
#define HQ_MATRIX_TILES 1
struct MatrixTiles {
    typedef float Sums __attribute__((ext_vector_type(8)));
    typedef _Float16 Halves __attribute__((ext_vector_type(8)));
    static constexpr int kLanes = 32, kDepth = 8;
    HQ_MEMBER static int row(int lane) { return lane % 16; }
    HQ_MEMBER static Sums product(Halves a, Halves b, Sums c) {
        return __builtin_amdgcn_wmma_f32_16x16x16_f16_w32_gfx12(a, b, c);
    }
};
#elif defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx942__) || defined(__gfx950__) || \
    defined(__gfx9_4_generic__)
#define HQ_MATRIX_TILES 1
struct MatrixTiles {
    typedef float Sums __attribute__((ext_vector_type(4)));
    typedef _Float16 Halves __attribute__((ext_vector_type(4)));
    static constexpr int kLanes = 64, kDepth = 4;
    HQ_MEMBER static int row(int lane) { return lane % 16; }
    HQ_MEMBER static Sums product(Halves a, Halves b, Sums c) {
        return __builtin_amdgcn_mfma_f32_16x16x16f16(a, b, c, 0, 0, 0);
    }
    // The value of the same lane of the wave's other team.
    HQ_MEMBER static int other_team(int v) {
        const int lane = (int)__builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0u));
        return __builtin_amdgcn_ds_bpermute((lane ^ 32) << 2, v);
    }
};
#else
#define HQ_MATRIX_TILES 0
#endif
template <class Tiles>
HQ_INLINE void multiply_tiles(float* c, const Words<2 * Tiles::kDepth>& a, const Words<2 * Tiles::kDepth>& b) {
    using Halves = typename Tiles::Halves;
    typename Tiles::Sums sums;
    __builtin_memcpy(&sums, c, sizeof sums);
    sums = Tiles::product(__builtin_bit_cast(Halves, a), __builtin_bit_cast(Halves, b), sums);
    __builtin_memcpy(c, &sums, sizeof sums);
}
