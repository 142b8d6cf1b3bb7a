"""Passes of a model, launched the first time, then captured in graphs and replayed, and the tokens drawn in them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

from ..driver import Event, Graph, Stream
from .layers import MAX_CAPTURED, Blocks

MAX_GRAPHS = 48  # that are kept: of all numbers of sequences there can be more


class Pass(NamedTuple):
    """What is launched at once: n tokens, the logits of the last `n_logits`, and tokens drawn from these."""

    n: int
    n_logits: int = 0
    draw: bool = False
    apart: bool = False  # whether each token is of a sequence of its own, where there are more than `MAX_CAPTURED`


class Drawing:
    """A token that the device draws for `position` of a sequence; `Model.drawn` gives it."""

    _marks = itertools.count(-1, -1)

    def __init__(self, sequence: int, position: int, begun: Event | None, done: Event) -> None:
        self.sequence, self.position = sequence, position
        self.token: int | None = None  # not read yet; negative: ~ of the first logit that cannot be used
        self.mark = next(self._marks)  # stands for the token in the cache's list as long as it is not known
        self._begun, self._done = begun, done

    def wait(self) -> None:
        self._done.synchronize()

    @property
    def seconds(self) -> float:
        """What the device took for the pass, once it is done; 0 for the first token after others."""
        return self._done.elapsed(self._begun) if self._begun is not None else 0.0


class Passes:
    """Runs passes on blocks. Short ones, and those over tokens of as many sequences, are captured once and replayed."""

    def __init__(self, blocks: Blocks[Any]) -> None:
        self.blocks = blocks
        self.graphs: dict[tuple[int, Pass], Graph] = {}  # of a stage; the one used last at the end
        self.seen: set[tuple[int, Pass]] = set()

    def run(self, what: Pass, step: Callable[[int], None]) -> None:
        """`step(n)` launches what is done with n tokens, up to the last norm."""
        for stage, stream in enumerate(self.blocks.stages(what.n, what.apart)):
            key = stage, what
            if key in self.graphs:
                self.graphs[key] = self.graphs.pop(key)
            elif (what.n > MAX_CAPTURED and not what.apart) or key not in self.seen:
                self._launch(what, step)  # the first one loads what it needs, not captured
                self.seen.add(key)
                continue
            else:
                self._capture(stream, key, step)
            self.graphs[key].launch(stream)

    def _capture(self, stream: Stream, key: tuple[int, Pass], step: Callable[[int], None]) -> None:
        with stream.capture() as graph:
            self._launch(key[1], step)
        self.graphs[key] = graph
        if len(self.graphs) > MAX_GRAPHS:
            stream.synchronize()  # the oldest one may be under way
            del self.graphs[next(iter(self.graphs))]

    def _launch(self, what: Pass, step: Callable[[int], None]) -> None:
        step(what.n)
        if what.n_logits:
            self.blocks.output(what.n - what.n_logits, what.n_logits)
        if what.draw:
            self.blocks.sample(what.n_logits)
