"""Activations in planes (kernels/gpu/planes.h), made and taken apart by numpy, for tests of the engine's kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from emulator import Emulator
from hipquant import wiring
from hipquant.toolchain.simulate import Simulator

Backend = Simulator | Emulator
Floats = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]
Parts = tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]

QK, UNIT, UNIT_BYTES = 32, 64, 80  # values of a block and of a unit of activations in planes, and its bytes


def launch(backend: Backend, name: str, sizes: dict[str, int], *params: npt.NDArray[np.generic] | float) -> None:
    """Launches a kernel of the table with the grid that it gives for `sizes`."""
    row = wiring.kernel(name)
    backend.launch(row, row.grid(**sizes), params)


def quantized(values: Floats, n_padded: int) -> Parts:
    """Columns in the arithmetic of the kernels: int8 [column][value], d of each 32, and sums of each 16 int8."""
    columns, n = values.shape
    padded = np.zeros((columns, n_padded), np.float32)
    padded[:, :n] = values
    x = padded.reshape(columns, -1, QK)
    d = np.abs(x).max(-1) / np.float32(127)
    with np.errstate(invalid="ignore", divide="ignore"):
        quants = np.where(d[..., None] > 0, np.clip(np.rint(x / d[..., None]), -127, 127), 0).astype(np.int8)
    return quants.reshape(columns, -1), d, quants.reshape(columns, -1, 16).sum(-1, dtype=np.int16)


def parts_of(q: Bytes, n_padded: int) -> Parts:
    """The same of columns of planes."""
    columns, units = len(q), n_padded // UNIT
    pieces = q[:, : units * UNIT].reshape(columns, UNIT // 16, units, 16).swapaxes(1, 2)
    scales = np.ascontiguousarray(q[:, units * UNIT :]).reshape(columns, 2 * units, 8)
    d, sums = np.ascontiguousarray(scales[..., :4]), np.ascontiguousarray(scales[..., 4:])
    return (
        np.ascontiguousarray(pieces).reshape(columns, n_padded).view(np.int8),
        d.view(np.float32)[..., 0],
        sums.view(np.int16).reshape(columns, -1),
    )


def decoded(q: Bytes, n_padded: int) -> Wide:
    """The values that columns of planes stand for."""
    quants, d, _ = parts_of(q, n_padded)
    return quants.astype(np.float64) * np.repeat(d, QK, axis=-1)


def check_planes(q: Bytes, values: Floats, n_padded: int) -> None:
    """Columns of planes hold what the same kernel has written as floats, bit for bit; NaN is the scale of its block."""
    for found, expected in zip(parts_of(q, n_padded), quantized(values, n_padded), strict=True):
        np.testing.assert_array_equal(found, expected)
