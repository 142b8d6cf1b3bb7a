"""`mul_mat_planes_*`, `mul_mat_planes_experts_*`: tiles of weights in planes times activations in planes, against
float64.

The kernels are simulated under AddressSanitizer and UBSan, by matrix units and by dot products. Where AMD_EMULATOR
names a checkout of tinygrad, its emulator executes the machine code of four AMD targets as well.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest

import emulator
import reference
from emulator import Emulator
from engine_runs import weights
from hipquant import wiring
from hipquant.quants import WEIGHT_TYPES, QuantType, activation_bytes, padded, plane_bytes, quant_type
from hipquant.toolchain import gpu, simulate
from hipquant.toolchain.cases import random_blocks
from hipquant.toolchain.simulate import Simulator
from planes import decoded, parts_of

Raw = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Backend = Simulator | Emulator

UNIT, GUARD = 64, 3  # weights of a unit; rows of the result that belong to another matrix
BY_DOTS, BY_MATRIX_UNITS = 1e-11, 4e-7  # NMSE of products in floats; of weights that are rounded to halves
pytestmark = pytest.mark.skipif(
    not simulate.can_sanitize(),
    reason="the run time of AddressSanitizer and UBSan comes with gcc, which is not installed",
)

SIMULATED = [
    pytest.param((wave, units), id=f"wave{wave}-{'matrix-units' if units else 'dots'}")
    for wave, units in ((32, False), (64, False), (32, True), (64, True))
]
EMULATED = [pytest.param(target, id=target) for target in emulator.engine_targets()]


@pytest.fixture(scope="module", params=SIMULATED + EMULATED)
def backend(request: pytest.FixtureRequest) -> Iterator[tuple[Backend, float]]:
    """Where kernels run, and the NMSE of what they give."""
    if isinstance(request.param, str):
        found: Backend = emulator.engine(request.param)
        tolerance = BY_DOTS
    else:
        wave, units = request.param
        sources = [gpu.ENGINE / "repack.hip", gpu.ENGINE / "mat_mat_planes.hip"]
        found = simulate.build(wave, True, sources, matrix_units=units)
        tolerance = BY_MATRIX_UNITS if units else BY_DOTS
    yield found, tolerance
    found.close()


def activations(x: Floats) -> tuple[Raw, Wide]:
    """Columns in planes as `kernels/gpu/planes.h` describes them, and the values that these stand for."""
    ncols, k = x.shape
    units = padded(k) // UNIT
    values = np.zeros((ncols, units, 2, 32), np.float32)
    values.reshape(ncols, -1)[:, :k] = x
    d = np.abs(values).max(-1) / np.float32(127)
    with np.errstate(invalid="ignore"):
        quants = np.where(d[..., None] > 0, np.rint(values / np.where(d > 0, d, 1)[..., None]), 0).astype(np.int8)
    scales = np.zeros((ncols, units, 2, 4), np.int16)
    scales[..., :2] = d[..., None].view(np.int16)
    scales[..., 2:] = quants.reshape(ncols, units, 2, 2, 16).sum(-1, dtype=np.int16)
    pieces = quants.reshape(ncols, units, 4, 16).swapaxes(1, 2).reshape(ncols, -1)
    planes = np.concatenate([pieces.view(np.uint8), scales.reshape(ncols, -1).view(np.uint8)], axis=1)
    assert planes.shape[1] == activation_bytes(padded(k))
    return planes, (quants.astype(np.float64) * d[..., None]).reshape(ncols, -1)[:, :k]


def product(backend: Backend, kind: QuantType, planes: Raw, y: Raw, rows: int, k: int) -> Floats:
    """Columns of the product, which lie GUARD rows apart; nothing is written between them."""
    stored = np.full((len(y), rows + GUARD), np.nan, np.float32)
    row = wiring.kernel(f"mul_mat_planes_{kind.suffix}")
    sizes = (k, rows, len(y), padded(k), rows + GUARD)
    backend.launch(row, row.grid(nrows=rows, ncols=len(y)), (planes, y, stored, *sizes))
    assert np.isnan(stored[:, rows:]).all()
    return stored[:, :rows]


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda t: t.suffix)
@pytest.mark.parametrize(
    ("rows", "nblocks", "ncols"),
    [
        (1, 1, 1),  # half a unit
        (130, 5, 3),  # an odd number of units, the last one half empty, and a second tile with 2 rows
        (9, 8, 131),
        (128, 17, 128),  # whole tiles; rows of activations that reach far into their padding
    ],
)
def test_product(backend: tuple[Backend, float], kind: QuantType, rows: int, nblocks: int, ncols: int) -> None:
    """As float64 has it, whatever rows, columns and weights of a row are left over by tiles."""
    run, tolerance = backend
    k = padded(32 * nblocks, kind.block_size)
    planes, w = weights(run, kind, rows, k)
    x = np.random.default_rng([rows, k, ncols]).standard_normal((ncols, k)).astype(np.float32)
    y, values = activations(x)
    found = product(run, kind, planes, y, rows, k)
    assert reference.nmse(found, values @ w.T) < tolerance


def test_a_column_that_is_not_finite_keeps_to_itself(backend: tuple[Backend, float]) -> None:
    """NaN in a block of activations makes the results of its column NaN, and no others."""
    run, tolerance = backend
    kind, rows, k, ncols = quant_type("Q4_K"), 20, 256, 11
    planes, w = weights(run, kind, rows, k)
    x = np.random.default_rng(7).standard_normal((ncols, k)).astype(np.float32)
    x[5, 70] = np.nan
    y, values = activations(x)
    found = product(run, kind, planes, y, rows, k)
    assert np.isnan(found[5]).all()
    others = np.arange(ncols) != 5
    assert reference.nmse(found[others], values[others] @ w.T) < tolerance


def test_small_and_great_weights(backend: tuple[Backend, float]) -> None:
    """Weights of 1e-6 and of hundreds keep their bits where they pass through halves."""
    run, tolerance = backend
    kind, rows, k = quant_type("Q8_0"), 4, 64
    blocks = random_blocks(kind, rows, k).reshape(rows, -1, kind.block_bytes)
    scales = np.array([6e-8, 1e-5, 1, 7], np.float16)
    blocks[..., :2] = scales.view(np.uint8).reshape(rows, 1, 2)
    planes = np.zeros(plane_bytes(kind, rows, k), np.uint8)
    row = wiring.kernel(f"repack_{kind.suffix}")
    run.launch(row, row.grid(nrows=rows, units=1), (blocks.reshape(rows, -1), planes, k, rows, 0, rows))
    y, values = activations(np.random.default_rng(3).standard_normal((2, k)).astype(np.float32))
    found = product(run, kind, planes, y, rows, k)
    w = reference.dequantize(kind, blocks.reshape(rows, -1), (rows, k)).astype(np.float64)
    for i in range(rows):
        assert reference.nmse(found[:, i], values @ w[i]) < tolerance


# Expert, first column, columns: more than a team's 16, all of a tile, and experts without any.
GROUPS = [(3, 0, 64), (3, 64, 5), (0, 69, 1), (0, 0, 0), (4, 70, 33), (1, 103, 16)]
EXPERTS, COLUMNS, TOKENS = 5, 119, 21


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda t: t.suffix)
@pytest.mark.parametrize(
    ("rows", "nblocks", "tokens"),
    [
        (1, 1, True),  # half a unit
        (66, 5, False),  # an odd number of units, the last one half empty, and a second tile with 2 rows
        (64, 24, True),
    ],
)
def test_product_of_experts(
    backend: tuple[Backend, float], kind: QuantType, rows: int, nblocks: int, tokens: bool
) -> None:
    """The rows of an expert times its columns, which `tokens` are found by their tokens; nothing else is written."""
    run, tolerance = backend
    stored = np.full((COLUMNS, rows + GUARD), np.nan, np.float32)
    expected = run_experts(run, kind, rows, padded(32 * nblocks, kind.block_size), tokens, (stored, rows + GUARD, 0, 0))
    assert np.isnan(stored[:, rows:]).all()
    assert reference.nmse(stored[:, :rows], expected) < tolerance


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q6_K"])
@pytest.mark.parametrize("pairs", [3, 64, 70])
def test_gated_product_of_experts(backend: tuple[Backend, float], kind: str, pairs: int) -> None:
    """SiLU of the first half of the rows times the second one, in planes of 32 that have one scale."""
    run, tolerance = backend
    n_padded = padded(pairs, UNIT)
    q = np.zeros((COLUMNS, activation_bytes(n_padded)), np.uint8)
    products = run_experts(run, quant_type(kind), 2 * pairs, 256, True, (0, 0, q, n_padded), 0.03)
    gate, up = products[:, :pairs], products[:, pairs:]
    with np.errstate(over="ignore"):
        gated = np.pad(gate / (1 + np.exp(-gate)) * up, ((0, 0), (0, n_padded - pairs)))
    found = decoded(q, n_padded)
    biggest = np.abs(gated).reshape(COLUMNS, -1, 32).max(-1).repeat(32, axis=-1)
    limit = 0.51 / 127 * biggest + 10 * np.sqrt(tolerance) * np.abs(gated).max()
    assert (np.abs(found - gated) <= limit).all()
    quants, _, sums = parts_of(q, n_padded)
    np.testing.assert_array_equal(sums, quants.reshape(COLUMNS, -1, 16).sum(-1, dtype=np.int16))


def run_experts(
    run: Backend,
    kind: QuantType,
    rows: int,
    k: int,
    tokens: bool,
    outputs: tuple[Raw | Floats | int, ...],
    deviation: float = 1,
) -> Wide:
    """Launches `mul_mat_planes_experts_*` to dst, its stride, q and n_padded_q; float64 of the products."""
    rng = np.random.default_rng([rows, k, tokens])
    planes, w = weights(run, kind, EXPERTS * rows, k)
    x = deviation * rng.standard_normal((TOKENS if tokens else COLUMNS, k))
    y, values = activations(x.astype(np.float32))
    token = rng.integers(0, TOKENS, COLUMNS, np.int32) if tokens else np.arange(COLUMNS, dtype=np.int32)
    groups = np.array([(*group, 0) for group in GROUPS], np.int32)
    row = wiring.find("mul_mat_planes_experts", kind)
    (dst, *rest), sizes = outputs, (k, rows, EXPERTS, padded(k))
    run.launch(
        row, row.grid(nrows=rows, groups=len(groups)),
        (planes, y, dst, *sizes, groups, token if tokens else 0, *rest),
    )  # fmt: skip
    expert = np.repeat(groups[:, 0], groups[:, 2])
    return np.asarray(np.einsum("ck,crk->cr", values[token], w.reshape(EXPERTS, rows, k)[expert]))
