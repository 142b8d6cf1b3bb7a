"""The GPUs' code objects: kernels/gpu/, kernels/gpu/engine/ or a user's own sources, as an AMD ELF or PTX per target.

AMD: each family is compiled to assembly, out of which the instruction facts come; the assembly of all families is
assembled and linked, with one metadata note for all of them, as readers look at the first note only. Targets whose
machine code is the same share the assembly. NVIDIA: the umbrella source is compiled to PTX.
"""

from __future__ import annotations

import functools
import gzip
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..targets import GpuTarget, gpu_target
from . import facts, zig
from .compile import PACKAGE, CompileError, Facts, Object, Part, fingerprint
from .entry_points import HEADER, gpu_header

SOURCES = PACKAGE / "kernels" / "gpu"
UMBRELLA = SOURCES / "quantized.hip"
ENGINE = SOURCES / "engine"
ENGINE_UMBRELLA = ENGINE / "engine.hip"
SIMULATION = ("simulate.h", "simulate_fibers.h", "simulate_lanes.h")  # what no GPU's object includes
HEADERS = "gpu"  # the folder of a build that holds the generated types.h
# No contraction and no fast math: dequantization is bit for bit. No header of this machine's C library either.
FLAGS = "-O3 -std=c++17 -ffp-contract=off -nostdlibinc".split()
STRICT = "-Wall -Wextra -Werror".split()  # our own sources
HIP_FLAGS = "-x hip --offload-device-only --no-gpu-bundle-output -nogpuinc -nogpulib -fno-discard-value-names".split()
# Without a toolkit's folder, the output does not depend on the CUDA that is installed.
CUDA_FLAGS = "-x cuda --cuda-device-only -nocudainc -nocudalib --cuda-path=/nonexistent".split()
LINK_FLAGS = "-m elf64_amdgpu --no-undefined -shared --discard-all -z norelro --build-id=none".split()


def families() -> list[Path]:
    """The sources of the frameworks' kernels, one a family; the heaviest first."""
    return _heaviest_first(p for p in SOURCES.glob("*.hip") if p != UMBRELLA)


def engine_families() -> list[Path]:
    """The sources of the engine's kernels, as `families`."""
    return _heaviest_first(p for p in ENGINE.glob("*.hip") if p != ENGINE_UMBRELLA)


def _heaviest_first(sources: Iterable[Path]) -> list[Path]:
    return sorted(sources, key=lambda p: (-p.stat().st_size, p.name))


def headers() -> list[Path]:
    """What every object may include; the engine has more of its own."""
    found = (p for p in SOURCES.rglob("*.h") if p.name not in SIMULATION and ENGINE not in p.parents)
    return sorted(found)


@dataclass(frozen=True)
class _Sources:
    """What the objects of one build are made of.

    `units` are compiled for AMD one by one and linked. `umbrella`, which includes them, is compiled for NVIDIA, as PTX
    is not linked; None where there are several units and nothing includes them.
    """

    units: tuple[tuple[str, Path], ...]  # names that tell their parts apart, and files
    umbrella: Path | None
    headers: tuple[Path, ...]
    of: Literal["frameworks", "engine", "user"]

    def filename(self, target: GpuTarget) -> str:
        return target.engine_filename if self.of == "engine" else target.filename


def gpu_objects(
    targets: Iterable[GpuTarget], profile: str = "hip", sources: Sequence[Path] = (), warnings: list[str] | None = None
) -> list[Object]:
    """The code objects of the targets: the frameworks' kernels under a name profile, or a user's own `sources`.

    The compiler's warnings on a user's sources go to `warnings`; on ours they are errors.
    """
    if sources:
        units = tuple((f"{i}.{p.stem}", p) for i, p in enumerate(sources))
        made_of = _Sources(units, sources[0] if len(sources) == 1 else None, tuple(headers()), "user")
    else:
        made_of = _Sources(tuple((p.stem, p) for p in families()), UMBRELLA, tuple(headers()), "frameworks")
    return _Plan(profile, made_of, warnings if warnings is not None else []).objects(targets)


def engine_objects(targets: Iterable[GpuTarget]) -> list[Object]:
    """The code objects of the targets with the kernels of the engine."""
    units = tuple((f"engine.{p.stem}", p) for p in engine_families())
    made_of = _Sources(units, ENGINE_UMBRELLA, (*headers(), *sorted(ENGINE.rglob("*.h"))), "engine")
    return _Plan("hip", made_of, []).objects(targets)


def include_flags(scratch: Path) -> list[str]:
    return [f"-I{SOURCES}", f"-I{scratch / HEADERS}"]


def prepare(profile: str, scratch: Path) -> None:
    """Writes the generated header."""
    (scratch / HEADERS).mkdir(exist_ok=True)
    (scratch / HEADERS / HEADER).write_text(gpu_header(profile))


class _Plan:
    """What the objects of one build have in common."""

    def __init__(self, profile: str, sources: _Sources, warnings: list[str]) -> None:
        self.sources, self.warnings = sources, warnings
        flags = (FLAGS, STRICT, HIP_FLAGS, CUDA_FLAGS, LINK_FLAGS)
        self.made_from = fingerprint(zig.version(), flags, gpu_header(profile), files=sources.headers)
        self.prepare = functools.partial(prepare, profile)
        self.joined_by = fingerprint(files=[Path(__file__), Path(facts.__file__)])

    def objects(self, targets: Iterable[GpuTarget]) -> list[Object]:
        chosen = sorted(targets, key=lambda t: t.vendor == "amd")  # PTX is one long run each: it comes first
        return [self.amd(t) if t.vendor == "amd" else self.nvidia(t) for t in chosen]

    def amd(self, target: GpuTarget) -> Object:
        """Assembly of each family, assembled and linked. A user's sources may ask for a target: they have no twins."""
        base = gpu_target(target.twin) if target.twin and self.sources.of != "user" else target
        parts = []
        for unit, source in self.sources.units:
            make = functools.partial(self._compile_amd, source, base, unit)
            made_from = fingerprint(self.made_from, base, files=[source])
            parts.append(Part(f"{base.name}.{unit}.s.gz", made_from, make))

        def join(files: Sequence[Path], scratch: Path, to: Path) -> Facts:
            listings = [gzip.decompress(p.read_bytes()).decode() for p in sorted(files)]
            _link_amd(listings, base, target, scratch, to)
            return {name: found for listing in listings for name, found in facts.amd_facts(listing).items()}

        return self._object(target, parts, join)

    def nvidia(self, target: GpuTarget) -> Object:
        """PTX is not linked, so it comes out of one source."""
        source = self.sources.umbrella
        if source is None:
            raise CompileError(f"PTX is not linked: give one source at a time for {target.name}, or include the others")
        files = {source, *(path for _, path in self.sources.units)}
        make = functools.partial(self._compile_nvidia, source, target)
        part = Part(self.sources.filename(target), fingerprint(self.made_from, target, files=files), make)

        def join(files: Sequence[Path], scratch: Path, to: Path) -> Facts:
            to.write_bytes(files[0].read_bytes())
            return facts.ptx_facts(to.read_text())

        return self._object(target, [part], join)

    def _object(self, target: GpuTarget, parts: Sequence[Part], join: Callable[..., Facts | None]) -> Object:
        filename = self.sources.filename(target)
        return Object(filename, Path(filename).stem, tuple(parts), join, self.prepare, self.joined_by)

    def _compile_amd(self, source: Path, target: GpuTarget, unit: str, scratch: Path, to: Path) -> None:
        machine = [f"--offload-arch={target.name}", f"-mcode-object-version={target.code_object}"]
        listing = to.with_suffix("")
        # Each unit has a symbol __hip_cuid_*, named by the path if not told otherwise.
        self._clang(source, target, [*HIP_FLAGS, "-fuse-cuid=none", f"-cuid={unit}", *machine], scratch, listing)
        to.write_bytes(gzip.compress(listing.read_bytes(), 6, mtime=0))
        listing.unlink()

    def _compile_nvidia(self, source: Path, target: GpuTarget, scratch: Path, to: Path) -> None:
        machine = [f"--cuda-gpu-arch={target.name}", f"--cuda-feature=+ptx{target.ptx}"]
        self._clang(source, target, [*CUDA_FLAGS, *machine], scratch, to)

    def _clang(self, source: Path, target: GpuTarget, flags: list[str], scratch: Path, to: Path) -> None:
        flags = [*flags, *FLAGS, *(() if self.sources.of == "user" else STRICT), *include_flags(scratch)]
        try:
            said = zig.clang([*flags, "-S", source, "-o", to], f"compiling {source.name} for {target.name}")
        except CompileError as error:
            raise CompileError(f"{error}{_hint(str(error))}") from None
        if said.strip():
            self.warnings.append(said.strip())


def _hint(message: str) -> str:
    if re.search(r"'(hip/|cuda)[\w./]*' file not found", message):
        return "\nno header of HIP or CUDA is needed or there: include device.h, which has their words"
    return ""


def _link_amd(listings: Sequence[str], base: GpuTarget, target: GpuTarget, scratch: Path, to: Path) -> None:
    """Assembles the families' listings, made for `base`, for `target`, and links them."""
    units = [_retarget(re.sub(_METADATA, "", listing), base, target) for listing in listings]
    objects = []
    for i, text in enumerate([*units, _metadata(listings, target)]):
        assembly = scratch / f"{to.name}.{i}.s"
        assembly.write_text(text)
        objects.append(assembly.with_suffix(".o"))
        machine = f"-target amdgcn-amd-amdhsa -mcpu={target.name} -mcode-object-version={target.code_object}".split()
        zig.clang([*machine, "-c", assembly, "-o", objects[-1]], f"assembling for {target.name}")
        assembly.unlink()
    zig.lld([*LINK_FLAGS, "-o", to, *objects], f"linking {to.name}")
    for file in objects:
        file.unlink()


_METADATA = re.compile(r"^\t\.amdgpu_metadata\n(.*?)^\t\.end_amdgpu_metadata\n", re.MULTILINE | re.DOTALL)
_KERNELS = re.compile(r"^amdhsa\.kernels:\n(.*?)^amdhsa\.target:", re.MULTILINE | re.DOTALL)


def _retarget(listing: str, base: GpuTarget, target: GpuTarget) -> str:
    for old, new in (
        (f'.amdgcn_target "amdgcn-amd-amdhsa--{base.name}"', f'.amdgcn_target "amdgcn-amd-amdhsa--{target.name}"'),
        (f".amdhsa_code_object_version {base.code_object}\n", f".amdhsa_code_object_version {target.code_object}\n"),
    ):
        if listing.count(old) != 1:
            raise CompileError(f"the assembly for {base.name} does not have {old.strip()!r} once")
        listing = listing.replace(old, new)
    return listing


def _metadata(listings: Sequence[str], target: GpuTarget) -> str:
    """The kernels of all units in one note: an assembly listing of nothing else."""
    kernels = []
    for listing in listings:
        note = _METADATA.search(listing)
        listed = _KERNELS.search(note[1]) if note else None
        kernels.append(listed[1] if listed else "")
    found = "".join(kernels)
    return (
        f'\t.amdgcn_target "amdgcn-amd-amdhsa--{target.name}"\n'
        f"\t.amdhsa_code_object_version {target.code_object}\n"
        "\t.amdgpu_metadata\n---\n"
        f"amdhsa.kernels:{chr(10) + found if found else '  []' + chr(10)}"
        f"amdhsa.target: amdgcn-amd-amdhsa--{target.name}\n"
        "amdhsa.version:\n  - 1\n  - 2\n...\n\t.end_amdgpu_metadata\n"
    )
