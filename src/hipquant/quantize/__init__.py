"""Quantizing GGUF files: float weights to blocks of a type, a part of a tensor at a time.

`kernels/cpu/search.h` says how scales are found, `mixes.py` which tensor gets which type, `imatrix.py` how columns are
weighed, `gguf_writer.py` how the file is written.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..codeobjects import QUANTIZED
from ..driver import Device
from ..driver import device as get_device
from ..errors import OutputFileError, QuantizationError
from ..gguf_file import GGUFFile, TensorInfo
from ..gguf_writer import GGUFWriter, KeyValue, TensorEntry, Uint32, encode_key
from ..quants import F32, QuantType, Role
from ..wiring import find
from .imatrix import F32Array, Importance, load_importance
from .mixes import FILE_TYPES, Choice, FileType, Part, choose_types, file_type, matrix_type, part_of

__all__ = [
    "FILE_TYPES",
    "FileType",
    "Importance",
    "Plan",
    "file_type",
    "load_importance",
    "matrix_type",
    "plan",
    "quantize_file",
    "quantize_rows",
]

QUANTIZATION_VERSION = 2  # general.quantization_version: of ggml's block layouts
PART = 1 << 22  # weights that are in memory at once
_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

Raw = npt.NDArray[np.uint8]


@dataclass
class Plan:
    """What a quantized file will hold. `notes` are sentences that a user should read."""

    file: GGUFFile
    kind: FileType
    choices: list[Choice]
    importance: Importance | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def entries(self) -> list[TensorEntry]:
        return [TensorEntry(c.info.name, c.type, c.info.shape) for c in self.choices]

    @property
    def weights(self) -> int:
        return sum(prod(c.info.shape) for c in self.choices)

    @property
    def bytes_before(self) -> int:
        return sum(c.info.nbytes for c in self.choices)

    @property
    def bytes_after(self) -> int:
        return sum(e.nbytes for e in self.entries)

    @property
    def types(self) -> dict[str, int]:
        """How many tensors have which type, most frequent first."""
        return dict(Counter(c.type.name for c in self.choices).most_common())


def plan(
    file: GGUFFile,
    kind: FileType,
    *,
    importance: Importance | None = None,
    allow_requantize: bool = False,
    output: QuantType | None = None,
    embedding: QuantType | None = None,
) -> Plan:
    """Chooses the types, and checks all that can be checked before any weight is read.

    Raises `QuantizationError` for a file whose weights are quantized already (unless that is allowed), or an importance
    matrix that is of another model.
    """
    choices = choose_types(file, kind, output=output, embedding=embedding, has_importance=importance is not None)
    made = Plan(file, kind, choices, importance, [c.note for c in choices if c.note])
    changed = [c for c in choices if c.type is not c.info.type]
    quantized = [c.info for c in changed if c.info.type.role is not Role.FLOAT]
    if quantized and not allow_requantize:
        raise QuantizationError(
            f"{file.path}: tensor {quantized[0].name!r} is {quantized[0].type} already ({len(quantized)} tensors are "
            "quantized), and each time costs quality. Take the F16, BF16 or F32 file, or --allow-requantize"
        )
    if quantized:
        made.notes.append(f"{len(quantized)} tensors are quantized a second time, which costs quality")
    if importance is not None:
        made.notes += _importance_notes(importance, [c.info for c in changed if c.type.role is not Role.FLOAT])
    return made


def _importance_notes(importance: Importance, tensors: Sequence[TensorInfo]) -> list[str]:
    missing = [t.name for t in tensors if importance.weights(t) is None and part_of(t.name) is not Part.EMBEDDING]
    if tensors and not set(importance.entries) & {t.name for t in tensors}:
        importance.fail("no entry has the name of a tensor of this model; is it the importance matrix of another one?")
    if not missing:
        return []
    listed = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
    return [f"the importance matrix has no entry for {len(missing)} tensors: {listed}"]


def quantize_file(
    made: Plan,
    out: str | os.PathLike[str],
    *,
    replace: bool = False,
    device: Device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Writes the file of a plan; the seconds that it took. `progress(done, total)` is called with bytes read.

    Raises `QuantizationError` for a weight that is NaN, infinite or too large for the type, `InvalidModelFileError` for
    such a scale in a tensor that is copied, `OutputFileError` if the file cannot be written. Nothing is left then.
    """
    begun, on, target = time.perf_counter(), device or get_device("cpu"), Path(out)
    if target.exists() and os.path.samefile(target, made.file.path):
        raise OutputFileError(f"{target}: this is the model itself; give another name for the result")
    total, done = made.bytes_before, 0
    keys = _keys(made)
    with GGUFWriter(target, keys, made.entries, alignment=made.file.alignment, replace=replace) as writer:
        for choice in made.choices:
            for raw, read in _tensor(made, choice, on):
                writer.write(raw)
                done += read
                if progress is not None:
                    progress(done, total)
    return time.perf_counter() - begun


def _keys(made: Plan) -> list[bytes]:
    """The metadata of the file as they are, save those that say how it is quantized."""
    new: dict[str, KeyValue] = {
        "general.quantization_version": Uint32(QUANTIZATION_VERSION),
        "general.file_type": Uint32(made.kind.id),
    }
    if made.importance is not None:
        new["quantize.imatrix.file"] = made.importance.path.name
        new["quantize.imatrix.entries_count"] = Uint32(len(made.importance.entries))
        if made.importance.dataset:
            new["quantize.imatrix.dataset"] = made.importance.dataset
        if made.importance.chunks > 0:
            new["quantize.imatrix.chunks_count"] = Uint32(made.importance.chunks)
    file = made.file
    names = [k for k in file.metadata if k not in _SPLIT_KEYS]
    kept = [encode_key(k, new.pop(k)) if k in new else file.raw_key(k) for k in names]
    return kept + [encode_key(k, v) for k, v in new.items()]


def _tensor(made: Plan, choice: Choice, device: Device) -> Iterator[tuple[Raw, int]]:
    """The bytes of a tensor in parts, each with the bytes of the source that it was made from."""
    file, info = made.file, choice.info
    if choice.type is info.type:
        file.check_scales(info.name)
        step = PART * 4
        for at in range(0, info.nbytes, step):
            part = file.data(info.name)[at : at + step]
            yield part, part.nbytes
            file.release(info.name, at, part.nbytes)
        return
    weights = made.importance.weights(info) if made.importance and choice.type.role is not Role.FLOAT else None
    k, row_bytes = info.shape[-1], info.type.row_bytes(info.shape[-1])
    rows_of_one = info.shape[-2] if weights is not None and len(weights) > 1 else prod(info.shape[:-1])
    rows, step, source = prod(info.shape[:-1]), max(1, PART // k), file.data(info.name).reshape(-1, row_bytes)
    at = 0
    while at < rows:
        one = at // rows_of_one  # an expert has its own importance
        end = min(at + step, rows_of_one * (one + 1))
        x = float_rows(source[at:end], info.type, k, device)
        importance = None if weights is None else weights[one]
        what = f"{file.path}: tensor {info.name!r}"
        yield quantize_part(x, choice.type, importance, device, what, at * k), (end - at) * row_bytes
        file.release(info.name, at * row_bytes, (end - at) * row_bytes)
        at = end


def float_rows(rows: Raw, type: QuantType, k: int, device: Device) -> F32Array:
    """Rows of a type, uint8 [n, row_bytes] and contiguous, as float32 [n, k]."""
    if type is F32:
        x = rows.view(np.float32)
        return x if x.flags.aligned else x.copy()
    n = len(rows)
    x, ids = np.empty((n, k), np.float32), np.arange(n, dtype=np.uint32)
    kernel = find("get_rows", type)
    function = device.get_or_load_func(kernel.name, QUANTIZED)
    function.launch(kernel.grid(nids=n, k=k), kernel.block, 0, device.stream, [rows, ids, x, k, rows.shape[1]])
    return x


def quantize_rows(x: F32Array, type: QuantType, importance: F32Array | None = None) -> Raw:
    """Rows of float32 weights [rows, k] as blocks of a type, uint8 [rows, row_bytes]. `importance`, float32 [k] or
    None, weighs the squares of the errors. `QuantizationError` for a weight that the type cannot hold, `ValueError` for
    shapes that do not match."""
    if x.ndim != 2 or x.dtype != np.float32 or (importance is not None and importance.shape != x.shape[1:]):
        shape = None if importance is None else importance.shape
        raise ValueError(f"expected float32 [rows, k] and [k], not {x.dtype} {x.shape} and {shape}")
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
    return quantize_part(np.ascontiguousarray(x), type, importance, get_device("cpu"), "the array", 0)


def quantize_part(
    x: F32Array, type: QuantType, importance: F32Array | None, device: Device, what: str, first: int
) -> Raw:
    """Blocks of a type, uint8 [rows, row_bytes]. `first` is the index of the first weight in `what`."""
    rows, k = x.shape
    out, kernel = np.empty((rows, type.row_bytes(k)), np.uint8), find("quantize_weights", type)
    grid = kernel.grid(n=x.size)
    invalid = np.full(grid[0], -1, np.int64)
    function = device.get_or_load_func(kernel.name, QUANTIZED)
    function.launch(grid, kernel.block, 0, device.stream, [x, importance, out, invalid, k, x.size])
    bad = invalid[invalid >= 0]
    if bad.size:
        at = int(bad[0])
        raise QuantizationError(
            f"{what} is {x.reshape(-1)[at]} at index {first + at} (row {(first + at) // k}, column {at % k}), "
            f"expected finite numbers that {type} can hold; the file is damaged, or training diverged"
        )
    return out
