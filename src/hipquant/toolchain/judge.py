"""Judges the outputs of cases: what is wrong with them, in words that name the mistake.

An output is an array that was filled with `POISON` and has a guard band behind what the kernel is to write.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..quants import QK8_1, padded

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Exact = npt.NDArray[np.float64]

# By element size: 0xCD bytes; for floats a NaN of a payload that no kernel computes.
POISON: dict[int, np.unsignedinteger[Any]] = {1: np.uint8(0xCD), 2: np.uint16(0x7ECD), 4: np.uint32(0x7FCDCDCD)}
_LISTED = 6


def nmse(found: Array, expected: Array) -> float:
    """Normalized mean squared error: |found - expected|² / |expected|²; infinite where anything is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    error = float(((found.astype(np.float64) - expected) ** 2).sum())
    power = float((expected.astype(np.float64) ** 2).sum())
    return error / power if power else (0.0 if error == 0 else float("inf"))


def _untouched(found: Array) -> npt.NDArray[np.bool_]:
    poison = POISON[found.dtype.itemsize]
    return np.asarray(found.view(poison.dtype) == poison)


def _some(what: str, indices: Iterable[int], total: int) -> str:
    """`rows 1, 3, 5 (3 of 7)`, or a range where they are all of one."""
    listed = [int(i) for i in indices]
    counted = f" ({len(listed)} of {total})"
    if len(listed) == 1:
        return f"{what} {listed[0]}{counted}"
    if listed == list(range(listed[0], listed[0] + len(listed))):
        return f"{what}s {listed[0]} to {listed[-1]}{counted}"
    more = ", ..." if len(listed) > _LISTED else ""
    return f"{what}s {', '.join(map(str, listed[:_LISTED]))}{more}{counted}"


def _guard(band: Array, last: str) -> list[str]:
    """What was written behind the end of an output."""
    changed = np.flatnonzero(~_untouched(band))
    if not changed.size:
        return []
    return [
        f"wrote past the last {last}: {changed.size} elements behind the output changed, the first is {changed[0]} "
        "beyond its end"
    ]


def bit_for_bit(output: Array, *, expected: Array, what: str, size: int) -> list[str]:
    """Dequantized values: equal bits, and NaN and infinities in the same places. A `what` has `size` elements."""
    found = output[: expected.size].view(expected.dtype)
    wanted, bits = expected.reshape(-1), POISON[found.dtype.itemsize].dtype
    complaints = _guard(output[expected.size :], what)
    missing = _untouched(found) & ~np.isnan(wanted)  # where NaN is right, any NaN is
    if missing.any():
        complaints.append(
            f"{_some(what, np.unique(np.flatnonzero(missing) // size), -(-found.size // size))} not written"
        )
    equal = found.view(bits) == wanted.view(bits)
    with np.errstate(invalid="ignore"):
        equal |= ~np.isfinite(wanted) & ((found == wanted) | (np.isnan(found) & np.isnan(wanted)))
    wrong = np.flatnonzero(~equal & ~missing)
    if wrong.size:
        at = wrong[0]
        complaints.append(
            f"differs from the oracle in {wrong.size} of {found.size} elements, first in {what} {at // size}, element "
            f"{at % size}: found {found[at]!s} ({found.view(bits)[at]:#x}), expected {wanted[at]!s} "
            f"({wanted.view(bits)[at]:#x})"
        )
    return complaints


def product(
    output: Array, *, expected: Exact, typical: Exact, stride: int, tolerance: float, tile: tuple[int, int] | None
) -> list[str]:
    """Products, float32 dst[column * stride + row]: all written, nothing else, NMSE within `tolerance`, and no single
    one off by more than a few times its root of what is `typical` of a product."""
    columns, rows = expected.shape
    whole = output[: columns * stride].reshape(columns, stride)
    found, gap = whole[:, :rows], ~_untouched(whole[:, rows:])
    complaints = _guard(output[columns * stride :], "row")
    if gap.any():
        column, beyond = np.argwhere(gap)[0]
        complaints.append(f"wrote past the last row: at row {rows + beyond} of column {column}, of {rows} rows")
    missing = _untouched(found)
    if missing.any():
        complaints.append(_missing(missing, tile))
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.abs(found - expected)
    wrong = ~missing & ~(error <= 8 * np.sqrt(tolerance) * typical)
    total = nmse(found[~missing], expected[~missing])
    if total > tolerance or wrong.any():
        column, row = np.argwhere(wrong if wrong.any() else ~missing & (error >= error[~missing].max()))[0]
        hint = "; NaN: padding or memory that was not written is read" if np.isnan(found[column, row]) else ""
        complaints.append(
            f"differs from the oracle: NMSE {total:.2g} (at most {tolerance:g}), {wrong.sum()} of {wrong.size} results "
            f"wrong, first in row {row}, column {column}: found {found[column, row]:.7g}, expected "
            f"{expected[column, row]:.7g}{hint}"
        )
    return complaints


def _missing(missing: npt.NDArray[np.bool_], tile: tuple[int, int] | None) -> str:
    """Which results [columns, rows] were not written."""
    columns, rows = missing.shape
    at_rows, at_columns = np.flatnonzero(missing.any(axis=0)), np.flatnonzero(missing.any(axis=1))
    text = f"{_some('row', at_rows, rows)} not written"
    if at_columns.size < columns:
        text += f" in {_some('column', at_columns, columns)}"
    if tile is not None:
        return f"{text}: is its tile another than the table's {tile[0]} columns x {tile[1]} rows?"
    whole = missing[:, at_rows].all() and at_columns.size == columns
    return f"half of the rows: {text}" if whole and at_rows.size in (rows // 2, -(-rows // 2)) else text


def quantized(output: Array, *, x: Floats) -> list[str]:
    """q8_1 of x [rows, k]: d = max|x| / 127 and s = the sum of x in half precision, q within a tie of x / d."""
    rows, k = x.shape
    row_bytes = padded(k) // QK8_1 * 36
    complaints = _guard(output[rows * row_bytes :], "row")
    blocks = output[: rows * row_bytes].reshape(-1, 36)
    missing = _untouched(blocks).all(axis=1)
    if missing.any():
        complaints.append(f"{_some('block', np.flatnonzero(missing), len(blocks))} not written")
    wide = np.zeros((rows, padded(k)), np.float32)
    wide[:, :k] = x
    wide = wide.reshape(-1, QK8_1)
    biggest = np.abs(wide).max(axis=1)
    scales = blocks[:, :4].copy().view("<f2")
    d = biggest / np.float32(127)
    between = np.abs(scales[:, 0].astype(np.float64) - d) > np.spacing(d.astype(np.float16)).astype(np.float64)
    total = wide.sum(axis=1, dtype=np.float64)
    rounding = np.abs(total) * 2.0**-10 + np.abs(wide).sum(axis=1) * 1e-5 + 2.0**-24
    with np.errstate(invalid="ignore"):
        sums = ~(np.abs(scales[:, 1] - total) <= rounding)
    exact = np.divide(
        wide.astype(np.float64) * 127, biggest[:, None], out=np.zeros(wide.shape), where=biggest[:, None] > 0
    )
    quants = (np.abs(blocks[:, 4:].view(np.int8) - exact) > 0.5 + 1e-4).any(axis=1)
    beyond = np.arange(len(blocks)) % (padded(k) // QK8_1) * QK8_1 >= k
    for name, wrong in (("d", between), ("s", sums), ("q", quants)):
        if (wrong & ~missing & ~beyond).any():
            complaints.append(
                f"{name} is wrong in {_some('block', np.flatnonzero(wrong & ~missing & ~beyond), len(blocks))}"
            )
    if (beyond & ~missing & blocks.any(axis=1)).any():
        complaints.append(f"blocks beyond k are not zero: a row of {k} is padded to {padded(k)}")
    return complaints
