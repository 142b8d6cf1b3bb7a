"""Tokens per second of whole models, alternating with llama.cpp's llama-bench where LLAMA_BENCH names it.

    python benchmarks/models.py MODEL.gguf ... [-p 128] [-n 32] [-r 5] [--keep NAME]

Both run the same file on the same number of threads, one after the other in each round, so that what else the machine
does hits both; the ratio is that of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np

import hipquant as hq
from common import ceiling, header, keep, seconds, summary


def llama_bench(model: Path, threads: int, p: int, n: int) -> tuple[float, float] | None:
    """(prompt, generation) tokens/s of one run of llama.cpp, or None where there is none."""
    program = os.environ.get("LLAMA_BENCH")
    if not program:
        return None
    sizes = ["-p", str(p), "-n", str(n), "-r", "1", "-t", str(threads), "-o", "json"]
    done = subprocess.run(
        [program, "-m", str(model), *sizes],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "LD_LIBRARY_PATH": str(Path(program).parent)},
    )
    rows = json.loads(done.stdout)
    speed = {("p" if row["n_prompt"] else "n"): float(row["avg_ts"]) for row in rows}
    return speed["p"], speed["n"]


def ours(model: hq.Model, p: int, n: int) -> tuple[float, float]:
    """(prompt, generation) tokens/s: a prompt of p tokens, then n tokens one at a time."""
    tokens = np.random.default_rng(0).integers(0, model.n_vocab, max(p, n))
    prompt = p / seconds(lambda: model.forward(tokens[:p], 0))

    def generate() -> None:
        for i in range(n):
            model.forward(tokens[i : i + 1], i)

    return prompt, n / seconds(generate)


def measure(path: Path, o: argparse.Namespace, limit: float) -> dict[str, Any]:
    model = hq.load(path)
    assert np.isfinite(model.forward([1, 2, 3], 0, logits="all")).all(), "logits must be finite"
    ours(model, o.p, 2)
    mine: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    for _ in range(o.r):
        mine.append(ours(model, o.p, o.n))
        peer = llama_bench(path, model.device.threads, o.p, o.n)
        if peer:
            theirs.append(peer)
    read = model.weights_bytes / 1e9  # all of them for each token; rows of the embedding are not counted
    row: dict[str, Any] = {"model": path.name, "weights_bytes": model.weights_bytes}
    for i, what in enumerate((f"prompt {o.p}", f"generation {o.n}")):
        row[what] = {"hipquant": summary([m[i] for m in mine])}
        line = f"{path.name:<24} {what:<15} {row[what]['hipquant']['median']:8.1f} tokens/s"
        if i == 1:
            row[what]["GB/s"] = row[what]["hipquant"]["median"] * read
            row[what]["fraction_of_ceiling"] = row[what]["GB/s"] / limit
            line += f" {row[what]['GB/s']:6.1f} GB/s ({row[what]['fraction_of_ceiling']:.0%})"
        if theirs:
            row[what]["llama.cpp"] = summary([t[i] for t in theirs])
            row[what]["ratio"] = row[what]["hipquant"]["median"] / row[what]["llama.cpp"]["median"]
            line += f"   llama.cpp {row[what]['llama.cpp']['median']:8.1f}   ratio {row[what]['ratio']:.2f}"
        print(line, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("-p", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("-n", type=int, default=32, help="tokens to generate")
    parser.add_argument("-r", type=int, default=5, help="rounds")
    parser.add_argument("--keep", metavar="NAME", help="keep the result in benchmarks/results/NAME.json")
    o = parser.parse_args()
    device = hq.device()
    result = header(device)
    result["read_ceiling_GB/s"] = limit = ceiling(device)
    from hipquant.models import DEMO

    result["models"] = [measure(path, o, limit) for path in o.models or [DEMO]]
    if o.keep:
        keep(o.keep, result)


if __name__ == "__main__":
    main()
