"""`hipquant bench`: how fast a model reads a prompt, writes a text, and writes several at once."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import device_options, emit, emit_json, json_option, model_argument, open_model, placement, table

if TYPE_CHECKING:
    from ..models import Model
    from .common import GpuLayers

MAX_BATCH = 32


class Batches(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """Numbers of sequences: 1,2,4,8."""

    name = "numbers"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        try:
            sizes = [int(part) for part in str(value).split(",") if part]
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,2,4,8", param, ctx)
        if any(not 1 <= size <= MAX_BATCH for size in sizes):
            self.fail(f"{value!r} has a number outside of 1 to {MAX_BATCH}", param, ctx)
        return sizes


@dataclass
class Result:
    """Tokens/s of each repetition, and the bytes of weights that a second of the median one read."""

    test: str
    rates: list[float]
    weights_bytes_per_second: float | None

    @property
    def median(self) -> float:
        return statistics.median(self.rates)

    @property
    def spread(self) -> float:
        """Half of what lies between the slowest and the fastest, as a part of the median."""
        return (max(self.rates) - min(self.rates)) / 2 / self.median


@click.command("bench")
@model_argument
@click.option("-p", "--prompt", default=128, show_default=True, type=click.IntRange(min=0), help="Tokens of a prompt.")
@click.option("-n", "--tokens", default=32, show_default=True, type=click.IntRange(min=0), help="Tokens to generate.")
@click.option("-r", "--repeat", default=3, show_default=True, type=click.IntRange(min=1), help="Times to measure.")
@click.option(
    "--batch", type=Batches(), default="1,2,4,8,16,32", show_default=True, help="Sequences generated at once."
)
@click.option(
    "--report", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write a file that you can send."
)
@device_options
@json_option
def command(
    model: str | None,
    prompt: int,
    tokens: int,
    repeat: int,
    batch: list[int],
    report: Path | None,
    device: str,
    threads: int | None,
    cache_type: str,
    gpu_layers: GpuLayers,
    as_json: bool,
) -> None:
    """Measures MODEL, a GGUF file, a folder or a name (default: the demo model), on random tokens.

    pp: tokens of a prompt in one go; tg: one token after the other; batch: one token each of several sequences at once,
    8 in a pass on a GPU. Given are the median and half the range. GB/s counts the weights that are read. A report holds
    all of it as JSON, with the device, its driver and the system, and no path or name of yours.
    """
    if report is not None:
        _write(report, "")  # what cannot be written is said before anything is measured
    context, sequences = max(prompt, tokens + 1), max(batch, default=1)
    loaded = open_model(model, device, threads, context, sequences, cache_type, gpu_layers)
    bench = _Bench(loaded, prompt, tokens, repeat)
    bench.check()
    about = _about(loaded)
    if not as_json:
        emit("".join(f"{key:10} {value}\n" for key, value in about.items()) + "\n")
    ceiling = _ceiling(loaded)
    results = bench.results(batch if tokens else [])
    tests = [vars(r) | {"median": r.median, "spread": r.spread} for r in results]
    measured = {"repetitions": repeat, "read_ceiling_bytes_per_second": ceiling, "results": tests}
    if report is not None:
        _write(report, json.dumps(_system(loaded) | measured, indent=1) + "\n")
    if as_json:
        emit_json(about | measured)
    else:
        emit(table(("test", "tokens/s", "±", "GB/s", "of the ceiling"), [_row(r, ceiling) for r in results]))
        readers = ["The threads read" if part.device.kind == "cpu" else "The device reads" for part in loaded.parts]
        reader = readers[0] if len(readers) == 1 else "One after the other, the CPU and the GPU read"
        emit(f"\n{reader} memory at {ceiling / 1e9:.1f} GB/s; a small model is read from the cache, faster.\n")


def _row(result: Result, ceiling: float) -> list[str]:
    rate = result.weights_bytes_per_second
    read = ["", ""] if rate is None else [f"{rate / 1e9:.1f}", f"{rate / ceiling:.0%}"]
    return [result.test, f"{result.median:,.1f}", f"{result.spread:.1%}", *read]


def _ceiling(model: Model) -> float:
    """Bytes of weights per second that a pass could read: each device its own, one after the other."""
    from ..ceiling import read_ceiling

    seconds = sum(part.weights_bytes / read_ceiling(part.device) for part in model.parts)
    return model.weights_bytes / seconds


class _Bench:
    def __init__(self, model: Model, prompt: int, tokens: int, repeat: int) -> None:
        import numpy as np

        self.model, self.n_prompt, self.n_tokens, self.repeat = model, prompt, tokens, repeat
        random = np.random.default_rng(0)
        self.ids = random.integers(0, model.n_vocab, max(prompt, tokens, MAX_BATCH) + 1).tolist()
        self.pass_bytes = model.weights_bytes

    def check(self) -> None:
        """No timing of nonsense: the logits of a prompt and of a step must be finite."""
        import numpy as np

        for tokens, position in ((self.ids[: max(1, self.n_prompt)], 0), (self.ids[:1], 0)):
            if not np.isfinite(self.model.forward(tokens, position)).all():
                raise click.ClickException(f"{self.model.name}: the logits are not finite, so nothing was timed")

    def results(self, batches: list[int]) -> list[Result]:
        """All tests, in the order in which they are shown."""
        found = []
        if self.n_prompt:
            found.append(self._measure(f"pp{self.n_prompt}", self._read, self.n_prompt, None))
        if self.n_tokens:
            found.append(self._measure(f"tg{self.n_tokens}", self._write, self.n_tokens, self.n_tokens))
        for size in batches:
            name = f"batch{size} tg{self.n_tokens}"
            passes = self.n_tokens * len(list(self.model.blocks.passes(size, self.model.blocks.batch)))
            found.append(self._measure(name, partial(self._batch, size), size * self.n_tokens, passes))
        return found

    def _measure(self, test: str, run: Callable[[], float], tokens: int, passes: int | None) -> Result:
        run()
        seconds = [run() for _ in range(self.repeat)]
        rate = None if passes is None else passes * self.pass_bytes / statistics.median(seconds)
        return Result(test, [tokens / s for s in seconds], rate)

    def _read(self) -> float:
        begun = time.perf_counter()
        self.model.forward(self.ids[: self.n_prompt], 0)
        return time.perf_counter() - begun

    def _write(self) -> float:
        begun = time.perf_counter()
        for position in range(self.n_tokens):
            self.model.forward(self.ids[position : position + 1], position)
        return time.perf_counter() - begun

    def _batch(self, size: int) -> float:
        sequences = list(range(size))
        for sequence in sequences:
            self.model.forward(self.ids[sequence : sequence + 1], 0, sequence=sequence)
        begun = time.perf_counter()
        for position in range(1, self.n_tokens + 1):
            self.model.forward_batch(self.ids[:size], [position] * size, sequences)
        return time.perf_counter() - begun


def _about(model: Model) -> dict[str, str]:
    import numpy as np

    from .. import __version__

    commit = _commit()
    cpu = next((part.device for part in model.parts if part.device.kind == "cpu"), None)
    return {
        "model": f"{model.name}, {model.weights_bytes / 2**20:,.1f} MiB of weights",
        "device": f"{model.device.name} ({model.device.target.name})",
        **({"layers": placement(model)} if len(model.parts) > 1 else {}),
        **({"threads": str(cpu.threads)} if cpu else {}),
        "versions": f"hipquant {__version__}, Python {platform.python_version()}, numpy {np.__version__}",
        **({"commit": commit} if commit else {}),
    }


def _system(model: Model) -> dict[str, object]:
    """What figures depend on: versions, system, device, and the model's sizes and types."""
    from .. import __version__
    from .devices import describe

    types: dict[str, int] = {}
    for tensor in model.file.tensors.values():
        types[tensor.type.name] = types.get(tensor.type.name, 0) + tensor.nbytes
    return {
        "hipquant": __version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device": describe(model.device),
        "parts": [
            {"device": part.device.kind, "layers": part.layers, "weights_bytes": part.weights_bytes}
            for part in model.parts
        ],
        **({"cpu": describe(model.parts[0].device)} if len(model.parts) > 1 else {}),
        "model": {
            "name": model.file.get("general.name", str, ""),
            "architecture": model.file.require("general.architecture", str),
            "weights_bytes": model.weights_bytes,
            "bytes_by_type": types,
        },
    }


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise click.ClickException(f"{path} cannot be written: {error.strerror}") from None


def _commit() -> str:
    """The commit of a checkout of hipquant that this runs from; nothing for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or not (root / "src" / "hipquant").is_dir():
        return ""
    call = ["git", "--no-optional-locks", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(call, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
