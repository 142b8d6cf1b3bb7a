"""The names that frameworks load by string, and rows of an embedding, which stand beside them."""

from __future__ import annotations

from collections.abc import Iterator

from ..quants import DEQUANTIZE_TYPES, FLOAT_TYPES, WEIGHT_TYPES, DequantizeArgs, padded
from .row import Kernel, _args, _ceil

MAX_BATCH = 8  # columns that one mul_mat_vec kernel takes
MAX_GRID_Y = 65535


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


COMPATIBILITY: tuple[Kernel, ...] = (
    *_quantize(),
    *_dequantize(),
    *_dequantize_mul_mat_vec(),
    *_mul_mat_vec(),
    *_mul_mat(),
)
GET_ROWS = tuple(_get_rows())
