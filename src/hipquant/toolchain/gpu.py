"""The GPUs' code objects: kernels/gpu/, or a user's own sources, as an AMD ELF or as PTX per target.

AMD: each family is compiled to assembly, out of which the instruction facts come; the assembly of all families is
assembled and linked, with one metadata note for all of them, as readers look at the first note only. Targets whose
machine code is the same share the assembly. NVIDIA: the umbrella source is compiled to PTX.
"""

from __future__ import annotations

import functools
import gzip
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..targets import GpuTarget, gpu_target
from . import facts, zig
from .compile import PACKAGE, CompileError, Facts, Object, Part, fingerprint
from .entry_points import HEADER, gpu_header

SOURCES = PACKAGE / "kernels" / "gpu"
UMBRELLA = SOURCES / "quantized.hip"
SIMULATION = ("simulate.h", "simulate.cpp")  # what no GPU's object includes
HEADERS = "gpu"  # the folder of a build that holds the generated types.h
# No contraction and no fast math: dequantization is bit for bit. No header of this machine's C library either.
FLAGS = "-O3 -std=c++17 -ffp-contract=off -nostdlibinc".split()
STRICT = "-Wall -Wextra -Werror".split()  # our own sources
HIP_FLAGS = "-x hip --offload-device-only --no-gpu-bundle-output -nogpuinc -nogpulib -fno-discard-value-names".split()
# Without a toolkit's folder, the output does not depend on the CUDA that is installed.
CUDA_FLAGS = "-x cuda --cuda-device-only -nocudainc -nocudalib --cuda-path=/nonexistent".split()
LINK_FLAGS = "-m elf64_amdgpu --no-undefined -shared --discard-all -z norelro --build-id=none".split()


def families() -> list[Path]:
    """The package's sources, one a family; the heaviest first."""
    sources = (p for p in SOURCES.glob("*.hip") if p != UMBRELLA)
    return sorted(sources, key=lambda p: (-p.stat().st_size, p.name))


def headers() -> list[Path]:
    return sorted(p for p in SOURCES.rglob("*.h") if p.name not in SIMULATION)


def gpu_objects(
    targets: Iterable[GpuTarget], profile: str = "hip", sources: Sequence[Path] = (), warnings: list[str] | None = None
) -> list[Object]:
    """The code objects of the targets: the package's kernels under a name profile, or a user's own `sources`.

    The compiler's warnings on a user's sources go to `warnings`; on ours they are errors.
    """
    plan = _Plan(profile, tuple(sources), warnings if warnings is not None else [])
    chosen = sorted(targets, key=lambda t: t.vendor == "amd")  # PTX is one long run each: it comes first
    return [plan.amd(t) if t.vendor == "amd" else plan.nvidia(t) for t in chosen]


def include_flags(scratch: Path) -> list[str]:
    return [f"-I{SOURCES}", f"-I{scratch / HEADERS}"]


def prepare(profile: str, scratch: Path) -> None:
    """Writes the generated header."""
    (scratch / HEADERS).mkdir(exist_ok=True)
    (scratch / HEADERS / HEADER).write_text(gpu_header(profile))


class _Plan:
    """What the objects of one build have in common."""

    def __init__(self, profile: str, sources: tuple[Path, ...], warnings: list[str]) -> None:
        self.profile, self.sources, self.warnings = profile, sources, warnings
        flags = (FLAGS, STRICT, HIP_FLAGS, CUDA_FLAGS, LINK_FLAGS)
        self.made_from = fingerprint(zig.version(), flags, gpu_header(profile), files=headers())
        self.prepare = functools.partial(prepare, profile)
        self.joined_by = fingerprint(files=[Path(__file__), Path(facts.__file__)])

    def amd(self, target: GpuTarget) -> Object:
        """Assembly of each family, assembled and linked. A user's sources may ask for a target: they have no twins."""
        base = gpu_target(target.twin) if target.twin and not self.sources else target
        parts = []
        for i, source in enumerate(self.sources or families()):
            unit = f"{i}.{source.stem}" if self.sources else source.stem
            make = functools.partial(self._compile_amd, source, base, unit)
            made_from = fingerprint(self.made_from, base, files=[source])
            parts.append(Part(f"{base.name}.{unit}.s.gz", made_from, make))

        def join(files: Sequence[Path], scratch: Path, to: Path) -> Facts:
            listings = [gzip.decompress(p.read_bytes()).decode() for p in sorted(files)]
            _link_amd(listings, base, target, scratch, to)
            return {name: found for listing in listings for name, found in facts.amd_facts(listing).items()}

        return Object(target.filename, target.name, tuple(parts), join, self.prepare, self.joined_by)

    def nvidia(self, target: GpuTarget) -> Object:
        """PTX is not linked, so it comes out of one source."""
        if len(self.sources) > 1:
            raise CompileError(f"PTX is not linked: give one source at a time for {target.name}, or include the others")
        source = self.sources[0] if self.sources else UMBRELLA
        files = [source] if self.sources else [source, *families()]
        make = functools.partial(self._compile_nvidia, source, target)
        part = Part(target.filename, fingerprint(self.made_from, target, files=files), make)

        def join(files: Sequence[Path], scratch: Path, to: Path) -> Facts:
            to.write_bytes(files[0].read_bytes())
            return facts.ptx_facts(to.read_text())

        return Object(target.filename, target.name, (part,), join, self.prepare, self.joined_by)

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
        flags = [*flags, *FLAGS, *(() if self.sources else STRICT), *include_flags(scratch)]
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
        assembly = scratch / f"{target.name}.{i}.s"
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
