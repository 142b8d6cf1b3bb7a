"""Running the engine's kernels on the host: simulated under AddressSanitizer and UBSan, or as AMD's machine code.

Where AMD_EMULATOR names a checkout of tinygrad, its emulator executes the machine code of four AMD targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import emulator
import reference
from hipquant.quants import FLOAT_TYPES, QuantType, padded, plane_bytes, plane_units
from hipquant.toolchain import cases, gpu, simulate
from planes import UNIT, UNIT_BYTES, Backend, Bytes, Floats, Wide, check_planes, decoded, launch

NULL = 0  # a pointer
POISON = 0xA5  # of bytes
EPS = 1e-5
needs_sanitizers = pytest.mark.skipif(
    not simulate.can_sanitize(),
    reason="the run time of AddressSanitizer and UBSan comes with gcc, which is not installed",
)
WAVES = [pytest.param(wave, id=f"wave{wave}") for wave in (32, 64)]
EMULATED = [pytest.param(target, id=target) for target in emulator.engine_targets()]


@contextmanager
def started(which: str | int, *sources: str | Path, matrix_units: int = 0) -> Iterator[Backend]:
    """What runs kernels of the engine: the emulator of a target, or a simulator with waves of so many lanes, of sources
    that are files, or the names of some of the engine's."""
    if isinstance(which, str):
        found: Backend = emulator.engine(which)
    else:
        paths = [gpu.ENGINE / f"{source}.hip" if isinstance(source, str) else source for source in sources]
        found = simulate.build(which, True, paths, matrix_units=matrix_units)
    with closing(found):
        yield found


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def poison(*shape: int) -> Floats:
    """What a kernel must not leave behind, nor read."""
    return np.full(shape, np.nan, np.float32)


def assert_close(found: npt.ArrayLike, expected: npt.ArrayLike, tolerance: float = 2e-6) -> None:
    """Within a tolerance of the greatest of the expected values, and NaN where they are."""
    scale = float(np.nanmax(np.abs(np.asarray(expected, np.float64)), initial=0))
    np.testing.assert_allclose(found, expected, rtol=2 * tolerance, atol=tolerance * scale)


def rms_norm(x: Floats, weight: Floats, eps: float) -> Wide:
    v = x.astype(np.float64)
    return v * weight / np.sqrt((v * v).mean(-1, keepdims=True) + eps)


def outputs(rows: int, n_padded: int, which: str) -> tuple[Floats | int, Bytes | int]:
    """Poisoned arrays for y and q, or null: which is "y", "q" or "yq"."""
    y = poison(rows, n_padded) if "y" in which else NULL
    q = np.full((rows, n_padded // UNIT * UNIT_BYTES), POISON, np.uint8) if "q" in which else NULL
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


def weights(backend: Backend, kind: QuantType, rows: int, k: int) -> tuple[Bytes, Wide]:
    """A random matrix as the engine keeps it, and its values: rows of floats are filled up with zeros to units."""
    blocks = cases.random_blocks(kind, rows, k)
    if kind in FLOAT_TYPES:
        wide = np.zeros((rows, plane_units(k) * UNIT * kind.block_bytes), np.uint8)
        wide[:, : blocks.shape[1]] = blocks
        return wide, cases.values(kind, blocks, k).astype(np.float64)
    planes = np.full(plane_bytes(kind, rows, k), POISON, np.uint8)
    launch(backend, f"repack_{kind.suffix}", {"nrows": rows, "units": plane_units(k)}, blocks, planes, k, rows, 0, rows)
    return planes, reference.dequantize(kind, blocks, (rows, k)).astype(np.float64)


def activations(backend: Backend, kind: QuantType, x: Floats, n_padded: int) -> tuple[Bytes | Floats, Wide]:
    """Columns as a product with weights of a type takes them, and the values that these stand for."""
    columns, k = x.shape
    floats = np.zeros((columns, n_padded), np.float32)
    floats[:, :k] = x
    if kind in FLOAT_TYPES:
        return floats, x.astype(np.float64)
    q = np.full((columns, n_padded // UNIT * UNIT_BYTES), POISON, np.uint8)
    launch(backend, "quantize_q8", {"n_padded": n_padded, "rows": columns}, floats, q, n_padded)
    return q, decoded(q, n_padded)[:, :k]
