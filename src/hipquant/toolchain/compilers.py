"""Other compilers than the package's own, for those who hold to one: clang (AMD, NVIDIA), hipcc (AMD), nvcc (NVIDIA).

Each makes a code object out of one source in one run, without a header or a library of HIP or CUDA.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..codeobjects import bundle
from ..errors import InvalidCodeObjectError
from ..targets import GpuTarget
from . import gpu
from .compile import CompileError, Object, Part, fingerprint, run
from .entry_points import gpu_header

HIPCC_FLAGS = "--genco -nogpuinc -nogpulib".split()
NVCC_FLAGS = "-x cu -O3 -std=c++17 -fmad=false --expt-relaxed-constexpr".split()
_VENDORS = {"clang": ("amd", "nvidia"), "hipcc": ("amd",), "nvcc": ("nvidia",)}
_INSTALL = {
    "clang": "install clang and lld, 19 or newer (Debian: apt install clang-22 lld-22), or name one in HIPQUANT_CLANG",
    "hipcc": "install it with ROCm (Debian: apt install hipcc)",
    "nvcc": "install the CUDA toolkit",
}
_WITHOUT = "leave out --compiler: the compiler of `pip install ziglang==0.17.1` makes every target"


def compiler_objects(
    compiler: str, targets: Iterable[GpuTarget], profile: str, source: Path | None, cubin: bool = False
) -> list[Object]:
    """The code objects that `clang`, `hipcc` or `nvcc` makes of a source (default: the package's kernels).

    `cubin`: machine code in place of PTX, which nvcc can make. `CompileError` for a compiler that is missing or makes
    nothing for a target.
    """
    chosen = list(targets)
    for target in chosen:
        if target.vendor not in _VENDORS[compiler]:
            right = " or ".join(c for c, vendors in _VENDORS.items() if target.vendor in vendors)
            raise CompileError(f"{compiler} makes nothing for {target.name}: take {right}, or {_WITHOUT}")
    return [_object(compiler, target, profile, source or gpu.UMBRELLA, cubin) for target in chosen]


def _object(compiler: str, target: GpuTarget, profile: str, source: Path, cubin: bool) -> Object:
    executable = clang_for(target) if compiler == "clang" else find(compiler)
    make = functools.partial(_MAKE[compiler], executable, target, source, cubin)
    name = f"{target.name}.cubin" if cubin else target.filename
    files = [source, *gpu.headers(), *gpu.families()]
    flags = (gpu.FLAGS, gpu.HIP_FLAGS, gpu.CUDA_FLAGS, HIPCC_FLAGS, NVCC_FLAGS)
    made_from = fingerprint(executable, version(executable), target, flags, gpu_header(profile), files=files)

    def join(files: Sequence[Path], scratch: Path, to: Path) -> None:
        to.write_bytes(files[0].read_bytes())

    return Object(name, target.name, (Part(name, made_from, make),), join, functools.partial(gpu.prepare, profile))


def find(compiler: str) -> str:
    """The path of hipcc or nvcc."""
    path = shutil.which(compiler)
    if path is None:
        raise CompileError(f"{compiler} is not on the PATH: {_INSTALL[compiler]}; or {_WITHOUT}")
    return path


def clangs() -> list[str]:
    """What HIPQUANT_CLANG names, otherwise every clang on the PATH, the newest first."""
    named = os.environ.get("HIPQUANT_CLANG")
    if named:
        path = shutil.which(named)
        if path is None:
            raise CompileError(f"HIPQUANT_CLANG names {named!r}, which is no program")
        return [path]
    found: dict[int, str] = {}
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        for name in names:
            match = re.fullmatch(r"clang(?:\+\+)?(?:-(\d+))?", name)
            if match:
                found.setdefault(int(match[1] or 0), os.path.join(folder, name))
    return [found[v] for v in sorted(found, reverse=True)]


def clang_for(target: GpuTarget) -> str:
    """The first clang that knows a target."""
    candidates = clangs()
    if not candidates:
        raise CompileError(f"no clang is on the PATH: {_INSTALL['clang']}; or {_WITHOUT}")
    for path in candidates:
        command = [path, *_clang_flags(target), "-fsyntax-only", "-"]
        if subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).returncode == 0:
            return path
    raise CompileError(f"{target.name} is not known to {', '.join(candidates)}: {_INSTALL['clang']}; or {_WITHOUT}")


@functools.cache
def version(executable: str) -> str:
    done = subprocess.run([executable, "--version"], capture_output=True, text=True, env=_environment())
    return done.stdout


def _environment() -> dict[str, str]:
    return {**os.environ, "HIP_PLATFORM": "amd"}  # hipcc takes nvcc where it finds one, if not told otherwise


def _clang_flags(target: GpuTarget) -> list[str]:
    if target.vendor == "nvidia":
        return [*gpu.CUDA_FLAGS, *gpu.FLAGS, f"--cuda-gpu-arch={target.name}", f"--cuda-feature=+ptx{target.ptx}"]
    machine = [f"--offload-arch={target.name}", f"-mcode-object-version={target.code_object}"]
    return [*gpu.HIP_FLAGS, *gpu.FLAGS, "-fuse-cuid=none", *machine]


def _clang(executable: str, target: GpuTarget, source: Path, cubin: bool, scratch: Path, to: Path) -> None:
    if cubin:
        raise CompileError("clang makes PTX: give -o FILE.ptx, or --compiler nvcc for a cubin")
    kind = ["-S"] if target.vendor == "nvidia" else []
    flags = [*_clang_flags(target), *kind, *gpu.include_flags(scratch)]
    run([executable, *flags, source, "-o", to], f"compiling {source.name} for {target.name} with {executable}")


def _hipcc(executable: str, target: GpuTarget, source: Path, cubin: bool, scratch: Path, to: Path) -> None:
    machine = [f"--offload-arch={target.name}", f"-mcode-object-version={target.code_object}"]
    flags = [*HIPCC_FLAGS, *gpu.FLAGS, *machine, *gpu.include_flags(scratch)]
    what = f"compiling {source.name} for {target.name} with {executable}"
    run([executable, *flags, source, "-o", to], what, HIP_PLATFORM="amd")
    try:
        to.write_bytes(bundle.unpack(to.read_bytes())[target.name])
    except (InvalidCodeObjectError, KeyError) as error:
        raise CompileError(f"{executable} wrote no code object for {target.name}: {error}") from None


def _nvcc(executable: str, target: GpuTarget, source: Path, cubin: bool, scratch: Path, to: Path) -> None:
    machine = ["-cubin" if cubin else "-ptx", f"-arch={target.name}"]
    flags = [*NVCC_FLAGS, *machine, *gpu.include_flags(scratch)]
    run([executable, *flags, source, "-o", to], f"compiling {source.name} for {target.name} with {executable}")


_MAKE: dict[str, Callable[[str, GpuTarget, Path, bool, Path, Path], None]] = {
    "clang": _clang,
    "hipcc": _hipcc,
    "nvcc": _nvcc,
}
