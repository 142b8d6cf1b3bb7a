"""The generation loop: tokens in, text out piece by piece, with what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import ContextLengthError

if TYPE_CHECKING:
    from .models.model import Model
    from .models.passes import Drawing
    from .sampling import Sampler, SamplingParams, StopStrings


@dataclass
class Timings:
    """Seconds and tokens of a generation. The first token generated counts to the prompt, which its logits end."""

    prompt_tokens: int = 0
    prompt_computed: int = 0  # those that the cache did not hold
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generation_seconds: float = 0.0

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_computed / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def generated_tokens_per_second(self) -> float:
        return max(0, self.generated_tokens - 1) / self.generation_seconds if self.generation_seconds else 0.0


class Generation:
    """An iterator of pieces of text. While and after it runs: `tokens`, `timings` and `finish_reason`.

    `finish_reason` is "end" (an end token), "stop" (a stop string), "length" (`max_tokens`) or "context" (it is full).
    """

    def __init__(
        self,
        model: Model,
        prompt: str | Sequence[int],
        max_tokens: int | None,
        params: SamplingParams,
        stop: Sequence[str],
        sequence: int | None,
        parse_special: bool,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if max_tokens is not None and max_tokens < 0:
            raise ValueError(f"max_tokens must be 0 or more, not {max_tokens}")
        self.model, self.params, self.max_tokens = model, params, max_tokens
        if isinstance(prompt, str):
            self.prompt = model.tokenizer.encode(prompt, parse_special=parse_special)
        else:
            self.prompt = model._checked_tokens(prompt).tolist() if len(prompt) else []
        if not self.prompt:
            raise ValueError("the prompt has no tokens and the model no begin token: give it some text")
        if len(self.prompt) >= model.context:
            raise ContextLengthError(
                f"the prompt has {len(self.prompt)} tokens, the context holds {model.context}: "
                "shorten the prompt or load the model with a larger context"
            )
        if sequence is not None:
            model._checked_sequence(sequence)
        self.sequence, self.tokens = sequence, list[int]()
        self._progress = progress
        self.timings, self.finish_reason = Timings(prompt_tokens=len(self.prompt)), ""
        self._pieces = self._run(stop)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Ends the generation early; its sequence is free for others."""
        self._pieces.close()  # type: ignore[attr-defined]

    @property
    def text(self) -> str:
        """The rest of the text at once."""
        return "".join(self)

    def _run(self, stop: Sequence[str]) -> Iterator[str]:
        from .sampling import Sampler, StopStrings

        stops = StopStrings(stop)
        sampler = Sampler(self.params)
        if self.max_tokens == 0:
            self.finish_reason = "length"
            return
        reserved = self.model.reserve(self.prompt) if self.sequence is None else None
        try:
            # Where every sequence is in use, the first one is shared: both recompute what the other has replaced.
            sequence = next(s for s in (self.sequence, reserved, 0) if s is not None)
            drawn = _DrawnAhead if self.model.device_sampling else _Drawn
            tokens = drawn(self.model, sampler, sequence, self._progress)
            yield from self._tokens_to_text(tokens, stops)
        finally:
            if reserved is not None:
                self.model.release(reserved)

    def _tokens_to_text(self, source: _Drawn, stops: StopStrings) -> Iterator[str]:
        model, every = self.model, list(self.prompt)
        text = _Text(model, self.prompt)
        while True:
            more = len(self.tokens) + 1 != self.max_tokens and len(every) + 1 < model.context
            token, computed, seconds = source.next(every, more)
            self._count(seconds, computed)
            if token in text.end_ids:
                self.finish_reason = "end"
                break
            self.tokens.append(token)
            every.append(token)
            piece, stopped = stops.push(text.push(token))
            if piece:
                yield piece
            if stopped:
                self.finish_reason = "stop"
                return
            if len(self.tokens) == self.max_tokens:
                self.finish_reason = "length"
                break
            if len(every) >= model.context:
                self.finish_reason = "context"
                break
        piece, stopped = stops.push(text.flush())
        if not stopped:
            piece += stops.flush()
        if piece:
            yield piece

    def _count(self, seconds: float, computed: int) -> None:
        t = self.timings
        t.generated_tokens += 1
        if t.generated_tokens == 1:
            t.prompt_seconds, t.prompt_computed = seconds, computed
        else:
            t.generation_seconds += seconds


class _Drawn:
    """Tokens that the host draws, one after the other."""

    def __init__(
        self, model: Model, sampler: Sampler, sequence: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self.model, self.sampler, self.sequence, self._progress = model, sampler, sequence, progress

    def next(self, every: Sequence[int], more: bool) -> tuple[int, int, float]:
        """The token after `every`, how many tokens were computed for it, and seconds; `more` may be asked for."""
        begun = time.perf_counter()
        logits, computed = self.model.extend(every, self.sequence, self._take_progress())
        token = self.sampler.sample(logits, every)
        return token, computed, time.perf_counter() - begun

    def _take_progress(self) -> Callable[[int, int], None] | None:
        """It is called for the prompt alone."""
        progress, self._progress = self._progress, None
        return progress


class _DrawnAhead(_Drawn):
    """Tokens that the device draws: the pass for the next one is launched before the last one is known here.

    What is launched behind a token that ends the text is not asked for: others write over it.
    """

    _last: Drawing | None = None
    _next: Drawing | None = None

    def next(self, every: Sequence[int], more: bool) -> tuple[int, int, float]:
        begun, model, computed = time.perf_counter(), self.model, 1
        follows, current = self._last is not None, self._next
        if current is None and self._last is not None:
            current = model.draw_ahead(self._last, self.sampler)
        if current is None:
            current, computed = model.draw(every, self.sampler, self.sequence, self._take_progress())
        # Not behind the prompt, whose time ends with its token.
        self._next = model.draw_ahead(current, self.sampler) if more and follows else None
        self._last = current
        token = model.drawn(current)
        # While the caller had the last token the device went on: its own time counts where it is longer.
        return token, computed, max(time.perf_counter() - begun, current.seconds)


class _Text:
    """Tokens to text; a model without a vocabulary has ids for words."""

    def __init__(self, model: Model, prompt: Sequence[int]) -> None:
        from .tokenizer import has_vocabulary

        self.end_ids: frozenset[int] = frozenset()
        self._stream = None
        if has_vocabulary(model.file.metadata):
            self.end_ids = model.tokenizer.end_ids
            self._stream = model.tokenizer.stream()

    def push(self, token: int) -> str:
        return self._stream.push(token) if self._stream else f"{token} "

    def flush(self) -> str:
        return self._stream.flush() if self._stream else ""
