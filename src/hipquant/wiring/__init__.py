"""The kernel table: every kernel's name, arguments and launch geometry, written once for all three kinds of silicon.

A kernel is a *name*, an *argument list* and a *launch geometry*. Code objects for AMD, NVIDIA and the CPU export the
same names; loader, launcher, docs and tests read this table. The families of `COMPATIBILITY` are the 123 names that
frameworks load by string. The other families belong to the engine, which has a file for CPUs and one for GPUs; `row.py`
says what a row is.

A *name profile* renames the families whose names carry a vendor: `hip` (`mul_mat_vec_q4_0_q8_1_hip1`) is the table's
own, `cuda` (`mul_mat_vec_q4_0_q8_1_cuda1`) is what Candle's CUDA build loads.
"""

from __future__ import annotations

from dataclasses import replace

from ..errors import KernelNotFoundError
from ..quants import FLOAT_TYPES, MATRIX_TYPES, QK8_1, WEIGHT_TYPES, QuantType
from .compatibility import COMPATIBILITY, GET_ROWS, MAX_BATCH, MAX_GRID_Y
from .cpu_engine import CPU_ENGINE, PACK_ROWS
from .gpu_engine import (
    CACHE_TYPES,
    EXPERT_TILE,
    FLOAT_EXPERT_BATCH,
    GATE_BLOCKS,
    GPU_ENGINE,
    PLANE_BATCHES,
    attention,
    rows_to_block,
)
from .row import Arg, Dim3, Kernel, Kind, Silicon

__all__ = [
    "CACHE_TYPES",
    "COMPATIBILITY",
    "CPU_KERNELS",
    "EXPERT_TILE",
    "FLOAT_EXPERT_BATCH",
    "GATE_BLOCKS",
    "GPU_ENGINE",
    "KERNELS",
    "MAX_BATCH",
    "MAX_GRID_Y",
    "PACK_ROWS",
    "PLANE_BATCHES",
    "PROFILES",
    "TABLE",
    "Arg",
    "Dim3",
    "Kernel",
    "Kind",
    "Silicon",
    "attention",
    "find",
    "kernel",
    "profile",
    "rows_to_block",
]

PROFILES = ("hip", "cuda")

TABLE: tuple[Kernel, ...] = (*COMPATIBILITY, *GET_ROWS, *CPU_ENGINE, *GPU_ENGINE)
CPU_KERNELS = tuple(k for k in TABLE if k.silicon != "gpu")
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
