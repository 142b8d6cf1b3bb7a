"""Writing GGUF files: a header, and the tensors' bytes in its order.

Format: the GGUF specification of ggml (docs/gguf.md), version 3, little endian. A file is written beside its place,
under a name that ends with `.partial`, and takes the place when it is whole: whatever happens in between, the place
holds what it held.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import OutputFileError
from .gguf_file import DEFAULT_ALIGNMENT
from .quants import QuantType

VERSION = 3
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9  # value types of the specification


@dataclass(frozen=True)
class Uint32:
    """A metadata value that the format knows as an unsigned number."""

    value: int


Data = bytes | npt.NDArray[Any]
KeyValue = Uint32 | int | float | bool | str | Sequence[int] | Sequence[float] | Sequence[str]


@dataclass(frozen=True)
class TensorEntry:
    """A tensor that is to be written: `shape` is row-major, its last dimension contiguous."""

    name: str
    type: QuantType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def encode_key(name: str, value: KeyValue) -> bytes:
    """A key of the metadata as it stands in a file. Arrays are of whatever their first element is."""
    return _string(name) + _tagged(value)


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _tagged(value: KeyValue) -> bytes:
    if isinstance(value, (list, tuple)):
        kind, _ = _scalar(value[0])
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + b"".join(_scalar(v)[1] for v in value)
    kind, raw = _scalar(value)
    return struct.pack("<I", kind) + raw


def _scalar(value: Any) -> tuple[int, bytes]:
    if isinstance(value, Uint32):
        return _UINT32, struct.pack("<I", value.value)
    if isinstance(value, bool):
        return _BOOL, struct.pack("<B", value)
    if isinstance(value, int):
        return _INT32, struct.pack("<i", value)
    if isinstance(value, float):
        return _FLOAT32, struct.pack("<f", value)
    return _STRING, _string(value)


def _bytes(data: Data) -> memoryview:
    return (data.data if isinstance(data, np.ndarray) else memoryview(data)).cast("B")


class GGUFWriter:
    """A context: `write` takes the tensors' bytes, one tensor after the other in the order of `tensors`, each in parts
    of any size. At the end the file is there; after an error it is as if nothing had been written.

    `keys` are raw (`encode_key`, `GGUFFile.raw_key`). Raises `OutputFileError` if the file exists and is not to be
    replaced, or if it cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        keys: Sequence[bytes],
        tensors: Sequence[TensorEntry],
        *,
        alignment: int = DEFAULT_ALIGNMENT,
        replace: bool = False,
    ) -> None:
        self.path, self.replace, self.alignment = Path(path), replace, alignment
        self.partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.partial")
        self._tensors = list(tensors)
        self._left = [t.nbytes for t in reversed(self._tensors)]  # of each tensor, the next one last
        header = self._header(keys)
        self.nbytes = len(header) + sum(self._padded(t.nbytes) for t in self._tensors)
        self._open()
        try:
            self._write(header)
        except BaseException:
            self._abandon()
            raise

    def _header(self, keys: Iterable[bytes]) -> bytes:
        raw = list(keys)
        parts, offset = [b"GGUF", struct.pack("<IQQ", VERSION, len(self._tensors), len(raw)), *raw], 0
        for t in self._tensors:
            shape = t.shape[::-1]
            parts += [_string(t.name), struct.pack(f"<I{len(shape)}Q", len(shape), *shape)]
            parts.append(struct.pack("<IQ", t.type.ggml_id, offset))
            offset += self._padded(t.nbytes)
        header = b"".join(parts)
        return header.ljust(self._padded(len(header)), b"\0")

    def _padded(self, nbytes: int) -> int:
        return -(-nbytes // self.alignment) * self.alignment

    def _open(self) -> None:
        if self.path.exists() and not self.path.is_file():
            what = "a folder" if self.path.is_dir() else "not a regular file"
            raise OutputFileError(f"{self.path}: this is {what}; give the path of a file")
        if self.path.exists() and not self.replace:
            raise OutputFileError(f"{self.path}: the file exists; choose another name, or replace it (--force)")
        with self._told():
            free = shutil.disk_usage(self.path.absolute().parent).free
        if free < self.nbytes:
            have = f"{self.nbytes / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free"
            raise OutputFileError(f"{self.path}: {have} in its folder; make room or write elsewhere")
        with self._told():
            self._file = open(self.partial, "wb", buffering=0)  # noqa: SIM115

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Errors of the system as sentences."""
        try:
            yield
        except OSError as error:
            raise OutputFileError(f"{self.path}: it cannot be written: {error.strerror or error}") from error

    def _write(self, data: Data) -> None:
        rest = _bytes(data)
        with self._told():
            while len(rest):
                rest = rest[self._file.write(rest) :]

    def write(self, data: Data) -> None:
        """The next bytes of the tensor that is not complete yet. `ValueError` if they are more than it lacks."""
        n = _bytes(data).nbytes
        if not self._left or n > self._left[-1]:
            raise ValueError(f"{n} bytes, but the tensor lacks {self._left[-1] if self._left else 0}")
        self._write(data)
        self._left[-1] -= n
        if not self._left[-1]:
            self._left.pop()
            size = self._tensors[len(self._tensors) - len(self._left) - 1].nbytes
            self._write(bytes(self._padded(size) - size))

    def _finish(self) -> None:
        if self._left:
            raise ValueError(f"{len(self._left)} tensors are not complete")
        with self._told():
            self._file.close()
            os.replace(self.partial, self.path)

    def _abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self.partial.unlink()

    def __enter__(self) -> GGUFWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            if self.partial.exists():
                self._abandon()
