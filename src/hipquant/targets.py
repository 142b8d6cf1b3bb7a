"""What code objects are built for: the compiler's words for each target, and what a processor must have to run it."""

from __future__ import annotations

import difflib
import platform
from collections.abc import Iterable
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


@dataclass(frozen=True)
class GpuTarget:
    """Two GPU code objects, the frameworks' kernels and the engine's: AMD ELFs in code object version 5 (generic
    targets: 6), or PTX for NVIDIA.

    `twin` is the target whose machine code is the same: it is compiled for that one and retargeted.
    """

    name: str
    vendor: str  # "amd" | "nvidia"
    wave: int  # lanes
    dot4: bool  # has an int8 dot instruction
    code_object: int = 0
    twin: str = ""
    ptx: str = ""  # the oldest PTX version that has the instructions, so that old drivers take it

    @property
    def filename(self) -> str:
        return self.name + self._suffix

    @property
    def engine_filename(self) -> str:
        return f"{self.name}.engine{self._suffix}"

    @property
    def _suffix(self) -> str:
        return ".hsaco" if self.vendor == "amd" else ".ptx"


_NO_DOT4 = ("gfx900", "gfx90c", "gfx1010", "gfx9-generic", "gfx10-1-generic")
_TWINS = {
    "gfx90c": "gfx900",
    "gfx9-generic": "gfx900",
    "gfx9-4-generic": "gfx942",
    "gfx10-1-generic": "gfx1010",
    "gfx1012": "gfx1011",
    **dict.fromkeys("gfx1031 gfx1032 gfx1033 gfx1034 gfx1035 gfx1036 gfx10-3-generic".split(), "gfx1030"),
    "gfx11-generic": "gfx1102",
    "gfx1152": "gfx1150",
    "gfx1153": "gfx1150",
    "gfx1201": "gfx1200",
    "gfx12-generic": "gfx1200",
}


def _amd(names: str, code_object: int) -> tuple[GpuTarget, ...]:
    return tuple(
        GpuTarget(n, "amd", 64 if n.startswith("gfx9") else 32, n not in _NO_DOT4, code_object, _TWINS.get(n, ""))
        for n in names.split()
    )


AMD_TARGETS: tuple[GpuTarget, ...] = (
    *_amd("gfx900 gfx906 gfx908 gfx90a gfx90c gfx942 gfx950", 5),
    *_amd("gfx1010 gfx1011 gfx1012 gfx1030 gfx1031 gfx1032 gfx1033 gfx1034 gfx1035 gfx1036", 5),
    *_amd("gfx1100 gfx1101 gfx1102 gfx1103 gfx1150 gfx1151 gfx1152 gfx1153 gfx1200 gfx1201", 5),
    *_amd("gfx9-generic gfx9-4-generic gfx10-1-generic gfx10-3-generic gfx11-generic gfx12-generic", 6),
)
NVIDIA_TARGETS: tuple[GpuTarget, ...] = tuple(
    GpuTarget(name, "nvidia", 32, True, ptx=ptx) for name, ptx in (("sm_75", "65"), ("sm_80", "70"), ("sm_90a", "80"))
)
GPU_TARGETS: tuple[GpuTarget, ...] = AMD_TARGETS + NVIDIA_TARGETS


def gpu_target(name: str) -> GpuTarget:
    """The target of a name; `ValueError` with the nearest names otherwise."""
    for target in GPU_TARGETS:
        if target.name == name:
            return target
    raise ValueError(_unknown(name, [t.name for t in GPU_TARGETS]))


def select(words: Iterable[str]) -> tuple[CpuTarget | GpuTarget, ...]:
    """What words name: targets, `amd`, `nvidia`, `cpu` (this machine's), a machine (`x86_64`), `all`; without repeats.

    Raises `ValueError` with the nearest words for one that names nothing.
    """
    groups: dict[str, tuple[CpuTarget | GpuTarget, ...]] = {
        "all": (*GPU_TARGETS, *CPU_TARGETS),
        "amd": AMD_TARGETS,
        "nvidia": NVIDIA_TARGETS,
        "cpu": cpu_targets(host_machine()),
        **{machine: cpu_targets(machine) for machine in RUNTIMES},
        **{t.name: (t,) for t in GPU_TARGETS + CPU_TARGETS},
    }
    chosen: dict[str, CpuTarget | GpuTarget] = {}
    for word in words:
        if word not in groups:
            raise ValueError(_unknown(word, groups))
        if not groups[word]:
            raise ValueError(f"there is no CPU target for {host_machine()}; there are {', '.join(RUNTIMES)}")
        chosen |= {t.name: t for t in groups[word]}
    return tuple(chosen.values())


def _unknown(name: str, known: Iterable[str]) -> str:
    names = list(known)
    nearest = [n for n in names if n.startswith(name)][:4] or difflib.get_close_matches(name, names, n=4, cutoff=0.5)
    return f"unknown target {name!r}; " + (f"nearest: {', '.join(nearest)}" if nearest else f"known: {' '.join(names)}")
