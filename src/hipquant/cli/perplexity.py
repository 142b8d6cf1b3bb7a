"""`hipquant perplexity`: how well a model predicts a text, by the procedure of llama.cpp's llama-perplexity.

The text is cut into chunks of the context's length; in each one, a begin token takes the place of the first where the
model wants one, and the tokens of the second half are predicted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .common import (
    Bar,
    decode_text,
    device_options,
    emit,
    emit_json,
    interruptible,
    json_option,
    open_model,
    read_stdin,
)

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from ..models import Model
    from ..tokenizer import Tokenizer
    from .common import GpuLayers

LOGITS_AT_ONCE = 128  # tokens; 64 MB for a vocabulary of 128k


@click.command("perplexity")
@click.argument("model")
@click.argument("text")
@click.option("-c", "--context", default=512, show_default=True, type=click.IntRange(min=4), help="Tokens of a chunk.")
@click.option("--chunks", type=click.IntRange(min=1), help="Take only the first chunks.")
@device_options
@json_option
def command(
    model: str,
    text: str,
    context: int,
    chunks: int | None,
    device: str,
    threads: int | None,
    cache_type: str,
    gpu_layers: GpuLayers,
    as_json: bool,
) -> int:
    """Perplexity of MODEL (a GGUF file, a folder or a name) on TEXT, a file or - for standard input, with its standard
    error, and bits per byte.

    The same procedure as llama.cpp's llama-perplexity, so that its figures can be compared. A newline at the end of
    the text does not count.
    """
    content = read_stdin("standard input") if text == "-" else decode_text(Path(text).read_bytes(), text)
    loaded = open_model(model, device, threads, context, cache_type=cache_type, gpu_layers=gpu_layers)
    tokens = loaded.tokenizer.encode(content)
    count = min(len(tokens) // context, chunks or len(tokens))
    if not count:
        raise click.ClickException(
            f"the text has {len(tokens)} tokens, one chunk takes {context}: give a longer text or a smaller --context"
        )
    score, code = _Score(loaded.tokenizer), 0
    try:
        with interruptible(), Bar("perplexity") as bar:
            for i in range(count):
                for logits, targets in _predictions(loaded, tokens[i * context : (i + 1) * context]):
                    score.add(logits, targets)
                bar(i + 1, count)
    except KeyboardInterrupt:
        code = 130
    score.seconds = time.perf_counter() - score.begun
    _show(score, loaded, context, as_json)
    return code


def _predictions(model: Model, chunk: list[int]) -> Iterator[tuple[npt.NDArray[np.float32], list[int]]]:
    """Logits of the second half of a chunk and the tokens that came there, in parts."""
    tokenizer = model.tokenizer
    if tokenizer.bos_id is not None and tokenizer.encode("a")[0] == tokenizer.bos_id:
        chunk = [tokenizer.bos_id, *chunk[1:]]
    half, last = len(chunk) // 2, len(chunk) - 1
    model.forward(chunk[:half], 0)
    for at in range(half, last, LOGITS_AT_ONCE):
        end = min(at + LOGITS_AT_ONCE, last)
        yield model.forward(chunk[at:end], at, logits="all"), chunk[at + 1 : end + 1]


class _Score:
    """Sums of the surprise (nats) of the tokens predicted so far."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.begun, self.seconds = tokenizer, time.perf_counter(), 0.0
        self.tokens, self.bytes, self.nats, self.squares = 0, 0, 0.0, 0.0

    def add(self, logits: npt.NDArray[np.float32], targets: list[int]) -> None:
        import numpy as np

        top = logits.max(axis=1)
        if not np.isfinite(top).all():
            raise click.ClickException("the model's logits are not finite: the file may be damaged")
        total = np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)
        nats = np.log(total) + top - logits[np.arange(len(targets)), targets]
        self.tokens += len(targets)
        self.nats += float(nats.sum())
        self.squares += float(np.square(nats).sum())
        self.bytes += sum(len(self.tokenizer.token_bytes(t)) for t in targets)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)

    @property
    def error(self) -> float:
        """The standard error: of the mean surprise, carried through the exponential."""
        variance = self.squares / self.tokens - (self.nats / self.tokens) ** 2
        return self.perplexity * math.sqrt(max(0.0, variance) / (self.tokens - 1)) if self.tokens > 1 else 0.0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else 0.0


def _show(score: _Score, model: Model, context: int, as_json: bool) -> None:
    predicted = context - context // 2 - 1  # of a chunk
    if not score.tokens:
        return
    report = {
        "perplexity": score.perplexity,
        "standard_error": score.error,
        "bits_per_byte": score.bits_per_byte,
        "chunks": score.tokens // predicted,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "context": context,
        "model": model.name,
        "seconds": score.seconds,
        "tokens_per_second": score.tokens // predicted * context / score.seconds,
    }
    if as_json:
        emit_json(report)
        return
    emit(
        f"perplexity     {score.perplexity:.4f} ± {score.error:.4f}\n"
        f"bits per byte  {score.bits_per_byte:.4f}\n"
        f"{score.tokens} tokens ({score.bytes} bytes) predicted in {score.tokens // predicted} chunks of {context}, "
        f"{score.seconds:.1f} s, {report['tokens_per_second']:,.0f} tokens/s\n"
    )
