"""The kernels of the engine on CPUs, and the quantizer's."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..quants import FLOAT_TYPES, MATRIX_TYPES, WEIGHT_TYPES
from .row import Dim3, Kernel, _args, _ceil

PACK_ROWS = 16  # rows that the engine's packed weights interleave
QUANTIZE_PART = 4096  # weights of a block of the grid of quantize_weights


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


CPU_ENGINE = (*_cpu_engine(), *_quantizer())
