"""Tokens per second of whole models on a GPU, alternating with llama.cpp's llama-bench on the same files.

    python benchmarks/gpu_models.py --models FOLDER [--llama-cpp FOLDER] [--model 7b:q4_0 ...]

The files are FOLDER/SHAPE-TYPE.gguf; make_models.py has the shapes, and writes those that are not there. In each round
llama.cpp comes first, then hipquant; each takes every test several times, after one that does not count.

decode       tokens that `generate` draws greedily, one after the other, from an empty context on
with logits  the same passes by `forward`, whose logits come to the host, as those of llama-bench's tg test do
batch 8      `forward_batch`: a token for each of 8 sequences in a pass, with the logits of all of them. llama-bench
             reads a prompt in passes of 8 instead, with logits of the last token, and waits for the last pass alone
prompt N     `forward` over N tokens, up to the logits of the last one
first token  seconds from the start of a process that loads the model until it has the best token after 8 others; the
             file is in the page cache. For CUDA also without the driver's cache of compiled kernels
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import hipquant as hq
from common import ceiling, header, keep, seconds, summary  # first: it keeps numpy's threads quiet
from hipquant.driver import Device
from hipquant.errors import HipquantError
from hipquant.models import DEMO
from hipquant.quantize import FileType
from hipquant.sampling import Sampler, SamplingParams
from make_models import SHAPES, Shape, file_name, model_name, write

OF_LLAMA = ("7b:q4_0", "8b:q4_K_M", "8b:q8_0", "1b:q4_K_M")
MODELS = (*OF_LLAMA, "gemma2-2b:q4_K_M", "qwen3-4b:q4_K_M", "qwen3moe-16l:q4_0", "mixtral-8l:q4_0")
BATCH = 8
# NMSE of logits to the CPU's or, where a file is too large for that, of one kind of pass to another. Activations that
# are rounded to 8 bits, after sums in another order, set two passes apart: in numpy by 4e-5 for 1b and by 9e-5 for
# gemma2-2b, whose norms bring what a layer adds to full size. With experts, a token may even be given another one.
LIMIT, LIMIT_OF_OTHERS = 1e-4, 1e-3
ON_CPU = 2e9  # bytes of a model that is still checked against the CPU, where larger ones take long to load
CHECKED, DRAWN = 48, 32  # tokens of a prompt whose logits are checked, and tokens drawn after it
FIRST = tuple(range(1, 9))  # the prompt of the first token
FIRST_TOKEN = """
import sys, hipquant
model = hipquant.load(sys.argv[1], sys.argv[2])
print(int(model.forward([int(token) for token in sys.argv[3:]], 0).argmax()), flush=True)
"""

Floats = npt.NDArray[np.float32]
Speeds = dict[str, list[float]]  # tokens/s of each repetition of a test


class CheckError(Exception):
    """A result is wrong, so there is nothing to time."""


class PeerError(Exception):
    """llama-bench gave no figures."""


@dataclass(frozen=True)
class Plan:
    """What is measured: sizes in tokens, how often."""

    prompts: tuple[int, ...] = (512, 2048)
    tokens: int = 128
    passes: int = 32  # of a batch
    repeat: int = 3
    rounds: int = 3

    @property
    def context(self) -> int:
        return max(*self.prompts, self.tokens, self.passes, CHECKED + DRAWN) + 1


class LlamaBench:
    """llama.cpp's llama-bench on one GPU."""

    def __init__(self, program: Path, device: Device) -> None:
        self.program, self.on_gpu, self.build = program, device.kind != "cpu", ""
        self.index = getattr(device, "index", 0)

    def speeds(self, model: Path, plan: Plan) -> Speeds:
        prompts, repeat = ",".join(map(str, plan.prompts)), ["-r", str(plan.repeat)]
        found: Speeds = {}
        for row in self._run(model, "-p", prompts, "-n", str(plan.tokens), *repeat):
            tests = (f"prompt {row['n_prompt']}",) if row["n_prompt"] else ("decode", "with logits")
            found |= dict.fromkeys(tests, row["samples_ts"])
        batched = ["-b", str(BATCH), "-ub", str(BATCH)]
        (row,) = self._run(model, "-p", str(BATCH * plan.passes), "-n", "0", *batched, *repeat)
        return found | {f"batch {BATCH}": row["samples_ts"]}

    def _run(self, model: Path, *options: str) -> list[dict[str, Any]]:
        command = [str(self.program), "-m", str(model), "-fa", "1", "-sm", "none", "-mg", str(self.index), "-o", "json"]
        paths = [str(self.program.parent), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
        environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(paths)}
        try:
            done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=180, env=environment)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise PeerError(f"llama-bench did not run: {error}") from None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise PeerError(f"llama-bench failed with exit code {done.returncode}: {last}")
        try:
            rows: list[dict[str, Any]] = json.loads(done.stdout)
        except ValueError:
            raise PeerError(f"llama-bench gave no JSON, but {done.stdout[:60]!r}") from None
        if self.on_gpu and not rows[0]["gpu_info"]:
            raise PeerError("llama-bench found no GPU: what it measured is the CPU")
        self.build = f"build {rows[0]['build_number']} ({rows[0]['build_commit']}), {rows[0]['backends']}"
        return rows


def find_llama_bench(folder: Path | None, device: Device) -> LlamaBench | None:
    if folder is None:
        print("llama.cpp: not asked for (--llama-cpp FOLDER); hipquant is measured alone\n")
        return None
    program = folder / "llama-bench"
    if not program.is_file():
        print(f"llama.cpp: no llama-bench in {folder.name}; hipquant is measured alone\n")
        return None
    return LlamaBench(program.resolve(), device)


def model_file(shape: str, kind: FileType, folder: Path) -> Path:
    """The file of a model, which is written if it is not there. Raises HipquantError where that cannot be."""
    path, begun = folder / file_name(shape, kind), time.perf_counter()
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(path, SHAPES[shape], kind)
        print(f"{path.name}: written in {time.perf_counter() - begun:.0f} s")
    return path


def limit_of(shape: Shape) -> float:
    return LIMIT if shape.architecture == "llama" and not shape.experts else LIMIT_OF_OTHERS


# --- checks ---


def nmse(found: Floats, expected: Floats) -> float:
    exact = expected.astype(np.float64)
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def check(model: hq.Model, path: Path, most: float = LIMIT) -> dict[str, Any]:
    """Raises CheckError if logits of any kind of pass are further apart than `most`, an NMSE, or if tokens drawn on the
    device are not those of the sampler."""
    ids = np.random.default_rng(0).integers(0, model.n_vocab, CHECKED).tolist()
    on_cpu = path.stat().st_size <= ON_CPU
    against, first = ("the CPU", 0) if on_cpu else ("steps", 1)
    found = [("steps", np.array([model.forward(ids[i : i + 1], i) for i in range(CHECKED)]))]
    found.append(("a long pass", model.forward(ids, 0, logits="all")))
    for i in range(BATCH):  # sequence i will take token i + 1
        model.forward(ids[: i + 1], 0, sequence=i)
    batch = range(1, BATCH + 1)
    found.append(("a batch", model.forward_batch(ids[1 : BATCH + 1], batch, range(BATCH))))
    expected = found[0][1]
    if on_cpu:
        expected = hq.load(path, "cpu", context=CHECKED, sequences=1).forward(ids, 0, logits="all")
    errors = {}
    for name, logits in found[first:]:
        rows = expected[1 : BATCH + 1] if name == "a batch" else expected
        errors[name] = error = nmse(logits, rows)
        if not error <= most:  # nor is NaN
            raise CheckError(f"{path.name}, {name} against {against}: NMSE {error:.1e}, expected {most} at most")
    for temperature in (0.0, 0.8):
        check_drawn(model, path, ids, temperature)
    shown = ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    print(f"{path.name}: NMSE to {against}: {shown}; tokens drawn on the device are the sampler's", flush=True)
    return {"against": against, "nmse": errors}


def check_drawn(model: hq.Model, path: Path, prompt: list[int], temperature: float) -> None:
    """Tokens that `generate` gives are those that the sampler draws from the logits of `forward`."""
    params = SamplingParams(temperature=temperature, seed=1)
    sampler, every = Sampler(params), list(prompt)
    logits = model.forward(prompt, 0)
    while len(every) < CHECKED + DRAWN:
        every.append(sampler.sample(logits, every))
        logits = model.forward(every[-1:], len(every) - 1)
    model.forward([(prompt[0] + 1) % model.n_vocab], 0)  # or the prompt would not be computed again
    tokens, expected = generate(model, prompt, DRAWN, params), every[CHECKED:]
    if tokens != expected:
        at = next(i for i, pair in enumerate(zip([*tokens, -1], expected, strict=False)) if pair[0] != pair[1])
        raise CheckError(
            f"{path.name}, temperature {temperature}: token {at} that is generated is {[*tokens, -1][at]}, "
            f"the sampler draws {expected[at]} from the logits"
        )


def generate(model: hq.Model, prompt: Sequence[int], n: int, params: SamplingParams) -> list[int]:
    generation = model.generate(prompt, max_tokens=n, params=params, sequence=0)
    for _ in generation:
        pass
    return generation.tokens


# --- what is timed: each gives seconds ---


def decode(model: hq.Model, n: int) -> float:
    params = SamplingParams(temperature=0)
    return seconds(lambda: generate(model, FIRST[:1], n, params))


def decode_with_logits(model: hq.Model, n: int) -> float:
    ids = np.random.default_rng(0).integers(0, model.n_vocab, n)

    def passes() -> None:
        for i in range(n):
            model.forward(ids[i : i + 1], i)

    return seconds(passes)


def batches(model: hq.Model, passes: int) -> float:
    ids, each = np.random.default_rng(0).integers(0, model.n_vocab, (passes, BATCH)).tolist(), range(BATCH)
    for sequence in each:
        model.forward(FIRST[:1], 0, sequence=sequence)

    def run() -> None:
        for i, tokens in enumerate(ids):
            model.forward_batch(tokens, [i + 1] * BATCH, each)

    return seconds(run)


def prompt(model: hq.Model, n: int) -> float:
    ids = np.random.default_rng(0).integers(0, model.n_vocab, n)
    return seconds(lambda: model.forward(ids, 0))


def speeds(model: hq.Model, plan: Plan) -> Speeds:
    """Tokens/s of each test."""
    tests: dict[str, tuple[int, Callable[[], float]]] = {
        "decode": (plan.tokens, lambda: decode(model, plan.tokens)),
        "with logits": (plan.tokens, lambda: decode_with_logits(model, plan.tokens)),
        f"batch {BATCH}": (BATCH * plan.passes, lambda: batches(model, plan.passes)),
    }
    tests |= {f"prompt {n}": (n, lambda n=n: prompt(model, n)) for n in plan.prompts}  # type: ignore[misc]
    found: Speeds = {}
    for name, (tokens, run) in tests.items():
        run()
        found[name] = [tokens / run() for _ in range(plan.repeat)]
    return found


def first_token(path: Path, device: Device, expected: int, **environment: str) -> float:
    """Seconds from the start of a process to its first token, which must be the one expected."""
    name = "cpu" if device.kind == "cpu" else repr(device)
    command = [sys.executable, "-c", FIRST_TOKEN, str(path), name, *map(str, FIRST)]
    begun = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}) as process:
        assert process.stdout is not None
        said = process.stdout.readline().strip()
        taken = time.perf_counter() - begun
    if process.returncode or said != str(expected):
        raise CheckError(f"{path.name}: the first token of a new process is {said or 'missing'}, expected {expected}")
    return taken


# --- models ---


def measure(
    path: Path, most: float, device: Device, peer: LlamaBench | None, plan: Plan, limit: float
) -> dict[str, Any]:
    """One model: checked, then measured in alternation with llama.cpp; prints a line for each test."""
    begun = time.perf_counter()
    model = hq.load(path, device, context=plan.context, sequences=BATCH)
    row: dict[str, Any] = {
        "model": path.name,
        "weights_bytes": model.weights_bytes,
        "checked": check(model, path, most),
    }
    mine: Speeds = {}
    theirs: Speeds = {}
    for _ in range(plan.rounds):
        if peer:
            try:
                add(theirs, peer.speeds(path, plan))
            except PeerError as error:
                print(f"{path.name}: {error}; hipquant is measured alone", flush=True)
                peer, theirs, row["llama.cpp"] = None, {}, str(error)
        add(mine, speeds(model, plan))
    for test, values in mine.items():
        row[test] = compare(test, values, theirs.get(test), model.weights_bytes / 1e9, limit)
        print(f"{path.stem:<17} {test:<12} {line(row[test])}", flush=True)
    token = int(model.forward(FIRST, 0).argmax())
    row["first token"] = summary([first_token(path, device, token) for _ in range(plan.rounds)])
    shown = f"{row['first token']['median']:8.2f} s from the start of a process"
    if device.kind == "cuda":
        row["first token, kernels compiled"] = first_token(path, device, token, CUDA_CACHE_DISABLE="1")
        shown += f", {row['first token, kernels compiled']:.2f} s where the driver compiles the kernels"
    print(f"{path.stem:<17} {'first token':<12} {shown}\n{path.stem}: {time.perf_counter() - begun:.0f} s in all\n")
    return row


def add(found: Speeds, more: Speeds) -> None:
    for test, values in more.items():
        found.setdefault(test, []).extend(values)


def compare(test: str, mine: list[float], theirs: list[float] | None, gigabytes: float, limit: float) -> dict[str, Any]:
    """Medians of a test; for passes over few tokens the GB/s of weights; the ratio to llama.cpp."""
    found: dict[str, Any] = {"hipquant": summary(mine)}
    median = found["hipquant"]["median"]
    if not test.startswith("prompt"):
        found["GB/s"] = median * gigabytes / (BATCH if test.startswith("batch") else 1)
        found["fraction_of_ceiling"] = found["GB/s"] / limit
    if theirs:
        found["llama.cpp"] = summary(theirs)
        found["ratio"] = median / found["llama.cpp"]["median"]
    return found


def line(found: dict[str, Any]) -> str:
    text = f"{found['hipquant']['median']:8.1f} tokens/s"
    text += f" {found['GB/s']:6.0f} GB/s ({found['fraction_of_ceiling']:4.0%})" if "GB/s" in found else " " * 19
    if "ratio" in found:
        text += f"   llama.cpp {found['llama.cpp']['median']:8.1f}   ratio {found['ratio']:.2f}"
    return text


def measure_all(o: argparse.Namespace, device: Device, result: dict[str, Any]) -> int:
    """Measures each model into result; how many could not be."""
    peer, plan, failed = find_llama_bench(o.llama_cpp, device), Plan(rounds=o.rounds, repeat=o.repeat), 0
    result |= {"rounds": plan.rounds, "repetitions": plan.repeat}
    result["demo model"] = check(hq.load(DEMO, device, sequences=BATCH), DEMO)
    result["models"] = []
    for shape, kind in o.model or map(model_name, MODELS):
        name = file_name(shape, kind)
        try:
            path, most = model_file(shape, kind, o.models), limit_of(SHAPES[shape])
            result["models"].append(measure(path, most, device, peer, plan, result["read_ceiling_GB/s"]))
        except (CheckError, HipquantError) as error:
            failed += 1
            result["models"].append({"model": name, "failed": str(error)})
            print(f"{name} is not measured: {error}\n", flush=True)
        gc.collect()  # a model's memory is given back before the next one is loaded
    if peer and peer.build:
        result["llama.cpp"] = peer.build
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--model", type=model_name, nargs="+", metavar="SHAPE:TYPE", help=f"default: {' '.join(MODELS)}"
    )
    parser.add_argument("--models", type=Path, required=True, metavar="FOLDER", help="where the files are, or shall be")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="where llama-bench and its libraries are")
    parser.add_argument("--rounds", type=int, default=3, help="in which llama.cpp and hipquant alternate")
    parser.add_argument("--repeat", type=int, default=3, help="times that each takes a test in a round")
    parser.add_argument("--keep", metavar="NAME", help="keep the result in benchmarks/results/NAME.json")
    o = parser.parse_args()
    device = hq.device(o.device)
    result = header(device)
    result["read_ceiling_GB/s"] = ceiling(device)
    failed = measure_all(o, device, result)
    if o.keep:
        keep(o.keep, result)
    if failed:
        sys.exit(f"{failed} of {len(result['models'])} models could not be measured")


if __name__ == "__main__":
    main()
