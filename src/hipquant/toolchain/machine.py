"""Which code objects this machine needs, found out without a driver's library."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..targets import GPU_TARGETS, NVIDIA_TARGETS, CpuTarget, GpuTarget, select

KFD = Path("/sys/class/kfd/kfd/topology/nodes")
NVIDIA = Path("/proc/driver/nvidia/gpus")
_GENERIC = {"gfx9.4": "gfx9-4-generic", "gfx9": "gfx9-generic", "gfx10.1": "gfx10-1-generic",
            "gfx10.3": "gfx10-3-generic", "gfx11": "gfx11-generic", "gfx12": "gfx12-generic"}  # fmt: skip
_BY_NAME = {t.name: t for t in GPU_TARGETS}


def wanted() -> tuple[CpuTarget | GpuTarget, ...]:
    """What an installation from source compiles: what HIPQUANT_TARGETS names, otherwise what this machine needs.

    Raises `ValueError` for a word that names no target.
    """
    words = os.environ.get("HIPQUANT_TARGETS", "").replace(",", " ").split()
    try:
        return select(words) if words else (*select(["cpu"]), *gpu_targets())
    except ValueError as error:
        raise ValueError(f"HIPQUANT_TARGETS: {error}" if words else str(error)) from None


def gpu_targets() -> tuple[GpuTarget, ...]:
    """The targets of the GPUs that the kernel of this machine knows."""
    return tuple({t.name: t for t in (*_amd(), *_nvidia())}.values())


def _amd() -> Iterator[GpuTarget]:
    """The exact target of each GPU, or the generic one of its family."""
    for properties in sorted(KFD.glob("*/properties")):
        try:
            match = re.search(r"^gfx_target_version (\d+)$", properties.read_text(), re.MULTILINE)
        except OSError:
            continue
        version = int(match[1]) if match else 0  # major * 10000 + minor * 100 + stepping; 0 is a CPU
        major, minor, stepping = version // 10000, version // 100 % 100, version % 100
        for name in (
            f"gfx{major}{minor:x}{stepping:x}",
            _GENERIC.get(f"gfx{major}.{minor}", ""),
            _GENERIC.get(f"gfx{major}", ""),
        ):
            if version and name in _BY_NAME:
                yield _BY_NAME[name]
                break


def _nvidia() -> Iterator[GpuTarget]:
    """The best PTX for each compute capability; all PTX where there are GPUs that cannot be asked."""
    command = shutil.which("nvidia-smi")
    said = ""
    if command:
        query = [command, "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            said = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
        except (OSError, subprocess.TimeoutExpired):
            said = ""
    found = [int(major) * 10 + int(minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", said, re.MULTILINE)]
    for capability in found:
        if capability == 90:
            yield _BY_NAME["sm_90a"]
        elif capability >= 75:
            yield _BY_NAME["sm_80" if capability >= 80 else "sm_75"]
    if not found and NVIDIA.is_dir() and any(NVIDIA.iterdir()):
        yield from NVIDIA_TARGETS
