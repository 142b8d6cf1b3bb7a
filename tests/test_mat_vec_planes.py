"""`mul_mat_vec_{planes,norm,gate}_*`: weights in planes times up to 8 columns, and what becomes of that.

The kernels are simulated and emulated, against float64 on the weights and activations as they were quantized.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import reference
from engine_runs import EMULATED, EPS, NULL, activations, needs_sanitizers, normal, poison, started, weights
from hipquant import wiring
from hipquant.quants import MATRIX_TYPES, QuantType, padded, plane_units, quant_type
from hipquant.toolchain import gpu, simulate
from hipquant.toolchain.compile import fingerprint
from planes import (
    QK,
    UNIT,
    UNIT_BYTES,
    Backend,
    Bytes,
    Floats,
    Wide,
    parts_of,
    quantized,
)

Halves = npt.NDArray[np.uint16]
Params = tuple[npt.NDArray[np.generic] | int, ...]

POISON, NAN = 0xA5, 0x7E55
# NMSE. Products of integers are exact: what is left is a float sum, whose few results may nearly cancel. Matrix units
# multiply what was rounded to halves.
PRODUCTS, BY_MATRIX_UNITS = 1e-11, 4e-7
# With matrix units, and copies to shared memory: a type for each kind of scales and minimums, and of planes.
TILE_TYPES = ("Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q5_K", "Q6_K")
NO_PLANES: tuple[int, ...] = (NULL, 0)  # q, n_padded_q
# k_cache, v_cache, rope, position, slot, n_head, n_head_kv, head_dim, n_rot, n_context
NO_ROPE: tuple[int, ...] = (NULL, NULL, NULL, NULL, NULL, 1, 1, 2, 0, 1)
pytestmark = needs_sanitizers

SIMULATED = [
    pytest.param((wave, units), id=f"wave{wave}{'-matrix-units' if units else ''}")
    for wave, units in ((32, False), (64, False), (32, True))
]


class Epilogue(IntEnum):
    """What becomes of the results of `mul_mat_vec_planes_*` (mat_vec_epilogue.h)."""

    STORE = 0
    GATE = 2
    ROPE_AND_STORE = 3
    GATE_GELU = 4


@dataclass(frozen=True)
class Runner:
    """What runs the kernels, and whether it has matrix units, for 4 columns and more, and asynchronous copies."""

    backend: Backend
    matrix_units: bool


def of_tile_types() -> Path:
    """A source of the kernels for TILE_TYPES, in the simulator's cache: it takes half the time of all types."""
    kernels = gpu.ENGINE / "mat_vec_planes.hip"
    rows = " ".join(f"X({quant_type(name).suffix}, {name})" for name in TILE_TYPES)
    # A source is compiled again when it changes itself, so that it names what it includes by its content too.
    included = f'#include "{kernels}"  // {fingerprint(files=[kernels])}'
    path = simulate.cache_folder() / "tests" / "mat_vec_tiles.hip"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#include "types.h"\n#undef HQ_PLANES\n#define HQ_PLANES(X) {rows}\n{included}\n')
    return path


@pytest.fixture(scope="module", params=SIMULATED + EMULATED)
def runner(request: pytest.FixtureRequest) -> Iterator[Runner]:
    which, units = request.param if isinstance(request.param, tuple) else (request.param, False)
    products = of_tile_types() if units else gpu.ENGINE / "mat_vec_planes.hip"
    with started(which, "repack", "activation", products, matrix_units=units) as backend:
        yield Runner(backend, units)


@dataclass(frozen=True)
class Shape:
    """Of a product: its weights, what the kernel is compiled for and gets, and what it may do besides."""

    kind: str
    batch: int
    columns: int
    rows: int
    k: int
    bias: bool = False
    squares: bool = False

    def __str__(self) -> str:
        also = "-bias" * self.bias + "-squares" * self.squares
        return f"{self.kind}-{self.columns}of{self.batch}-{self.rows}x{self.k}{also}"


class Product:
    """A product of `shape`, whose results are rows `first` and on."""

    def __init__(self, runner: Runner, rng: np.random.Generator, shape: Shape, first: int = 0) -> None:
        kind, backend = quant_type(shape.kind), runner.backend
        if runner.matrix_units and shape.kind not in TILE_TYPES:
            pytest.skip("the same without matrix units, or of a type that is like one of TILE_TYPES")
        self.backend, self.shape, self.first, self.kind = backend, shape, first, kind
        self.limit = BY_MATRIX_UNITS if runner.matrix_units and shape.batch >= 4 else PRODUCTS
        self.k = padded(shape.k, kind.block_size)
        # Matrix units take 256 values of a column at a time.
        self.n_padded = padded(self.k, UNIT if shape.k % 64 and not runner.matrix_units else 512)
        self.bias = normal(rng, first + shape.rows) if shape.bias else NULL
        # Of nothing that is multiplied here: the kernel is told what to divide by.
        squares = rng.uniform(1, 99, (shape.columns, -(-self.k // QK))).astype(np.float32)
        self.squares = squares if shape.squares else NULL
        self.w, self.w_values = weights(backend, kind, shape.rows, self.k)
        self.y, x = activations(backend, kind, normal(rng, shape.columns, self.k), self.n_padded)
        self.expected = x @ self.w_values.T
        if shape.squares:
            self.expected /= np.sqrt(squares.sum(-1, dtype=np.float64, keepdims=True) / self.k + EPS)
        if isinstance(self.bias, np.ndarray):
            self.expected += self.bias[first:]

    def run(self, dst: Floats, epilogue: Epilogue, planes: Params = NO_PLANES, rope: Params = NO_ROPE) -> None:
        """Launches `mul_mat_vec_planes_*`; the columns of `dst` are its rows."""
        shape = self.shape
        row = wiring.find("mul_mat_vec_planes", self.kind, batch=shape.batch)
        gated, units = epilogue in (Epilogue.GATE, Epilogue.GATE_GELU), plane_units(self.k)
        to_block = wiring.rows_to_block(self.kind, shape.rows, units, shape.batch, gated, 1)
        grid = row.grid(nrows=shape.rows, ncols=shape.columns, rows_to_block=to_block)
        to = self.first, dst.shape[1], int(epilogue), to_block
        self.backend.launch(row, grid, (*self._product(dst), *to, *planes, *rope))

    def gate(self, dst: Floats, epilogue: Epilogue, planes: Params) -> None:
        """The same by `mul_mat_vec_gate_*`, which is for one column."""
        row = wiring.find("mul_mat_vec_gate", self.kind, batch=1)
        to = dst.shape[1], int(epilogue), *planes
        self.backend.launch(row, row.grid(nrows=self.shape.rows), (*self._product(dst), *to))

    def add_and_norm(self, x: Floats, weight: Floats, outputs: Params) -> None:
        """Launches `mul_mat_vec_norm_*`, which adds to the columns of `x`; outputs: normed, q, sums, n_padded_q."""
        row = wiring.find("mul_mat_vec_norm", self.kind, batch=self.shape.batch)
        self.backend.launch(row, row.grid(nrows=self.shape.rows), (*self._product(x), x.shape[1], weight, *outputs))

    def _product(self, dst: Floats) -> tuple[npt.NDArray[np.generic] | float, ...]:
        """What the arguments of both kernels begin with."""
        sizes = self.k, self.shape.rows, self.shape.columns, self.n_padded
        return self.w, self.y, self.squares, EPS, *sizes, self.bias, dst

    def stored(self) -> Floats:
        """The results where they are stored, in columns that are longer than that; nothing else is written."""
        dst, rows = poison(self.shape.columns, self.first + self.shape.rows + 5), self.shape.rows
        self.run(dst, Epilogue.STORE)
        assert np.isnan(dst[:, : self.first]).all()
        assert np.isnan(dst[:, self.first + rows :]).all()
        return dst[:, self.first : self.first + rows]


# A unit that is half empty, an odd number of blocks, one to four teams that share rows of up to 196 units, and as many
# rows as a block may have.
SHAPES = [
    (1, 1, 33, 32, True, False),
    (2, 1, 70, 96, False, True),
    (2, 2, 1, 64, True, True),
    (4, 3, 31, 256, False, False),
    (8, 6, 33, 2048, True, False),
    (8, 8, 31, 96, False, True),
    (4, 4, 6, 4096, True, True),
    (1, 1, 17, 4096 + 256, False, True),
    (8, 7, 3, 4096 + 256, False, False),
    (2, 2, 5, 11008, True, False),
    (1, 1, 6, 12544, False, True),
    (1, 1, 1009, 128, False, False),
]


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=lambda t: t.suffix)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(str(int(n)) for n in s))
def test_store(
    runner: Runner, rng: np.random.Generator, kind: QuantType, shape: tuple[int, int, int, int, bool, bool]
) -> None:
    """As float64 has it, for whatever rows and columns are left over, in the middle of longer columns."""
    product = Product(runner, rng, Shape(kind.name, *shape), first=3)
    assert reference.nmse(product.stored(), product.expected) <= product.limit


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("batch", "columns", "squares"), [(8, 19, True), (8, 9, False), (2, 5, True)])
def test_more_columns_than_a_block_takes(
    runner: Runner, rng: np.random.Generator, kind: str, batch: int, columns: int, squares: bool
) -> None:
    """They are another row of the grid's blocks."""
    product = Product(runner, rng, Shape(kind, batch, columns, 9, 160, True, squares))
    assert reference.nmse(product.stored(), product.expected) <= product.limit


def test_floats_of_any_length(runner: Runner, rng: np.random.Generator) -> None:
    for k in (1, 70, 190):
        product = Product(runner, rng, Shape("F16", 2, 2, 5, k))
        assert reference.nmse(product.stored(), product.expected) <= product.limit


@pytest.mark.parametrize("kind", ["Q5_0", "Q3_K", "F32"])
def test_a_column_that_is_not_finite_keeps_to_itself(runner: Runner, rng: np.random.Generator, kind: str) -> None:
    product = Product(runner, rng, Shape(kind, 4, 3, 20, 256))
    x = normal(rng, 3, 256)
    x[1, 70] = np.nan
    product.y, values = activations(runner.backend, product.kind, x, product.n_padded)
    found = product.stored()
    assert np.isnan(found[1]).all()
    assert reference.nmse(found[::2], values[::2] @ product.w_values.T) <= product.limit


@pytest.mark.parametrize("kind", ["Q5_0", "Q4_K", "F32"])
@pytest.mark.parametrize(("batch", "columns"), [(1, 1), (2, 2), (4, 3), (8, 8)])
def test_a_great_residual_stream(runner: Runner, rng: np.random.Generator, kind: str, batch: int, columns: int) -> None:
    """What is yet to be normed may be greater than halves are, whatever the product is made with."""
    product = Product(runner, rng, Shape(kind, batch, columns, 20, 512, squares=True))
    x = 1e7 * normal(rng, columns, 512)
    product.y, values = activations(runner.backend, product.kind, x, product.n_padded)
    product.squares = np.square(x.astype(np.float64)).reshape(columns, -1, QK).sum(-1).astype(np.float32)
    expected = values @ product.w_values.T / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True))
    assert reference.nmse(product.stored(), expected) <= product.limit


# What follows a product. Results of a group of 32 that is not full are put in planes with zeros behind them.


def check_group_planes(q: Bytes, values: Floats, n_padded: int) -> None:
    """Columns of planes hold values as far as their groups reach; what lies behind is not touched."""
    groups = -(-values.shape[1] // QK)
    untouched = parts_of(np.full_like(q, POISON), n_padded)
    for found, expected, before in zip(parts_of(q, n_padded), quantized(values, n_padded), untouched, strict=True):
        filled = groups * (found.shape[1] * QK // n_padded)
        np.testing.assert_array_equal(found[:, :filled], expected[:, :filled])
        np.testing.assert_array_equal(found[:, filled:].view(np.uint8), before[:, filled:].view(np.uint8))


ADD_AND_NORM = [
    # shape; which outputs are wanted: floats, planes
    (Shape("Q4_0", 1, 1, 32, 64, bias=True), "yq"),
    (Shape("Q4_K", 1, 1, 70, 256), "q"),
    (Shape("Q6_K", 2, 2, 33, 2304, squares=True), "yq"),
    (Shape("Q8_0", 4, 3, 97, 4352), "q"),
    (Shape("Q5_1", 8, 8, 64, 96, bias=True, squares=True), "yq"),
    (Shape("Q2_K", 8, 5, 31, 8448), "yq"),
    (Shape("F16", 2, 2, 129, 96), "y"),
    (Shape("F32", 1, 1, 1, 32, bias=True), "yq"),
    (Shape("Q3_K", 1, 1, 576, 4352), "yq"),
]


@pytest.mark.parametrize(("shape", "which"), ADD_AND_NORM, ids=str)
def test_add_and_norm(runner: Runner, rng: np.random.Generator, shape: Shape, which: str) -> None:
    """The residual stream with the results, the sums of its squares, and its norm up to the division by rms."""
    product, n, columns = Product(runner, rng, shape), shape.rows, shape.columns
    groups = -(-n // QK)
    for n_padded in {padded(n, UNIT), padded(n)}:
        residual, weight = normal(rng, columns, n + 7), normal(rng, n)
        x, normed, sums = residual.copy(), poison(columns, n_padded), poison(columns, groups)
        q = np.full((columns, n_padded // UNIT * UNIT_BYTES), POISON, np.uint8)
        outputs = normed if "y" in which else NULL, q if "q" in which else NULL
        product.add_and_norm(x, weight, (*outputs, sums, n_padded))
        assert reference.nmse(x[:, :n] - residual[:, :n], product.expected) <= 4 * product.limit
        np.testing.assert_array_equal(x[:, n:], residual[:, n:])
        squares = np.pad(x[:, :n].astype(np.float64) ** 2, ((0, 0), (0, groups * QK - n))).reshape(columns, groups, QK)
        np.testing.assert_allclose(sums, squares.sum(-1), rtol=1e-6)
        expected = x[:, :n] * weight
        if "y" in which:
            np.testing.assert_array_equal(normed[:, :n], expected)
            assert np.isnan(normed[:, n:]).all()
        if "q" in which:
            check_group_planes(q, expected, n_padded)


GATE = [
    (Shape("Q4_0", 1, 1, 64, 64, bias=True), "q"),
    (Shape("Q4_K", 1, 1, 2 * 70, 256, squares=True), "q"),
    (Shape("Q6_K", 2, 2, 2 * 33, 2304), "q"),
    (Shape("Q8_0", 4, 3, 2 * 97, 4352, squares=True), "q"),
    (Shape("Q5_0", 8, 8, 2 * 31, 96, bias=True, squares=True), "q"),
    (Shape("Q5_K", 8, 5, 2 * 64, 8448), "q"),
    (Shape("BF16", 2, 1, 2 * 45, 96), ""),
    (Shape("F32", 1, 1, 2, 32, bias=True), "q"),
    (Shape("Q4_1", 1, 1, 2 * 352, 128), "q"),
    (Shape("Q3_K", 1, 1, 2 * 33, 4352, squares=True), "q"),
    (Shape("Q6_K", 1, 1, 2 * 32, 2304, bias=True), "q"),
    (Shape("F16", 1, 1, 2 * 40, 160), "q"),
]


@pytest.mark.parametrize("kind", [Epilogue.GATE, Epilogue.GATE_GELU], ids=["silu", "gelu"])
@pytest.mark.parametrize(("shape", "which"), GATE, ids=str)
def test_gate(runner: Runner, rng: np.random.Generator, shape: Shape, which: str, kind: Epilogue) -> None:
    """SiLU or GELU (tanh form) of the first half of the rows times the second half, as floats and in planes."""
    product, n, columns = Product(runner, rng, shape), shape.rows // 2, shape.columns
    gate, up = product.expected[:, :n], product.expected[:, n:]
    launches = [product.run, product.gate] if shape.batch == 1 else [product.run]
    for n_padded, run in itertools.product({padded(n, UNIT), padded(n)}, launches):
        dst = poison(columns, n_padded)
        q = np.full((columns, n_padded // UNIT * UNIT_BYTES), POISON, np.uint8)
        run(dst, kind, (q if which else NULL, n_padded))
        with np.errstate(over="ignore"):
            gelu = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
            activated = gate / (1 + np.exp(-gate)) if kind == Epilogue.GATE else gelu
        # 1 more: a single result may be as good as 0, of which no part is small.
        assert reference.nmse(dst[:, :n].astype(np.float64) + 1, activated * up + 1) <= 4 * product.limit
        assert np.isnan(dst[:, n:]).all()
        if which:
            check_group_planes(q, dst[:, :n], n_padded)


def rotated(values: Wide, rope: Floats, position: npt.NDArray[np.int32], n_rot: int) -> Wide:
    """Heads [token][head][head_dim] with the first n_rot of their values turned by pairs."""
    turn = rope[position].astype(np.float64)[:, None, :, :]
    a, b, found = values[..., 0:n_rot:2], values[..., 1:n_rot:2], values.copy()
    found[..., 0:n_rot:2], found[..., 1:n_rot:2] = (
        a * turn[..., 0] - b * turn[..., 1],
        a * turn[..., 1] + b * turn[..., 0],
    )
    return found


@pytest.mark.parametrize(
    ("kind", "batch", "columns", "k", "heads", "apart"),
    [
        # heads: n_head, n_head_kv, head_dim, n_rot; apart: queries, keys and values are products of their own
        ("Q4_K", 1, 1, 256, (2, 1, 64, 64), False),
        ("Q8_0", 4, 4, 96, (3, 1, 32, 20), True),
        ("Q5_0", 4, 3, 2304, (2, 2, 80, 64), False),
        ("F16", 2, 2, 96, (1, 1, 80, 80), True),
        ("Q3_K", 8, 4, 4352, (2, 1, 32, 32), True),
        ("Q4_1", 2, 1, 64, (1, 1, 2, 0), False),
    ],
)
def test_rope_and_store(
    runner: Runner,
    rng: np.random.Generator,
    kind: str,
    batch: int,
    columns: int,
    k: int,
    heads: tuple[int, int, int, int],
    apart: bool,
) -> None:
    """Queries are turned in their place; keys, turned, and values are halves in the cache, and nothing else changes."""
    n_head, n_head_kv, head_dim, n_rot = heads
    n_context, slots, n = 6, 3, n_head * head_dim
    position, slot = (np.array(v, np.int32)[:columns] for v in ([5, 0, 3, 3], [2, 0, 1, 2]))
    angle = rng.uniform(-3, 3, (n_context, n_rot // 2))
    rope = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    table = rope if n_rot else np.zeros(1, np.float32)
    before = np.full((2, slots, n_head_kv, n_context, head_dim), NAN, np.uint16)
    found, dst, products = before.copy(), poison(columns, n + 3), list[Product]()
    counts = [n_head, n_head_kv, n_head_kv] if apart else [n_head + 2 * n_head_kv]
    for first, count in zip(np.cumsum([0, *counts[:-1]]), counts, strict=True):
        shape = Shape(kind, batch, columns, count * head_dim, k, bias=True, squares=True)
        product = Product(runner, rng, shape, int(first) * head_dim)
        keys, values = found[0].copy(), found[1].copy()
        product.run(dst, Epilogue.ROPE_AND_STORE, rope=(keys, values, table, position, slot, *heads, n_context))
        found[0], found[1] = keys, values
        products.append(product)

    parts = np.concatenate([p.expected for p in products], axis=1).reshape(columns, -1, head_dim)
    limit = max(p.limit for p in products)
    query, key, value = np.split(parts, [n_head, n_head + n_head_kv], axis=1)
    assert reference.nmse(dst[:, :n], rotated(query, rope, position, n_rot).reshape(columns, n)) <= limit
    assert np.isnan(dst[:, n:]).all()
    for stored, expected in zip(found, (rotated(key, rope, position, n_rot), value), strict=True):
        there: Halves = stored[slot, :, position]
        # A half of the float's neighbour is as good, where the float's rounding decides; 6 deviations are none.
        atol = 6 * np.sqrt(limit) * np.sqrt((expected**2).mean())
        np.testing.assert_allclose(there.view(np.float16), expected, rtol=2**-11 * 1.01, atol=atol)
        stored[slot, :, position] = NAN
    np.testing.assert_array_equal(found, before)
