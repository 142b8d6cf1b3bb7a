"""What every benchmark needs: who was measured, the read ceiling, medians, and the file that keeps the result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads spin for a while after a product, on the cores to be measured

import numpy as np

import hipquant as hq
from hipquant.ceiling import read_ceiling
from hipquant.driver import Buffer, Device, gpu

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit measured, marked where the tree differs from it; HIPQUANT_COMMIT tells it to a copy without git."""
    if known := os.environ.get("HIPQUANT_COMMIT"):
        return known
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def _runs_on(device: Device) -> dict[str, Any]:
    if isinstance(device, gpu.Device):
        return {"driver": ".".join(map(str, device.driver_version))}
    return {"threads": device.threads}


def header(device: Device) -> dict[str, Any]:
    """Prints and returns the circumstances of a measurement."""
    found = {
        "command": " ".join(
            [
                "python",
                f"benchmarks/{Path(sys.argv[0]).name}",
                *(Path(a).name if Path(a).exists() else a for a in sys.argv[1:]),
            ]
        ),
        "device": device.name,
        "target": device.target.name,
        **_runs_on(device),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
        "hipquant": hq.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    for key, value in found.items():
        print(f"{key:>9}: {value}")
    return found


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def ceiling(device: Device, *sources: Buffer) -> float:
    """Prints and returns the read ceiling in GB/s, the best of the memory given."""
    found = max(read_ceiling(device, source) for source in sources or (None,)) / 1e9
    by = f" by {device.threads} threads" if device.kind == "cpu" else ""
    print(f"  ceiling: {found:.1f} GB/s read{by}\n")
    return found


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def keep(name: str, result: dict[str, Any]) -> None:
    """Writes a result beside the others."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in benchmarks/results/{path.name}")
