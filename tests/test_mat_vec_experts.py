"""A mixture of experts on a GPU: choosing and sorting them, `router_*`, `mul_mat_vec_experts_*`, `mul_mat_vec_mixed_*`.

The kernels are simulated under AddressSanitizer and UBSan. Where AMD_EMULATOR names a checkout of tinygrad, its
emulator executes the machine code of four AMD targets as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pytest

import emulator
import reference
from engine_runs import activations, normal, poison, weights
from hipquant import wiring
from hipquant.models.gpu_weights import EpilogueKind
from hipquant.quants import FLOAT_TYPES, MATRIX_TYPES, QuantType, padded
from hipquant.toolchain import gpu, simulate
from planes import UNIT, UNIT_BYTES, Backend, Floats, Wide, check_planes, launch

Ints = npt.NDArray[np.int32]

NULL, POISON, EPS = 0, 0xA5, 1e-5
STORE, GATE = EpilogueKind.STORE, EpilogueKind.GATE
SOURCES = ["repack", "activation", "choose_experts", "mat_vec_experts"]
pytestmark = pytest.mark.skipif(
    not simulate.can_sanitize(),
    reason="the run time of AddressSanitizer and UBSan comes with gcc, which is not installed",
)
SIMULATED = [
    pytest.param((32, False), id="wave32"),
    pytest.param((64, False), id="wave64"),
    pytest.param((32, True), id="wave32-matrix-units"),  # there a team takes more rows at a time
]
EMULATED = [pytest.param(target, id=target) for target in emulator.engine_targets()]


@pytest.fixture(scope="module", params=SIMULATED + EMULATED)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    if isinstance(request.param, str):
        found: Backend = emulator.engine(request.param)
    else:
        wave, units = request.param
        sources = [gpu.ENGINE / f"{name}.hip" for name in SOURCES]
        found = simulate.build(wave, True, sources, matrix_units=units)
    yield found
    found.close()


def ints(*shape: int) -> Ints:
    return np.full(shape, -7, np.int32)


def choose(backend: Backend, logits: Floats, used: int) -> tuple[Ints, Floats, Ints, Ints]:
    """Experts and weights [token][choice], and of each choice its group and token."""
    n, experts = logits.shape
    found = ints(n, used), poison(n, used), ints(n * used, 4), ints(n * used)
    launch(backend, "choose_experts_q8", {"ntokens": n}, logits, *found, NULL, NULL, experts, used)
    return found


@pytest.mark.parametrize(("experts", "used"), [(1, 1), (8, 2), (40, 5), (128, 8), (512, 32), (3, 3)])
def test_the_best_are_chosen(backend: Backend, rng: np.random.Generator, experts: int, used: int) -> None:
    logits = 4 * normal(rng, 3, experts)
    chosen, weights, groups, token = choose(backend, logits, used)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :used]
    np.testing.assert_array_equal(chosen, expected)
    of_chosen = np.exp(np.take_along_axis(logits, expected, 1).astype(np.float64))
    np.testing.assert_allclose(weights, of_chosen / of_chosen.sum(1, keepdims=True), rtol=3e-6)
    columns = np.arange(3 * used)
    np.testing.assert_array_equal(groups[:, :3], np.stack([chosen.ravel(), columns, np.ones_like(columns)], 1))
    np.testing.assert_array_equal(token, columns // used)


def test_of_equal_experts_the_first_are_chosen(backend: Backend) -> None:
    logits = np.zeros((1, 70), np.float32)
    logits[0, [1, 33, 2, 65]] = 2
    chosen, weights, *_ = choose(backend, logits, 6)
    assert chosen.tolist() == [[1, 2, 33, 65, 0, 3]]
    assert len(set(weights[0, :4].tolist())) == 1


def test_logits_that_are_no_numbers_choose_experts_that_there_are(backend: Backend) -> None:
    """Each one once; what all of them give is not a number where all logits are none."""
    nan, inf = np.nan, np.inf
    logits = np.array([[nan] * 4, [1, nan, 2, 0], [inf, inf, 0, 0], [-inf] * 4], np.float32)
    chosen, weights, *_ = choose(backend, logits, 4)
    assert all(sorted(row) == list(range(4)) for row in chosen.tolist())
    assert np.isnan(weights).any(axis=1).all()


@pytest.mark.parametrize(
    ("experts", "used", "n", "most"),
    [(8, 2, 9, 8), (40, 5, 61, 8), (3, 3, 70, 64), (512, 32, 11, 64), (1, 1, 9, 8), (32, 32, 131, 64)],
)
def test_columns_are_sorted_by_expert(
    backend: Backend, rng: np.random.Generator, experts: int, used: int, n: int, most: int
) -> None:
    """Those of an expert lie side by side, in any order; the counts are 0 again."""
    choices = n * used
    chosen, weights, counts = ints(n, used), poison(n, used), np.zeros(experts, np.int32)
    ngroups = choices // most + experts
    groups, token, column = ints(ngroups, 4), ints(choices), ints(choices)
    logits = normal(rng, n, experts)
    launch(backend, "choose_experts_q8", {"ntokens": n}, logits, chosen, weights, NULL, NULL, counts, column, experts,
           used)  # fmt: skip
    np.testing.assert_array_equal(chosen, np.argsort(-logits, axis=1, kind="stable")[:, :used])
    in_each = np.bincount(chosen.ravel(), minlength=experts)
    np.testing.assert_array_equal(counts, in_each)
    sizes = experts, used, n, most, ngroups
    launch(backend, "sort_experts_q8", {}, chosen, counts, groups, token, column, *sizes)
    assert not counts.any()
    assert sorted(column) == list(range(choices))
    np.testing.assert_array_equal(token[column], np.arange(choices) // used)
    assert (np.diff(chosen.ravel()[np.argsort(column)]) >= 0).all()
    expected, first = [], 0
    for expert, count in enumerate(in_each.tolist()):
        expected += [[expert, first + at, min(most, count - at), 0] for at in range(0, count, most)]
        first += count
    assert groups.tolist() == expected + [[0] * 4] * (ngroups - len(expected))


class Experts:
    """Random weights of experts, one matrix on the device, and columns of activations."""

    def __init__(
        self, backend: Backend, rng: np.random.Generator, kind: QuantType, experts: int, rows: int, k: int, columns: int
    ) -> None:
        self.backend, self.kind, self.experts, self.rows = backend, kind, experts, rows
        self.k, all_rows = padded(k, kind.block_size), experts * rows
        self.n_padded = padded(self.k)
        self.w, values = weights(backend, kind, all_rows, self.k)
        self.y, self.x = activations(backend, kind, normal(rng, columns, self.k), self.n_padded)
        self.values = values.reshape(experts, rows, self.k)


@dataclass(frozen=True)
class Shape:
    batch: int
    rows: int
    k: int
    tokens: bool  # whether columns are rows of the activations that `token` names
    squares: bool = False


GROUPS = {1: [(3, 0, 1), (0, 1, 1), (3, 2, 1)], 8: [(1, 0, 8), (1, 8, 3), (4, 11, 1), (0, 0, 0)]}
SHAPES = [Shape(1, 66, 64, True, True), Shape(1, 5, 96, False), Shape(1, 128, 2304, True), Shape(8, 66, 96, True),
          Shape(8, 31, 2304, False)]  # fmt: skip


def run(
    rng: np.random.Generator, w: Experts, shape: Shape, epilogue: EpilogueKind, outputs: tuple[object, ...]
) -> Wide:
    """Launches `mul_mat_vec_experts_*` to dst, its first row and its stride, q and n_padded_q; float64 of the same."""
    groups = np.array([(*group, 0) for group in GROUPS[shape.batch]], np.int32)
    columns = int(groups[:, 2].sum())
    token = rng.permutation(len(w.x)).astype(np.int32)[:columns] if shape.tokens else np.arange(columns, dtype=np.int32)
    squares = rng.uniform(1, 99, (len(w.x), -(-w.k // 32))).astype(np.float32)
    dst, first, stride, *planes = outputs
    row = wiring.find("mul_mat_vec_experts", w.kind, batch=shape.batch)
    sizes = w.k, w.rows, w.experts, w.n_padded
    w.backend.launch(
        row, row.grid(nrows=w.rows, groups=len(groups)),
        (w.w, w.y, squares if shape.squares else NULL, EPS, *sizes, groups, token if shape.tokens else NULL, dst, first,
         stride, int(epilogue), *planes),
    )  # fmt: skip
    expert = np.repeat(groups[:, 0], groups[:, 2])
    expected = np.einsum("ck,crk->cr", w.x[token], w.values[expert])
    if shape.squares:
        expected /= np.sqrt(squares[token].sum(-1, dtype=np.float64, keepdims=True) / w.k + EPS)
    return expected


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, shape) for kind in MATRIX_TYPES for shape in SHAPES if shape.batch == 1 or kind in FLOAT_TYPES],
    ids=str,
)
def test_products(backend: Backend, rng: np.random.Generator, kind: QuantType, shape: Shape) -> None:
    """Stored in the middle of longer columns; nothing else is written."""
    w = Experts(backend, rng, kind, 5, shape.rows, shape.k, 12)
    columns = sum(n for _, _, n in GROUPS[shape.batch])
    dst = poison(columns, shape.rows + 7)
    expected = run(rng, w, shape, STORE, (dst, 3, dst.shape[1], NULL, 0))
    assert reference.nmse(dst[:, 3 : 3 + shape.rows], expected) <= 1e-11
    assert np.isnan(dst[:, :3]).all()
    assert np.isnan(dst[:, 3 + shape.rows :]).all()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *((kind, Shape(1, 2 * 64, 256, True, True)) for kind in ("Q4_K", "Q8_0", "Q6_K", "F32")),
        ("BF16", Shape(8, 2 * 96, 160, True)),
    ],
    ids=str,
)
def test_gated(backend: Backend, rng: np.random.Generator, kind: str, shape: Shape) -> None:
    """SiLU of the first half of the rows times the second one, as floats and in planes."""
    type = next(t for t in MATRIX_TYPES if t.name == kind)
    w, n = Experts(backend, rng, type, 5, shape.rows, shape.k, 12), shape.rows // 2
    columns, n_padded = sum(n for _, _, n in GROUPS[shape.batch]), padded(n, 64)
    dst, q = np.zeros((columns, n_padded), np.float32), np.zeros((columns, n_padded // UNIT * UNIT_BYTES), np.uint8)
    products = run(rng, w, shape, GATE, (dst, 0, n_padded, q, n_padded))
    gate, up = products[:, :n], products[:, n:]
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    assert reference.nmse(dst[:, :n], expected) <= 1e-10
    assert not dst[:, n:].any()
    check_planes(q, dst, n_padded)


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=lambda t: t.suffix)
@pytest.mark.parametrize(("used", "rows", "k"), [(1, 9, 64), (5, 37, 96), (3, 64, 2304), (6, 3, 768)])
def test_mixed(backend: Backend, rng: np.random.Generator, kind: QuantType, used: int, rows: int, k: int) -> None:
    """What the experts of a token give, weighted, is added to the residual stream, which is normed up to the division
    by rms; a lane of a team may have units of several experts."""
    n, w = 2, Experts(backend, rng, kind, 6, rows, k, 2 * used)
    experts = np.stack([rng.permutation(6)[:used] for _ in range(n)]).astype(np.int32)
    weights, residual, norm = rng.random((n, used), np.float32), normal(rng, n, rows + 5), normal(rng, rows)
    groups, n_padded = -(-rows // 32), padded(rows, UNIT)
    x, normed, sums = residual.copy(), poison(n, n_padded), poison(n, groups)
    q = np.zeros((n, n_padded // UNIT * UNIT_BYTES), np.uint8)
    kernel = wiring.find("mul_mat_vec_mixed", kind)
    sizes = w.k, rows, 6, used, w.n_padded
    to = x, x.shape[1], norm, normed, q, sums, n_padded
    backend.launch(kernel, kernel.grid(nrows=rows, ntokens=n), (w.w, w.y, *sizes, experts, weights, *to))
    expected = np.einsum("tjk,tjrk,tj->tr", w.x.reshape(n, used, -1), w.values[experts], weights.astype(np.float64))
    assert reference.nmse(x[:, :rows], residual[:, :rows] + expected) <= 1e-11
    np.testing.assert_array_equal(x[:, rows:], residual[:, rows:])
    squares = np.pad(x[:, :rows].astype(np.float64) ** 2, ((0, 0), (0, groups * 32 - rows))).reshape(n, groups, 32)
    np.testing.assert_allclose(sums, squares.sum(-1), rtol=1e-6)
    np.testing.assert_array_equal(normed[:, :rows], x[:, :rows] * norm)
    assert np.isnan(normed[:, rows:]).all()
    check_planes(q, normed[:, :rows], n_padded)


@pytest.mark.parametrize("kind", FLOAT_TYPES, ids=lambda t: t.suffix)
@pytest.mark.parametrize(
    ("experts", "used", "k", "squares"),
    [(1, 1, 32, False), (8, 2, 100, True), (130, 8, 2048, True), (5, 3, 5000, False)],
)
def test_router(
    backend: Backend, rng: np.random.Generator, kind: QuantType, experts: int, used: int, k: int, squares: bool
) -> None:
    """Logits, and the experts that `choose_experts_q8` finds by them; counters are 0 again."""
    n, w = 3, Experts(backend, rng, kind, 1, experts, k, 3)
    sums = rng.uniform(1, 99, (n, -(-k // 32))).astype(np.float32)
    logits, counters = poison(n, experts), np.zeros(n, np.int32)
    found = ints(n, used), poison(n, used), ints(n * used, 4), ints(n * used)
    row = wiring.find("router", kind)
    backend.launch(
        row, row.grid(n_expert=experts, ntokens=n),
        (w.w, w.y, sums if squares else NULL, EPS, k, experts, w.n_padded, logits, counters, *found, used),
    )  # fmt: skip
    expected = w.x @ w.values[0].T
    if squares:
        expected /= np.sqrt(sums.sum(-1, dtype=np.float64, keepdims=True) / k + EPS)
    assert reference.nmse(logits, expected) <= 1e-11
    for mine, theirs in zip(found, choose(backend, logits, used), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert not counters.any()


def test_what_experts_give_is_added(backend: Backend, rng: np.random.Generator) -> None:
    n, used, width = 3, 4, 300
    x, weights, dst = normal(rng, n * used, width), rng.random((n, used), np.float32), poison(n, width)
    column = rng.permutation(n * used).astype(np.int32)
    sizes = {"n": width, "ntokens": n}
    launch(backend, "add_experts_q8", sizes, x, weights, column, dst, width, used)
    expected = (x[column].reshape(n, used, width).astype(np.float64) * weights[:, :, None]).sum(1)
    np.testing.assert_allclose(dst, expected, rtol=1e-5, atol=1e-5)
