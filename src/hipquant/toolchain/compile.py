"""Compiles kernels/cpu/ into one shared object per target, with nothing but the `ziglang` wheel.

`zig clang` compiles, `zig ld.lld` links: neither needs a header or a library of the machine. The objects refer to a
few functions of the C library by plain name and so run on any Linux that has one, glibc or musl.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .. import quants
from ..quants import DequantizeArgs
from ..targets import RUNTIMES, CpuTarget, cpu_targets, host_machine, runtime_filename

PACKAGE = Path(__file__).parent.parent
SOURCES = PACKAGE / "kernels" / "cpu"
OUTPUT = PACKAGE / "codeobjects"
MANIFEST = "manifest.json"
RUNTIME = "runtime.cpp"
FLAGS = (
    "-O3 -std=c++20 -ffreestanding -fno-exceptions -fno-rtti -fno-threadsafe-statics -fno-stack-protector"
    " -fno-math-errno -fPIC -fvisibility=hidden -Wall -Wextra -Werror"
).split()


class CompileError(RuntimeError):
    """The compiler refused a source: its own message, and which file and target."""


def types_header() -> str:
    """The type table as C: includes of the type headers and a list of rows for each family of entry points."""

    def rows(name: str, lines: Iterable[str]) -> str:
        return f"#define {name}(X) " + " ".join(f"X({line})" for line in lines) + "\n"

    dequantize = []
    for t in quants.DEQUANTIZE_TYPES:
        assert t.dequantize is not None
        arg = {DequantizeArgs.NB32: "NB32", DequantizeArgs.K: "K", DequantizeArgs.GRID: "GRID"}[t.dequantize.args]
        dequantize.append(f"{t.suffix}, {t.name}, {t.dequantize.elements}, {arg}")
    from ..wiring import find

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


def _run(arguments: list[str], what: str) -> None:
    done = subprocess.run([sys.executable, "-m", "ziglang", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{what} failed:\n{done.stderr.strip() or done.stdout.strip()}")


def _compile(source: Path, triple: str, flags: Iterable[str], to: Path) -> None:
    import ziglang

    builtins = Path(ziglang.__file__).parent / "lib"  # clang's own headers: stdint.h, immintrin.h, arm_neon.h
    machine = ["-target", triple, "-resource-dir", str(builtins), *flags]
    arguments = ["clang", *machine, *FLAGS, f"-I{SOURCES}", f"-I{to.parent}", "-c", str(source)]
    _run([*arguments, "-o", str(to)], f"compiling {source.name} for {triple} {' '.join(flags)}")


def _link(objects: list[Path], machine: str, to: Path) -> None:
    emulation = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux"}[machine]
    partial = to.with_suffix(f".{os.getpid()}.part")
    arguments = ["ld.lld", "-shared", "-m", emulation, "--gc-sections", "-s", "--build-id=none", "-z", "noexecstack"]
    _run([*arguments, "-o", str(partial), *map(str, objects)], f"linking {to.name}")
    partial.replace(to)  # a process that has the old object loaded keeps it


def _fingerprint(triple: str, flags: Iterable[str], sources: Iterable[Path]) -> str:
    """Changes whenever the object would: sources, headers, tables, flags and compiler."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        compiler = version("ziglang")
    except PackageNotFoundError:
        compiler = ""
    h = hashlib.sha256(repr((compiler, triple, tuple(flags), FLAGS, types_header())).encode())
    for path in sorted([*sources, *SOURCES.rglob("*.h")]):
        h.update(path.name.encode() + path.read_bytes())
    return h.hexdigest()


def kernel_sources() -> list[Path]:
    return sorted(p for p in SOURCES.glob("*.cpp") if p.name != RUNTIME)


def build_cpu(
    machines: Iterable[str] | None = None,
    output: Path = OUTPUT,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Builds the runtime and every code object of the machines (default: this one) that is not up to date.

    Returns the files. `progress(done, total)` is called after each source. Raises `CompileError`.
    """
    chosen = tuple(machines) if machines is not None else (host_machine(),)
    jobs: list[tuple[str, str, str, tuple[str, ...], list[Path]]] = []
    for machine in chosen:
        if machine not in RUNTIMES:
            raise CompileError(f"no CPU target for {machine}; there are {', '.join(RUNTIMES)}")
        jobs.append((runtime_filename(machine), machine, RUNTIMES[machine], (), [SOURCES / RUNTIME]))
        jobs += [(t.filename, machine, t.triple, t.flags, kernel_sources()) for t in cpu_targets(machine)]
    output.mkdir(parents=True, exist_ok=True)
    manifest_path = output / MANIFEST
    manifest: dict[str, str] = json.loads(manifest_path.read_text()) if manifest_path.exists() else {}
    todo = []
    for name, machine, triple, flags, sources in jobs:
        fingerprint = _fingerprint(triple, flags, sources)
        if manifest.get(name) != fingerprint or not (output / name).exists():
            todo.append((name, machine, triple, flags, sources, fingerprint))
    total, done = sum(len(t[4]) for t in todo), 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        (Path(folder) / "types.h").write_text(types_header())
        pending = []
        for name, machine, triple, flags, sources, fingerprint in todo:
            objects = [Path(folder) / f"{name}.{s.stem}.o" for s in sources]
            compiled = [pool.submit(_compile, s, triple, flags, o) for s, o in zip(sources, objects, strict=True)]
            pending.append((name, machine, objects, compiled, fingerprint))
        for name, machine, objects, compiled, fingerprint in pending:
            for future in compiled:
                future.result()
                done += 1
                if progress:
                    progress(done, total)
            _link(objects, machine, output / name)
            manifest[name] = fingerprint
            manifest_path.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
    return [output / name for name, *_ in jobs]


def wanted_machines() -> tuple[str, ...]:
    """What `pip install` builds: this machine's objects, or those of HIPQUANT_TARGETS (`all`, or machines)."""
    chosen = os.environ.get("HIPQUANT_TARGETS", "").replace(",", " ").split()
    if chosen == ["all"]:
        return tuple(RUNTIMES)
    return tuple(chosen) or (host_machine(),)


__all__ = ["CompileError", "CpuTarget", "build_cpu", "types_header", "wanted_machines"]
