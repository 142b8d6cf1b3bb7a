"""A second, minimal writer of GGUF files: the `gguf` package does not write wrong ones."""

from __future__ import annotations

import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from hipquant.quants import QUANT_TYPES
from models import finish, random_blocks

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def text(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def key(name: bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def array(kind: int, length: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, length) + payload


def tensor(
    name: bytes, ne: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    dims = struct.pack(f"<I{len(ne)}Q", len(ne) if n_dims is None else n_dims, *ne)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def file_of(
    *entries: bytes, tensors: tuple[bytes, ...] = (), data: int = 0, alignment: int = 32, **start: Any
) -> bytes:
    """A file of these keys and tensors with `data` bytes of zeros; `start` replaces version, n_keys or n_tensors."""
    version, n_tensors, n_keys = (
        start.get(name, value)
        for name, value in (("version", 3), ("n_tensors", len(tensors)), ("n_keys", len(entries)))
    )
    header = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + b"".join(entries) + b"".join(tensors)
    return header + bytes(-len(header) % alignment + data)


U32, STRING, ARRAY, BOOL = 4, 8, 9, 7


def u32(name: bytes, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def write_everything(path: Path, version: int = 3) -> None:
    """A small file with every type of value and of tensor."""
    rng = np.random.default_rng(0)
    w = gguf.GGUFWriter(path, "llama")
    for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        top = np.iinfo(name).max
        getattr(w, f"add_{name}")(f"one.{name}", int(top))
        w.add_key_value(
            f"many.{name}", [int(top), 0, 7], gguf.GGUFValueType.ARRAY, getattr(gguf.GGUFValueType, name.upper())
        )
    w.add_float32("one.float32", 0.1)
    w.add_float64("one.float64", 0.1)
    w.add_array("many.float", [1.5, -2.5])
    w.add_bool("one.bool", True)
    w.add_array("many.bool", [True, False, True])
    w.add_string("one.string", "grüße")
    w.add_array("many.strings", ["", "a", "ß", "长" * 50])
    for kind in (t for t in QUANT_TYPES if t.name != "Q8_1"):  # the package takes 40 bytes for the 36 of a q8_1 block
        raw = random_blocks(rng, kind, 3, kind.block_size)
        w.add_tensor(f"{kind.name}.weight", raw, raw_dtype=gguf.GGMLQuantizationType(kind.ggml_id))
    w.add_tensor("cube", rng.standard_normal((2, 3, 4, 5)).astype(np.float32))
    finish(w, version)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that a call allocates at any moment."""
    tracemalloc.start(1)
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
