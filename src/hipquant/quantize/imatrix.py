"""Importance matrices: for each column of a weight matrix, the mean square of the activations that it multiplies.

`llama-imatrix` makes them from a text. Two formats: GGUF (tensors NAME.in_sum2 and NAME.counts), and the older .dat.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import QuantizationError
from ..gguf_file import GGUFFile, StringArray, TensorInfo
from .mixes import Part, part_of

F32Array = npt.NDArray[np.float32]
_SUMS, _COUNTS = ".in_sum2", ".counts"
_FLOOR = 1e-4  # of the mean: columns that no text reached still count a little


@dataclass
class Importance:
    """`entries` are float32 [n] by the names of weights: n columns, or as many for each expert."""

    path: Path
    entries: dict[str, F32Array] = field(default_factory=dict)
    chunks: int = 0
    dataset: str = ""

    def weights(self, info: TensorInfo) -> F32Array | None:
        """The importance of a tensor's columns, float32 [experts, columns] with a mean of 1 in each row; None if the
        matrix has no entry of this name. `QuantizationError` if the entry is for another shape."""
        found = self.entries.get(info.name)
        if found is None:
            return None
        columns, experts = info.shape[-1], info.shape[0] if len(info.shape) == 3 else 1
        if found.size != columns * experts:
            if part_of(info.name) is Part.EMBEDDING:
                return None  # its columns are not what it was measured for
            self.fail(
                f"entry {info.name!r} has {found.size} values, the tensor has {experts} x {columns} columns; "
                "is this the importance matrix of another model?"
            )
        rows = found.reshape(experts, columns).astype(np.float64)
        mean = rows.mean(axis=1, keepdims=True)
        scaled = np.divide(rows, mean, out=np.ones_like(rows), where=mean > 0)
        return np.ascontiguousarray(np.maximum(scaled, _FLOOR), np.float32)

    def fail(self, message: str) -> NoReturn:
        raise QuantizationError(f"{self.path}: {message}")


def load_importance(path: str | os.PathLike[str]) -> Importance:
    """Reads either format. `QuantizationError` or `InvalidModelFileError` if the file is damaged, empty, or holds
    numbers that are negative or not finite."""
    found = Importance(Path(path))
    with open(path, "rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if is_gguf:
        _read_gguf(found)
    else:
        _read_legacy(found)
    if not found.entries:
        found.fail("an importance matrix without entries")
    for name, values in found.entries.items():
        bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
        if bad.size:
            found.fail(
                f"entry {name!r} is {values[bad[0]]} at index {bad[0]}, expected finite numbers from 0 on; "
                "make the importance matrix again"
            )
    return found


def _read_gguf(found: Importance) -> None:
    with GGUFFile(found.path) as file:
        for name, info in file.tensors.items():
            if not name.endswith(_SUMS):
                continue
            of = name.removesuffix(_SUMS)
            if of + _COUNTS not in file.tensors:
                found.fail(f"tensor {name!r} has no {of + _COUNTS!r} beside it; the file is damaged")
            sums, counts = (_floats(found, file, n) for n in (name, of + _COUNTS))
            if not counts.size or sums.size % counts.size or not np.isfinite(counts).all():
                found.fail(f"{of + _COUNTS!r} holds {counts.size} counts for {info.shape} sums; the file is damaged")
            rows = sums.reshape(counts.size, -1)
            count = counts[:, None]
            # An expert that no token chose has no sums: its columns count alike.
            found.entries[of] = np.where(count > 0, rows / np.where(count > 0, count, 1), 1).reshape(-1)
        found.chunks = file.get("imatrix.chunk_count", int, 0)
        datasets = file.get("imatrix.datasets", StringArray)
        found.dataset = datasets[0] if datasets else ""


def _floats(found: Importance, file: GGUFFile, name: str) -> F32Array:
    if file.tensors[name].type.name != "F32":
        found.fail(f"tensor {name!r} is {file.tensors[name].type}, expected F32; is this an importance matrix?")
    return file.data(name).view(np.float32).copy()


class _Bytes:
    """The bytes of a .dat file, from front to back."""

    def __init__(self, found: Importance) -> None:
        self.found, self.raw, self.at = found, found.path.read_bytes(), 0

    def take(self, nbytes: int) -> bytes:
        if not 0 <= nbytes <= len(self.raw) - self.at:
            self.found.fail(
                f"{nbytes} bytes at byte {self.at} of {len(self.raw)}: the file is cut off, or no importance matrix"
            )
        self.at += nbytes
        return self.raw[self.at - nbytes : self.at]

    def number(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])


def _read_legacy(found: Importance) -> None:
    """int32 entries; each: int32 length, name, int32 calls, int32 values, float32 ...; then int32 chunks, and the
    length and name of the text, which older files lack. Values are sums over the calls."""
    file = _Bytes(found)
    for _ in range(file.number()):
        name = file.take(file.number()).decode("utf-8", "replace")
        calls, n = file.number(), file.number()
        values = np.frombuffer(file.take(4 * n), "<f4").astype(np.float32)
        found.entries[name] = values / np.float32(calls) if calls > 0 else values
    if file.at < len(file.raw):
        found.chunks = file.number()
    if file.at < len(file.raw):
        found.dataset = file.take(file.number()).decode("utf-8", "replace")
