"""The CPU's code objects: kernels/cpu/ as one shared object per target.

They refer to a few functions of the C library by plain name and so run on any Linux that has one, glibc or musl.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import quants
from ..quants import DequantizeArgs
from ..targets import RUNTIMES, CpuTarget, runtime_filename
from ..wiring import find
from . import zig
from .compile import PACKAGE, Object, Part, fingerprint

SOURCES = PACKAGE / "kernels" / "cpu"
RUNTIME = "runtime.cpp"
HEADERS = "cpu"  # the folder of a build that holds the generated types.h
FLAGS = (
    "-O3 -std=c++20 -ffreestanding -fno-exceptions -fno-rtti -fno-threadsafe-statics -fno-stack-protector"
    " -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra -Werror"
).split()
LINK_FLAGS = "-shared --gc-sections -s --build-id=none -z noexecstack".split()
_EMULATION = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux"}


def types_header() -> str:
    """The type table as C: includes of the type headers and a list of rows for each family of entry points."""

    def rows(name: str, lines: Iterable[str]) -> str:
        return f"#define {name}(X) " + " ".join(f"X({line})" for line in lines) + "\n"

    dequantize = []
    for t in quants.DEQUANTIZE_TYPES:
        assert t.dequantize is not None
        arg = {DequantizeArgs.NB32: "NB32", DequantizeArgs.K: "K", DequantizeArgs.GRID: "GRID"}[t.dequantize.args]
        dequantize.append(f"{t.suffix}, {t.name}, {t.dequantize.elements}, {arg}")
    names = [f"{find('dequantize_mul_mat_vec', t).name}, {t.name}" for t in quants.WEIGHT_TYPES]
    tiles = [f"{t.suffix}, {t.name}, {t.tile[0]}, {t.tile[1]}" for t in quants.WEIGHT_TYPES if t.tile]
    includes = "".join(f'#include "quants/{t.suffix}.h"\n' for t in quants.DEQUANTIZE_TYPES)
    return (
        "// Generated from quants.py.\n#pragma once\n"
        + includes
        + '#include "floats.h"\n'
        + rows("HQ_WEIGHT_TYPES", (f"{t.suffix}, {t.name}" for t in quants.WEIGHT_TYPES))
        + rows("HQ_FLOAT_TYPES", (f"{t.suffix}, {t.name}" for t in quants.FLOAT_TYPES))
        + rows("HQ_DEQUANTIZE_TYPES", dequantize)
        + rows("HQ_DEQUANTIZE_MAT_VEC_NAMES", names)
        + rows("HQ_TILES", tiles)
    )


def compile_source(source: Path, triple: str, flags: Iterable[str], scratch: Path, to: Path) -> None:
    """One source to an object file; `scratch` holds the generated header (`prepare`)."""
    flags = tuple(flags)
    includes = [f"-I{SOURCES}", f"-I{scratch / HEADERS}"]
    machine = ["-target", triple, *flags]
    zig.clang(
        [*machine, *FLAGS, *includes, "-c", source, "-o", to],
        f"compiling {source.name} for {' '.join((triple, *flags))}",
    )


def link(objects: Sequence[Path], machine: str, to: Path) -> None:
    zig.lld(["-m", _EMULATION[machine], *LINK_FLAGS, "-o", to, *objects], f"linking {to.name}")


def prepare(scratch: Path) -> None:
    (scratch / HEADERS).mkdir(exist_ok=True)
    (scratch / HEADERS / "types.h").write_text(types_header())


def kernel_sources() -> list[Path]:
    """The heaviest first."""
    return sorted((p for p in SOURCES.glob("*.cpp") if p.name != RUNTIME), key=lambda p: (-p.stat().st_size, p.name))


def cpu_objects(targets: Iterable[CpuTarget]) -> list[Object]:
    """The code objects of the targets, and the runtimes of their machines."""
    targets = list(targets)
    machines = dict.fromkeys(t.machine for t in targets)
    runtimes = [
        _object(runtime_filename(machine), machine, RUNTIMES[machine], (), [SOURCES / RUNTIME]) for machine in machines
    ]
    return runtimes + [_object(t.filename, t.machine, t.triple, t.flags, kernel_sources()) for t in targets]


def _object(filename: str, machine: str, triple: str, flags: tuple[str, ...], sources: list[Path]) -> Object:
    stem = filename.removesuffix(".so")
    headers = sorted(SOURCES.rglob("*.h"))
    parts = []
    for source in sources:
        made_from = (zig.version(), triple, flags, FLAGS, LINK_FLAGS, types_header())
        make = functools.partial(compile_source, source, triple, flags)
        parts.append(Part(f"{stem}.{source.stem}.o", fingerprint(made_from, files=[source, *headers]), make))

    def join(files: Sequence[Path], scratch: Path, to: Path) -> None:
        link(sorted(files), machine, to)

    return Object(filename, stem, tuple(parts), join, prepare, fingerprint(files=[Path(__file__)]))
