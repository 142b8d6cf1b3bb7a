"""`hipquant inspect`: what is in a code object."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import click

from .common import TargetsCommand, emit, emit_json, json_option, table

if TYPE_CHECKING:
    from ..toolchain.inspect import Facts, Inspection, KernelInfo

HEAD = (
    *("VGPRs", "SGPRs", "LDS", "scratch", "spills", "wave", "workgroup", "waves/SIMD"),
    *("dot4", "matrix", "widest load"),
)
UNKNOWN, ABSENT = "unknown", "-"


@click.command("inspect", cls=TargetsCommand)
@click.argument("file", required=False)
@click.option("--target", "targets", multiple=True, metavar="T", help="List the kernels of a target (repeatable).")
@click.option("--kernel", "pattern", metavar="PATTERN", help="Show the arguments of a kernel, e.g. 'mul_mat_q4_*'.")
@json_option
def command(file: str | None, targets: tuple[str, ...], pattern: str | None, as_json: bool) -> None:
    """Shows what is in FILE: kernels x targets, arguments, registers, memory, limits, instruction facts.

    FILE is an AMD code object, an offload bundle (also compressed), a host object with one inside, PTX, a cubin or a
    CPU code object of hipquant. Without FILE: what this installation embeds, the frameworks' kernels and the engine's.
    Registers are maxima over the kernels of a target; LDS and scratch are in bytes. Waves that a SIMD of an AMD GPU
    holds, as registers, LDS and whole blocks allow, are the least.
    """
    from ..toolchain.inspect import inspect_file, inspect_installed

    found = inspect_file(file, instructions=True) if file else inspect_installed()
    found.targets = chosen(found, targets)
    if pattern is not None:
        found.targets = {t: [k for k in ks if fnmatchcase(k.name, pattern)] for t, ks in found.targets.items()}
        if not any(found.targets.values()):
            raise click.ClickException(f"no kernel matches {pattern!r}; `hipquant inspect --target T` lists them")
    if as_json:
        emit_json(asdict(found))
        return
    emit(f"{found.name}: {found.kind}, {_count(found)}\n\n")
    if pattern is not None:
        _show_arguments(found)
    elif targets:
        for target, kernels in found.targets.items():
            emit(f"{target}\n\n{_kernel_table(target, kernels)}\n")
    else:
        emit(_target_table(found))
    for problem in found.problems:
        emit(f"\n{problem.target}: {problem.message}; {problem.fix}\n")


def chosen(found: Inspection, targets: Sequence[str]) -> dict[str, list[KernelInfo]]:
    """The targets that were asked for, `gfx90a` also standing for `gfx90a:xnack+`; all if none was."""
    for wanted in targets:
        if not any(wanted in (t, t.partition(":")[0]) for t in found.targets):
            raise click.ClickException(
                f"no target {wanted!r} in {found.name}; it holds {' '.join(found.targets) or 'none'}"
            )
    return {t: k for t, k in found.targets.items() if not targets or t in targets or t.partition(":")[0] in targets}


def _count(found: Inspection) -> str:
    names = {k.name for kernels in found.targets.values() for k in kernels}
    n = len(found.targets)
    return f"{len(names)} kernel{'s' * (len(names) != 1)} in {n} target{'s' * (n != 1)}"


def _target_table(found: Inspection) -> str:
    """A row a target: maxima (of waves, minima), and for facts the number of kernels that have it."""
    rows = [[target, str(len(kernels)), *_totals(target, kernels)] for target, kernels in found.targets.items()]
    head = ("target", "kernels", *HEAD)
    return table(head, rows)


def _totals(target: str, kernels: Sequence[KernelInfo]) -> list[str]:
    facts = [k.facts for k in kernels if k.facts is not None]
    return [
        _greatest(k.vgprs for k in kernels),
        _greatest(k.sgprs for k in kernels),
        _greatest(k.lds for k in kernels),
        _greatest(k.scratch for k in kernels),
        _greatest(_spills(k) for k in kernels),
        "/".join(sorted({str(k.wave) for k in kernels if k.wave})) or ABSENT,
        _greatest(k.max_workgroup for k in kernels),
        min((_waves(target, k) for k in kernels), key=_number, default=ABSENT),
        _having(facts, lambda f: f.dot4),
        _having(facts, lambda f: f.matrix),
        _greatest((f.widest_load for f in facts), UNKNOWN),
    ]


def _waves(target: str, kernel: KernelInfo) -> str:
    from ..toolchain.occupancy import occupancy

    waves = occupancy(target, kernel) if target.startswith("gfx") else None
    return ABSENT if waves is None else f"{waves:g}"


def _number(text: str) -> float:
    return math.inf if text == ABSENT else float(text)


def _kernel_table(target: str, kernels: Sequence[KernelInfo]) -> str:
    rows = []
    for k in kernels:
        numbers = [k.vgprs, k.sgprs, k.lds, k.scratch, _spills(k), k.wave, k.max_workgroup]
        f = k.facts
        counts = [f.dot4, f.matrix, f.widest_load] if f else None
        rows.append(
            [
                k.name,
                ABSENT if k.args is None else str(len(k.args)),
                *(ABSENT if n is None else str(n) for n in numbers),
                _waves(target, k),
            ]
            + ([str(n) for n in counts] if counts else [UNKNOWN] * 3)
        )
    return table(("kernel", "args", *HEAD), rows)


def _show_arguments(found: Inspection) -> None:
    """The arguments of each kernel, once for all targets that have the same, and its resources in each target."""
    by_name: dict[str, list[tuple[str, KernelInfo]]] = {}
    for target, kernels in found.targets.items():
        for k in kernels:
            by_name.setdefault(k.name, []).append((target, k))
    for name, places in by_name.items():
        for _, same in itertools.groupby(sorted(places, key=_shape), key=_shape):
            group = list(same)
            emit(f"{name} in {' '.join(target for target, _ in group)}\n\n")
            args = group[0][1].args
            if args is None:
                emit("the format tells no arguments\n\n")
                continue
            rows = [[a.name or ABSENT, a.kind or UNKNOWN, str(a.offset), str(a.size)] for a in args]
            emit(table(("argument", "kind", "offset", "size"), rows, words=2) + "\n")
        rows = [[target, *_totals(target, [k])] for target, k in places]
        emit(table(("target", *HEAD), rows) + "\n")


def _shape(place: tuple[str, KernelInfo]) -> str:
    args = place[1].args
    return "" if args is None else repr([(a.kind, a.offset, a.size) for a in args])


def _spills(k: KernelInfo) -> int | None:
    return None if k.vgpr_spills is None else k.vgpr_spills + (k.sgpr_spills or 0)


def _greatest(numbers: Iterable[int | None], otherwise: str = ABSENT) -> str:
    return str(max((n for n in numbers if n is not None), default=otherwise))


def _having(facts: Sequence[Facts], count: Callable[[Facts], int]) -> str:
    return f"{sum(count(f) > 0 for f in facts)}" if facts else UNKNOWN
