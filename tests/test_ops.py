"""Every kernel against the oracle, through the framework functions and at odd sizes. Parametrized over the tables."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hipquant as hq
from hipquant import ops, quants, wiring
from hipquant.driver import Device
from hipquant.models.cpu import Activations
from hipquant.models.layers import Kernels
from hipquant.quants import DEQUANTIZE_TYPES, MATRIX_TYPES, WEIGHT_TYPES, QuantType, padded
from models import random_blocks
from reference import dequantize, nmse, quantize_q8_1

every_weight_type = pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=str)
Floats = npt.NDArray[np.float32]
EXACT = 1e-6  # NMSE: float32 rounding, much enlarged where a single result happens to be near zero


def make(kind: QuantType, rows: int, k: int, seed: int = 0) -> tuple[hq.Tensor, npt.NDArray[np.float64]]:
    """A random matrix and its values in float64."""
    raw = random_blocks(np.random.default_rng(seed), kind, rows, k)
    return hq.Tensor.from_numpy(raw, kind, (rows, k)), dequantize(kind, raw, (rows, k)).astype(np.float64)


def sizes(kind: QuantType) -> list[tuple[int, int]]:
    """Rows odd, prime and one; columns that are and are not a multiple of 512."""
    odd = 256 * 3 if kind.is_super_block else 32 * 21
    return [(1, kind.block_size), (37, odd), (257, 2048), (130, 512 + kind.block_size)]


def activations(columns: int, k: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).standard_normal((columns, k)).astype(np.float32)


def on_the_grid(columns: int, k: int, seed: int = 1) -> Floats:
    """Activations that q8_1 holds exactly: whole numbers of 1/64 with a biggest of 127/64 in every block."""
    q = np.random.default_rng(seed).integers(-127, 128, (columns, k))
    q[:, ::32] = 127
    return (q / 64).astype(np.float32)


@pytest.mark.parametrize("kind", DEQUANTIZE_TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_dequantize_bit_for_bit(kind: QuantType, rows: int) -> None:
    k = 3 * kind.block_size
    raw = random_blocks(np.random.default_rng(rows), kind, rows, k)
    w = hq.Tensor.from_numpy(raw, kind, (rows, k))
    expected = dequantize(kind, raw, (rows, k))
    found = ops.dequantize_f32(w).numpy()
    assert found.shape == (rows, k)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    half = ops.dequantize_f16(w).numpy()
    np.testing.assert_array_equal(half.view(np.uint16), expected.astype(np.float16).view(np.uint16))


@pytest.mark.parametrize("kind", DEQUANTIZE_TYPES, ids=str)
def test_dequantize_random_bytes(kind: QuantType) -> None:
    """Any bytes at all, with negative and subnormal scales: equal bits, and the same NaN and infinities."""
    raw = np.frombuffer(np.random.default_rng(5).bytes(500 * kind.block_bytes), np.uint8).reshape(500, -1)
    with np.errstate(all="ignore"):
        expected = dequantize(kind, raw, (500, kind.block_size))
        found = ops.dequantize_f32(hq.Tensor.from_numpy(raw, kind, expected.shape)).numpy()
        finite = np.isfinite(expected)
        np.testing.assert_array_equal(found[finite].view(np.uint32), expected[finite].view(np.uint32))
        np.testing.assert_array_equal(found[~finite], expected[~finite])


@pytest.mark.parametrize("k", [1, 31, 32, 100, 512, 1000, 4096 + 32])
@pytest.mark.parametrize("rows", [1, 5])
def test_quantize_q8_1(k: int, rows: int) -> None:
    x = activations(rows, k) * np.float32(3)
    x[0, : min(k, 32)] = 0
    result = ops.quantize_q8_1(x)
    found = result.numpy().reshape(rows, -1, 36)
    expected = quantize_q8_1(x).reshape(rows, -1, 36)
    assert found.shape[1] == padded(k) // 32
    np.testing.assert_array_equal(found[..., :2], expected[..., :2])
    full = np.zeros((rows, padded(k)), np.float32)
    full[:, :k] = x
    blocks = full.reshape(rows, -1, 32)
    q, d = found[..., 4:].view(np.int8), np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    with np.errstate(all="ignore"):
        exact = np.where(d > 0, blocks / d, 0)
    assert np.abs(q - exact).max() <= 0.5 + 1e-4
    sums = found[..., 2:4].copy().view(np.float16)[..., 0].astype(np.float64)
    np.testing.assert_allclose(sums, blocks.sum(-1, dtype=np.float64), rtol=1e-3, atol=1e-3)
    assert not found.reshape(rows, -1)[:, -(-k // 32) * 36 :].any(), "blocks beyond k must be zero"


def test_quantize_q8_1_many_rows() -> None:
    x = activations(70_001, 32)
    found = ops.quantize_q8_1(x).numpy()
    for row in (0, 65_534, 65_535, 70_000):
        np.testing.assert_array_equal(found[row], ops.quantize_q8_1(x[row]).numpy())


@every_weight_type
def test_products_on_the_grid(kind: QuantType) -> None:
    for rows, k in sizes(kind):
        w, exact = make(kind, rows, k)
        y = on_the_grid(33, k)
        expected = y.astype(np.float64) @ exact.T
        for b in range(1, 9):
            found = ops.mul_mat_vec_via_q8_1(w, y[:b])
            assert found.shape == (b, rows)
            assert nmse(found.numpy(), expected[:b]) <= EXACT, (rows, k, b)
        for n in (1, 2, 7, 33):
            assert nmse(ops.mul_mat_via_q8_1(w, y[:n]).numpy(), expected[:n]) <= EXACT, (rows, k, n)
        assert nmse(ops.dequantize_mul_mat_vec(w, y[0]).numpy(), expected[0]) <= EXACT, (rows, k)


@every_weight_type
def test_products_off_the_grid(kind: QuantType) -> None:
    w, exact = make(kind, 257, 2048)
    y = activations(33, 2048)
    expected = y.astype(np.float64) @ exact.T
    assert nmse(ops.mul_mat_vec_via_q8_1(w, y[:8]).numpy(), expected[:8]) <= 5e-4
    assert nmse(ops.mul_mat_via_q8_1(w, y).numpy(), expected) <= 5e-4
    assert nmse(ops.dequantize_mul_mat_vec(w, y[3]).numpy(), expected[3]) <= EXACT


@every_weight_type
@pytest.mark.parametrize("ncols", [15, 16, 17, 64, 129, 300])
def test_mul_mat_tile_edges(kind: QuantType, ncols: int) -> None:
    w, exact = make(kind, 129, kind.block_size)
    y = on_the_grid(ncols, kind.block_size)
    found = ops.mul_mat_via_q8_1(w, y).numpy()
    assert found.shape == (ncols, 129)
    assert nmse(found, y.astype(np.float64) @ exact.T) <= EXACT


@every_weight_type
def test_more_than_65535_rows(kind: QuantType) -> None:
    rows, k = 65_537, 256
    raw = np.tile(random_blocks(np.random.default_rng(0), kind, 53, k), (1237, 1))[:rows]
    w, exact = hq.Tensor.from_numpy(raw, kind, (rows, k)), dequantize(kind, raw[:53], (53, k)).astype(np.float64)
    y = on_the_grid(9, k)
    expected = np.tile(y.astype(np.float64) @ exact.T, (1, 1237))[:, :rows]
    assert nmse(ops.mul_mat_vec_via_q8_1(w, y[:1]).numpy(), expected[:1]) <= EXACT
    assert nmse(ops.mul_mat_vec_via_q8_1(w, y[:3]).numpy(), expected[:3]) <= EXACT
    assert nmse(ops.mul_mat_via_q8_1(w, y).numpy(), expected) <= EXACT
    assert nmse(ops.dequantize_mul_mat_vec(w, y[0]).numpy(), expected[0]) <= EXACT


@every_weight_type
def test_nothing_is_written_or_read_outside(kind: QuantType) -> None:
    """Results keep to their place, and poisoned padding of the activations never reaches them."""
    rows, k, n = 37, kind.block_size, 5
    w, exact = make(kind, rows, k)
    y = ops.quantize_q8_1(on_the_grid(n, k))
    y.numpy()[:, k // 32 * 36 :] = 0x7F  # NaN scales in what pads a row
    dst = np.full(4 + n * rows + 4, 777, np.float32)
    for kernel, grid, params in (
        (wiring.find("mul_mat_vec", kind, batch=n), {"nrows": rows}, [k, rows, padded(k), rows]),
        (wiring.find("mul_mat", kind), {"nrows": rows, "ncols": n}, [k, rows, n, padded(k), rows]),
    ):
        dst[4:-4] = np.nan
        ops.launch(kernel, w, None, kernel.grid(**grid), [w, y, dst.ctypes.data + 16, *params])
        assert (dst[:4] == 777).all()
        assert (dst[-4:] == 777).all()
        assert nmse(dst[4:-4].reshape(n, rows), on_the_grid(n, k).astype(np.float64) @ exact.T) <= EXACT


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=str)
@pytest.mark.parametrize("k", [256, 1280])
def test_get_rows(kind: QuantType, k: int) -> None:
    raw = random_blocks(np.random.default_rng(0), kind, 19, k)
    w = hq.Tensor.from_numpy(raw, kind, (19, k))
    ids = np.array([18, 0, 7, 7, 3])
    found = ops.get_rows(w, ids).numpy()
    np.testing.assert_array_equal(found.view(np.uint32), dequantize(kind, raw, (19, k))[ids].view(np.uint32))


def test_get_rows_checks_ids() -> None:
    w = hq.Tensor.from_numpy(np.zeros((4, 32), np.float32))
    assert ops.get_rows(w, np.array([], np.int64)).shape == (0, 32)
    for bad in (np.array([4]), np.array([-1])):
        with pytest.raises(IndexError, match="matrix of 4 rows"):
            ops.get_rows(w, bad)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(WEIGHT_TYPES))
    rows, blocks = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 2048 // kind.block_size))
    n, k = data.draw(st.integers(1, 40)), blocks * kind.block_size
    w, exact = make(kind, rows, k, seed=rows)
    y = on_the_grid(n, k, seed=n)
    expected = y.astype(np.float64) @ exact.T
    assert nmse(ops.mul_mat_via_q8_1(w, y).numpy(), expected) <= EXACT
    if n <= 8:
        assert nmse(ops.mul_mat_vec_via_q8_1(w, y).numpy(), expected) <= EXACT


def test_one_column_gives_one_row() -> None:
    w, _ = make(quants.BY_NAME["Q4_0"], 5, 64)
    y = activations(1, 64)
    for op in (ops.dequantize_mul_mat_vec, ops.mul_mat_vec_via_q8_1, ops.mul_mat_via_q8_1):
        assert op(w, y[0]).shape == (5,)
        assert op(w, y).shape == (1, 5)


Q4 = quants.BY_NAME["Q4_0"]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: ops.mul_mat_vec_via_q8_1(w, activations(9, 64)), ValueError, "1 to 8 columns, not 9"),
        (lambda w: ops.mul_mat_vec_via_q8_1(w, activations(1, 96)), ValueError, r"shape \(64,\) or .*not \(1, 96\)"),
        (lambda w: ops.mul_mat_via_q8_1(w, activations(0, 64)), ValueError, "at least one column"),
        (lambda w: ops.dequantize_mul_mat_vec(w, activations(2, 64)), ValueError, "one column of activations, not 2"),
        (lambda w: ops.mul_mat_via_q8_1(w, np.zeros((1, 64))), TypeError, "float32 array or tensor, not .*float64"),
        (lambda w: ops.mul_mat_via_q8_1(w.numpy(), activations(1, 64)), TypeError, "must be a hipquant.Tensor"),
        (lambda w: ops.mul_mat_via_q8_1(w, [1.0]), TypeError, "not list"),
        (lambda w: ops.quantize_q8_1(np.zeros((2, 0), np.float32)), ValueError, r"not \(2, 0\)"),
        (lambda w: ops.quantize_q8_1(np.zeros((2, 2, 32), np.float32)), ValueError, r"\(rows, k\)"),
        (
            lambda w: ops.dequantize_f32(hq.Tensor.from_numpy(np.zeros((1, 32), np.float32))),
            hq.UnsupportedQuantTypeError,
            "dequantize_f32 does not support quant type F32; supported: Q4_0",
        ),
        (
            lambda w: ops.mul_mat_via_q8_1(hq.Tensor.from_numpy(np.zeros(292, np.uint8), "Q8_K", (1, 256)), w),
            hq.UnsupportedQuantTypeError,
            "Q8_K",
        ),
    ],
)
def test_what_the_framework_functions_refuse(call: object, error: type[Exception], message: str) -> None:
    w, _ = make(Q4, 3, 64)
    with pytest.raises(error, match=message):
        call(w)  # type: ignore[operator]


def test_tensor_refuses_a_short_buffer() -> None:
    with pytest.raises(ValueError, match=r"shape \(4, 64\) takes 144 bytes, the buffer has 143"):
        hq.Tensor.from_numpy(np.zeros(143, np.uint8), "Q4_0", (4, 64))
    with pytest.raises(ValueError, match="multiple of 32"):
        hq.Tensor.from_numpy(np.zeros(143, np.uint8), "Q4_0", (4, 63))
    with pytest.raises(ValueError, match="needs a `type`"):
        hq.Tensor.from_numpy(np.zeros(4))


@every_weight_type
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_engine_hides_no_nan(kind: QuantType, bad: float, cpu: Device) -> None:
    """A column of activations with NaN or infinity gives NaN results, and its neighbour's stay right."""
    rows, k = 16, kind.block_size
    w, exact = make(kind, rows, k)
    y = on_the_grid(2, k)
    expected = y[1].astype(np.float64) @ exact.T
    y[0, 5] = bad
    kernels, x = Kernels(cpu), Activations(Kernels(cpu), k, 2)
    x.floats.write(y)
    x.quantize(2)
    packed, dst = cpu.allocate(w.nbytes), np.zeros((2, rows), np.float32)
    pack, product = wiring.find("pack", kind), wiring.find("mul_mat_packed", kind)
    kernels(pack, pack.grid(nrows=rows), w, packed, k, rows)
    kernels(product, product.grid(nrows=rows), packed, x.tiles, dst, k, rows, 2, rows)
    assert np.isnan(dst[0]).all()
    assert nmse(dst[1], expected) <= EXACT


def test_attention_and_activation_hide_no_nan(cpu: Device) -> None:
    kernels, dim, context = Kernels(cpu), 16, 32
    q, out = np.ones((1, dim), np.float32), np.zeros((1, dim), np.float32)
    q[0, 3] = np.nan
    cache = [np.ones(dim * context, np.float16).view(np.uint16) for _ in range(2)]
    where = [np.array([n], np.int32) for n in (20, 0)]
    attention, silu = wiring.kernel("attention_f16"), wiring.kernel("silu_mul_f32")
    grid, numbers = attention.grid(n_head_kv=1, ntokens=1), (1, 1, dim, context, 0.25, 0.0, 0, None)
    kernels(attention, grid, q, *cache, out, *where, *numbers)
    assert np.isnan(out).all()
    cache[0][3] = 0x7E00  # NaN as one value of the key at position 3
    whole = np.ones_like(q)
    kernels(attention, grid, whole, *cache, out, *where, *numbers)
    assert np.isnan(out).all()
    kernels(silu, silu.grid(n=dim), q, np.ones(dim, np.float32), out, dim)
    assert np.isnan(out[0]).tolist() == np.isnan(q[0]).tolist()
    np.testing.assert_allclose(out[0, 0], 1 / (1 + np.exp(-1)), rtol=1e-6)
