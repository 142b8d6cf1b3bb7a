"""Time and error of quantizing a model, alternating with llama.cpp's llama-quantize where LLAMA_QUANTIZE names it.

    python benchmarks/quantize.py MODEL-F16.gguf [--types Q4_0 Q4_K_M ...] [-r 3] [--keep NAME]

Both are run as commands on the same number of threads, one after the other in each round. Times are of the clock and of
the processor, the latter for when the machine does something else as well. Errors are root mean squares over the first
2^20 weights of every matrix that is quantized.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import hipquant as hq
from common import header, keep, summary
from hipquant.gguf_file import GGUFFile
from hipquant.quants import F32, Role

TYPES = ("Q8_0", "Q4_0", "Q4_K_M", "Q6_K", "Q2_K")
SAMPLE = 1 << 20  # weights of a matrix


@dataclass
class Run:
    """One run of a command."""

    seconds: float
    processor_seconds: float
    peak_bytes: int


def run(command: list[str], environment: dict[str, str]) -> Run:
    begun = time.perf_counter()
    child = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with status {status}")
    return Run(time.perf_counter() - begun, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def values(file: GGUFFile, name: str) -> npt.NDArray[np.float32]:
    """The first weights of a matrix."""
    info = file.tensors[name]
    k = info.shape[-1]
    rows = max(1, min(SAMPLE, int(np.prod(info.shape))) // k)
    raw = file.data(name)[: rows * info.type.row_bytes(k)]
    if info.type is F32:
        return raw.view(np.float32)
    tensor = hq.Tensor.from_numpy(raw.copy(), info.type, (rows, k), "cpu")
    return hq.ops.get_rows(tensor, np.arange(rows, dtype=np.uint32)).numpy().reshape(-1)


def error(source: Path, quantized: Path) -> float:
    """The root mean square of the errors of a file's quantized weights."""
    squares, count = 0.0, 0
    with GGUFFile(source) as before, GGUFFile(quantized) as after:
        for name, info in after.tensors.items():
            if info.type.role is not Role.FLOAT:
                difference = values(after, name).astype(np.float64) - values(before, name)
                squares += float((difference**2).sum())
                count += difference.size
    return float(np.sqrt(squares / count))


def measure(model: Path, kind: str, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    program, out = os.environ.get("LLAMA_QUANTIZE"), folder / "out.gguf"
    mine = [sys.executable, "-m", "hipquant", "quantize", str(model), str(out), kind, "-t", str(threads)]
    commands = {"hipquant": (mine, {})}
    if program:
        theirs = [program, str(model), str(out), kind, str(threads)]
        commands["llama.cpp"] = (theirs, {"LD_LIBRARY_PATH": str(Path(program).parent)})
    runs: dict[str, list[Run]] = {who: [] for who in commands}
    row: dict[str, Any] = {"type": kind}
    # In a process of its own, as the peak of memory before a command is started counts as the command's.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for _ in range(rounds):
            for who, (command, environment) in commands.items():
                runs[who].append(run(command, environment))
                if who not in row:
                    row[who] = {"rms": pool.submit(error, model, out).result()}
                out.unlink()
    for who, found in runs.items():
        row[who]["seconds"] = summary([r.seconds for r in found])
        row[who]["processor_seconds"] = summary([r.processor_seconds for r in found])
        row[who]["peak_bytes"] = max(r.peak_bytes for r in found)
        print(
            f"{kind:<7} {who:<10} {row[who]['seconds']['median']:7.1f} s, of the processor "
            f"{row[who]['processor_seconds']['median']:6.1f} s, {row[who]['peak_bytes'] / 2**20:6.0f} MiB, rms "
            f"{row[who]['rms']:.3e}",
            flush=True,
        )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("-r", type=int, default=3, help="rounds")
    parser.add_argument("--keep", metavar="NAME", help="keep the result in benchmarks/results/NAME.json")
    o = parser.parse_args()
    device = hq.device("cpu")
    result = header(device)
    with GGUFFile(o.model) as file:
        result["model"] = {"name": o.model.name, "bytes": sum(t.nbytes for t in file.tensors.values())}
    with tempfile.TemporaryDirectory(dir=o.model.parent) as folder:
        result["types"] = [measure(o.model, kind, o.r, device.threads, Path(folder)) for kind in o.types]
    if o.keep:
        keep(o.keep, result)


if __name__ == "__main__":
    main()
