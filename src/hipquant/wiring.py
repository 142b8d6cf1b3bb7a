"""The kernel table: every kernel's name, arguments and launch geometry, written once for all three kinds of silicon.

A kernel is a *name*, an *argument list* and a *launch geometry*. Code objects for AMD, NVIDIA and the CPU export the
same names; loader, launcher, docs and tests read this table. The families of `COMPATIBILITY` are the 123 names that
frameworks load by string. The other families belong to the engine.

A *name profile* renames the families whose names carry a vendor: `hip` (`mul_mat_vec_q4_0_q8_1_hip1`) is the table's
own, `cuda` (`mul_mat_vec_q4_0_q8_1_cuda1`) is what Candle's CUDA build loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import Enum
from typing import Literal

from .errors import KernelNotFoundError
from .quants import (
    DEQUANTIZE_TYPES,
    FLOAT_TYPES,
    MATRIX_TYPES,
    QK8_1,
    WEIGHT_TYPES,
    DequantizeArgs,
    QuantType,
    padded,
)

Dim3 = tuple[int, int, int]
Silicon = Literal["any", "cpu", "gpu"]  # whose code objects have a kernel
PROFILES = ("hip", "cuda")
MAX_BATCH = 8  # columns that one mul_mat_vec kernel takes
PLANE_BATCHES = (1, 2, 4, 8)  # columns that the mul_mat_vec_planes kernels are compiled for
MAX_GRID_Y = 65535
PACK_ROWS = 16  # rows that the engine's packed weights interleave
CACHE_TYPES = ("f16", "q8_0")  # of the KV cache on a GPU
EXPERT_TILE = 64  # rows and columns of one expert that a block of mul_mat_planes_experts takes
FLOAT_EXPERT_BATCH = 8  # columns of one expert that mul_mat_vec_experts takes at most, of float weights
QUANTIZE_PART = 4096  # weights of a block of the grid of quantize_weights


class Kind(Enum):
    """Kind of an argument: how it is passed."""

    POINTER = "pointer"
    INT32 = "int32"
    INT64 = "int64"
    SIZE = "size"
    FLOAT32 = "float32"


_KINDS = {"int": Kind.INT32, "int64_t": Kind.INT64, "size_t": Kind.SIZE, "float": Kind.FLOAT32}


@dataclass(frozen=True)
class Arg:
    """One argument: its C type and name."""

    ctype: str
    name: str

    @property
    def kind(self) -> Kind:
        return Kind.POINTER if self.ctype.endswith("*") else _KINDS[self.ctype]


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    `grid(**sizes)` gives the grid for the sizes that the family's doc names; `block` is fixed. `batch` is the number
    of activation columns for the kernels that are compiled per batch.
    """

    name: str
    family: str
    args: tuple[Arg, ...]
    block: Dim3
    grid: Callable[..., Dim3]
    type: QuantType | None = None
    output: str = "f32"
    batch: int = 0
    silicon: Silicon = "any"
    overlaps: bool = False  # may begin before the kernel in front of it has ended: it waits by itself

    @property
    def signature(self) -> str:
        return f"void {self.name}({', '.join(f'{a.ctype} {a.name}' for a in self.args)})"


def _args(text: str) -> tuple[Arg, ...]:
    """`"const void* x, int k"` as arguments."""
    pairs = (a.strip().rpartition(" ") for a in text.split(",") if a.strip())
    return tuple(Arg(ctype, name) for ctype, _, name in pairs)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _quantize() -> Iterator[Kernel]:
    """q8_1 activations; the grid takes `k` and `rows` (at most 65535 a launch)."""
    yield Kernel(
        "quantize_q8_1",
        "quantize",
        _args("const float* x, void* y, int kx, int kx_padded"),
        (256, 1, 1),
        lambda k, rows: (_ceil(padded(k), 256), rows, 1),
    )


def _dequantize() -> Iterator[Kernel]:
    """Blocks to floats; the grid takes `elements`."""
    for t in DEQUANTIZE_TYPES:
        assert t.dequantize is not None
        per_block, threads = t.dequantize.elements, t.dequantize.threads
        for out, ctype in (("f32", "float*"), ("f16", "uint16_t*")):
            tail = f", {t.dequantize.args.value}" if t.dequantize.args is not DequantizeArgs.GRID else ""
            yield Kernel(
                f"dequantize_block_{t.suffix}_{out}",
                "dequantize",
                _args(f"const void* x, {ctype} y{tail}"),
                (threads, 1, 1),
                lambda elements, per_block=per_block: (_ceil(elements, per_block), 1, 1),
                t,
                out,
            )


def _dequantize_mul_mat_vec() -> Iterator[Kernel]:
    """Weights times one float column; the grid takes `nrows`."""
    for t in WEIGHT_TYPES:
        yield Kernel(
            f"dequantize_mul_mat_vec_{t.name.lower()}" + ("" if t.is_super_block else "_hip"),
            "dequantize_mul_mat_vec",
            _args("const void* x, const float* y, float* dst, int ncols, int nrows"),
            (32, 1, 1),
            lambda nrows: (nrows, 1, 1),
            t,
        )


def _mul_mat_vec() -> Iterator[Kernel]:
    """Weights times 1 to 8 columns of q8_1; the grid takes `nrows`. `nrows_y` is the padded k."""
    args = _args(
        "const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int nrows_y, int nrows_dst",
    )
    for t in WEIGHT_TYPES:
        for b in range(1, MAX_BATCH + 1):
            rows = 1 if b == 1 else 2
            yield Kernel(
                f"mul_mat_vec_{t.suffix}_q8_1_hip{b}",
                "mul_mat_vec",
                args,
                (32, 4 if b <= 4 else 2, 1),
                lambda nrows, rows=rows: (_ceil(nrows, rows), 1, 1),
                t,
                batch=b,
            )


def _mul_mat() -> Iterator[Kernel]:
    """Weights times any number of columns of q8_1; the grid takes `nrows` and `ncols`. `nrows_y` is the padded k."""
    args = _args(
        "const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int ncols_y, int nrows_y, int nrows_dst",
    )
    for t in WEIGHT_TYPES:
        assert t.tile is not None
        mmq_x, mmq_y = t.tile
        yield Kernel(
            f"mul_mat_{t.suffix}",
            "mul_mat",
            args,
            (32, 4, 1),
            lambda nrows, ncols, mmq_x=mmq_x, mmq_y=mmq_y: (_ceil(nrows, mmq_y), _ceil(ncols, mmq_x), 1),
            t,
        )


def _get_rows() -> Iterator[Kernel]:
    """Rows of an embedding by id, as floats; the grid takes `nids` and `k`."""
    for t in FLOAT_TYPES + WEIGHT_TYPES:
        if t.is_super_block:
            assert t.dequantize is not None
            per_block, threads = 256, t.dequantize.threads
        else:
            per_block, threads = (256, 256) if t in FLOAT_TYPES else (512, 256)
        yield Kernel(
            f"get_rows_{t.suffix}",
            "get_rows",
            _args("const void* x, const uint32_t* ids, float* dst, int64_t k, size_t row_bytes"),
            (threads, 1, 1),
            lambda nids, k, per_block=per_block: (nids, min(_ceil(k, per_block), MAX_GRID_Y), 1),
            t,
        )


def _cpu_engine() -> Iterator[Kernel]:
    """The CPU engine's families: weights packed 16 rows together, and what a transformer needs beside products.

    Activations of the packed family are *q8 tiles* (`kernels/cpu/tile.h`): 16 columns at a time, 32 values of each. Of
    a mixture of experts, `groups` of columns have an expert each (`kernels/cpu/experts.h`), `column` finds that of a
    token's `n_used` choices, and `rows`, where it is not null, which row of activations a column is.
    """
    one = (1, 1, 1)
    for t in WEIGHT_TYPES:
        yield Kernel(
            f"pack_{t.suffix}",
            "pack",
            _args("const void* x, void* y, int ncols, int nrows"),
            one,
            lambda nrows: (_ceil(nrows, PACK_ROWS), 1, 1),
            t,
            silicon="cpu",
        )
        yield Kernel(
            f"mul_mat_packed_{t.suffix}",
            "mul_mat_packed",
            _args("const void* x, const void* y, float* dst, int ncols_x, int nrows_x, int ncols_y, int nrows_dst"),
            one,
            lambda nrows: (_ceil(nrows, PACK_ROWS), 1, 1),
            t,
            silicon="cpu",
        )
    for t in FLOAT_TYPES:
        yield Kernel(
            f"mul_mat_float_{t.suffix}",
            "mul_mat_float",
            _args("const void* x, const float* y, float* dst, int ncols_x, int nrows_x, int ncols_y, int nrows_dst"),
            one,
            lambda nrows: (_ceil(nrows, PACK_ROWS), 1, 1),
            t,
            silicon="cpu",
        )

    for t in MATRIX_TYPES:
        yield Kernel(
            f"mul_mat_experts_{t.suffix}",
            "mul_mat_experts",
            _args(
                "const void* x, const void* y, const int* rows, const int* groups, float* dst, int ncols_x, int nrows_x"
            ),
            one,
            lambda nrows, groups: (_ceil(nrows, PACK_ROWS), groups, 1),
            t,
            silicon="cpu",
        )

    def kernel(name: str, family: str, args: str, grid: Callable[..., Dim3]) -> Kernel:
        return Kernel(name, family, _args(args), one, grid, silicon="cpu")

    yield kernel(
        "choose_experts",
        "experts",
        "const float* logits, int* experts, float* weights, int n_expert, int n_used",
        lambda ntokens: (ntokens, 1, 1),
    )
    yield kernel(
        "group_experts",
        "experts",
        "const int* experts, int* groups, int* token, int* column, int n_expert, int n_used, int ntokens",
        lambda: one,
    )
    yield kernel(
        "quantize_q8_experts",
        "experts",
        "const float* x, const int* rows, const int* groups, void* y, int k",
        lambda k, groups: (groups, _ceil(k, 1024), 1),
    )
    yield kernel(
        "add_experts_f32",
        "experts",
        "const float* x, const float* weights, const int* column, float* dst, int n, int n_used",
        lambda ntokens: (ntokens, 1, 1),
    )
    yield kernel(
        "quantize_q8_tiles",
        "quantize_q8_tiles",
        "const float* x, void* y, int k, int ncols",
        lambda k, ncols: (_ceil(ncols, 16), _ceil(k, 1024), 1),
    )
    yield kernel(
        "add_rms_norm_f32",
        "norm",
        "float* x, const float* residual, const float* weight, float* y, int n, float eps",
        lambda rows: (rows, 1, 1),
    )
    yield kernel(
        "add_layer_norm_f32",
        "norm",
        "float* x, const float* residual, const float* weight, const float* bias, float* y, int n, float eps",
        lambda rows: (rows, 1, 1),
    )
    yield kernel(
        "rope_store_kv",
        "rope",
        "float* q, float* k, const float* v, uint16_t* k_cache, uint16_t* v_cache, const float* rope,"
        " const int* position, const int* slot, int n_head, int n_head_kv, int head_dim, int n_rot, int n_context,"
        " const float* q_norm, const float* k_norm, float eps",
        lambda ntokens: (ntokens, 1, 1),
    )
    yield kernel(
        "attention_f16",
        "attention",
        "const float* q, const uint16_t* k_cache, const uint16_t* v_cache, float* dst, const int* position,"
        " const int* slot, int n_head, int n_head_kv, int head_dim, int n_context, float scale, float softcap,"
        " int window, const float* sinks",
        lambda n_head_kv, ntokens: (n_head_kv, ntokens, 1),
    )
    yield kernel(
        "silu_mul_f32",
        "activation",
        "const float* gate, const float* up, float* y, int n",
        lambda n: (_ceil(n, 1024), 1, 1),
    )
    yield kernel(
        "gelu_mul_f32",
        "activation",
        "const float* gate, const float* up, float* y, int n",
        lambda n: (_ceil(n, 1024), 1, 1),
    )
    for name, value in (("scale_f32", "float scale"), ("softcap_f32", "float cap")):
        yield kernel(name, "activation", f"float* x, int n, {value}", lambda n: (_ceil(n, 1024), 1, 1))
    yield kernel(
        "read_bytes",
        "read",
        "const void* x, int* dst, size_t nbytes",
        lambda nbytes: (_ceil(nbytes, 1 << 20), 1, 1),
    )
    yield kernel(
        "add_bias_f32",
        "activation",
        "float* x, const float* bias, int n",
        lambda rows: (rows, 1, 1),
    )


def _quantizer() -> Iterator[Kernel]:
    """Float weights to blocks of a type, on the CPU; the grid takes `n`, weights of whole rows of `ncols`.

    `importance`, one number a column or null, weighs the squares of the errors. `invalid` is told, for each block of
    the grid, the index of the first weight that cannot be quantized, or -1.
    """
    for t in WEIGHT_TYPES + FLOAT_TYPES:
        yield Kernel(
            f"quantize_{t.suffix}",
            "quantize_weights",
            _args("const float* x, const float* importance, void* y, int64_t* invalid, int ncols, int64_t n"),
            (1, 1, 1),
            lambda n: (_ceil(n, QUANTIZE_PART), 1, 1),
            t,
            silicon="cpu",
        )


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
        yield kernel(
            f"attention_decode_{cache_type}",
            f"const float* qkv, {read}, float* partial, float* y, void* q, int* counters, const int* position,"
            " const int* slot, int n_head, int n_head_kv, int head_dim, int n_context, int splits, int n_padded,"
            " float scale, float softcap, int window, const float* sinks",
            (128, 1, 1),
            lambda n_head_kv, splits, ntokens: (n_head_kv * splits, ntokens, 1),
        )
        yield kernel(
            f"attention_prefill_{cache_type}",
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


COMPATIBILITY: tuple[Kernel, ...] = (
    *_quantize(),
    *_dequantize(),
    *_dequantize_mul_mat_vec(),
    *_mul_mat_vec(),
    *_mul_mat(),
)
TABLE: tuple[Kernel, ...] = (*COMPATIBILITY, *_get_rows(), *_cpu_engine(), *_quantizer(), *_gpu_engine())
CPU_KERNELS = tuple(k for k in TABLE if k.silicon != "gpu")
GPU_ENGINE = tuple(k for k in TABLE if k.silicon == "gpu")
KERNELS: dict[str, Kernel] = {k.name: k for k in TABLE}
_BY_FAMILY = {(k.family, k.type, k.output, k.batch): k for k in TABLE}

assert len(KERNELS) == len(TABLE), "kernel names must be unique"
assert all(t.block_size % QK8_1 == 0 for t in WEIGHT_TYPES), "weights are multiplied 32 at a time"
assert set(MATRIX_TYPES) == set(WEIGHT_TYPES + FLOAT_TYPES)


def kernel(name: str) -> Kernel:
    """The row of a kernel by name; `KernelNotFoundError` with the nearest names otherwise."""
    try:
        return KERNELS[name]
    except KeyError:
        raise KernelNotFoundError(name, "the wiring table", KERNELS) from None


def find(family: str, type: QuantType | None = None, *, output: str = "f32", batch: int = 0) -> Kernel:
    """The row of a family for a type, an output type and a batch."""
    try:
        return _BY_FAMILY[family, type, output, batch]
    except KeyError:
        wanted = " ".join(str(v) for v in (family, type, output, batch or "") if v)
        raise KernelNotFoundError(wanted, "the wiring table", KERNELS) from None


def profile(which: str) -> tuple[Kernel, ...]:
    """The table under a name profile: `hip` as it is, `cuda` with the vendor's word in the names changed."""
    if which not in PROFILES:
        raise ValueError(f"unknown name profile {which!r}; there are {', '.join(PROFILES)}")
    return TABLE if which == "hip" else tuple(replace(k, name=k.name.replace("_hip", "_cuda")) for k in TABLE)
