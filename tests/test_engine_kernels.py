"""The engine's norms, activations and biases on a GPU, simulated and emulated, against float64 written out here."""

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
from hipquant.quants import padded
from planes import UNIT, UNIT_BYTES, Backend, Bytes, Floats, Wide, check_planes, launch

pytestmark = needs_sanitizers


@pytest.fixture(scope="module", params=WAVES + EMULATED)
def simulator(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with started(request.param, "norm", "activation", "read") as found:
        yield found


# Norm


@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (2, 4096 + 32), (2, 576)])
def test_norm(simulator: Backend, rng: np.random.Generator, rows: int, n: int, with_residual: bool) -> None:
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
def test_norm_of_any_length(simulator: Backend, rng: np.random.Generator, n: int) -> None:
    """Without planes a row need not be whole blocks, nor aligned to 16 bytes."""
    x, residual, weight, y = normal(rng, 3, n), normal(rng, 3, n), normal(rng, n), poison(3, n)
    stream = x.copy()
    launch(simulator, "add_rms_norm_q8", {"rows": 3}, stream, residual, weight, y, NULL, n, n, 1e-6)
    np.testing.assert_array_equal(stream, x + residual)
    assert_close(y, rms_norm(stream, weight, 1e-6))


def test_norm_of_zeros_and_nan(simulator: Backend, rng: np.random.Generator) -> None:
    x = normal(rng, 3, 64)
    x[0], x[1, 5] = 0, np.nan
    expected = rms_norm(x, np.ones(64, np.float32), 1e-5)
    assert np.isnan(expected[1]).all()

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        weight = np.ones(64, np.float32)
        launch(simulator, "add_rms_norm_q8", {"rows": 3}, x.copy(), NULL, weight, y, q, 64, n_padded, 1e-5)

    check_outputs(run, 3, 64, expected)


@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (2, 8192 + 4096 + 32), (2, 576)])
def test_norm_of_a_normed_branch(simulator: Backend, rng: np.random.Generator, rows: int, n: int) -> None:
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
def test_layer_norm(simulator: Backend, rng: np.random.Generator, rows: int, n: int, with_residual: bool) -> None:
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
def test_further_norms_of_any_length(simulator: Backend, rng: np.random.Generator, n: int) -> None:
    x, residual, weight, other, y = normal(rng, 3, n), normal(rng, 3, n), normal(rng, n), normal(rng, n), poison(3, n)
    stream = x.copy()
    launch(simulator, "add_layer_norm_q8", {"rows": 3}, stream, residual, weight, other, y, NULL, n, n, 1e-6)
    assert_close(y, layer_norm(x + residual, weight, other, 1e-6), 4e-6)
    stream = x.copy()
    launch(simulator, "add_normed_rms_norm_q8", {"rows": 3}, stream, residual, other, weight, y, NULL, n, n, 1e-6)
    assert_close(y, rms_norm(x + rms_norm(residual, other, 1e-6), weight, 1e-6), 4e-6)


# Activation and bias


@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 96), (2, 1024 + 32)])
def test_silu(simulator: Backend, rng: np.random.Generator, rows: int, n: int) -> None:
    gate_up = 4 * normal(rng, rows, 2 * n)
    gate_up[:, :16] = np.linspace(-120, 120, 16)
    gate_up[-1, [20, n - 1]] = np.nan  # of its block alone
    gate, up = gate_up[:, :n].astype(np.float64), gate_up[:, n:]

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        launch(simulator, "silu_mul_q8", {"n_padded": n_padded, "rows": rows}, gate_up, y, q, n, n_padded)

    check_outputs(run, rows, n, gate / (1 + np.exp(-gate)) * up, 1e-6)


def test_silu_is_exact_where_it_is_small(simulator: Backend) -> None:
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
def test_gelu(simulator: Backend, rng: np.random.Generator, rows: int, n: int, gated: bool) -> None:
    x = 2 * normal(rng, rows, 2 * n if gated else n)
    x[:, :16] = np.linspace(-120, 120, 16)
    x[-1, n - 1] = np.nan
    expected = gelu(x[:, :n]) * (x[:, n:] if gated else 1)

    def run(y: Floats | int, q: Bytes | int, n_padded: int) -> None:
        name = "gelu_mul_q8" if gated else "gelu_q8"
        launch(simulator, name, {"n_padded": n_padded, "rows": rows}, x, y, q, n, n_padded)

    check_outputs(run, rows, n, expected, 1e-6)


@pytest.mark.parametrize("n", [1, 7, 1024, 3001])
def test_scale_and_softcap(simulator: Backend, rng: np.random.Generator, n: int) -> None:
    """Soft-capping keeps the digits of small values, and NaN."""
    x = (normal(rng, n) * 10.0 ** rng.uniform(-6, 3, n)).astype(np.float32)
    x[-1] = np.nan if n > 7 else 1.0
    found = x.copy()
    launch(simulator, "scale_rows_f32", {"n": n}, found, n, 5.5)
    np.testing.assert_array_equal(found, x * np.float32(5.5))
    launch(simulator, "softcap_rows_f32", {"n": n}, x, n, 30.0)
    np.testing.assert_allclose(x, 30 * np.tanh(found / 5.5 / 30), rtol=1e-6)


@pytest.mark.parametrize(("rows", "n"), [(1, 32), (3, 70), (2, 1024 + 32)])
def test_quantize(simulator: Backend, rng: np.random.Generator, rows: int, n: int) -> None:
    for n_padded in (padded(n), -(-n // UNIT) * UNIT):
        x = np.zeros((rows, n_padded), np.float32)
        x[:, :n] = normal(rng, rows, n)
        x[-1, 5], x[0, :16] = np.nan, 1e-3 * x[0, :16]
        q = np.full((rows, n_padded // UNIT * UNIT_BYTES), 0xA5, np.uint8)
        launch(simulator, "quantize_q8", {"n_padded": n_padded, "rows": rows}, x, q, n_padded)
        check_planes(q, x, n_padded)


@pytest.mark.parametrize(("n", "stride"), [(1, 3), (256, 256), (300, 700)])
def test_bias(simulator: Backend, rng: np.random.Generator, n: int, stride: int) -> None:
    x, bias = normal(rng, 3, stride), normal(rng, n)
    found = x.copy()
    launch(simulator, "add_bias_rows_f32", {"n": n, "rows": 3}, found, bias, n, stride)
    np.testing.assert_array_equal(found[:, :n], x[:, :n] + bias)
    np.testing.assert_array_equal(found[:, n:], x[:, n:])


@pytest.mark.parametrize("nbytes", [16, 4112, (1 << 20) + 48])
def test_read_memory(simulator: Backend, rng: np.random.Generator, nbytes: int) -> None:
    """The sum of the words of each MiB, modulo 2^32."""
    x = rng.integers(-(1 << 31), 1 << 31, nbytes // 4).astype(np.int32)
    found = np.full(-(-nbytes // (1 << 20)), -1, np.int32)
    launch(simulator, "read_memory", {"nbytes": nbytes}, x, found, nbytes)
    parts = np.split(x.astype(np.int64), range(1 << 18, len(x), 1 << 18))
    np.testing.assert_array_equal(found, np.array([part.sum() for part in parts]).astype(np.int32))
