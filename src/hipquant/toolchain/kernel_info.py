"""What is known about a kernel in a code object; None where the format does not tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ArgInfo:
    """One argument: name (may be empty), offset and size in bytes, kind: pointer, value, or empty if not told."""

    name: str
    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class Facts:
    """Instruction counts of a kernel: int8 dot products, matrix instructions, vector loads, all; and in bytes the
    widest load."""

    dot4: int
    matrix: int
    widest_load: int
    loads: int
    instructions: int

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Facts:
        """A row of facts.json."""
        return cls(*(int(row[name]) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class KernelInfo:
    """A kernel as its code object describes it.

    Registers are counts per lane (vgprs, agprs) or per wave (sgprs); `lds` and `scratch` are bytes per block and per
    lane; spills are counts; `wave` is in lanes; `max_workgroup` the most threads a block may have.
    """

    name: str
    args: list[ArgInfo] | None = None
    vgprs: int | None = None
    sgprs: int | None = None
    agprs: int | None = None
    lds: int | None = None
    scratch: int | None = None
    vgpr_spills: int | None = None
    sgpr_spills: int | None = None
    wave: int | None = None
    max_workgroup: int | None = None
    facts: Facts | None = None
    loadable: bool = True  # False: the metadata describe it, but the loader would not find its symbol


@dataclass(frozen=True)
class Problem:
    """Something about an image as a whole that keeps it from being loaded: in words, and what to do."""

    target: str
    message: str
    fix: str


@dataclass
class Inspection:
    """What is in a file: `kind` in words, the kernels of each target in the file's order."""

    name: str
    kind: str
    targets: dict[str, list[KernelInfo]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
