"""Plans and builds code objects: the package's own for all kinds of target, or a user's sources for GPUs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..targets import CpuTarget, GpuTarget
from .compile import OUTPUT, CompileError, Object, Progress, build_objects
from .compilers import compiler_objects
from .cpu import cpu_objects
from .gpu import engine_objects, gpu_objects


def build(
    targets: Iterable[CpuTarget | GpuTarget],
    output: Path = OUTPUT,
    *,
    profile: str = "hip",
    engine: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Builds the package's code objects that are not up to date into a folder: the installation's own, if not told
    otherwise. Gives the files. See `plan` for `engine`, and `build_objects` for the errors."""
    return build_objects(plan(targets, profile=profile, engine=engine), output, jobs=jobs, progress=progress)


def plan(
    targets: Iterable[CpuTarget | GpuTarget],
    *,
    profile: str = "hip",
    engine: bool = False,
    sources: Sequence[Path] = (),
    compiler: str = "zig",
    cubin: bool = False,
    warnings: list[str] | None = None,
) -> list[Object]:
    """The objects to build, of the package's kernels under a name profile, or of a user's `sources` in HIP.

    `engine`: also those of the GPU engine, which an installation has beside the frameworks' kernels; zig makes them.
    `cubin`: machine code in place of PTX (nvcc). The compiler's warnings on a user's sources go to `warnings`. Raises
    `CompileError` for what cannot be made of each other.
    """
    chosen = list(targets)
    gpus = [t for t in chosen if isinstance(t, GpuTarget)]
    cpus = [t for t in chosen if isinstance(t, CpuTarget)]
    if cpus and sources:
        raise CompileError(f"kernels in HIP run on GPUs: they cannot be compiled for {cpus[0].name}")
    if compiler == "zig":
        if cubin:
            raise CompileError("a cubin needs NVIDIA's compiler: --compiler nvcc; drivers take -o FILE.ptx too")
        ours = engine_objects(gpus) if engine else []
        return [*gpu_objects(gpus, profile, sources, warnings), *ours, *cpu_objects(cpus)]
    if cpus:
        raise CompileError(f"{compiler} is for GPUs; {cpus[0].name} is compiled by zig: leave out --compiler")
    if len(sources) > 1:
        raise CompileError(f"{compiler} takes one source at a time; got {', '.join(p.name for p in sources)}")
    return compiler_objects(compiler, gpus, profile, sources[0] if sources else None, cubin)
