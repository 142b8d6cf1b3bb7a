"""What code objects are built for: the compiler's words for each target, and what a processor must have to run it."""

from __future__ import annotations

import platform
from dataclasses import dataclass


@dataclass(frozen=True)
class CpuTarget:
    """A CPU code object: `features` in the words of /proc/cpuinfo, best target first in `CPU_TARGETS`."""

    name: str
    machine: str  # platform.machine() of the processors that may run it
    triple: str
    flags: tuple[str, ...]
    features: tuple[str, ...]

    @property
    def filename(self) -> str:
        return f"cpu-{self.name}.so"


_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = ("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

CPU_TARGETS: tuple[CpuTarget, ...] = (
    CpuTarget(
        "x86-64-v4-vnni",
        "x86_64",
        "x86_64-linux-gnu",
        ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
        (*_V3, *_V4, "avx512_vnni"),
    ),
    CpuTarget("x86-64-v3", "x86_64", "x86_64-linux-gnu", ("-march=x86-64-v3",), _V3),
    CpuTarget(
        "aarch64-dotprod",
        "aarch64",
        "aarch64-linux-gnu",
        ("-march=armv8.2-a+dotprod+fp16",),
        ("asimd", "asimddp", "asimdhp", "fphp"),
    ),
)

# The pool of threads (kernels/cpu/runtime.cpp) runs on any processor of its machine.
RUNTIMES: dict[str, str] = {"x86_64": "x86_64-linux-gnu", "aarch64": "aarch64-linux-gnu"}


def runtime_filename(machine: str) -> str:
    return f"runtime-{machine}.so"


def host_machine() -> str:
    """platform.machine() in Linux's words."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine())


def cpu_targets(machine: str | None = None) -> tuple[CpuTarget, ...]:
    """The targets of a machine, or all."""
    return tuple(t for t in CPU_TARGETS if machine in (None, t.machine))
