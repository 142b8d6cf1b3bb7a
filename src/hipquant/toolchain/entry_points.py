"""The tables as C: for each family of kernels a list of rows, from which its source makes the entry points.

A list is a macro that takes a macro: `#define HQ_TILES(X) X(q4_0, Q4_0, 64, 128) …`.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..quants import DEQUANTIZE_TYPES, FLOAT_TYPES, WEIGHT_TYPES
from ..wiring import MAX_BATCH, find, profile

HEADER = "types.h"  # the name under which sources include it


def _rows(name: str, lines: Iterable[str]) -> str:
    return f"#define {name}(X) " + " ".join(f"X({line})" for line in lines) + "\n"


def gpu_header(which: str = "hip") -> str:
    """types.h of kernels/gpu/ under a name profile: `hip` or `cuda`."""
    names = {k.name.replace("_cuda", "_hip"): k.name for k in profile(which)}

    def dequantize() -> Iterable[str]:
        for t in DEQUANTIZE_TYPES:
            assert t.dequantize is not None
            yield f"{t.suffix}, {t.name}, {t.dequantize.elements}, {t.dequantize.threads}, {t.dequantize.args.name}"

    def mat_vec() -> Iterable[str]:
        for t in WEIGHT_TYPES:
            for b in range(1, MAX_BATCH + 1):
                yield f"{names[find('mul_mat_vec', t, batch=b).name]}, {t.name}, {b}"

    def get_rows(types: Iterable[object]) -> Iterable[str]:
        for t in FLOAT_TYPES + WEIGHT_TYPES:
            if t in types:
                yield f"{t.suffix}, {t.name}, {find('get_rows', t).block[0]}"

    includes = "".join(f'#include "quants/{t.suffix}.h"\n' for t in DEQUANTIZE_TYPES)
    tiles = (f"{t.suffix}, {t.name}, {t.tile[0]}, {t.tile[1]}" for t in WEIGHT_TYPES if t.tile)
    planes = (f"{t.suffix}, {t.name}" for t in WEIGHT_TYPES)
    dequantize_mat_vec = (f"{names[find('dequantize_mul_mat_vec', t).name]}, {t.name}" for t in WEIGHT_TYPES)
    return (
        f"// Generated from quants.py and wiring/, name profile {which}.\n#pragma once\n"
        + includes
        + _rows("HQ_DEQUANTIZE_TYPES", dequantize())
        + _rows("HQ_DEQUANTIZE_MAT_VEC", dequantize_mat_vec)
        + _rows("HQ_MAT_VEC", mat_vec())
        + _rows("HQ_TILES", tiles)
        + _rows("HQ_PLANES", planes)
        + _rows("HQ_GET_ROWS_WEIGHTS", get_rows(WEIGHT_TYPES))
        + _rows("HQ_GET_ROWS_FLOATS", get_rows(FLOAT_TYPES))
    )
