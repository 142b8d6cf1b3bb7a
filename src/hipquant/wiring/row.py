"""What a row of the kernel table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from ..quants import QuantType

Dim3 = tuple[int, int, int]
Silicon = Literal["any", "cpu", "gpu"]  # whose code objects have a kernel


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
