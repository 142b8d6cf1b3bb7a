"""The engine's RoPE, KV cache and attention of few tokens on a GPU, simulated and emulated, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from engine_runs import (
    EMULATED,
    NULL,
    WAVES,
    assert_close,
    check_outputs,
    needs_sanitizers,
    normal,
    poison,
    rms_norm,
    started,
)
from hipquant import wiring
from hipquant.quants import padded
from kv_cache import Cache, decoded, quantized
from planes import QK, UNIT_BYTES, Backend, Bytes, Floats, Wide, check_planes, launch

Halves = npt.NDArray[np.uint16]
pytestmark = needs_sanitizers


@pytest.fixture(scope="module", params=WAVES + EMULATED)
def simulator(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with started(request.param, "rope", "attention") as found:
        yield found


def halves(values: npt.ArrayLike) -> Halves:
    return np.asarray(values, np.float32).astype(np.float16).view(np.uint16)


def wide(values: Halves) -> Wide:
    return values.view(np.float16).astype(np.float64)


# RoPE and the KV cache


@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "head_dim", "n_rot"),
    [(4, 2, 64, 64), (3, 1, 128, 128), (2, 2, 48, 32), (1, 1, 2, 2), (4, 1, 256, 64), (2, 1, 10, 0)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_rope(
    simulator: Backend,
    rng: np.random.Generator,
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    n_rot: int,
    normed: bool,
) -> None:
    n_context, slots = 6, 3
    position, slot = np.array([0, 5, 3, 3], np.int32), np.array([2, 0, 1, 2], np.int32)
    heads = n_head + 2 * n_head_kv
    qkv = normal(rng, 4, heads, head_dim)
    angle = rng.uniform(-3, 3, (n_context, n_rot // 2))
    rope = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    cache = np.full((2, slots, n_head_kv, n_context, head_dim), 0x7E55, np.uint16)
    found, raw, k_cache, v_cache = qkv.copy(), qkv.copy(), cache[0].copy(), cache[1].copy()
    table = rope if n_rot else np.zeros(1, np.float32)
    norms = (1 + normal(rng, 2, head_dim) / 4) if normed else (NULL, NULL)
    params = found, k_cache, v_cache, table, position, slot, n_head, n_head_kv, head_dim, n_rot, n_context, *norms, 1e-5
    sizes = {"n_head": n_head, "n_head_kv": n_head_kv, "ntokens": 4}
    launch(simulator, "rope_store_kv_f16", sizes, *params)

    if normed:
        for kind, heads_of in zip(norms, (slice(n_head), slice(n_head, n_head + n_head_kv)), strict=True):
            qkv[:, heads_of] = rms_norm(qkv[:, heads_of], kind, 1e-5)
    turn = rope[position].astype(np.float64)[:, None, :, :]
    a, b = (qkv[..., i:n_rot:2].astype(np.float64) for i in (0, 1))
    rotated = qkv.astype(np.float64)
    rotated[..., 0:n_rot:2] = a * turn[..., 0] - b * turn[..., 1]
    rotated[..., 1:n_rot:2] = a * turn[..., 1] + b * turn[..., 0]
    assert_close(found[:, :n_head], rotated[:, :n_head])
    np.testing.assert_array_equal(found[:, n_head:], raw[:, n_head:])
    for t in range(4):
        keys = k_cache[slot[t], :, position[t]]
        # A half of the float's neighbour is as good, where the float's rounding decides.
        np.testing.assert_allclose(wide(keys), rotated[t, n_head : n_head + n_head_kv], rtol=2**-11 * 1.01, atol=1e-6)
        if not normed:
            np.testing.assert_array_equal(keys[:, n_rot:], halves(qkv[t, n_head : n_head + n_head_kv, n_rot:]))
        np.testing.assert_array_equal(v_cache[slot[t], :, position[t]], halves(qkv[t, n_head + n_head_kv :]))
        cache[:, slot[t], :, position[t]] = 0
        k_cache[slot[t], :, position[t]] = v_cache[slot[t], :, position[t]] = 0
    np.testing.assert_array_equal(k_cache, cache[0])
    np.testing.assert_array_equal(v_cache, cache[1])


@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "head_dim", "n_rot"), [(4, 2, 64, 64), (3, 1, 128, 32), (2, 2, 96, 96), (5, 1, 256, 256)]
)
@pytest.mark.parametrize("normed", [False, True])
def test_rope_into_a_quantized_cache(
    simulator: Backend,
    rng: np.random.Generator,
    n_head: int,
    n_head_kv: int,
    head_dim: int,
    n_rot: int,
    normed: bool,
) -> None:
    """The same as in a cache of halves, quantized, and nowhere else is anything written; NaN stays in its block."""
    n_context, slots, heads = 6, 3, n_head + 2 * n_head_kv
    position, slot = np.array([0, 5, 3], np.int32), np.array([2, 0, 1], np.int32)
    qkv, rope = normal(rng, 3, heads, head_dim), normal(rng, n_context, n_rot)
    qkv[1, n_head, 3], qkv[2, n_head, :32] = np.nan, 0
    norms = (1 + normal(rng, 2, head_dim) / 4) if normed else (NULL, NULL)
    where = rope, position, slot, n_head, n_head_kv, head_dim, n_rot, n_context, *norms, 1e-5
    sizes, shape = {"n_head": n_head, "n_head_kv": n_head_kv, "ntokens": 3}, (slots, n_head_kv, n_context)
    plain, found = qkv.copy(), qkv.copy()
    of_halves = np.zeros((2, *shape, head_dim), np.uint16)
    quants, scales = np.full((2, *shape, head_dim), 85, np.int8), np.full((2, *shape, head_dim // 32), 85, np.uint16)
    launch(simulator, "rope_store_kv_f16", sizes, plain, *of_halves, *where)
    launch(simulator, "rope_store_kv_q8_0", sizes, found, *quants, *scales, *where)
    np.testing.assert_array_equal(found, plain)
    for t in range(3):
        there = slice(None), slot[t], slice(None), position[t]
        values = wide(of_halves[there])
        for part, kept in zip(decoded(quants[there], scales[there]), values, strict=True):
            blocks, wanted = part.reshape(-1, 32), kept.reshape(-1, 32)
            bad = np.isnan(wanted).any(-1)
            assert np.isnan(blocks[bad]).all()
            step = np.abs(wanted[~bad]).max(-1, keepdims=True) / 127
            assert (np.abs(blocks[~bad] - wanted[~bad]) <= step * 0.51 + 2e-3 * np.abs(wanted[~bad])).all()
        exact = quantized(qkv[t, n_head + n_head_kv :])
        np.testing.assert_array_equal(quants[there][1], exact[0])
        np.testing.assert_array_equal(scales[there][1], exact[1])
        quants[there], scales[there] = 85, 85
    assert (quants == 85).all()
    assert (scales == 85).all()


# Attention


def attention(
    queries: Floats, keys: Wide, values: Wide, begin: int, end: int, scale: float, softcap: float
) -> tuple[Wide, float, float]:
    """Over positions begin to end of one head: sum of weighted values, greatest score, sum of weights."""
    if begin >= end:
        return np.zeros(len(queries)), -np.inf, 0.0
    scores = keys[begin:end] @ queries.astype(np.float64) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    weights = np.exp(scores - scores.max())
    return weights @ values[begin:end], float(scores.max()), float(weights.sum())


ATTENTION = [
    # head_dim, n_head, n_head_kv, splits, positions
    (64, 1, 1, 1, [0]),
    (64, 6, 2, 2, [0, 31, 32, 33]),
    (128, 8, 2, 7, [500, 1]),
    (128, 8, 1, 2, [500, 33]),
    (128, 2, 2, 1, [31, 130]),
    (48, 4, 4, 7, [33, 65]),
    (48, 8, 4, 2, [33, 100]),
    (48, 5, 1, 1, [70]),
    (2, 3, 1, 2, [40, 0]),
    (50, 3, 3, 2, [70, 3]),
    (256, 4, 1, 2, [33, 90]),
    (256, 1, 1, 3, [500]),
    (80, 12, 4, 1, [17, 64]),
    (250, 2, 1, 2, [40]),
    (16, 40, 1, 3, [70]),  # more heads than are put together at a time
    (32, 2, 2, 64, [2100, 700]),
]


class Decode:
    """Tokens of different sequences at `positions`: behind them the cache is NaN."""

    def __init__(
        self, rng: np.random.Generator, head_dim: int, n_head: int, n_head_kv: int, splits: int, positions: list[int]
    ) -> None:
        self.sizes, self.splits, self.positions = (n_head, n_head_kv, head_dim), splits, positions
        self.ntokens, self.n_context, slots = len(positions), max(positions) + 2, len(positions) + 1
        self.slot = np.arange(slots - 1, 0, -1, dtype=np.int32)[: self.ntokens]
        self.scale = float(np.float32(1.5 / np.sqrt(head_dim)))
        self.qkv = normal(rng, self.ntokens, n_head + 2 * n_head_kv, head_dim)
        self.cache = np.full((2, slots, n_head_kv, self.n_context, head_dim), 0x7E00, np.uint16)
        for slot, at in zip(self.slot, positions, strict=True):
            self.cache[:, slot, :, : at + 1] = halves(normal(rng, 2, n_head_kv, at + 1, head_dim))
        self.partial = poison(self.ntokens, n_head, splits, head_dim + 2)
        self.softcap, self.window, self.cache_type = 0.0, 0, "f16"
        self.sinks: Floats | int = NULL

    def hide(self, window: int) -> None:
        """A window, in front of which the cache is NaN."""
        self.window = window
        if not window:
            return
        for slot, at in zip(self.slot, self.positions, strict=True):
            self.cache[:, slot, :, : max(0, at + 1 - window)] = 0x7E00

    def first(self, token: int) -> int:
        return max(0, self.positions[token] + 1 - self.window) if self.window else 0

    def run(self, simulator: Backend, y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        n_head, n_head_kv, head_dim = self.sizes
        position, counters = np.array(self.positions, np.int32), np.zeros((self.ntokens, n_head_kv), np.int32)
        sizes = {"n_head_kv": n_head_kv, "splits": self.splits, "ntokens": self.ntokens}
        cache = Cache(self.cache, self.cache_type)
        self.wide = cache.wide
        self.partial[...] = np.nan
        arrays = self.qkv, *cache.arrays, self.partial, y, q, counters, position, self.slot
        numbers = n_head, n_head_kv, head_dim, self.n_context, self.splits, n_padded, self.scale
        scores = self.softcap, self.window, self.sinks
        name = wiring.attention("decode", self.cache_type, head_dim)
        launch(simulator, name, sizes, *arrays, *numbers, *scores)
        assert not counters.any()

    def share(self, token: int, head: int, begin: int, end: int) -> tuple[Wide, float, float]:
        """What `attention` gives for a head and a share of its positions."""
        keys, values = self.wide[:, self.slot[token], head // (self.sizes[0] // self.sizes[1])]
        return attention(self.qkv[token, head], keys, values, begin, end, self.scale, self.softcap)

    def expected(self) -> Wide:
        n_head, _, head_dim = self.sizes
        found = np.zeros((self.ntokens, n_head, head_dim))
        for t, head in np.ndindex(self.ntokens, n_head):
            sums, top, weights = self.share(t, head, self.first(t), self.positions[t] + 1)
            sink = 0 if isinstance(self.sinks, int) else np.exp(float(self.sinks[head]) - top)
            found[t, head] = sums / (weights + sink)
        return found.reshape(self.ntokens, -1)

    def check_parts(self) -> None:
        """Each part against the softmax of its share; those that have none are not written."""
        for t, head, split in np.ndindex(self.partial.shape[:3]):
            first, length, part = self.first(t), self.positions[t] + 1, self.partial[t, head, split]
            share = -(-(length - first) // (32 * self.splits)) * 32
            begin, end = first + split * share, min(first + (split + 1) * share, length)
            if begin >= end:
                assert np.isnan(part).all()
                continue
            sums, top, weights = self.share(t, head, begin, end)
            assert_close(part[:-2], sums)
            np.testing.assert_allclose(part[-2:], [top, weights], rtol=4e-6, atol=2e-6)


@pytest.mark.parametrize(("head_dim", "n_head", "n_head_kv", "splits", "positions"), ATTENTION)
def test_attention(
    simulator: Backend,
    rng: np.random.Generator,
    head_dim: int,
    n_head: int,
    n_head_kv: int,
    splits: int,
    positions: list[int],
) -> None:
    """The parts, and what becomes of them, against the softmax of their shares and of all positions."""
    decode, n = Decode(rng, head_dim, n_head, n_head_kv, splits, positions), n_head * head_dim
    if head_dim * (n_head // n_head_kv) % QK == 0:
        decode.wide = wide(decode.cache)
        check_outputs(lambda *to: decode.run(simulator, *to), len(positions), n, decode.expected())
    else:
        for n_padded in (n, padded(n)):
            y = poison(len(positions), n_padded)
            decode.run(simulator, y, NULL, n_padded)
            assert_close(y[:, :n], decode.expected())
            assert not y[:, n:].any()
    decode.check_parts()


@pytest.mark.parametrize(
    ("head_dim", "n_head", "n_head_kv", "splits", "positions"),
    [(64, 6, 2, 2, [0, 31, 33]), (128, 8, 1, 3, [500, 33]), (96, 2, 2, 1, [70]), (256, 5, 1, 2, [33, 90])],
)
def test_attention_of_a_quantized_cache(
    simulator: Backend,
    rng: np.random.Generator,
    head_dim: int,
    n_head: int,
    n_head_kv: int,
    splits: int,
    positions: list[int],
) -> None:
    decode, n = Decode(rng, head_dim, n_head, n_head_kv, splits, positions), n_head * head_dim
    decode.cache_type = "q8_0"
    for window, softcap in ((0, 0.0), (29, 2.0)):
        decode.softcap = softcap
        decode.hide(window)
        y = poison(len(positions), n)
        decode.run(simulator, y, NULL, n)
        assert_close(y, decode.expected())
        decode.check_parts()


@pytest.mark.parametrize("head_dim", [64, 128, 10])
def test_attention_of_great_scores(simulator: Backend, rng: np.random.Generator, head_dim: int) -> None:
    """Scores of several hundreds, of both signs: no weight overflows, and the greatest one counts."""
    decode = Decode(rng, head_dim, 1, 1, 2, [69])
    decode.qkv[...], decode.scale = 30, float(np.float32(0.05))
    decode.cache[0, 1, 0, :70] = halves(np.repeat(rng.uniform(-20, 20, (70, 1)), head_dim, 1))
    y = poison(1, head_dim)
    decode.run(simulator, y, NULL, head_dim)
    assert_close(y, decode.expected(), 2e-4)  # a score of 1000 is a float to 6e-5


@pytest.mark.parametrize(
    ("head_dim", "n_head", "n_head_kv", "splits", "positions", "window"),
    [
        (64, 4, 1, 2, [70, 9], 33),
        (128, 2, 2, 3, [100], 64),
        (256, 2, 1, 1, [40, 3], 1),
        (50, 3, 3, 2, [70, 3], 7),
        (80, 6, 2, 4, [33, 260], 200),
    ],
)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows_caps_and_sinks(
    simulator: Backend,
    rng: np.random.Generator,
    head_dim: int,
    n_head: int,
    n_head_kv: int,
    splits: int,
    positions: list[int],
    window: int,
    softcap: float,
    sinks: bool,
) -> None:
    """Positions before the window are not read; a cap bends scores; a sink takes its share of the weights."""
    decode = Decode(rng, head_dim, n_head, n_head_kv, splits, positions)
    decode.softcap, n = softcap, n_head * head_dim
    decode.hide(window)
    if sinks:
        decode.sinks = np.linspace(-2, 4, n_head, dtype=np.float32)
    y = poison(len(positions), n)
    decode.run(simulator, y, NULL, n)
    assert_close(y, decode.expected(), 4e-6)
    decode.check_parts()


def test_tanh_near_0(simulator: Backend, rng: np.random.Generator) -> None:
    """Where tanh is nearly its argument, and where the branches of its computation meet, no digits are lost."""
    decode = Decode(rng, 64, 1, 1, 1, [63])
    decode.qkv[...], decode.scale, decode.softcap = 1, 0.125, 8.0
    y = poison(1, 64)
    for greatest in (0.3, 1e-3):
        decode.cache[0, 1, 0, :64] = halves(np.linspace(-greatest, greatest, 64))[:, None]  # arguments of tanh
        decode.run(simulator, y, NULL, 64)
        assert_close(y, decode.expected(), 3e-6)


def test_attention_of_nan(simulator: Backend, rng: np.random.Generator) -> None:
    """It goes through to the result: of a query to all of its head, of a value to its place in all heads."""
    decode, head_dim = Decode(rng, 64, 2, 1, 2, [39]), 64
    decode.qkv[0, 0, 3], decode.cache[1, 1, 0, 35, 7] = np.nan, 0x7E00
    y, q = np.zeros((1, 2 * head_dim), np.float32), np.full((1, 2 * UNIT_BYTES), 0xA5, np.uint8)
    decode.run(simulator, y, q, 2 * head_dim)
    assert np.isnan(y[0, :head_dim]).all()
    np.testing.assert_array_equal(np.isnan(y[0, head_dim:]), np.arange(head_dim) == 7)
    check_planes(q, y, 2 * head_dim)
