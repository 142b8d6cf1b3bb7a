"""The GPU engine's kernels, simulated under AddressSanitizer and UBSan, against float64 written out here.

Where AMD_EMULATOR names a checkout of tinygrad, its emulator executes the machine code of four AMD targets as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

import emulator
from emulator import Emulator
from hipquant.quants import padded
from hipquant.toolchain import gpu, simulate
from hipquant.toolchain.simulate import Simulator
from kv_cache import Cache, decoded, quantized
from planes import QK, UNIT, UNIT_BYTES, Bytes, Floats, Wide, check_planes, launch

Halves = npt.NDArray[np.uint16]

SOURCES = ["norm", "rope", "attention", "activation", "sample", "read"]
NULL = 0
pytestmark = pytest.mark.skipif(
    not simulate.can_sanitize(),
    reason="the run time of AddressSanitizer and UBSan comes with gcc, which is not installed",
)


WAVES = [pytest.param(wave, id=f"wave{wave}") for wave in (32, 64)]
EMULATED = [pytest.param(target, id=target) for target in emulator.engine_targets()]


@pytest.fixture(scope="module", params=WAVES + EMULATED)
def simulator(request: pytest.FixtureRequest) -> Iterator[Simulator | Emulator]:
    """The sources simulated; and, where there is an emulator, the machine code of four AMD targets on that."""
    if isinstance(request.param, str):
        found: Simulator | Emulator = emulator.engine(request.param)
    else:
        found = simulate.build(request.param, True, [gpu.ENGINE / f"{name}.hip" for name in SOURCES])
    yield found
    found.close()


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    return np.random.default_rng([ord(c) for c in request.node.name])


def poison(*shape: int) -> Floats:
    return np.full(shape, np.nan, np.float32)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def halves(values: npt.ArrayLike) -> Halves:
    return np.asarray(values, np.float32).astype(np.float16).view(np.uint16)


def wide(values: Halves) -> Wide:
    return values.view(np.float16).astype(np.float64)


def assert_close(found: npt.ArrayLike, expected: npt.ArrayLike, tolerance: float = 2e-6) -> None:
    """Within a tolerance of the greatest of the expected values, and NaN where they are."""
    scale = float(np.nanmax(np.abs(np.asarray(expected, np.float64)), initial=0))
    np.testing.assert_allclose(found, expected, rtol=2 * tolerance, atol=tolerance * scale)


def outputs(rows: int, n_padded: int, which: str) -> tuple[Floats | int, Bytes | int]:
    """Poisoned arrays for y and q, or null: which is "y", "q" or "yq"."""
    y = poison(rows, n_padded) if "y" in which else NULL
    q = np.full((rows, n_padded // UNIT * UNIT_BYTES), 0xA5, np.uint8) if "q" in which else NULL
    return y, q


def check_outputs(run: Callable[..., None], rows: int, n: int, expected: Wide, tolerance: float = 2e-6) -> None:
    """Runs a kernel `run(y, q, n_padded)` with both outputs, padded far and no further than must be, and with each."""
    for n_padded in (padded(n), -(-n // UNIT) * UNIT):
        y, q = outputs(rows, n_padded, "yq")
        assert isinstance(y, np.ndarray)
        assert isinstance(q, np.ndarray)
        run(y, q, n_padded)
        assert_close(y[:, :n], expected, tolerance)
        assert not y[:, n:].any()
        check_planes(q, y[:, :n], n_padded)
    for which in "yq":
        alone = outputs(rows, n_padded, which)
        run(*alone, n_padded)
        for found, wanted in zip(alone, (y, q), strict=True):
            if isinstance(found, np.ndarray):
                np.testing.assert_array_equal(found, wanted)


# Norm


def rms_norm(x: Floats, weight: Floats, eps: float) -> Wide:
    v = x.astype(np.float64)
    return v * weight / np.sqrt((v * v).mean(-1, keepdims=True) + eps)


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (2, 4096 + 32), (2, 576)])
def test_norm(
    simulator: Simulator | Emulator, rng: np.random.Generator, rows: int, n: int, with_residual: bool
) -> None:
    x, residual, weight = normal(rng, rows, n), normal(rng, rows, n), normal(rng, n)
    x[-1] *= 300
    sum = x + residual if with_residual else x

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        stream = x.copy()
        params = stream, residual if with_residual else NULL, weight, y, q, n, n_padded, 1e-5
        launch(simulator, "add_rms_norm_q8", {"rows": rows}, *params)
        np.testing.assert_array_equal(stream, sum)

    check_outputs(run, rows, n, rms_norm(sum, weight, 1e-5))


@pytest.mark.parametrize("n", [1, 7, 258, 1023])
def test_norm_of_any_length(simulator: Simulator | Emulator, rng: np.random.Generator, n: int) -> None:
    """Without planes a row need not be whole blocks, nor aligned to 16 bytes."""
    x, residual, weight, y = normal(rng, 3, n), normal(rng, 3, n), normal(rng, n), poison(3, n)
    stream = x.copy()
    launch(simulator, "add_rms_norm_q8", {"rows": 3}, stream, residual, weight, y, NULL, n, n, 1e-6)
    np.testing.assert_array_equal(stream, x + residual)
    assert_close(y, rms_norm(stream, weight, 1e-6))


def test_norm_of_zeros_and_nan(simulator: Simulator | Emulator, rng: np.random.Generator) -> None:
    x = normal(rng, 3, 64)
    x[0], x[1, 5] = 0, np.nan
    expected = rms_norm(x, np.ones(64, np.float32), 1e-5)
    assert np.isnan(expected[1]).all()

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        weight = np.ones(64, np.float32)
        launch(simulator, "add_rms_norm_q8", {"rows": 3}, x.copy(), NULL, weight, y, q, 64, n_padded, 1e-5)

    check_outputs(run, 3, 64, expected)


@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (2, 8192 + 4096 + 32), (2, 576)])
def test_norm_of_a_normed_branch(simulator: Simulator | Emulator, rng: np.random.Generator, rows: int, n: int) -> None:
    """x += branch / rms(branch) * post, and then the norm of x."""
    x, branch, post, weight = normal(rng, rows, n), normal(rng, rows, n), normal(rng, n), normal(rng, n)
    branch[-1] *= 300
    added = x + rms_norm(branch, post, 1e-5)

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        stream = x.copy()
        params = stream, branch, post, weight, y, q, n, n_padded, 1e-5
        launch(simulator, "add_normed_rms_norm_q8", {"rows": rows}, *params)
        assert_close(stream, added)

    check_outputs(run, rows, n, rms_norm(added, weight, 1e-5), 4e-6)


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Wide:
    v = x.astype(np.float64)
    return (v - v.mean(-1, keepdims=True)) / np.sqrt(v.var(-1, keepdims=True) + eps) * weight + bias


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (2, 8192 + 4096 + 32), (2, 576)])
def test_layer_norm(
    simulator: Simulator | Emulator, rng: np.random.Generator, rows: int, n: int, with_residual: bool
) -> None:
    x, residual, weight, bias = 5 + normal(rng, rows, n), normal(rng, rows, n), normal(rng, n), normal(rng, n)
    x[-1] *= 30
    sum = x + residual if with_residual else x

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        stream = x.copy()
        params = stream, residual if with_residual else NULL, weight, bias, y, q, n, n_padded, 1e-5
        launch(simulator, "add_layer_norm_q8", {"rows": rows}, *params)
        np.testing.assert_array_equal(stream, sum)

    check_outputs(run, rows, n, layer_norm(sum, weight, bias, 1e-5), 4e-6)
    run(NULL, NULL, padded(n))  # only adds


@pytest.mark.parametrize("n", [1, 7, 258, 1023])
def test_further_norms_of_any_length(simulator: Simulator | Emulator, rng: np.random.Generator, n: int) -> None:
    x, residual, weight, other, y = normal(rng, 3, n), normal(rng, 3, n), normal(rng, n), normal(rng, n), poison(3, n)
    stream = x.copy()
    launch(simulator, "add_layer_norm_q8", {"rows": 3}, stream, residual, weight, other, y, NULL, n, n, 1e-6)
    assert_close(y, layer_norm(x + residual, weight, other, 1e-6), 4e-6)
    stream = x.copy()
    launch(simulator, "add_normed_rms_norm_q8", {"rows": 3}, stream, residual, other, weight, y, NULL, n, n, 1e-6)
    assert_close(y, rms_norm(x + rms_norm(residual, other, 1e-6), weight, 1e-6), 4e-6)


# RoPE and the KV cache


@pytest.mark.parametrize(
    ("n_head", "n_head_kv", "head_dim", "n_rot"),
    [(4, 2, 64, 64), (3, 1, 128, 128), (2, 2, 48, 32), (1, 1, 2, 2), (4, 1, 256, 64), (2, 1, 10, 0)],
)
@pytest.mark.parametrize("normed", [False, True])
def test_rope(
    simulator: Simulator | Emulator,
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
    simulator: Simulator | Emulator,
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

    def run(self, simulator: Simulator | Emulator, y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        n_head, n_head_kv, head_dim = self.sizes
        position, counters = np.array(self.positions, np.int32), np.zeros((self.ntokens, n_head_kv), np.int32)
        sizes = {"n_head_kv": n_head_kv, "splits": self.splits, "ntokens": self.ntokens}
        cache = Cache(self.cache, self.cache_type)
        self.wide = cache.wide
        self.partial[...] = np.nan
        arrays = self.qkv, *cache.arrays, self.partial, y, q, counters, position, self.slot
        numbers = n_head, n_head_kv, head_dim, self.n_context, self.splits, n_padded, self.scale
        scores = self.softcap, self.window, self.sinks
        launch(simulator, f"attention_decode_{self.cache_type}", sizes, *arrays, *numbers, *scores)
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
    simulator: Simulator | Emulator,
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
    simulator: Simulator | Emulator,
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
def test_attention_of_great_scores(simulator: Simulator | Emulator, rng: np.random.Generator, head_dim: int) -> None:
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
    simulator: Simulator | Emulator,
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


def test_tanh_near_0(simulator: Simulator | Emulator, rng: np.random.Generator) -> None:
    """Where tanh is nearly its argument, and where the branches of its computation meet, no digits are lost."""
    decode = Decode(rng, 64, 1, 1, 1, [63])
    decode.qkv[...], decode.scale, decode.softcap = 1, 0.125, 8.0
    y = poison(1, 64)
    for greatest in (0.3, 1e-3):
        decode.cache[0, 1, 0, :64] = halves(np.linspace(-greatest, greatest, 64))[:, None]  # arguments of tanh
        decode.run(simulator, y, NULL, 64)
        assert_close(y, decode.expected(), 3e-6)


def test_attention_of_nan(simulator: Simulator | Emulator, rng: np.random.Generator) -> None:
    """It goes through to the result: of a query to all of its head, of a value to its place in all heads."""
    decode, head_dim = Decode(rng, 64, 2, 1, 2, [39]), 64
    decode.qkv[0, 0, 3], decode.cache[1, 1, 0, 35, 7] = np.nan, 0x7E00
    y, q = np.zeros((1, 2 * head_dim), np.float32), np.full((1, 2 * UNIT_BYTES), 0xA5, np.uint8)
    decode.run(simulator, y, q, 2 * head_dim)
    assert np.isnan(y[0, :head_dim]).all()
    np.testing.assert_array_equal(np.isnan(y[0, head_dim:]), np.arange(head_dim) == 7)
    check_planes(q, y, 2 * head_dim)


# Activation and bias


@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (2, 1024 + 32)])
def test_silu(simulator: Simulator | Emulator, rng: np.random.Generator, rows: int, n: int) -> None:
    gate_up = 4 * normal(rng, rows, 2 * n)
    gate_up[:, :16] = np.linspace(-120, 120, 16)
    gate_up[-1, [20, n - 1]] = np.nan  # of its block alone
    gate, up = gate_up[:, :n].astype(np.float64), gate_up[:, n:]

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        launch(simulator, "silu_mul_q8", {"n_padded": n_padded, "rows": rows}, gate_up, y, q, n, n_padded)

    check_outputs(run, rows, n, gate / (1 + np.exp(-gate)) * up, 1e-6)


def test_silu_is_exact_where_it_is_small(simulator: Simulator | Emulator) -> None:
    """The relative error of e^x: with up = 1, silu(gate) / gate = 1 / (1 + e^-gate)."""
    n = 1000
    gate = np.linspace(-85, 20, n).astype(np.float32)
    gate[0] = np.nan
    y = poison(1, n)
    gate_up = np.concatenate([gate, np.ones(n, np.float32)])[None]
    launch(simulator, "silu_mul_q8", {"n_padded": n, "rows": 1}, gate_up, y, NULL, n, n)
    exact = gate.astype(np.float64)
    np.testing.assert_allclose(y[0], exact / (1 + np.exp(-exact)), rtol=1e-6)
    assert np.isnan(y[0, 0])


def gelu(x: npt.NDArray[np.floating]) -> Wide:
    """In the tanh form."""
    v = x.astype(np.float64)
    return v / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (2, 1024 + 32)])
def test_gelu(simulator: Simulator | Emulator, rng: np.random.Generator, rows: int, n: int, gated: bool) -> None:
    x = 2 * normal(rng, rows, 2 * n if gated else n)
    x[:, :16] = np.linspace(-120, 120, 16)
    x[-1, n - 1] = np.nan
    expected = gelu(x[:, :n]) * (x[:, n:] if gated else 1)

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        name = "gelu_mul_q8" if gated else "gelu_q8"
        launch(simulator, name, {"n_padded": n_padded, "rows": rows}, x, y, q, n, n_padded)

    check_outputs(run, rows, n, expected, 1e-6)


@pytest.mark.parametrize("n", [1, 7, 1024, 3001])
def test_scale_and_softcap(simulator: Simulator | Emulator, rng: np.random.Generator, n: int) -> None:
    """Soft-capping keeps the digits of small values, and NaN."""
    x = (normal(rng, n) * 10.0 ** rng.uniform(-6, 3, n)).astype(np.float32)
    x[-1] = np.nan if n > 7 else 1.0
    found = x.copy()
    launch(simulator, "scale_rows_f32", {"n": n}, found, n, 5.5)
    np.testing.assert_array_equal(found, x * np.float32(5.5))
    launch(simulator, "softcap_rows_f32", {"n": n}, x, n, 30.0)
    np.testing.assert_allclose(x, 30 * np.tanh(found / 5.5 / 30), rtol=1e-6)


@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 70), (2, 1024 + 32)])
def test_quantize(simulator: Simulator | Emulator, rng: np.random.Generator, rows: int, n: int) -> None:
    for n_padded in (padded(n), -(-n // UNIT) * UNIT):
        x = np.zeros((rows, n_padded), np.float32)
        x[:, :n] = normal(rng, rows, n)
        x[-1, 5], x[0, :16] = np.nan, 1e-3 * x[0, :16]
        q = np.full((rows, n_padded // UNIT * UNIT_BYTES), 0xA5, np.uint8)
        launch(simulator, "quantize_q8", {"n_padded": n_padded, "rows": rows}, x, q, n_padded)
        check_planes(q, x, n_padded)


@pytest.mark.parametrize(("n", "stride"), [(1, 3), (256, 256), (300, 700)])
def test_bias(simulator: Simulator | Emulator, rng: np.random.Generator, n: int, stride: int) -> None:
    x, bias = normal(rng, 3, stride), normal(rng, n)
    found = x.copy()
    launch(simulator, "add_bias_rows_f32", {"n": n, "rows": 3}, found, bias, n, stride)
    np.testing.assert_array_equal(found[:, :n], x[:, :n] + bias)
    np.testing.assert_array_equal(found[:, n:], x[:, n:])


@pytest.mark.parametrize("nbytes", [16, 4112, (1 << 20) + 48])
def test_read_memory(simulator: Simulator | Emulator, rng: np.random.Generator, nbytes: int) -> None:
    """The sum of the words of each MiB, modulo 2^32."""
    x = rng.integers(-(1 << 31), 1 << 31, nbytes // 4).astype(np.int32)
    found = np.full(-(-nbytes // (1 << 20)), -1, np.int32)
    launch(simulator, "read_memory", {"nbytes": nbytes}, x, found, nbytes)
    parts = np.split(x.astype(np.int64), range(1 << 18, len(x), 1 << 18))
    np.testing.assert_array_equal(found, np.array([part.sum() for part in parts]).astype(np.int32))
