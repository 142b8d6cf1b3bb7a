"""`hipquant verify`: holds a code object against the wiring table, and runs it against the oracle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..wiring import PROFILES, Kernel
from .common import Bar, TargetsCommand, emit, emit_json, interruptible, json_option, note, table

if TYPE_CHECKING:
    from ..toolchain.inspect import Inspection
    from ..toolchain.launch_check import Runner
    from ..toolchain.verify import Finding

NAMED = 3  # kernels or targets that one row of the table names
SOURCES = (".hip", ".cu", ".cpp")


@click.command("verify", cls=TargetsCommand)
@click.argument("file", required=False)
@click.option("--profile", type=click.Choice(PROFILES), default="hip", show_default=True, help="The kernels' names.")
@click.option("--target", "targets", multiple=True, metavar="T", help="Verify only this target (repeatable).")
@click.option("--run", "launch", is_flag=True, help="Also launch every kernel and compare with the oracle.")
@json_option
def command(file: str | None, profile: str, targets: tuple[str, ...], launch: bool, as_json: bool) -> int:
    """Holds FILE, or what this installation embeds, against the wiring table.

    Names in every target (the 123 that frameworks load, or the engine's), argument lists, workgroup limits, wave size,
    scratch, spills, int8 dot products, and whether it is a code object at all. --run launches each kernel but the
    engine's on the GPU at hand, or on the CPU for a CPU object; our own kernels, and a source file, are simulated where
    there is no GPU. Exit code 1 if there is an error.
    """
    from ..toolchain.compile import CompileError

    try:
        result, findings = _verify(file, profile, targets, launch)
    except CompileError as error:
        raise click.ClickException(str(error)) from None
    errors = sum(f.severity == "error" for f in findings)
    if as_json:
        emit_json({"file": file, "profile": profile, "summary": result, "findings": [asdict(f) for f in findings]})
    else:
        emit(render(findings) + f"{result}; {_plural(errors, 'error')}, {_plural(len(findings) - errors, 'warning')}\n")
    return 1 if errors else 0


def _verify(file: str | None, profile: str, targets: Sequence[str], launch: bool) -> tuple[str, list[Finding]]:
    """What is right, in words, and what is wrong."""
    from ..toolchain.inspect import inspect_file, inspect_installed
    from ..toolchain.verify import check, summary

    if file is not None and Path(file).suffix in SOURCES:
        if not launch:
            raise click.ClickException(f"{file} is a source: `hipquant build` it first, or simulate it with --run")
        return "simulated from source", list(_run_source(Path(file), profile))
    found = inspect_file(file, instructions=True) if file else inspect_installed()
    findings = check(found, profile, targets or None)
    if launch:
        findings += _run(found, Path(file) if file else None, profile)
    return summary(found, profile, targets or None), findings


def render(findings: Sequence[Finding]) -> str:
    """The findings as a table, the same one for several kernels or targets in one row, and below it what to do."""
    if not findings:
        return ""
    groups: dict[tuple[str, ...], list[Finding]] = {}
    for f in findings:
        groups.setdefault((f.severity, f.stage, f.message, f.fix), []).append(f)
    rows, fixes = [], dict[str, list[str]]()
    for n, ((severity, stage, message, fix), same) in enumerate(groups.items(), 1):
        kernels, targets = (_several(f.kernel for f in same), _several(f.target for f in same))
        rows.append((str(n), severity, stage, kernels, targets, message))
        fixes.setdefault(fix, []).append(str(n))
    listed = "".join(f"{', '.join(numbers)}: {fix}\n" for fix, numbers in fixes.items())
    return table(("#", "", "stage", "kernel", "target", "finding"), rows, words=6) + f"\nWhat to do:\n{listed}\n"


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _several(values: Iterable[str]) -> str:
    names = list(dict.fromkeys(v for v in values if v))
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _run(found: Inspection, path: Path | None, profile: str) -> Iterator[Finding]:
    """Launches what is in the file on every device that it is for, or simulates our own."""
    from ..codeobjects import QUANTIZED
    from ..toolchain import launch_check
    from ..toolchain.inspect import CPU, CUBIN, EMBEDDED, HOST, INSTALLED, PTX, read_code_object
    from ..toolchain.verify import ENGINE_NAMES, Finding, is_engine

    if found.kind in (HOST, EMBEDDED):
        return
    present = [k.name for kernels in found.targets.values() for k in kernels]
    if engine := set(present) & ENGINE_NAMES:
        note(f"{len(engine)} kernels of the engine are read only, as there are no cases to run them on")
    if is_engine(found):
        return
    code_object = read_code_object(path) if path else QUANTIZED
    vendors: list[str] = {CPU: [], PTX: ["cuda"], CUBIN: ["cuda"], INSTALLED: ["hip", "cuda"]}.get(found.kind, ["hip"])
    runners = [r for v in vendors if (r := launch_check.gpu_runner(v, code_object))]
    if not runners and found.kind == INSTALLED:
        note("there is no GPU here: the kernels are simulated from their source")
        runners += launch_check.simulators()
    if found.kind in (CPU, INSTALLED):
        runners.append(launch_check.cpu_runner(code_object))
    if not runners:
        message = (
            f"could not be run: there is no GPU for {' '.join(found.targets)} here, and simulating takes the source"
        )
        fix = "run it where there is one, or give the source: hipquant verify my_kernels.hip --run"
        yield Finding("error", "run", "", "", message, fix)
    for runner in runners:
        yield from _launch(runner, launch_check.kernels_to_run(present, profile))


def _run_source(path: Path, profile: str) -> Iterator[Finding]:
    """Simulates the kernels of the table that a source defines."""
    from ..toolchain import launch_check

    for runner in launch_check.simulators(path):
        kernels = launch_check.kernels_to_run(launch_check.simulated_names(runner), profile)
        if not kernels:
            raise click.ClickException(f"{path} defines no kernel of the wiring table under the name profile {profile}")
        yield from _launch(runner, kernels)


def _launch(runner: Runner, kernels: Sequence[Kernel]) -> Iterator[Finding]:
    from ..toolchain.launch_check import run

    note(f"running {len(kernels)} kernels: {runner.name}", dim=True)
    with interruptible(), Bar("running") as bar:
        yield from run(kernels, runner, bar)
