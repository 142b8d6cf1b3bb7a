"""From logits to the next token, and from pieces of text to the place where generation stops."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_BLOCK = 256  # of the search for the top k: large enough that few maxima remain, small enough to bound k well
_LOW_32, _LOW_64 = 2**32 - 1, 2**64 - 1
_FLOAT32 = np.finfo(np.float32)


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
    """Draws tokens by SamplingParams. The same seed and the same logits give the same tokens, on any device.

    The nth draw takes random bits n of the seed's sequence, of which the low 64 bits count. Probabilities are whole
    multiples of 2^-40 of the best token's: what is less probable is never drawn. GPUs draw alike (`engine/sample.hip`).
    """

    def __init__(self, params: SamplingParams | None = None) -> None:
        self.params = SamplingParams() if params is None else params
        self.seed = secrets.randbits(64) if self.params.seed is None else int(self.params.seed) & _LOW_64
        self.draws = 0  # so far

    def sample(self, logits: npt.NDArray[np.float32], recent: Sequence[int] = ()) -> int:
        """The next token for logits [n_vocab]; `recent` are the tokens before it, the newest last.

        Logits of -inf are never drawn. Raises ValueError for NaN, for +inf and where no logit is finite.
        """
        logits = np.asarray(logits, np.float32)
        if logits.ndim != 1 or not logits.size:
            raise ValueError(f"logits: found shape {list(logits.shape)}, expected [n_vocab]")
        if not np.isfinite(logits.max()):  # NaN if there is one
            raise unusable_logits(int(np.argmax(~(logits < np.inf))))
        logits = self._penalized(logits, recent)
        number, self.draws = self.draws, self.draws + 1
        best = int(logits.argmax())
        if self.params.temperature == 0:
            return best
        tokens = self._candidates(logits)
        distance = _distance(logits[tokens], logits[best])
        chances = _probabilities(distance * _float32(1 / self.params.temperature))
        chances[distance < self._least] = 0
        return int(tokens[_first_above(chances, lambda total: total * random_bits(self.seed, number) >> 64)])

    @property
    def _least(self) -> np.float32:
        """How far below the best logit one may be by min-p."""
        return np.float32(math.log(self.params.min_p) if self.params.min_p > 0 else -np.inf)

    @property
    def _nucleus(self) -> int:
        """top_p in 2^-64; 2^64 - 1 is all."""
        return _LOW_64 if self.params.top_p >= 1 else int(self.params.top_p * 2**64)

    def _penalized(self, logits: npt.NDArray[np.float32], recent: Sequence[int]) -> npt.NDArray[np.float32]:
        window = self.params.repetition_window
        if self.params.repetition_penalty == 1 or window == 0 or not len(recent):
            return logits
        tokens = np.unique(np.asarray(recent[-window:], np.int64))
        tokens = tokens[(tokens >= 0) & (tokens < len(logits))]
        tokens = tokens[np.isfinite(logits[tokens])]
        logits, values, penalty = logits.copy(), logits[tokens], _float32(self.params.repetition_penalty)
        with np.errstate(over="ignore", under="ignore"):
            values = np.where(values > 0, values / penalty, values * penalty)
        logits[tokens] = np.clip(values, -_FLOAT32.max, _FLOAT32.max)
        return logits

    def _candidates(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """Tokens that remain after top-k and top-p, best first where there is either."""
        p, keep = self.params.top_p, self.params.top_k
        if 0 < keep < len(logits):
            tokens = _sorted(logits, _top(logits, keep))[:keep]
            weights = _probabilities(_distance(logits[tokens], logits[tokens[0]]))
            total = int(weights.sum())
        elif p < 1:
            weights = _probabilities(_distance(logits, logits.max()))
            total = int(weights.sum())
            # What is left out here sums to less than is not wanted; sorting the few that remain makes this quick.
            floor = max(1, (total - (total * self._nucleus >> 64)) // len(logits))
            tokens = _sorted(logits, np.flatnonzero(weights >= floor))
            weights = weights[tokens]
        else:
            return np.arange(len(logits))
        if p < 1:
            tokens = tokens[: _first_above(weights, lambda _: max(0, (total * self._nucleus >> 64) - 1)) + 1]
        return tokens


def unusable_logits(token: int) -> ValueError:
    """For logits of which `token` is the first that is NaN or infinite, or 0 where all are -inf."""
    return ValueError(
        f"logits: found NaN or infinity for token {token}, expected finite numbers (or -inf for some); "
        "where a model gives them, its file is damaged or was converted with overflow: get it again"
    )


def random_bits(seed: int, number: int) -> int:
    """64 random bits for a number of a seed's sequence: Philox 4x32-10 (Salmon et al., SC 2011)."""
    k0, k1, c0, c1, c2, c3 = seed & _LOW_32, seed >> 32, number, 0, 0, 0
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _LOW_32, (a >> 32) ^ c3 ^ k1, a & _LOW_32
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_32, (k1 + 0xBB67AE85) & _LOW_32
    return c1 << 32 | c0


def _probabilities(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint64]:
    """e^x for x <= 0 as multiples of 2^-40, in arithmetic that every processor does alike: sample.hip has the same."""
    inside = x > -28
    x = np.where(inside, x, np.float32(0))
    n = (x * np.float32(1.44269504) - np.float32(0.5)).astype(np.int32)
    r = (x - n.astype(np.float32) * np.float32(0.693359375)) - n.astype(np.float32) * np.float32(-2.12194440e-4)
    e = np.full_like(r, 1 / 5040)
    for term in (720, 120, 24, 6, 2, 1, 1):
        e = e * r + np.float32(1) / np.float32(term)
    fixed = (e * np.float32(1 << 24)).astype(np.uint64) << np.uint64(16) >> (-n).astype(np.uint64)
    return np.where(inside, fixed, np.uint64(0))


def _distance(logits: npt.NDArray[np.float32], best: np.float32) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # to -inf, which has no probability
        return logits - best


def _float32(value: float) -> np.float32:
    """The nearest float above 0 that is not subnormal and not infinite."""
    return np.float32(min(max(value, float(_FLOAT32.tiny)), float(_FLOAT32.max)))


def _first_above(weights: npt.NDArray[np.uint64], target_of: Callable[[int], int]) -> int:
    """The first of weights at which their running sum exceeds the target, which is found for the sum of all."""
    sums = np.cumsum(weights)
    return int(np.searchsorted(sums, np.uint64(target_of(int(sums[-1]))), side="right"))


def _top(logits: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Tokens among which the k best are: the k-th best maximum of a block is a bound that k logits reach."""
    blocks = len(logits) // _BLOCK
    if blocks <= k:
        kth = np.partition(logits, len(logits) - k)[len(logits) - k]
    else:
        maxima = logits[: blocks * _BLOCK].reshape(blocks, _BLOCK).max(axis=1)
        kth = np.partition(maxima, blocks - k)[blocks - k]
    return np.flatnonzero(logits >= kth)


def _sorted(logits: npt.NDArray[np.float32], tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Best first, the lower id first among equals: one sort of integers, the logit's rank above the id."""
    bits = (logits[tokens] + np.float32(0)).view(np.int32)  # -0 becomes 0, which it equals
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # IEEE floats, negatives flipped, order as integers
    return np.sort((~rank.astype(np.int64) << 32) | tokens) & 0xFFFFFFFF


# How a GPU draws for a sequence: 16 words, which the kernels of engine/sample.hip read and count on.
_STATE = np.dtype(
    {
        "names": ["position", "first", "top_k", "window", "penalty", "inverse_temperature", "least", "seed", "top_p"],
        "formats": ["<i4", "<i4", "<i4", "<i4", "<f4", "<f4", "<f4", "<u8", "<u8"],
        "offsets": [0, 4, 8, 12, 16, 20, 24, 32, 40],
        "itemsize": 64,
    }
)
STATE_WORDS = _STATE.itemsize // 4
SAMPLES = 4  # tokens of a sequence that wait to be read: the one for position p is number p % 4


def state(sampler: Sampler, position: int, n_vocab: int) -> npt.NDArray[np.uint32]:
    """The state of a sequence whose next token, at `position`, is the sampler's next draw: 16 words."""
    p, words = sampler.params, np.zeros(1, _STATE)
    words["position"], words["first"] = position, position - sampler.draws
    words["top_k"] = p.top_k if p.top_k < n_vocab else 0
    words["window"] = 0 if p.repetition_penalty == 1 else min(p.repetition_window, 2**31 - 1)
    words["penalty"] = _float32(p.repetition_penalty)
    words["inverse_temperature"] = _float32(1 / p.temperature) if p.temperature else 0
    words["least"], words["seed"], words["top_p"] = sampler._least, sampler.seed, sampler._nucleus
    return words.view(np.uint32)


def work_words(n_vocab: int) -> int:
    """Words of memory that a row of logits takes while a token is drawn; they are 0 at the begin."""
    return 16 + 2048 + 4 * -(-n_vocab // 1024) + 2 * n_vocab


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
