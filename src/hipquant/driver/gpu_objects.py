"""Which code object a GPU runs: the choice among targets, and the checks on bytes before a driver sees them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ..codeobjects.bundle import unpack
from ..errors import InvalidCodeObjectError
from ..targets import GPU_TARGETS
from .base import Rejection

# The processors that each generic target covers. Source: LLVM's docs/AMDGPUUsage.rst.
GENERIC: dict[str, tuple[str, ...]] = {
    "gfx9-generic": ("gfx900", "gfx902", "gfx904", "gfx906", "gfx909", "gfx90c"),
    "gfx9-4-generic": ("gfx940", "gfx941", "gfx942", "gfx950"),
    "gfx10-1-generic": ("gfx1010", "gfx1011", "gfx1012", "gfx1013"),
    "gfx10-3-generic": ("gfx1030", "gfx1031", "gfx1032", "gfx1033", "gfx1034", "gfx1035", "gfx1036"),
    "gfx11-generic": ("gfx1100", "gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1152", "gfx1153"),
    "gfx12-generic": ("gfx1200", "gfx1201"),
}
GENERIC_SINCE = (6, 3)  # the ROCm that loads code objects of version 6
EM_CUDA, SHT_NOBITS = 190, 8
FATBIN_MAGIC = b"\x50\xed\x55\xba"
PTX_HEAD = 1 << 16  # bytes in which PTX must name its version and target
_SM = re.compile(r"sm_(\d+)([af]?)")
_PTX = re.compile(rb"\s*(?://[^\n]*\n\s*)*\.version\s+(\d+\.\d+)\s.*?\.target\s+(sm_\d+[af]?)\b", re.DOTALL)


@dataclass(frozen=True)
class GpuModel:
    """What the choice depends on: `name` is the target (`gfx1100`, `sm_90`), `version` the driver's (major, minor)."""

    name: str
    kind: str
    version: tuple[int, int] = (1 << 16, 0)

    def __str__(self) -> str:
        return self.name


def unfit(target: str, gpu: GpuModel) -> str:
    """Why a GPU does not run the code object of a target; empty if it does."""
    sm = _SM.fullmatch(target)
    if (sm is not None) != (gpu.kind == "cuda"):
        return f"for {'NVIDIA' if sm else 'AMD'} GPUs, this is {gpu}"
    if sm:
        found, own = int(sm[1]), int(gpu.name[3:])
        if sm[2] == "a" and found != own:
            return f"runs on compute capability {found / 10} only, this is {gpu}"
        if sm[2] == "f" and found // 10 != own // 10:
            return f"runs on compute capability {found // 10}.x only, this is {gpu}"
        return f"needs compute capability {found / 10}, this is {gpu}" if found > own else ""
    target = target.partition(":")[0]
    if target in GENERIC:
        if gpu.name not in GENERIC[target]:
            return f"does not cover {gpu}"
        if gpu.version < GENERIC_SINCE:
            return f"needs ROCm 6.3, this is {'.'.join(map(str, gpu.version))}"
        return ""
    return "" if target == gpu.name else f"this is {gpu}"


def choose(targets: Iterable[str], gpu: GpuModel) -> tuple[str | None, list[Rejection]]:
    """The best target for a GPU, and why each of the others is rejected.

    Best is the exact one, then the generic one; for NVIDIA the highest, where `sm_90a` is above `sm_90`.
    """

    def rank(target: str) -> tuple[int, str]:
        sm = _SM.fullmatch(target)
        return (int(sm[1]), sm[2]) if sm else (int(target.partition(":")[0] == gpu.name), "")

    reasons = {target: unfit(target, gpu) for target in targets}
    fit = sorted((t for t, reason in reasons.items() if not reason), key=rank)
    best = fit[-1] if fit else None
    return best, [Rejection(t, reason or f"{best} is better") for t, reason in reasons.items() if t != best]


def absent(targets: Iterable[str], gpu: GpuModel) -> list[Rejection]:
    """The known targets that a GPU runs and that are not among those that are there."""
    there = set(targets)
    names = [t.name for t in GPU_TARGETS if t.name not in there and not unfit(t.name, gpu)]
    return [Rejection(name, f"not in this installation; hipquant build --target {name} adds it") for name in names]


def explain(rejected: Iterable[Rejection]) -> str:
    """The reasons in one line, targets with the same one together."""
    by_reason: dict[str, list[str]] = {}
    for target, reason in rejected:
        by_reason.setdefault(reason, []).append(target)
    return "; ".join(f"{' '.join(targets)}: {reason}" for reason, targets in by_reason.items())


def image_for(blob: bytes, gpu: GpuModel) -> bytes:
    """What the driver is given of a code object: the machine code for this GPU, or PTX with its final zero byte.

    Raises `InvalidCodeObjectError` where the bytes are not a code object, damaged, or for other GPUs.
    """
    return _amd_image(blob, gpu) if gpu.kind == "hip" else _nvidia_image(blob, gpu)


def _amd_image(blob: bytes, gpu: GpuModel) -> bytes:
    needs = f"{gpu} needs an AMD code object or an offload bundle that holds one"
    if blob[:4] == b"\x7fELF" and (machine := _machine(blob)) in (62, 183, EM_CUDA):
        what = {62: "a host object for x86-64", 183: "a host object for aarch64", EM_CUDA: "an NVIDIA cubin"}[machine]
        raise InvalidCodeObjectError(f"this is {what}; {needs} (hipcc --genco, hipquant build)")
    if ptx_target(blob):
        raise InvalidCodeObjectError(f"this is PTX for NVIDIA's {ptx_target(blob)}; {needs}")
    objects = unpack(blob)
    best, rejected = choose(objects, gpu)
    if best is None:
        raise InvalidCodeObjectError(no_object(gpu, "this code object", rejected))
    check_whole(objects[best])
    return objects[best]


def _nvidia_image(blob: bytes, gpu: GpuModel) -> bytes:
    target = ptx_target(blob)
    if target:
        text = blob.rstrip(b"\0")
        if (zero := text.find(b"\0")) >= 0:
            raise InvalidCodeObjectError(f"the PTX is damaged: there is a zero byte at {zero}")
        if reason := unfit(target, gpu):
            raise InvalidCodeObjectError(no_object(gpu, "this PTX", [Rejection(target, reason)]))
        return text + b"\0"
    if blob[:4] == b"\x7fELF" and _machine(blob) == EM_CUDA:
        check_whole(blob)
        return blob
    if blob[:4] == FATBIN_MAGIC and len(blob) >= 16:
        header, size = struct.unpack_from("<HQ", blob, 6)
        if header + size > len(blob):
            raise InvalidCodeObjectError(
                f"the fat binary is truncated: {header + size} bytes claimed, {len(blob)} there"
            )
        return blob
    what = "an ELF file, but not a cubin" if blob[:4] == b"\x7fELF" else f"the bytes begin with {blob[:8]!r}"
    raise InvalidCodeObjectError(f"not a code object for NVIDIA: {what}; {gpu} needs PTX, a cubin or a fat binary")


def no_object(gpu: GpuModel, where: str, rejected: Iterable[Rejection]) -> str:
    """The sentence for a GPU that finds no code object."""
    reasons, target = explain(rejected), choose((t.name for t in GPU_TARGETS), gpu)[0]
    holds = f"{where} holds none that it runs: {reasons}" if reasons else f"{where} holds none for a GPU"
    build = f"Build one: hipquant build --target {target}" if target else "hipquant cannot build one for it"
    return f"no code object for {gpu}; {holds}. {build}"


def ptx_target(blob: bytes) -> str:
    """The target that PTX names; empty if the bytes are not PTX."""
    found = _PTX.match(blob[:PTX_HEAD])
    return found[2].decode() if found else ""


def waits(image: bytes) -> bool:
    """Whether kernels of a code object can wait for the one in front by themselves: PTX for sm_90 and later."""
    sm = _SM.fullmatch(ptx_target(image))
    return sm is not None and int(sm[1]) >= 90


def _machine(elf: bytes) -> int:
    return int(struct.unpack_from("<H", elf, 18)[0]) if len(elf) >= 20 else 0


def check_whole(elf: bytes) -> None:
    """Raises `InvalidCodeObjectError` if segments or sections of a 64-bit little-endian ELF reach beyond its end."""
    if len(elf) < 64 or elf[4:6] != b"\x02\x01":
        raise InvalidCodeObjectError(f"the code object is damaged: its ELF header is wrong, or cut off at {len(elf)}")
    segments, sections = struct.unpack_from("<QQ", elf, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", elf, 54)
    tables = ((segments, segment_size, segment_count, 56, 8), (sections, section_size, section_count, 64, 24))
    for start, size, count, expected, at in tables:
        if count and (size != expected or start + size * count > len(elf)):
            raise InvalidCodeObjectError(
                f"the code object is truncated or damaged: its headers are not in {len(elf)} bytes"
            )
        for entry in range(start, start + size * count, size or 1):
            kind = struct.unpack_from("<I", elf, entry + (0 if expected == 56 else 4))[0]
            # A segment: offset, addresses, size in the file. A section: offset, size.
            offset, *_, nbytes = struct.unpack_from("<4Q" if expected == 56 else "<2Q", elf, entry + at)
            if offset + nbytes > len(elf) and not (expected == 64 and kind == SHT_NOBITS):
                raise InvalidCodeObjectError(
                    f"the code object is truncated: a part ends at byte {offset + nbytes} of {len(elf)}; rebuild it"
                )
