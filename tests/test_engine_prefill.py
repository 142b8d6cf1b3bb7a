"""Attention of long passes on a GPU, simulated and emulated: every way through it, against float64."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

from emulator import Emulator
from engine_runs import EMULATED, needs_sanitizers, started
from hipquant import wiring
from hipquant.codeobjects import ENGINE
from hipquant.quants import padded
from hipquant.targets import GPU_TARGETS, GpuTarget
from hipquant.toolchain.compile import FACTS
from kv_cache import Cache
from planes import Backend, Floats, Wide
from reference import nmse

Halves = npt.NDArray[np.uint16]

LIMIT = 1e-6  # NMSE: queries and weights are rounded to halves
NAN = 0x7E00
pytestmark = needs_sanitizers


# How the simulator multiplies (HQ_MATRIX_UNITS of simulate.h), and on which waves.
SIMULATED = [
    pytest.param((wave, units), id=f"wave{wave}-{name}")
    for name, units, waves in [
        ("mma", 1, (32, 64)),
        ("wmma-rdna3", 16, (32,)),
        ("wmma-rdna4", 8, (32,)),
        ("mfma", 4, (64,)),
        ("vectors", 0, (32, 64)),
    ]
    for wave in waves
]


@pytest.fixture(scope="module", params=SIMULATED + EMULATED)
def simulator(request: pytest.FixtureRequest) -> Iterator[Backend]:
    which, units = request.param if isinstance(request.param, tuple) else (request.param, 0)
    with started(which, "attention_prefill", matrix_units=units) as found:
        yield found


class Pass:
    """A pass of n tokens behind `offset` positions of sequence 1 of 3; what is not yet in the cache is NaN."""

    def __init__(
        self, rng: np.random.Generator, n: int, offset: int, head_dim: int, n_head: int, n_head_kv: int
    ) -> None:
        self.n, self.offset, self.sizes = n, offset, (n_head, n_head_kv, head_dim)
        self.scale, self.length, self.n_context = float(np.float32(1.5 / np.sqrt(head_dim))), offset + n, offset + n + 3
        self.n_padded = padded(n_head * head_dim)
        self.qkv = rng.standard_normal((n, n_head + 2 * n_head_kv, head_dim)).astype(np.float32)
        self.qkv[:, n_head:] = np.nan  # they are read from the cache alone
        self.cache = np.full((2, 3, n_head_kv, self.n_context, head_dim), NAN, np.uint16)
        there = rng.standard_normal((2, n_head_kv, self.length, head_dim)).astype(np.float16)
        self.cache[:, 1, :, : self.length] = there.view(np.uint16)
        self.softcap, self.window, self.cache_type = 0.0, 0, "f16"
        self.sinks: Floats | int = 0

    def run(self, simulator: Backend) -> Floats:
        n_head, n_head_kv, head_dim = self.sizes
        y = np.full((self.n, self.n_padded), np.nan, np.float32)
        position = np.arange(self.offset, self.length, dtype=np.int32)
        slot = np.ones(self.n, np.int32)
        row = wiring.kernel(wiring.attention("prefill", self.cache_type, head_dim))
        grid = row.grid(n_head=n_head, n_head_kv=n_head_kv, ntokens=self.n)
        numbers = n_head, n_head_kv, head_dim, self.n_context, self.n, self.n_padded, self.scale
        numbers = *numbers, self.softcap, self.window, self.sinks  # type: ignore[assignment]
        arrays = Cache(self.cache, self.cache_type).arrays
        simulator.launch(row, grid, (self.qkv, *arrays, y, position, slot, *numbers))
        assert not y[:, n_head * head_dim :].any()
        return y[:, : n_head * head_dim].reshape(self.n, n_head, head_dim)

    def expected(self) -> Wide:
        n_head, n_head_kv, head_dim = self.sizes
        keys, values = Cache(self.cache, self.cache_type).wide[:, 1, :, : self.length]
        queries = self.qkv[:, :n_head].astype(np.float64).reshape(self.n, n_head_kv, -1, head_dim)
        scores = np.einsum("tkgd,kpd->tkgp", queries, keys) * self.scale
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        behind = np.arange(self.offset, self.length)[:, None] - np.arange(self.length)
        seen = (behind >= 0) & (behind < (self.window or self.length))
        scores = np.where(seen[:, None, None], scores, -np.inf)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        if not isinstance(self.sinks, int):
            total += np.exp(self.sinks.reshape(1, n_head_kv, -1, 1) - top)
        values = np.where(seen.any(0)[:, None], values, 0)  # in front of all windows there is NaN
        sums = np.einsum("tkgp,kpd->tkgd", weights / total, values)
        return sums.reshape(self.n, n_head, head_dim)


@pytest.mark.parametrize(
    ("n", "offset", "head_dim", "n_head", "n_head_kv"),
    [
        (1, 0, 64, 1, 1),
        (9, 0, 64, 4, 4),
        (64, 0, 64, 1, 1),
        (70, 5, 64, 2, 2),
        (70, 37, 128, 1, 1),
        (33, 0, 128, 6, 2),
        (17, 5, 128, 8, 2),
        (20, 37, 128, 7, 1),
        (9, 130, 128, 8, 1),
        (31, 37, 80, 3, 1),
        (65, 0, 96, 1, 1),
        (12, 5, 48, 4, 1),
        (10, 0, 24, 3, 3),
        (35, 37, 256, 2, 1),
        (9, 0, 136, 1, 1),
        (40, 0, 250, 2, 2),
        (23, 5, 50, 3, 1),
        (70, 0, 2, 1, 1),
        (5, 62, 64, 1, 1),  # the second token's key is the last one of a tile
        (5, 62, 256, 1, 1),
    ],
)
def test_passes(
    simulator: Backend,
    rng: np.random.Generator,
    n: int,
    offset: int,
    head_dim: int,
    n_head: int,
    n_head_kv: int,
) -> None:
    a_pass = Pass(rng, n, offset, head_dim, n_head, n_head_kv)
    found, expected = a_pass.run(simulator), a_pass.expected()
    assert nmse(found, expected) <= LIMIT
    np.testing.assert_allclose(found, expected, atol=5e-3)  # of each token


@pytest.mark.parametrize(
    ("n", "offset", "head_dim", "n_head", "n_head_kv", "window"),
    [
        (9, 130, 128, 8, 1, 64),
        (70, 37, 64, 2, 2, 20),
        (65, 70, 96, 1, 1, 1),
        (35, 100, 256, 2, 1, 33),
        (23, 5, 50, 3, 1, 4),
        (40, 90, 128, 3, 1, 100),
    ],
)
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.parametrize("sinks", [False, True])
def test_windows_caps_and_sinks(
    simulator: Backend,
    rng: np.random.Generator,
    n: int,
    offset: int,
    head_dim: int,
    n_head: int,
    n_head_kv: int,
    window: int,
    softcap: float,
    sinks: bool,
) -> None:
    """Positions before the first token's window are not read; a cap bends scores; sinks take a share of the weights."""
    a_pass = Pass(rng, n, offset, head_dim, n_head, n_head_kv)
    a_pass.window, a_pass.softcap = window, softcap
    if sinks:
        a_pass.sinks = np.linspace(-2, 4, n_head, dtype=np.float32)
    expected = a_pass.expected()
    a_pass.cache[:, 1, :, : max(0, offset + 1 - window)] = NAN
    found = a_pass.run(simulator)
    assert nmse(found, expected) <= LIMIT
    np.testing.assert_allclose(found, expected, atol=5e-3)


@pytest.mark.parametrize(
    ("n", "offset", "head_dim", "n_head", "n_head_kv"),
    [(70, 37, 64, 2, 2), (20, 37, 128, 7, 1), (31, 0, 96, 1, 1), (35, 37, 256, 2, 1), (9, 70, 32, 3, 1)],
)
def test_a_quantized_cache(
    simulator: Backend,
    rng: np.random.Generator,
    n: int,
    offset: int,
    head_dim: int,
    n_head: int,
    n_head_kv: int,
) -> None:
    a_pass = Pass(rng, n, offset, head_dim, n_head, n_head_kv)
    a_pass.cache_type = "q8_0"
    for a_pass.window, a_pass.softcap in ((0, 0.0), (29, 2.0)):
        assert nmse(a_pass.run(simulator), a_pass.expected()) <= LIMIT


def test_great_scores(simulator: Backend, rng: np.random.Generator) -> None:
    """Scores of several hundreds that grow and fall along the keys: no weight overflows, and the greatest counts."""
    a_pass = Pass(rng, 40, 60, 64, 2, 1)
    a_pass.qkv[:, :2] = 32  # exact as halves, also with the scale
    a_pass.scale = 0.0625 / np.log2(np.e)
    size = rng.permutation(np.linspace(-16, 16, a_pass.length)).astype(np.float16)
    a_pass.cache[0, 1, 0, : a_pass.length] = size.view(np.uint16)[:, None]
    found, expected = a_pass.run(simulator), a_pass.expected()
    assert nmse(found, expected) <= LIMIT


def test_many_small_weights(simulator: Backend, rng: np.random.Generator) -> None:
    """Weights below 2^-14 of the greatest, whose halves would be subnormal, count where there are many."""
    a_pass = Pass(rng, 20, 380, 64, 2, 1)
    a_pass.qkv[:, :2], a_pass.scale = 1, float(np.float32(1 / (64 * np.log2(np.e))))
    keys = rng.uniform(-18, -15, (a_pass.length, 1)).astype(np.float16)
    keys[7] = 0
    a_pass.cache[0, 1, 0, : a_pass.length] = keys.view(np.uint16)
    a_pass.cache[1, 1, 0, 7] = 0
    values = a_pass.cache[1, 1, 0, : a_pass.length].view(np.float16)
    values[...] = np.abs(values)
    found, expected = a_pass.run(simulator), a_pass.expected()
    assert nmse(found, expected) <= 1e-5


def test_nan(simulator: Backend, rng: np.random.Generator) -> None:
    """Of a query it goes to all of its head, of a value to its place, from its token on."""
    if isinstance(simulator, Emulator) and simulator.target in ("gfx90a", "gfx942"):
        pytest.skip("the emulator's MFMA takes halves that are NaN for numbers")
    a_pass = Pass(rng, 70, 0, 64, 2, 1)
    expected = np.zeros((70, 2, 64), bool)
    a_pass.qkv[20, 1, 3], a_pass.cache[1, 1, 0, 40, 7] = np.nan, NAN
    expected[20, 1] = expected[40:, :, 7] = True
    found = np.isnan(a_pass.run(simulator))
    rows = 32  # tokens of a block, whose earlier ones see weights of 0 times NaN
    np.testing.assert_array_equal(found[rows * 2 :], expected[rows * 2 :])
    np.testing.assert_array_equal(found[:rows], expected[:rows])
    assert found[40:, :, 7].all()
    assert not found[:, :, 8:][~expected[:, :, 8:]].any()


def test_the_same_as_one_at_a_time(simulator: Backend, rng: np.random.Generator) -> None:
    """What later tokens are does not matter to a bit: a pass and its beginning agree."""
    whole = Pass(rng, 50, 5, 128, 4, 2)
    found = whole.run(simulator)
    whole.n, whole.qkv = 20, np.ascontiguousarray(whole.qkv[:20])
    whole.length = 25
    whole.cache[:, 1, :, 25:] = NAN
    np.testing.assert_array_equal(whole.run(simulator), found[:20])


@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda t: t.name)
def test_matrix_instructions(target: GpuTarget) -> None:
    """They are used where there are some: on NVIDIA, on RDNA3 and 4, and on CDNA."""
    path = ENGINE.targets().get(target.name)
    if path is None:
        pytest.skip(f"{target.name} is not built: HIPQUANT_TARGETS")
    facts = json.loads((ENGINE.folder / FACTS).read_text())[path.stem]["kernels"]
    cdna = target.name in ("gfx908", "gfx90a", "gfx942", "gfx950", "gfx9-4-generic")
    expected = cdna or target.vendor == "nvidia" or target.name.startswith(("gfx11", "gfx12"))
    assert (facts[wiring.attention("prefill", "f16", 128)]["matrix"] > 0) == expected
