"""From logits to the next token, and from pieces of text to the place where generation stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BLOCK = 256  # of the search for the top k: large enough that few maxima remain, small enough to bound k well


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the order of the steps and the defaults are those of llama.cpp's sampler chain.

    temperature: divides the logits; 0 takes the best token. top_k: the k best remain (0: all). top_p: of these the
    fewest whose probabilities sum to p (1: all). min_p: of these the ones at least min_p times as probable as the best
    (0: all). repetition_penalty: logits of the last `repetition_window` tokens are divided by it where positive,
    multiplied where negative (1: off). seed: None draws one from the system.
    Raises ValueError for values out of range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("temperature", 0.0, math.inf),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("repetition_penalty", 0.0, math.inf),
        ):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not low <= value <= high or math.isinf(value):
                raise ValueError(f"{name}: found {value!r}, expected a number from {low:g} to {high:g}")
        if self.repetition_penalty == 0:
            raise ValueError("repetition_penalty: found 0, expected a number above 0 (1 is no penalty)")
        for name in ("top_k", "repetition_window", "seed"):
            value = getattr(self, name)
            if name == "seed" and value is None:
                continue
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}: found {value!r}, expected a whole number from 0")


class Sampler:
    """Draws tokens by SamplingParams. The same seed and the same logits give the same tokens (PCG64)."""

    def __init__(self, params: SamplingParams | None = None) -> None:
        self.params = SamplingParams() if params is None else params
        self._random = np.random.Generator(np.random.PCG64(self.params.seed))

    def sample(self, logits: npt.NDArray[np.float32], recent: Sequence[int] = ()) -> int:
        """The next token for logits [n_vocab]; `recent` are the tokens before it, the newest last.

        Logits of -inf are never drawn. Raises ValueError for NaN, for +inf and where no logit is finite.
        """
        logits = np.asarray(logits, np.float32)
        if logits.ndim != 1 or not logits.size:
            raise ValueError(f"logits: found shape {list(logits.shape)}, expected [n_vocab]")
        best = logits.max()  # NaN if there is one
        if not np.isfinite(best):
            at = int(np.argmax(np.isnan(logits) | (logits == best)))
            raise ValueError(f"logits: found {logits[at]} for token {at}, expected finite numbers (or -inf for some)")
        logits = self._penalized(logits, recent)
        if self.params.temperature == 0:
            return int(logits.argmax())
        tokens, values = self._candidates(logits)
        weights = np.exp((values - values.max()) / self.params.temperature)
        cumulative = np.cumsum(weights)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(tokens[min(int(drawn), len(tokens) - 1)])

    def _penalized(self, logits: npt.NDArray[np.float32], recent: Sequence[int]) -> npt.NDArray[np.float32]:
        penalty, window = self.params.repetition_penalty, self.params.repetition_window
        if penalty == 1 or window == 0 or not len(recent):
            return logits
        tokens = np.unique(np.asarray(recent[-window:], np.int64))
        tokens = tokens[(tokens >= 0) & (tokens < len(logits))]
        logits = logits.copy()
        values = logits[tokens]
        logits[tokens] = np.where(values > 0, values / penalty, values * penalty)
        return logits

    def _candidates(self, logits: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Tokens and logits that remain after top-k, top-p and min-p."""
        p, keep = self.params.top_p, self.params.top_k
        if 0 < keep < len(logits):
            tokens, values = _sorted(logits, _top(logits, keep))
            tokens, values = tokens[:keep], values[:keep]
            total = np.exp(values - values[0]).sum()
        elif p < 1:
            weights = np.exp(logits - logits.max())
            total = weights.sum(dtype=np.float64)
            # What is left out here sums to less than 1 - p; sorting the few that remain is what makes this quick.
            floor = total * (1 - p) / len(logits)
            tokens, values = _sorted(logits, np.flatnonzero((weights >= floor) & (weights > 0)))
        else:
            tokens = np.flatnonzero(logits > -np.inf)
            values = logits[tokens].astype(np.float64)
        if p < 1:
            cumulative = np.cumsum(np.exp(values - values[0]))
            values = values[: int(np.searchsorted(cumulative, p * total)) + 1]
            tokens = tokens[: len(values)]
        if self.params.min_p > 0:
            probable = values >= values.max() + math.log(self.params.min_p)
            tokens, values = tokens[probable], values[probable]
        return tokens, values


def _top(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Tokens among which the k best are: the k-th best maximum of a block is a bound that k logits reach."""
    blocks = len(logits) // _BLOCK
    if blocks <= k:
        kth = np.partition(logits, len(logits) - k)[len(logits) - k]
    else:
        maxima = logits[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        kth = np.partition(maxima, blocks - k)[blocks - k]
    return np.flatnonzero(logits >= kth)


def _sorted(
    logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Best first, the lower id first among equals: one sort of integers, the logit's rank above the id."""
    bits = (logits[tokens] + np.float32(0)).view(np.int32)  # -0 becomes 0, which it equals
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE floats, negatives flipped, order as integers
    tokens = np.sort((~rank.astype(np.int64) << 32) | tokens) & 0xFFFFFFFF
    return tokens, logits[tokens].astype(np.float64)


class StopStrings:
    """Finds the first stop string in a text that comes in pieces, whatever the cuts.

    First is the one that ends first, of several with one end the longest. Text that may begin a stop string is held
    back. One Knuth-Morris-Pratt automaton for each string: the time is linear in the text.
    Raises ValueError for an empty stop string.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if isinstance(strings, str) or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(f"stop strings: found {strings!r}, expected a sequence of strings that are not empty")
        self._strings = sorted(set(strings), key=len, reverse=True)
        self._failures = [_failures(string) for string in self._strings]
        self._matched = [0] * len(self._strings)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """Takes the next piece; returns the text that is certain now, and whether a stop string was found."""
        if self.stopped:
            return "", True
        before, text = len(self._held), self._held + piece
        for i, character in enumerate(piece):
            for n, string in enumerate(self._strings):
                matched = self._step(n, string, character)
                if matched == len(string):
                    self.stopped, self._held = True, ""
                    return text[: before + i + 1 - matched], True
        keep = max(self._matched, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _step(self, n: int, string: str, character: str) -> int:
        matched = self._matched[n]
        while matched and string[matched] != character:
            matched = self._failures[n][matched - 1]
        self._matched[n] = matched = matched + (string[matched] == character)
        return matched

    def flush(self) -> str:
        """The text held back at the end: no stop string came of it."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._strings)
        return held


def _failures(string: str) -> list[int]:
    """For each prefix the length of its longest proper border (Knuth, Morris, Pratt 1977)."""
    table, border = [0], 0
    for character in string[1:]:
        while border and string[border] != character:
            border = table[border - 1]
        border += string[border] == character
        table.append(border)
    return table
