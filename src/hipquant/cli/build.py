"""`hipquant build`: compiles the package's kernels, or a user's own, into code objects."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..wiring import PROFILES
from .common import Bar, TargetsCommand, emit, interruptible, note

if TYPE_CHECKING:
    from ..targets import CpuTarget, GpuTarget

    Target = CpuTarget | GpuTarget

COMPILERS = ("zig", "clang", "hipcc", "nvcc")
SUFFIXES = {
    ".hsaco": "AMD targets",
    ".ptx": "one NVIDIA target",
    ".cubin": "one NVIDIA target",
    ".so": "one CPU target",
}


@click.command("build", cls=TargetsCommand)
@click.argument("sources", nargs=-1, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--target", "words", multiple=True, help="gfx1100, sm_80, ..., or all, amd, nvidia, cpu: one or more.")
@click.option("--profile", type=click.Choice(PROFILES), default="hip", show_default=True, help="Names of the kernels.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="A file, or a folder for several.")
@click.option("--compiler", type=click.Choice(COMPILERS), default="zig", show_default=True)
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at a time (default: processors).")
def command(
    sources: tuple[Path, ...],
    words: tuple[str, ...],
    profile: str,
    output: Path | None,
    compiler: str,
    jobs: int | None,
) -> None:
    """Compiles the package's kernels into this installation, except for what is up to date.

    Without --target: for this machine's processor and GPUs. With -o, the kernels that frameworks load, without the
    engine's: FILE.hsaco is one offload bundle of AMD targets; FILE.ptx, FILE.cubin (nvcc) or FILE.so is for one target;
    a folder gets one file a target.

    SOURCES are kernels of your own, in HIP; they may include the package's device.h. Without --target they are
    compiled for every AMD target, into a bundle named after the first.
    """
    begun = time.perf_counter()
    targets = _targets(words, bool(sources))
    if output is not None and not _is_folder(output):
        _check_file(output, targets)
    plan = _Plan(sources, targets, profile, compiler, output)
    with tempfile.TemporaryDirectory() as scratch, interruptible(), Bar("compiling") as bar:
        folder = plan.folder(Path(scratch))
        plan.build(folder, jobs, bar)
        files = plan.deliver(folder)
    for path in files:
        emit(f"{path}  {path.stat().st_size:,} bytes\n")
    note(f"{len(files)} {'file' if len(files) == 1 else 'files'}, {time.perf_counter() - begun:.1f} s", dim=True)


def _targets(words: Sequence[str], own_sources: bool) -> tuple[Target, ...]:
    from ..targets import select
    from ..toolchain.machine import wanted

    split = [word for text in words for word in text.replace(",", " ").split()]
    if split:
        return select(split)
    return select(["amd"]) if own_sources else wanted()


def _is_folder(output: Path) -> bool:
    return output.is_dir() or not output.suffix


def _check_file(output: Path, targets: Sequence[Target]) -> None:
    """Whether one file of this kind can hold the targets."""
    kind = SUFFIXES.get(output.suffix)
    if kind is None:
        raise click.UsageError(f"-o {output}: expected a folder or a file ending in {', '.join(SUFFIXES)}")
    vendor = {".hsaco": "amd", ".so": "cpu"}.get(output.suffix, "nvidia")
    wrong = [t.name for t in targets if _vendor(t) != vendor]
    if wrong or (vendor != "amd" and len(targets) != 1):
        names = wrong or [t.name for t in targets]
        found = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise click.UsageError(f"-o {output}: such a file holds {kind}, not {found}; name targets or give a folder")


def _vendor(target: Target) -> str:
    return getattr(target, "vendor", "cpu")


@dataclass
class _Plan:
    """What one call builds, and where it goes."""

    sources: tuple[Path, ...]
    targets: tuple[Target, ...]
    profile: str
    compiler: str
    output: Path | None

    def __post_init__(self) -> None:
        self.warnings: list[str] = []
        self.cubin = self.output is not None and self.output.suffix == ".cubin"
        self.embeds = not self.sources and self.output is None
        if self.embeds and self.profile != "hip":
            raise click.UsageError(f"the installation has the names of profile hip; give -o for {self.profile}")

    def folder(self, scratch: Path) -> Path:
        """Where the objects are built: the installation, if they are its own, so that nothing is compiled twice."""
        from ..toolchain.compile import OUTPUT

        writable = os.access(OUTPUT, os.W_OK)
        if self.embeds and not writable:
            raise click.ClickException(f"{OUTPUT} cannot be written: give -o FILE or -o FOLDER")
        own = not self.sources and self.profile == "hip" and self.compiler == "zig" and writable
        return OUTPUT if self.embeds or own else scratch

    def build(self, folder: Path, jobs: int | None, bar: Bar) -> None:
        from ..toolchain.build import plan
        from ..toolchain.compile import build_objects

        objects = plan(
            self.targets,
            profile=self.profile,
            engine=self.embeds,
            sources=self.sources,
            compiler=self.compiler,
            cubin=self.cubin,
            warnings=self.warnings,
        )
        self.filenames = {o.target: o.filename for o in objects}
        build_objects(objects, folder, jobs=jobs, progress=bar)
        for text in dict.fromkeys(self.warnings):
            note(text)

    def deliver(self, folder: Path) -> list[Path]:
        """The files that were asked for, out of the folder that they were built in."""
        if self.embeds:
            return [folder / name for name in self.filenames.values()]
        if self.output is not None and not _is_folder(self.output):
            return [_write(self.output, self._content(folder))]
        to = self.output or Path()
        to.mkdir(parents=True, exist_ok=True)
        if not self.sources:
            return [_write(to / name, (folder / name).read_bytes()) for name in self.filenames.values()]
        stem = self.sources[0].stem
        files = [_write(to / f"{stem}.hsaco", self._content(folder))] if self._amd() else []
        others = [name for target, name in self.filenames.items() if target not in self._amd()]
        return files + [_write(to / f"{stem}.{name}", (folder / name).read_bytes()) for name in others]

    def _amd(self) -> list[str]:
        return [t.name for t in self.targets if _vendor(t) == "amd"]

    def _content(self, folder: Path) -> bytes:
        from ..codeobjects import bundle

        images = {name: (folder / self.filenames[name]).read_bytes() for name in self._amd()}
        if images:
            return bundle.pack(images)
        return (folder / list(self.filenames.values())[-1]).read_bytes()  # a CPU's comes after its runtime


def _write(path: Path, data: bytes) -> Path:
    from ..toolchain.compile import write

    write(path, data)
    return path
