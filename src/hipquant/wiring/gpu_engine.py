"""The kernels of the engine on GPUs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

from ..quants import FLOAT_TYPES, WEIGHT_TYPES, QuantType
from .row import Dim3, Kernel, _args, _ceil

PLANE_BATCHES = (1, 2, 4, 8)  # columns that the mul_mat_vec_planes kernels are compiled for
CACHE_TYPES = ("f16", "q8_0")  # of the KV cache on a GPU
DECODE_DIMS, PREFILL_DIMS = (64, 128, 256), (64, 96, 128, 256)  # values of a head, at most, that attention is for
ANY_DIMS = {"f16": ("any",), "q8_0": ()}  # what else: for heads that are not a multiple of 8 values
EXPERT_TILE = 64  # rows and columns of one expert that a block of mul_mat_planes_experts takes
FLOAT_EXPERT_BATCH = 8  # columns of one expert that mul_mat_vec_experts takes at most, of float weights


def _gpu_engine() -> Iterator[Kernel]:
    """The GPU engine's families, in code objects of their own.

    Weights lie in *planes* (`kernels/gpu/planes.h`), and so do activations: `q` and `y` are columns of them, padded to
    `n_padded` values. A row of `qkv` holds n_head queries, then n_head_kv keys, then as many values, of head_dim floats
    each. The KV cache is halves [slot][head][n_context][head_dim]; or, as q8_0, int8 and, apart, their scales, a half
    for 32 of them, of which head_dim is a multiple. Attention is *split* over the positions of a sequence: a part of
    `partial` [token][head][split] holds the sum of values, weighted, its greatest score, and the sum of weights. Tokens
    of `attention_prefill_*` are of one sequence, that of the first one, at consecutive positions. A token sees `window`
    positions up to its own (0: all), scores are soft-capped where there is a cap, and `sinks` [n_head] are scores
    without values. `counters` are 0 between launches. `mul_mat_vec_*` of 4 columns and more take quantized weights
    times at most so many columns, whose `n_padded` is a multiple of 256; float ones take any number.
    """

    def kernel(
        name: str, args: str, block: Dim3, grid: Callable[..., Dim3], type: QuantType | None = None, batch: int = 0
    ) -> Kernel:
        family = name if type is None else name.partition(f"_{type.suffix}")[0]
        return Kernel(name, family, _args(args), block, grid, type, batch=batch, silicon="gpu", overlaps=True)

    yield kernel(
        "add_rms_norm_q8",
        "float* x, const float* residual, const float* weight, float* y, void* q, int n, int n_padded, float eps",
        (1024, 1, 1),
        lambda rows: (rows, 1, 1),
    )
    for name, args in (
        ("add_layer_norm_q8", "const float* residual, const float* weight, const float* bias"),
        ("add_normed_rms_norm_q8", "const float* branch, const float* post, const float* weight"),
    ):
        tail = "float* y, void* q, int n, int n_padded, float eps"
        yield kernel(name, f"float* x, {args}, {tail}", (1024, 1, 1), lambda rows: (rows, 1, 1))
    for cache_type in CACHE_TYPES:
        scales = ", uint16_t* k_scales, uint16_t* v_scales" if cache_type == "q8_0" else ""
        values = "int8_t*" if scales else "uint16_t*"
        written = f"{values} k_cache, {values} v_cache{scales}"
        read = ", ".join(f"const {argument}" for argument in written.split(", "))
        yield kernel(
            f"rope_store_kv_{cache_type}",
            f"float* qkv, {written}, const float* rope, const int* position, const int* slot, int n_head,"
            " int n_head_kv, int head_dim, int n_rot, int n_context, const float* q_norm, const float* k_norm,"
            " float eps",
            (32, 4, 1),
            lambda n_head, n_head_kv, ntokens: (_ceil(n_head + 2 * n_head_kv, 4), ntokens, 1),
        )
        for dims in (*DECODE_DIMS, *ANY_DIMS[cache_type]):
            yield kernel(
                f"attention_decode_{cache_type}_{dims}",
                f"const float* qkv, {read}, float* partial, float* y, void* q, int* counters, const int* position,"
                " const int* slot, int n_head, int n_head_kv, int head_dim, int n_context, int splits, int n_padded,"
                " float scale, float softcap, int window, const float* sinks",
                (128, 1, 1),
                lambda n_head_kv, splits, ntokens: (n_head_kv * splits, ntokens, 1),
            )
        for dims in (*PREFILL_DIMS, *ANY_DIMS[cache_type]):
            yield kernel(
                f"attention_prefill_{cache_type}_{dims}",
                f"const float* qkv, {read}, float* y, const int* position, const int* slot, int n_head, int n_head_kv,"
                " int head_dim, int n_context, int ntokens, int n_padded, float scale, float softcap, int window,"
                " const float* sinks",
                (128, 1, 1),
                lambda n_head, n_head_kv, ntokens: (n_head_kv, _ceil(ntokens * (n_head // n_head_kv), 64), 1),
            )
    for name, source in (("silu_mul_q8", "gate_up"), ("gelu_mul_q8", "gate_up"), ("gelu_q8", "x")):
        yield kernel(
            name,
            f"const float* {source}, float* y, void* q, int n, int n_padded",
            (256, 1, 1),
            lambda n_padded, rows: (_ceil(n_padded, 1024), rows, 1),
        )
    for name, value in (("scale_rows_f32", "float scale"), ("softcap_rows_f32", "float cap")):
        yield kernel(name, f"float* x, int n, {value}", (256, 1, 1), lambda n: (_ceil(n, 1024), 1, 1))
    yield kernel(
        "quantize_q8",
        "const float* x, void* q, int n_padded",
        (256, 1, 1),
        lambda n_padded, rows: (_ceil(n_padded, 1024), rows, 1),
    )
    yield kernel(
        "add_bias_rows_f32",
        "float* x, const float* bias, int n, int stride",
        (256, 1, 1),
        lambda n, rows: (_ceil(n, 256), rows, 1),
    )
    yield kernel(
        "read_memory",
        "const void* x, int* dst, int64_t nbytes",
        (256, 1, 1),
        lambda nbytes: (_ceil(nbytes, 1 << 20), 1, 1),
    )
    sampled = "const float* logits, const int* slot, const int* state, const int* history, int* work"
    for name, args in (
        ("sample_best_f32", f"{sampled}, int n, int n_context"),
        ("sample_bins_f32", f"{sampled}, int n, int n_context"),
        (
            "sample_draw_f32",
            "const float* logits, const int* slot, int* state, int* history, int* work, int* token, int* position,"
            " int* samples, int n, int n_context",
        ),
    ):
        yield kernel(name, args, (256, 1, 1), lambda n, rows: (_ceil(n, 1024), rows, 1))
    for t in WEIGHT_TYPES:
        yield kernel(
            f"repack_{t.suffix}",
            "const void* x, void* planes, int ncols, int nrows, int first, int nrows_planes",
            (256, 1, 1),
            lambda nrows, units: (_ceil(nrows * units, 256), 1, 1),
            t,
        )
        yield kernel(
            f"get_rows_planes_{t.suffix}",
            "const void* planes, const uint32_t* ids, float* dst, int k, int nrows",
            (256, 1, 1),
            lambda nids, units: (nids, _ceil(units, 16), 1),
            t,
        )
        yield kernel(
            f"mul_mat_planes_{t.suffix}",
            "const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int ncols_y, int n_padded,"
            " int nrows_dst",
            (32, 8, 1),
            lambda nrows, ncols: (_ceil(nrows, 128), _ceil(ncols, 128), 1),
            t,
        )
    product = (
        "const void* x, const void* y, const float* squares, float eps, int ncols_x, int nrows_x, int ncols_y,"
        " int n_padded, const float* bias, float* dst"
    )
    for t in WEIGHT_TYPES + FLOAT_TYPES:
        for b in PLANE_BATCHES:
            yield kernel(
                f"mul_mat_vec_planes_{t.suffix}_{b}",
                f"{product}, int first, int nrows_dst, int epilogue, int rows_to_block, void* q, int n_padded_q,"
                " uint16_t* k_cache, uint16_t* v_cache, const float* rope, const int* position, const int* slot,"
                " int n_head, int n_head_kv, int head_dim, int n_rot, int n_context",
                (32, 4 if b <= 2 else 8, 1),
                lambda nrows, ncols, rows_to_block, b=b: (_ceil(nrows, rows_to_block), _ceil(ncols, b), 1),
                t,
                b,
            )
            yield kernel(
                f"mul_mat_vec_norm_{t.suffix}_{b}",
                f"{product}, int nrows_dst, const float* weight, float* normed, void* q, float* sums, int n_padded_q",
                (32, 16 if b <= 2 else 8, 1),
                lambda nrows: (_ceil(nrows, 32), 1, 1),
                t,
                b,
            )
        yield kernel(
            f"mul_mat_vec_gate_{t.suffix}_1",
            f"{product}, int nrows_dst, int epilogue, void* q, int n_padded_q",
            (32, 8, 1),
            lambda nrows: (_ceil(nrows, 64), 1, 1),
            t,
            1,
        )
    yield from _gpu_experts(kernel)


def _gpu_experts(kernel: Callable[..., Kernel]) -> Iterator[Kernel]:
    """Of a mixture of experts on GPUs: the weights of all experts are one matrix, of n_expert times `nrows_x` rows.

    `groups` of at most as many columns as a kernel takes have an expert each; a column is row `token` of the
    activations, or its own. A token has `n_used` experts; `column` finds what they give for it. In a long pass
    `counts`, which are 0 between launches of `sort_experts_q8`, say how many columns an expert has.
    """
    yield kernel(
        "choose_experts_q8",
        "const float* logits, int* experts, float* weights, int* groups, int* token, int* counts, int* column,"
        " int n_expert, int n_used",
        (128, 1, 1),
        lambda ntokens: (ntokens, 1, 1),
    )
    for t in FLOAT_TYPES:
        yield kernel(
            f"router_{t.suffix}",
            "const void* x, const void* y, const float* squares, float eps, int ncols_x, int n_expert, int n_padded,"
            " float* logits, int* counters, int* experts, float* weights, int* groups, int* token, int n_used",
            (128, 1, 1),
            lambda n_expert, ntokens: (n_expert, ntokens, 1),
            t,
        )
    yield kernel(
        "sort_experts_q8",
        "const int* experts, int* counts, int* groups, int* token, int* column, int n_expert, int n_used, int ntokens,"
        " int most, int ngroups",
        (512, 1, 1),
        lambda: (1, 1, 1),
    )
    yield kernel(
        "add_experts_q8",
        "const float* x, const float* weights, const int* column, float* dst, int n, int n_used",
        (256, 1, 1),
        lambda n, ntokens: (_ceil(n, 256), ntokens, 1),
    )
    for t in WEIGHT_TYPES + FLOAT_TYPES:
        if t in WEIGHT_TYPES:
            yield kernel(
                f"mul_mat_planes_experts_{t.suffix}",
                "const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int n_expert, int n_padded,"
                " const int* groups, const int* token, int nrows_dst, void* q, int n_padded_q",
                (32, EXPERT_TILE // 16, 1),
                lambda nrows, groups: (_ceil(nrows, EXPERT_TILE), groups, 1),
                t,
            )
        for b in (1,) if t in WEIGHT_TYPES else (1, FLOAT_EXPERT_BATCH):
            yield kernel(
                f"mul_mat_vec_experts_{t.suffix}_{b}",
                "const void* x, const void* y, const float* squares, float eps, int ncols_x, int nrows_x, int n_expert,"
                " int n_padded, const int* groups, const int* token, float* dst, int first, int nrows_dst,"
                " int epilogue, void* q, int n_padded_q",
                (32, 8, 1),
                lambda nrows, groups: (_ceil(nrows, 64), groups, 1),
                t,
                b,
            )
        yield kernel(
            f"mul_mat_vec_mixed_{t.suffix}",
            "const void* x, const void* y, int ncols_x, int nrows_x, int n_expert, int n_used, int n_padded,"
            " const int* experts, const float* weights, float* dst, int nrows_dst, const float* weight, float* normed,"
            " void* q, float* sums, int n_padded_q",
            (32, 16, 1),
            lambda nrows, ntokens: (_ceil(nrows, 32), ntokens, 1),
            t,
        )


def attention(what: Literal["decode", "prefill"], cache_type: str, head_dim: int) -> str:
    """The name of the kernel for heads of up to 256 values."""
    compiled = DECODE_DIMS if what == "decode" else PREFILL_DIMS
    dims = "any" if head_dim % 8 else next(n for n in compiled if n >= head_dim)
    return f"attention_{what}_{cache_type}_{dims}"


GATE_BLOCKS = 3  # of `mul_mat_vec_gate_*` on a processor; where there are more, `mul_mat_vec_planes_*` is faster


def rows_to_block(t: QuantType, nrows: int, units: int, batch: int, gated: bool, processors: int) -> int:
    """Rows that a block of `mul_mat_vec_planes_*` shall take: where they are gated, those that make 32 activations; of
    few columns, so many that the places of the blocks on the processors are busy to the end; a block takes the time
    of about 4 rows to begin (H200, 2026-11-23)."""
    if gated or batch > 2:
        return 64 if gated else 32
    at_once = (16 if batch == 1 else 8) // (1 if units <= 32 else 2 if units <= 64 else 4)  # of teams that share rows
    places = processors * (5 if batch == 1 and t.name in ("Q4_0", "Q4_1", "Q2_K") else 4)  # as in mat_vec_planes.hip
    return min(range(at_once, 129, at_once), key=lambda rows: _ceil(_ceil(nrows, rows), places) * (rows + 4))


GPU_ENGINE = tuple(_gpu_engine())
