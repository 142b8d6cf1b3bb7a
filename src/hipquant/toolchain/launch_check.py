"""`hipquant verify --run`: launches every kernel on small cases and compares with the oracle.

On a GPU where there is one, on the CPU for its own code objects, otherwise simulated, which needs the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..codeobjects import CodeObjects
from ..errors import DeviceNotFoundError, DriverError, HipquantError, InvalidCodeObjectError
from ..wiring import COMPATIBILITY, Kernel
from ..wiring import profile as rows_of
from .cases import Backend, cases, on_device
from .elf import Elf
from .verify import Finding

RUN_FIX = "compare with the kernel of the same name in hipquant's kernels/gpu/; the case names the shape that fails"


@dataclass(frozen=True)
class Runner:
    """Where kernels run: a name for it, and what launches a case there."""

    name: str
    backend: Backend


def kernels_to_run(present: Iterable[str], profile: str = "hip") -> list[Kernel]:
    """The rows of the table under a name profile that there are cases for and that a code object has."""
    names, families = set(present), {k.family for k in COMPATIBILITY} | {"get_rows"}
    return [k for k in rows_of(profile) if k.family in families and k.name in names]


def gpu_runner(vendor: str, code_object: bytes | CodeObjects) -> Runner | None:
    """The GPU of a vendor (`hip`, `cuda`), or None where there is none."""
    from ..driver import device

    try:
        found = device(vendor)
    except DeviceNotFoundError:
        return None
    return Runner(f"{found.name} ({vendor})", on_device(found, code_object))


def cpu_runner(code_object: bytes | CodeObjects) -> Runner:
    """This processor."""
    from ..driver import device

    found = device("cpu")
    return Runner(f"{found.name} (cpu)", on_device(found, code_object))


def simulators(source: Path | None = None) -> list[Runner]:
    """A source compiled for the host, on waves of 32 and of 64; default: the package's own."""
    from . import simulate

    return [Runner(f"simulated, waves of {wave}", simulate.build(wave, sources=source)) for wave in (32, 64)]


def simulated_names(runner: Runner) -> list[str]:
    """The functions that a simulator has."""
    from .simulate import Simulator

    assert isinstance(runner.backend, Simulator)
    return [s.name for s in Elf(runner.backend.program.read_bytes()).symbols() if s.is_function]


def run(
    kernels: Sequence[Kernel],
    runner: Runner,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Finding]:
    """Runs the cases of each kernel; a kernel's first complaint is its finding, its later cases are not run.

    A code object that is not loaded, or a launch that the driver refuses, ends everything: after it a GPU's context is
    often unusable.
    """
    for i, kernel in enumerate(kernels):
        complaint, broken = _first_complaint(kernel, runner)
        if complaint:
            yield Finding("error", "run", runner.name, kernel.name, complaint, RUN_FIX)
        if broken and (rest := len(kernels) - i - 1):
            message = f"{rest} more kernels were not run, as the driver gave up on {kernel.name}"
            yield Finding("error", "run", runner.name, "", message, "repair that one first")
            return
        if progress:
            progress(i + 1, len(kernels))


def _first_complaint(kernel: Kernel, runner: Runner) -> tuple[str, bool]:
    """What is wrong with a kernel, empty if nothing is; and whether the driver failed."""
    for case in cases(kernel):
        try:
            runner.backend(case)
        except (HipquantError, TypeError, ValueError) as error:
            return f"{case.description}: {error}", isinstance(error, (DriverError, InvalidCodeObjectError))
        if complaints := case.check():
            return f"{case.description}: {'; '.join(complaints)}", False
    return "", False
