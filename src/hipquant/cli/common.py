"""What the commands share: options, loading a model, output that may fail, and a progress bar."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import click

from ..wiring import CACHE_TYPES

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..models import Model

    GpuLayers = int | Literal["auto"]

F = TypeVar("F", bound=Callable[..., Any])
DEMO = "demo"  # the name of the packaged model, where no file is called so
BAR_AFTER, BAR_EVERY = 1.0, 0.1  # seconds


TARGET = re.compile(r"(gfx[\w-]+|sm_\w+|all|amd|nvidia|cpu|x86[_-]64[\w-]*|aarch64[\w-]*)(,.*)?")


class TargetsCommand(click.Command):
    """A command whose --target takes several words: `--target gfx90a gfx1100` is `--target gfx90a --target gfx1100`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        spelled: list[str] = []
        for word in args:
            if len(spelled) > 1 and spelled[-2] == "--target" and TARGET.fullmatch(word):
                spelled.append("--target")
            spelled.append(word)
        return super().parse_args(ctx, spelled)


class GpuLayersType(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """A number of layers from 0 on, or auto."""

    name = "number"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> GpuLayers:
        text = str(value)
        if text == "auto":
            return "auto"
        if not re.fullmatch(r"[0-9]{1,9}", text):
            self.fail(f"{text!r} is neither 'auto' nor a number of layers from 0 on", param, ctx)
        return int(text)


def model_argument(function: F) -> F:
    """MODEL, which may also be given as --model."""

    @click.argument("model", required=False)
    @click.option("--model", "model_option", metavar="MODEL", help="The same as the argument MODEL.")
    @functools.wraps(function)
    def command(model: str | None, model_option: str | None, **options: Any) -> Any:
        if model is not None and model_option is not None:
            raise click.UsageError(f"the model is given twice: {model!r} and {model_option!r}")
        return function(model=model_option if model is None else model, **options)

    return cast(F, command)


def device_options(function: F) -> F:
    """--device, --gpu-layers, --threads and --cache-type."""
    layers = click.option(
        "--gpu-layers",
        type=GpuLayersType(),
        default="auto",
        show_default=True,
        help="Layers on the GPU, the last ones; the others run on the CPU. auto: all, or an error.",
    )
    threads = click.option("-t", "--threads", type=click.IntRange(1, 256), help="Threads of the CPU (default: cores).")
    device = click.option("--device", default="auto", show_default=True, help="As `hipquant devices` names them.")
    cache = click.option(
        "--cache-type",
        type=click.Choice(CACHE_TYPES),
        default="f16",
        show_default=True,
        help="Of the KV cache on a GPU; q8_0 takes about half of the memory.",
    )
    return device(layers(threads(cache(function))))


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, and nothing else.")(function)


def open_model(
    path: str | None,
    device: str,
    threads: int | None,
    context: int | None,
    sequences: int = 1,
    cache_type: str = "f16",
    gpu_layers: GpuLayers = "auto",
) -> Model:
    """Loads a model, with a bar if that takes long; `path` may be a name, too (`hipquant.hub`).

    No path, or `demo` where there is no such file: the demo model. Where a number of layers was asked for, a line on
    standard error says which run where.
    """
    from ..driver import device as get_device
    from ..hub import find
    from ..models import load

    on = get_device(device)
    if threads is not None:
        (on if gpu_layers == "auto" else get_device("cpu")).threads = threads
    if path == DEMO and not Path(path).exists():
        path = None
    kinds: dict[str, Any] = {"context": context, "sequences": sequences}
    kinds |= {"cache_type": cache_type, "gpu_layers": gpu_layers}
    with interruptible():
        free = on.free_memory if gpu_layers == "auto" else None  # the CPU has the rest
        found = find(path, free=free, say=note) if path is not None else None
        with Bar("loading") as bar:
            model = load(found, on, progress=bar, **kinds)
    if gpu_layers != "auto":
        note(placement(model))
    return model


def placement(model: Model) -> str:
    """How many layers run where: `20 of 32 layers on cuda:0, 12 on the CPU`."""
    total = sum(part.layers for part in model.parts)
    where = ["the CPU" if part.device.kind == "cpu" else str(part.device) for part in model.parts]
    (last, n), *others = reversed([(name, part.layers) for name, part in zip(where, model.parts, strict=True)])
    return f"{n} of {total} layers on {last}" + "".join(f", {n} on {name}" for name, n in others)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Here Ctrl-C is a KeyboardInterrupt, not the immediate end."""
    before = signal.getsignal(signal.SIGINT)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def emit(text: str) -> None:
    """Writes to standard output at once."""
    if sys.stdout is None:
        raise click.ClickException("standard output is closed")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise click.ClickException(f"standard output cannot be written: {error.strerror}") from None


def emit_json(value: object) -> None:
    emit(json.dumps(value) + "\n")


def note(text: str, dim: bool = False) -> None:
    """Writes a line to standard error, which must not stop anything by being closed or full."""
    with contextlib.suppress(OSError):
        click.echo(click.style(text, dim=True) if dim else text, err=True)


def tolerate_output_encoding() -> None:
    """Text of a model that the terminal's encoding cannot express is replaced by question marks."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def read_stdin(what: str) -> str:
    """All of standard input as text."""
    return decode_text(sys.stdin.buffer.read(), what) if sys.stdin is not None else ""


def decode_text(raw: bytes, what: str) -> str:
    """UTF-8 to text, without the newline at the end that editors and echo put there."""
    try:
        return raw.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise click.ClickException(f"{what} is not UTF-8: byte {error.start} is 0x{raw[error.start]:02X}") from None


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """An aligned table that is Markdown too; the first columns are words, the others are numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = [("-" * w if i < words else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    cells = ([c.ljust(w) if i < words else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
             for row in (head, rule, *rows))  # fmt: skip
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


class Bar:
    """A progress bar, called with (done, total): on standard error, if that is a terminal and a second has passed."""

    def __init__(self, what: str) -> None:
        self.what, self.begun, self.drawn = what, time.perf_counter(), 0.0
        self.visible = sys.stderr is not None and sys.stderr.isatty()
        self._bar: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        now = time.perf_counter()
        if done >= total:
            self.close()
        elif self.visible and now - self.begun >= BAR_AFTER and now - self.drawn >= BAR_EVERY:
            self.drawn = now
            if self._bar is None:
                self._open()
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=done, total=total, refresh=True)

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, auto_refresh=False, transient=True, redirect_stdout=False)
        self._bar.add_task(self.what)
        self._bar.start()

    def close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
