"""Reading safetensors: the weights of a folder from Hugging Face, memory-mapped, with nothing believed unchecked.

Format: 8 bytes little endian, the length of a JSON header {name: {dtype, shape, data_offsets}}, then the data. Models
in several files have an index, model.safetensors.index.json, whose weight_map says which file a tensor is in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidModelFileError
from ..quants import BF16, F16, F32, QuantType

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_MAX_HEADER = 100 << 20  # bytes; the format's own limit
_TYPES = {"F32": F32, "F16": F16, "BF16": BF16}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: `data` is uint8, a view of the mapping."""

    name: str
    type: QuantType
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `InvalidModelFileError` if there is none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InvalidModelFileError(f"{path}: there is no such file; give the folder of a model") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidModelFileError(f"{path}: it cannot be read as JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise InvalidModelFileError(f"{path}: this is a JSON {type(value).__name__}, expected an object")
    return value


def read_folder(folder: Path) -> dict[str, Stored]:
    """The tensors of all safetensors files of a model, by name."""
    names = [SINGLE]
    if (folder / INDEX).exists():
        places = read_json(folder / INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(f, str) and Path(f).name == f for f in places.values()):
            raise InvalidModelFileError(f"{folder / INDEX}: 'weight_map' does not name files of the folder")
        names = sorted(set(places.values()))
    tensors: dict[str, Stored] = {}
    for name in names:
        for tensor in read_file(folder / name):
            if tensor.name in tensors:
                raise InvalidModelFileError(f"{folder / name}: tensor {tensor.name!r} is in another file as well")
            tensors[tensor.name] = tensor
    return tensors


def read_file(path: Path) -> list[Stored]:
    """The tensors of one file. Types other than F32, F16 and BF16 are refused."""
    try:
        data = np.memmap(path, np.uint8, "r")
    except FileNotFoundError:
        raise InvalidModelFileError(f"{path}: there is no such file; the model's download is incomplete") from None
    except (OSError, ValueError) as error:
        raise InvalidModelFileError(f"{path}: it cannot be mapped: {error}") from None
    length = int(data[:8].view("<u8")[0]) if data.size >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, data.size - 8):
        raise InvalidModelFileError(
            f"{path}: a header of {length} bytes in a file of {data.size}; not safetensors, or a partial download"
        )
    try:
        header = json.loads(data[8 : 8 + length].tobytes())
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise InvalidModelFileError(f"{path}: the header is not a JSON object; download the file again")
    body = np.asarray(data[8 + length :])
    return [_tensor(path, name, entry, body) for name, entry in header.items() if name != "__metadata__"]


def _tensor(path: Path, name: str, entry: Any, body: npt.NDArray[np.uint8]) -> Stored:
    where = f"{path}: tensor {name!r}"
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sound = all(type(n) is int and n > 0 for n in shape) and type(begin) is int and type(end) is int
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound or not 1 <= len(shape) <= 4:
        raise InvalidModelFileError(f"{where} has the entry {entry!r:.100}, expected dtype, shape and data_offsets")
    if kind not in _TYPES:
        known = " ".join(_TYPES)
        raise InvalidModelFileError(f"{where} is {kind}, expected one of {known}: take the model that is not quantized")
    nbytes = prod(shape) * _TYPES[kind].block_bytes
    if not 0 <= begin <= end <= body.size or end - begin != nbytes:
        raise InvalidModelFileError(
            f"{where} takes bytes {begin} to {end} of {body.size}, expected {nbytes}; download the file again"
        )
    return Stored(name, _TYPES[kind], shape, body[begin:end])
