"""Holds a code object against the wiring table: names, argument lists, limits, and what makes kernels slow.

`check` reads only what the file says about itself. What takes a launch to see is in `launch_check`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ..targets import gpu_target
from ..wiring import COMPATIBILITY, GPU_ENGINE, PROFILES, TABLE, Kernel, Kind, profile
from .inspect import EMBEDDED, HOST, INSTALLED
from .kernel_info import Inspection, KernelInfo

Severity = Literal["error", "warning"]
SIZES = {Kind.POINTER: 8, Kind.INT32: 4, Kind.INT64: 8, Kind.SIZE: 8, Kind.FLOAT32: 4}  # bytes
DOT4_FAMILIES = ("mul_mat_vec", "mul_mat")  # products with q8_1 activations
BUILD_FOR_ALL = "build it for every target: an #if may leave it out for this one"
ENGINE_NAMES = frozenset(k.name for k in GPU_ENGINE)
NEAREST_FOR = 20  # missing names of a target for which the nearest is looked up
_MANGLED = re.compile(r"_Z(\d{1,4})(\w+)")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong (error) or slow (warning), found by reading or by running, and what to do about it."""

    severity: Severity
    stage: Literal["static", "run"]
    target: str
    kernel: str
    message: str
    fix: str


def required_names(which: str = "hip") -> list[str]:
    """The names that every code object for frameworks must have under a name profile."""
    compatible = {k.name for k in COMPATIBILITY}
    return [k.name for original, k in zip(TABLE, profile(which), strict=True) if original.name in compatible]


def check(inspection: Inspection, profile: str = "hip", targets: Sequence[str] | None = None) -> list[Finding]:
    """What is wrong with a code object under a name profile; `targets` must be in it (default: those that are).

    The names of `COMPATIBILITY` are required; of a code object of the GPU engine, those of `GPU_ENGINE` in their place;
    of an installation's GPU targets, both. Other rows of the table are checked where they are found.
    """
    return list(_check(inspection, profile, targets))


def _check(inspection: Inspection, which: str, targets: Sequence[str] | None) -> Iterator[Finding]:
    rows = {k.name: k for k in profile(which)}
    if inspection.kind in (HOST, EMBEDDED):
        yield _host_object(inspection)
    if inspection.kind == HOST:
        return
    for problem in inspection.problems:
        yield Finding("error", "static", problem.target, "", problem.message, problem.fix)
    chosen = {t: ks for t, ks in inspection.targets.items() if not targets or _is_one_of(t, targets)}
    for wanted in targets or ():
        if not any(_is_one_of(t, [wanted]) for t in chosen):
            held = " ".join(inspection.targets) or "none"
            fix = f"hipquant build --target {wanted}"
            yield Finding("error", "static", wanted, "", f"the target is not in the file; it holds {held}", fix)
    fitting = _fitting_profile(chosen)
    if fitting and fitting != which:
        message = f"the names are those of the name profile {fitting}, not of {which}"
        yield Finding("error", "static", "", "", message, f"verify it with --profile {fitting}, or rename the kernels")
        return
    yield from _names(chosen, _required(inspection, which), rows, inspection.kind == INSTALLED)
    for target, kernels in chosen.items():
        for kernel in kernels:
            row = rows.get(kernel.name)
            if row is not None:
                yield from _kernel(target, row, kernel)


def is_engine(inspection: Inspection) -> bool:
    """Whether a file is a code object of the GPU engine: it has names of its, and none that frameworks load."""
    names = {k.name for kernels in inspection.targets.values() for k in kernels}
    frameworks = {name for p in PROFILES for name in required_names(p)}
    return inspection.kind != INSTALLED and bool(names & ENGINE_NAMES) and not names & frameworks


def _required(inspection: Inspection, which: str) -> list[str]:
    return [k.name for k in GPU_ENGINE] if is_engine(inspection) else required_names(which)


def summary(inspection: Inspection, profile: str = "hip", targets: Sequence[str] | None = None) -> str:
    """`123 of 123 names in 33 targets`."""
    names = set(_required(inspection, profile))
    counts = [
        len(names & {k.name for k in kernels})
        for target, kernels in inspection.targets.items()
        if inspection.kind != HOST and (not targets or _is_one_of(target, targets))
    ]
    low, high = min(counts, default=0), max(counts, default=0)
    between = str(low) if low == high else f"{low} to {high}"
    return f"{between} of {len(names)} names in {len(counts)} target{'s' * (len(counts) != 1)}"


def _is_one_of(target: str, wanted: Iterable[str]) -> bool:
    return bool({target, target.partition(":")[0]} & set(wanted))


def _host_object(inspection: Inspection) -> Finding:
    holds = " ".join(inspection.targets)
    inside = f", with a bundle for {holds} inside" if inspection.kind == EMBEDDED else ""
    cut = "; or cut the bundle out: llvm-objcopy -O binary --only-section=.hip_fatbin FILE OUT" if inside else ""
    return Finding(
        "error",
        "static",
        "" if inside else holds,
        "",
        f"this is an x86 or ARM host object{inside}, which is not loaded as a code object",
        f"compile with --genco (hipcc), --offload-device-only (clang) or -ptx (nvcc) instead of -c{cut}",
    )


def _fitting_profile(targets: dict[str, list[KernelInfo]]) -> str:
    """The profile that has most of the names that only one profile has; empty where there are none."""
    names = {k.name for kernels in targets.values() for k in kernels}
    shared = set.intersection(*(set(required_names(p)) for p in PROFILES))
    counts = {p: len(names & set(required_names(p)) - shared) for p in PROFILES}
    best = max(counts, key=counts.__getitem__)
    return best if counts[best] else ""


def _names(
    targets: dict[str, list[KernelInfo]], required: Sequence[str], rows: Collection[str], installed: bool
) -> Iterator[Finding]:
    """Names that are missing or twice there; a name of one target must be in all others of its kind of processor.

    `installed`: GPU targets must have the engine's names too; one that has none lacks the file, which is one finding.
    """
    counts = {target: Counter(k.name for k in kernels) for target, kernels in targets.items()}
    for group in ([t for t in counts if not _is_cpu(t)], [t for t in counts if _is_cpu(t)]):
        anywhere = set().union(*(counts[t] for t in group))
        further = sorted(anywhere & set(rows) - set(required))
        for target in group:
            wanted = [*required, *further]
            if installed and not _is_cpu(target):
                wanted = [*required, *(n for n in further if n not in ENGINE_NAMES)]
                if counts[target].keys() & ENGINE_NAMES:
                    wanted += sorted(ENGINE_NAMES)
                else:
                    message = "has no code object of the engine: no model runs on it"
                    yield Finding("error", "static", target, "", message, f"hipquant build --target {target}")
            yield from _missing(target, wanted, {t: counts[t] for t in group})
            others = sorted(anywhere - set(rows) - set(counts[target]))
            if others:
                message = f"{len(others)} kernels of other targets are missing: {_some(others)}"
                yield Finding("error", "static", target, "", message, BUILD_FOR_ALL)
            if twice := sorted(n for n, times in counts[target].items() if times > 1):
                message = f"{len(twice)} kernels are there more than once: {_some(twice)}"
                yield Finding("error", "static", target, "", message, "keep one definition: a loader takes either")


def _is_cpu(target: str) -> bool:
    return target.startswith(("x86", "aarch64"))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _missing(target: str, wanted: Sequence[str], group: Mapping[str, Collection[str]]) -> Iterator[Finding]:
    """The names that a target lacks: declared as C++, mistyped, or left out for this target alone."""
    here = group[target]
    mangled = {name: n for n in here if (match := _MANGLED.match(n)) and (name := match[2][: int(match[1])])}
    missing = [name for name in wanted if name not in here]
    few = len(missing) <= NEAREST_FOR
    for name in missing:
        if name in mangled:
            message, fix = f"is there as {mangled[name]}", 'declare it extern "C"'
        elif elsewhere := next((t for t, names in group.items() if name in names), ""):
            message, fix = f"is missing, though {elsewhere} has it", BUILD_FOR_ALL
        else:
            message, fix = "is missing", "add it to the source, and build it for every target"
            close = difflib.get_close_matches(name, set(here) - set(wanted), 1, 0.8) if few else []
            message += f"; nearest: {close[0]}" if close else ""
        yield Finding("error", "static", target, name, message, fix)


def _kernel(target: str, row: Kernel, found: KernelInfo) -> Iterator[Finding]:
    def finding(severity: Severity, message: str, fix: str) -> Finding:
        return Finding(severity, "static", target, found.name, message, fix)

    if not found.loadable:
        yield finding("error", "is described but not exported", "remove static and -fvisibility=hidden")
    if found.args is not None and (wrong := _arguments(row, found)):
        yield finding("error", wrong, f"declare it as {row.signature}")
    threads = math.prod(row.block)
    if found.max_workgroup is not None and found.max_workgroup < threads:
        message = f"takes blocks of at most {found.max_workgroup} threads, is launched with {threads}"
        yield finding("error", message, f"amdgpu_flat_work_group_size(1, {threads}) or __launch_bounds__({threads})")
    if found.wave is not None and (expected := _wave(target)) and found.wave != expected:
        message = f"was compiled for waves of {found.wave} lanes, expected {expected}"
        yield finding("error", message, f"compile without -mwavefrontsize{found.wave}")
    if found.scratch:
        message = f"uses {found.scratch} bytes of scratch memory a lane: it is slow"
        yield finding("warning", message, "keep arrays in registers: constant indices, fewer rows or columns at a time")
    if spills := (found.vgpr_spills or 0) + (found.sgpr_spills or 0):
        fix = "tell the launch bounds, or keep fewer values alive"
        yield finding("warning", f"spills {spills} registers: it is slow", fix)
    if row.family in DOT4_FAMILIES and found.facts and not (found.facts.dot4 or found.facts.matrix) and _dot4(target):
        fix = "use __builtin_amdgcn_sdot4 (gfx9, gfx10), __builtin_amdgcn_sudot4 (gfx11 on) or __dp4a (NVIDIA)"
        yield finding("warning", "has no int8 dot product, though the target does: it is slow", fix)


def _arguments(row: Kernel, found: KernelInfo) -> str:
    """How the arguments differ from those that the kernel is launched with; empty if they do not."""
    args = found.args or []
    if len(args) != len(row.args):
        return f"takes {len(args)} arguments, is launched with {len(row.args)}"
    offset = 0
    for i, (there, wanted) in enumerate(zip(args, row.args, strict=True), 1):
        size = SIZES[wanted.kind]
        offset = -(-offset // size) * size
        kind = "pointer" if wanted.kind is Kind.POINTER else "value"
        if (there.offset, there.size) != (offset, size) or there.kind not in ("", kind):
            return (
                f"argument {i} is a {there.kind or 'value'} of {there.size} bytes at byte {there.offset}, "
                f"is launched with {wanted.ctype} {wanted.name}: a {kind} of {size} bytes at byte {offset}"
            )
        offset += size
    return ""


def _wave(target: str) -> int:
    """Lanes of a wave of a GPU's target; 0 where it is not known."""
    name = target.partition(":")[0]
    try:
        return gpu_target(name).wave
    except ValueError:
        if name.startswith("sm_"):
            return 32
        return (32 if name.startswith(("gfx10", "gfx11", "gfx12")) else 64) if name.startswith("gfx") else 0


def _dot4(target: str) -> bool:
    """Whether a target is known to have an int8 dot product."""
    name = target.partition(":")[0]
    try:
        return gpu_target(name).dot4
    except ValueError:
        number = name.removeprefix("sm_").rstrip("af")
        return number != name and number.isdecimal() and int(number) >= 61


__all__ = ["Finding", "check", "required_names", "summary"]
