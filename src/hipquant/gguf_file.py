"""GGUF files: metadata and weights, mapped into memory, with nothing believed before it is checked.

Format: the GGUF specification of ggml (docs/gguf.md), versions 2 and 3, little endian. A file is a header (metadata,
then one entry a tensor) and the tensors' bytes, each at a multiple of `general.alignment`. Weights are never copied:
`GGUFFile.data` is a view of the mapping. Whatever is wrong with a file raises `InvalidModelFileError` when it is
opened, or `UnsupportedQuantTypeError` if a tensor has a type that hipquant does not run.

Not handled: a file that another process truncates while it is mapped (the operating system then ends this process
with SIGBUS when a lost page is touched). Replace model files by renaming, not by overwriting.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TypeVar, overload

import numpy as np
import numpy.typing as npt

from .errors import InvalidModelFileError, UnsupportedQuantTypeError
from .quants import BY_GGML_ID, MATRIX_TYPES, QuantType

DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # GGML_MAX_DIMS
_MIN_ALIGNMENT, _MAX_ALIGNMENT = 8, 1 << 24
_MAX_HEADER = 1 << 27  # bytes; vocabularies of 262k tokens with their merges take about 20 MiB
_MAX_ENTRIES = 1 << 17  # keys, tensors
_MAX_NAME = (1 << 16) - 1  # bytes of a key, by the specification; tensor names are shorter
_MIN_KEY_BYTES, _MIN_TENSOR_BYTES = 14, 33  # what the shortest entry of each kind takes
_BLOCKS_AT_ONCE = 1 << 16  # of a check for invalid scales: temporaries of at most 256 KiB

_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_BOOL, _STRING, _ARRAY = 7, 8, 9  # value types of the specification; the numeric ones:
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}

# ggml's types, those it removed too, by their ids: what the type table lacks can be named.
_GGML_TYPES = (
    "F32 F16 Q4_0 Q4_1 Q4_2 Q4_3 Q5_0 Q5_1 Q8_0 Q8_1 Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K IQ2_XXS IQ2_XS IQ3_XXS IQ1_S "
    "IQ4_NL IQ3_S IQ2_S IQ4_XS I8 I16 I32 I64 F64 IQ1_M BF16 Q4_0_4_4 Q4_0_4_8 Q4_0_8_8 TQ1_0 TQ2_0 IQ4_NL_4_4 "
    "IQ4_NL_4_8 IQ4_NL_8_8 MXFP4 NVFP4 Q1_0 Q2_0"
)

# What people load by mistake, by the first bytes.
_LOOKALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the model itself: run `git lfs pull`"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint: convert the model to GGUF first"),
    (b"<!", "a web page: download the file itself, not the page that shows it"),
    (b"<html", "a web page: download the file itself, not the page that shows it"),
    (b"tjgg", "a GGML file from before GGUF (2023): convert the original model again"),
    (b"lmgg", "a GGML file from before GGUF (2023): convert the original model again"),
    (b"FUGG", "a GGUF file with swapped magic bytes"),
)

# Float format of the scales by type: word and exponent bits, all set in an infinity or a NaN. Others: half precision.
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "Q8_K": ("<u4", 0x7F800000), "BF16": ("<u2", 0x7F80), "F16": ("<u2", 0x7C00)}
_HALF = ("<u2", 0x7C00)

_CONVERT = "convert the model again"


class StringArray(Sequence[str]):
    """The strings of a metadata array, decoded when the first of them is asked for.

    Bytes that are not UTF-8 (tokens may hold any) become surrogate escapes: `s.encode("utf-8", "surrogateescape")`
    gives the bytes of the file.
    """

    def __init__(self, raw: bytes, length: int) -> None:
        self._raw, self._length = raw, length
        self._strings: list[str] = []

    def tolist(self) -> list[str]:
        """All strings; the same list at each call."""
        if self._raw:
            raw, read, start, strings = self._raw, _U64.unpack_from, 0, []
            for _ in range(self._length):
                end = start + 8 + read(raw, start)[0]
                strings.append(raw[start + 8 : end].decode("utf-8", "surrogateescape"))
                start = end
            self._strings, self._raw = strings, b""
        return self._strings

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self.tolist()[index]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return iter(self.tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (StringArray, list, tuple)) and self.tolist() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<StringArray of {self._length} strings>"


Value = bool | int | float | str | npt.NDArray[Any] | StringArray
_T = TypeVar("_T")
_KINDS: dict[type, str] = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    np.ndarray: "an array of numbers",
    StringArray: "an array of strings",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file: `shape` is row-major, its last dimension contiguous (ggml's ne[0]); `offset` is in bytes
    from the start of the file, or of the model's part that holds it (from 0)."""

    name: str
    type: QuantType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0


class GGUFFile:
    """An open GGUF file, or all files of a model in parts (`gguf_parts.py`), of which `path` is the first.

    `metadata` maps keys to Python scalars, text (what is not UTF-8 is replaced), 1-D numpy arrays and
    `StringArray`; `tensors` maps names to `TensorInfo`, both in the order of the file. Usable as a context manager;
    metadata and the views made by `data` stay valid after `close`.

    Raises `InvalidModelFileError` if the file or a part is missing, unreadable, truncated, or contradicts itself;
    `UnsupportedQuantTypeError` for a tensor of a type that is not in the type table.
    """

    def __init__(self, path: str | os.PathLike[str], *, part: int = 0) -> None:
        """`part` says that this is opened as a later part of a model."""
        self.path, self._others = Path(path), list[GGUFFile]()
        self._map: mmap.mmap | None = _map_file(self.path)
        header = _Header(self.path, self._map)
        try:
            self.version, n_tensors, n_keys = header.read_start()
            self.metadata: dict[str, Value] = header.read_metadata(n_keys)
            self._spans = header.spans
            self.alignment = _alignment(self)
            self.tensors: dict[str, TensorInfo] = header.read_tensors(n_tensors, self.alignment)
            if not part and (count := self.get("split.count", int, 1)) > 1:
                from .gguf_parts import open_others

                self._others = open_others(self, count)
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor: read-only uint8 [nbytes], a view of the mapping. `KeyError` for an unknown name."""
        info = self.tensors[name]
        return np.frombuffer(self._part(info)._mapping(), np.uint8, info.nbytes, info.offset)

    def raw_key(self, key: str) -> bytes:
        """A key of the metadata as it stands in the file: name, type and value. `KeyError` for an unknown key."""
        start, end = self._spans[key]
        return self._mapping()[start:end]

    def release(self, name: str, start: int = 0, nbytes: int | None = None) -> None:
        """Lets go of the memory of a tensor's pages (of `nbytes` bytes from its byte `start`), or does nothing where
        the system cannot. Views stay valid: pages that are touched again are read again."""
        info = self.tensors[name]
        mapping = self._part(info)._mapping()
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        length = info.nbytes - start if nbytes is None else nbytes
        if start < 0 or length < 0 or start + length > info.nbytes:
            raise ValueError(f"bytes {start} to {start + length} are not within the {info.nbytes} bytes of {name!r}")
        first = (info.offset + start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length:
            mapping.madvise(mmap.MADV_DONTNEED, first, info.offset + start + length - first)

    def check_scales(self, name: str) -> None:
        """Raises `InvalidModelFileError` if a scale of a block (an element, for float types) is NaN or infinite."""
        info = self.tensors[name]
        block = find_invalid_scales(info.type, self.data(name))
        if block is not None:
            per_row = info.shape[-1] // info.type.block_size
            row, column = block // per_row, block % per_row * info.type.block_size
            what = "element" if info.type.block_size == 1 else "scale of a block"
            self.fail(
                f"tensor {name!r} ({info.type}) has a NaN or infinite {what} at row {row}, column {column} (block "
                f"{block}, byte {info.offset + block * info.type.block_bytes}), expected finite numbers; "
                "the file is damaged or was made from a damaged model: download or convert it again"
            )

    @overload
    def get(self, key: str, kind: type[_T]) -> _T | None: ...
    @overload
    def get(self, key: str, kind: type[_T], default: _T) -> _T: ...
    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T | None:
        """The value of a key as `kind` (bool, int, float, str, np.ndarray or StringArray), or `default` if the key is
        absent. An integer serves as a float; any other difference raises `InvalidModelFileError`."""
        if key not in self.metadata:
            return default
        value: Any = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            found = _KINDS[type(value)] + (f" ({value!r:.60})" if np.isscalar(value) else "")
            self.fail(f"key {key!r} is {found}, expected {_KINDS.get(kind, kind.__name__)}; convert the model again")
        return value

    def require(self, key: str, kind: type[_T]) -> _T:
        """As `get`, but an absent key raises `InvalidModelFileError` as well."""
        value = self.get(key, kind)
        if value is None:
            expected = _KINDS.get(kind, kind.__name__)
            self.fail(f"key {key!r} is missing, expected {expected}; convert the model again with a newer converter")
        return value

    def fail(self, message: str) -> NoReturn:
        """Raises `InvalidModelFileError` with the path in front of the message."""
        raise InvalidModelFileError(f"{self.path}: {message}")

    def close(self) -> None:
        """Unmaps the file, or leaves that to the last view of it that is still in use. May be called twice."""
        for other in self._others:
            other.close()
        mapping, self._map = self._map, None
        if mapping is not None:
            with contextlib.suppress(BufferError):  # views are in use: the mapping goes when the last of them does
                mapping.close()

    def _part(self, info: TensorInfo) -> GGUFFile:
        return self._others[info.part - 1] if info.part else self

    def _mapping(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return self._map

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<GGUFFile {str(self.path)!r}: {len(self.metadata)} keys, {len(self.tensors)} tensors>"


class _Header:
    """Reads the header from front to back; `at` is the byte that is read next."""

    def __init__(self, path: Path, mapping: mmap.mmap) -> None:
        self.path, self.map, self.size, self.at = path, mapping, len(mapping), 0
        self.spans: dict[str, tuple[int, int]] = {}  # the bytes of each key

    def fail(self, message: str, todo: str = "the file is damaged or its download is incomplete") -> NoReturn:
        raise InvalidModelFileError(f"{self.path}: {message}; {todo}")

    def take(self, nbytes: int, what: str) -> int:
        """The position of the next `nbytes` bytes, which are there; moves past them."""
        start, end = self.at, self.at + nbytes
        if end > self.size:
            self.fail(f"the file ends within {what}: {nbytes} bytes at byte {start} of {self.size}")
        if end > _MAX_HEADER:
            self.fail(f"{what} ends at byte {end} of the header, which may take {_MAX_HEADER}")
        self.at = end
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.map, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.map, self.take(8, what))[0])

    def string(self, what: str) -> bytes:
        start = self.take(self.u64(f"the length of {what}"), what)
        return self.map[start : self.at]

    def name(self, what: str) -> str:
        """A key or a tensor's name, which must be UTF-8."""
        start, raw = self.at, self.string(what)
        if not 1 <= len(raw) <= _MAX_NAME:
            self.fail(f"{what} at byte {start} is {len(raw)} bytes long, expected 1 to {_MAX_NAME}")
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(f"{what} at byte {start} is not UTF-8: {raw[:60]!r}")

    def count(self, what: str, least: int) -> int:
        """A number of entries that take at least `least` bytes each and so must fit into the file."""
        n = self.u64(f"the number of {what}")
        most = min(_MAX_ENTRIES, self.size // least)
        if n > most:
            self.fail(f"the header announces {n} {what}, expected at most {most} in a file of {self.size} bytes")
        return n

    def read_start(self) -> tuple[int, int, int]:
        """Magic and version; the version and the numbers of tensors and keys."""
        magic = self.map[: min(64, self.size)]
        if not magic.startswith(b"GGUF"):
            known = (text for start, text in _LOOKALIKES if magic.lower().startswith(start.lower()))
            guess = "a safetensors file: convert the model to GGUF first" if magic[8:9] == b"{" else "not a GGUF file"
            self.fail(f"this is {next(known, guess)} (it starts with {magic[:8]!r}, expected b'GGUF')")
        self.at = 4
        version = self.u32("the version")
        if version == 1:
            self.fail("GGUF version 1 (2023), expected 2 or 3", _CONVERT)
        if version & 0xFFFF == 0 and version:
            self.fail("a big-endian GGUF file, expected little endian", "convert it with `gguf-convert-endian`")
        if version not in (2, 3):
            self.fail(f"GGUF version {version}, expected 2 or 3", "update hipquant if the file is sound")
        return version, self.count("tensors", _MIN_TENSOR_BYTES), self.count("keys", _MIN_KEY_BYTES)

    def read_metadata(self, n_keys: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for i in range(n_keys):
            start, key = self.at, self.name(f"the name of key {i}")
            if key in metadata:
                self.fail(f"key {key!r} occurs a second time at byte {start}", _CONVERT)
            metadata[key] = self.value(f"the value of key {key!r}")
            self.spans[key] = (start, self.at)
        return metadata

    def value(self, what: str) -> Value:
        start, kind = self.at, self.u32(what)
        if kind == _STRING:
            return self.string(what).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self.array(what)
        if kind == _BOOL or kind in _NUMBERS:
            value: bool | int | float = self.numbers(what, kind, 1).item()
            return value
        self.fail(f"{what} has type {kind} at byte {start}, expected 0 to 12")

    def array(self, what: str) -> Value:
        start, kind = self.at, self.u32(what)
        length = self.u64(what)
        if kind == _STRING:
            return self.strings(what, length)
        if kind == _BOOL or kind in _NUMBERS:
            return self.numbers(what, kind, length)
        found = "arrays" if kind == _ARRAY else f"type {kind}"
        self.fail(f"{what} is an array of {found} at byte {start}, expected numbers, booleans or strings")

    def numbers(self, what: str, kind: int, length: int) -> npt.NDArray[Any]:
        """A copy, so that it is aligned and outlives the mapping."""
        dtype = np.dtype(_NUMBERS.get(kind, "<u1"))
        start = self.take(length * dtype.itemsize, what)
        values = np.frombuffer(self.map, dtype, length, start).astype(dtype.newbyteorder("="))
        if kind != _BOOL:
            return values
        if length and values.max() > 1:
            self.fail(f"{what} at byte {start} holds {values.max()}, expected booleans (0 or 1)")
        return values.astype(np.bool_)

    def strings(self, what: str, length: int) -> StringArray:
        start = at = self.at
        end, read, buffer = min(self.size, _MAX_HEADER), _U64.unpack_from, self.map
        for _ in range(length):  # the hot loop of opening a file
            if at > end - 8:
                at = max(at, end) + 8  # which `take` rejects
                break
            at += 8 + read(buffer, at)[0]
        self.take(at - start, what)
        return StringArray(buffer[start : self.at], length)

    def read_tensors(self, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for i in range(n_tensors):
            start, info = self.at, self.tensor(f"the entry of tensor {i}")
            if info.name in tensors:
                self.fail(f"tensor {info.name!r} occurs a second time at byte {start}", _CONVERT)
            if info.offset % alignment:
                self.fail(f"tensor {info.name!r} is at offset {info.offset}, expected a multiple of {alignment}")
            tensors[info.name] = info
        data = -(-self.at // alignment) * alignment
        placed = {t.name: TensorInfo(t.name, t.type, t.shape, t.offset + data, t.nbytes) for t in tensors.values()}
        self.check_places(placed)
        return placed

    def tensor(self, what: str) -> TensorInfo:
        """An entry of a tensor; its offset is still relative to the start of the data."""
        name = self.name(f"the name in {what}")
        what = f"the entry of tensor {name!r}"
        n_dims = self.u32(what)
        if not 1 <= n_dims <= MAX_DIMS:
            self.fail(f"tensor {name!r} has {n_dims} dimensions, expected 1 to {MAX_DIMS}")
        shape = tuple(self.u64(what) for _ in range(n_dims))[::-1]
        type_id, offset = self.u32(what), self.u64(what)
        kind, known = BY_GGML_ID.get(type_id), _GGML_TYPES.split()
        if kind is None and type_id < len(known):
            where, supported = f"reading tensor {name!r} of {self.path}", (t.name for t in MATRIX_TYPES)
            raise UnsupportedQuantTypeError(known[type_id], where, supported)
        if kind is None:
            self.fail(f"tensor {name!r} has ggml type {type_id}, which is unknown")
        if 0 in shape or shape[-1] % kind.block_size:
            rule = f"no zero and the last a multiple of {kind.block_size}"
            self.fail(f"tensor {name!r} ({kind}) has shape {shape}, expected {rule}")
        return TensorInfo(name, kind, shape, offset, prod(shape[:-1]) * kind.row_bytes(shape[-1]))

    def check_places(self, tensors: dict[str, TensorInfo]) -> None:
        """Every tensor within the file, no two of them on the same byte."""
        before, end = "", 0
        for info in sorted(tensors.values(), key=lambda t: t.offset):
            if info.offset < end:
                self.fail(f"tensors {before!r} and {info.name!r} overlap at byte {info.offset}")
            before, end = info.name, info.offset + info.nbytes
            if end > self.size:
                self.fail(
                    f"tensor {info.name!r} ({info.type}, shape {info.shape}) takes bytes {info.offset} to {end}, but "
                    f"the file ends at byte {self.size}"
                )


def find_invalid_scales(quant_type: QuantType, raw: npt.NDArray[np.uint8]) -> int | None:
    """The index of the first block of `raw` (uint8 [n * block_bytes], contiguous) with a NaN or infinite scale, for
    float types the first such element; None if there is none. `ValueError` if `raw` does not hold whole blocks."""
    if raw.size % quant_type.block_bytes:
        raise ValueError(f"{raw.size} bytes are not a multiple of the {quant_type.block_bytes} of a {quant_type} block")
    if not quant_type.scales and quant_type.name not in _EXPONENTS:
        return None
    dtype, exponent = _EXPONENTS.get(quant_type.name, _HALF)
    words = raw.reshape(-1).view(dtype)
    stride = quant_type.block_bytes // words.itemsize
    planes = [words[at // words.itemsize :: stride] for at in quant_type.scales or (0,)]
    masked = np.empty(min(_BLOCKS_AT_ONCE, raw.size // quant_type.block_bytes), dtype)
    for start in range(0, raw.size // quant_type.block_bytes, _BLOCKS_AT_ONCE):
        invalid = []
        for plane in planes:
            part = plane[start : start + _BLOCKS_AT_ONCE]
            bits = np.bitwise_and(part, masked.dtype.type(exponent), out=masked[: part.size])
            if bits.max() == exponent:
                invalid.append(start + int(np.argmax(bits == exponent)))
        if invalid:
            return min(invalid)
    return None


def _map_file(path: Path) -> mmap.mmap:
    """A read-only mapping of a regular file that is not empty; `InvalidModelFileError` otherwise."""
    try:
        mode = os.stat(path).st_mode  # before opening, which could wait on a pipe forever
        if not stat.S_ISREG(mode):
            what = "a folder; give the path of a .gguf file in it" if stat.S_ISDIR(mode) else "not a regular file"
            raise InvalidModelFileError(f"{path}: this is {what}")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise InvalidModelFileError(f"{path}: the file is empty; download it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise InvalidModelFileError(f"{path}: there is no such file; the folder is {path.absolute().parent}") from None
    except PermissionError:
        raise InvalidModelFileError(f"{path}: no permission to read it; check the file's owner and mode") from None
    except (OSError, ValueError) as error:
        if isinstance(error, InvalidModelFileError):
            raise
        raise InvalidModelFileError(f"{path}: it cannot be opened and mapped: {error}") from error


def _alignment(file: GGUFFile) -> int:
    alignment = file.get("general.alignment", int, DEFAULT_ALIGNMENT)
    if not _MIN_ALIGNMENT <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        rule = f"a power of two from {_MIN_ALIGNMENT} to {_MAX_ALIGNMENT}"
        file.fail(f"key 'general.alignment' is {alignment}, expected {rule}; the file is damaged")
    return alignment
