"""What every benchmark needs: who was measured, the read ceiling, medians, and the file that keeps the result."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hipquant as hq
from hipquant import wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.driver import Device

RESULTS = Path(__file__).parent / "results"


def commit() -> str:
    """The commit measured, marked where the tree differs from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or "unknown"


def header(device: Device) -> dict[str, Any]:
    """Prints and returns the circumstances of a measurement."""
    found = {
        "command": " ".join(
            [
                "python",
                f"benchmarks/{Path(sys.argv[0]).name}",
                *(Path(a).name if Path(a).is_file() else a for a in sys.argv[1:]),
            ]
        ),
        "device": device.name,
        "target": device.target.name,
        "threads": device.threads,
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


def read_ceiling(device: Device, nbytes: int = 1 << 30, repeats: int = 7) -> float:
    """GB/s at which all threads together read memory, best of several passes over more than the caches hold."""
    source = device.allocate(nbytes, "the read ceiling")
    source.bytes[:] = 1
    kernel = wiring.kernel("read_bytes")
    grid = kernel.grid(nbytes=nbytes)
    sums = np.zeros(grid[0], np.int32)
    function = device.get_or_load_func(kernel.name, QUANTIZED)

    def run() -> None:
        function.launch(grid, kernel.block, 0, device.stream, [source, sums, nbytes])

    run()
    assert (sums == (0x01010101 << 18) % (1 << 32)).all(), "the read kernel is wrong"
    return nbytes / min(seconds(run) for _ in range(repeats)) / 1e9


def summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def keep(name: str, result: dict[str, Any]) -> None:
    """Writes a result beside the others."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"kept in benchmarks/results/{path.name}")
