"""The GGUF reader: agreement with the `gguf` package, the getters, and what is mapped."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import struct
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_bytes import ARRAY, STRING, array, file_of, key, on_linux, peak_bytes, tensor, text, write_everything
from hipquant.errors import InvalidModelFileError, UnsupportedQuantTypeError
from hipquant.gguf_file import GGUFFile, StringArray, TensorInfo
from hipquant.quants import BY_GGML_ID, BY_NAME, MATRIX_TYPES, QuantType
from models import write_llama
from reference import dequantize

# Agreement


@pytest.mark.parametrize("version", [2, 3])
def test_agrees_with_the_gguf_package(tmp_path: Path, version: int) -> None:
    path = tmp_path / "everything.gguf"
    write_everything(path, version)
    reader = gguf.GGUFReader(path)
    with GGUFFile(path) as file:
        assert file.version == version
        fields = {name: f.contents() for name, f in reader.fields.items() if not name.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for name, expected in fields.items():
            found = file.metadata[name]
            assert (found.tolist() if isinstance(found, (np.ndarray, StringArray)) else found) == expected, name
        assert list(file.tensors) == [t.name for t in reader.tensors]
        for t in reader.tensors:
            info, shape = file.tensors[t.name], tuple(int(n) for n in reversed(t.shape))
            assert info == TensorInfo(t.name, BY_GGML_ID[t.tensor_type], shape, t.data_offset, t.n_bytes)
            assert file.data(t.name).tobytes() == t.data.tobytes()


def test_types_of_values(everything: Path) -> None:
    with GGUFFile(everything) as file:
        for name in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
            assert type(file.metadata[f"one.{name}"]) is int
            many = file.require(f"many.{name}", np.ndarray)
            assert many.dtype == np.dtype(name)
            assert many.flags.owndata
            assert many.flags.aligned
        assert file.metadata["one.bool"] is True
        assert type(file.metadata["one.float32"]) is float
        assert file.require("many.bool", np.ndarray).dtype == np.bool_
        assert file.require("many.strings", StringArray)[-1] == "长" * 50


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=str)
def test_model_of_each_type(tmp_path: Path, kind: QuantType) -> None:
    model = write_llama(tmp_path / "m.gguf", type=kind.name, n_layer=1, biases=True)
    with GGUFFile(model.path) as file:
        assert set(file.tensors) == set(model.tensors)
        for name, expected in model.tensors.items():
            info = file.tensors[name]
            assert info.shape == expected.shape
            assert np.array_equal(dequantize(info.type, file.data(name), info.shape), expected)
            file.check_scales(name)


def test_strings_behave_as_a_list() -> None:
    strings = StringArray(text(b"a") + text(b"") + text("ß".encode()), 3)
    assert len(strings) == 3
    assert list(strings) == ["a", "", "ß"]
    assert strings == ["a", "", "ß"]
    assert strings != ["a", ""]
    assert strings[1:] == ["", "ß"]
    assert "ß" in strings
    assert strings.index("ß") == 2
    assert strings.tolist() is strings.tolist()
    assert StringArray(b"", 0).tolist() == []


def test_bytes_that_are_not_utf8(opened: Any) -> None:
    """Kept in tokens, replaced in text."""
    tokens = key(b"tokens", ARRAY, array(STRING, 2, text(b"\xff\xe2\x96") + text(b"ok")))
    file = opened(file_of(tokens, key(b"name", STRING, text(b"a\xffb"))))
    assert file.metadata["tokens"][0].encode("utf-8", "surrogateescape") == b"\xff\xe2\x96"
    assert file.metadata["name"] == "a\ufffdb"


@pytest.mark.parametrize("kind", [*range(9), 10, 11, 12])
def test_empty_arrays(opened: Any, kind: int) -> None:
    value = opened(file_of(key(b"a", ARRAY, array(kind, 0, b"")))).metadata["a"]
    assert len(value) == 0
    assert isinstance(value, StringArray if kind == STRING else np.ndarray)


@on_linux
def test_offsets_of_64_bits(tmp_path: Path) -> None:
    """A sparse file of 5 GiB whose last bytes are not zero."""
    path = tmp_path / "sparse.gguf"
    path.write_bytes(file_of(tensors=(tensor(b"t", (8,), offset=5 << 30),)))
    with open(path, "r+b") as raw:
        raw.seek(64 + (5 << 30))
        raw.write(bytes(range(32)))
    with GGUFFile(path) as file:
        assert file.data("t").tolist() == list(range(32))
    path.unlink()


# Getters


def test_getters(everything: Path) -> None:
    with GGUFFile(everything) as file:
        assert file.get("one.uint8", int) == 255
        assert file.get("one.uint8", float) == 255.0
        assert isinstance(file.get("one.uint8", float), float)
        assert file.get("one.bool", bool) is True
        assert file.get("absent", int) is None
        assert file.get("absent", int, 7) == 7
        assert file.require("one.string", str) == "grüße"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("one.string", int, ["a string ('grüße')", "an integer"]),
        ("one.bool", int, ["a boolean (True)", "an integer"]),
        ("one.bool", float, ["a boolean", "a number"]),
        ("one.float64", int, ["a number (0.1)", "an integer"]),
        ("one.uint8", str, ["an integer (255)", "a string"]),
        ("one.uint8", bool, ["an integer (255)", "a boolean"]),
        ("many.uint8", int, ["an array of numbers", "an integer"]),
        ("many.strings", np.ndarray, ["an array of strings", "an array of numbers"]),
        ("many.uint8", StringArray, ["an array of numbers", "an array of strings"]),
        ("absent", int, ["missing", "an integer"]),
    ],
)
def test_getters_name_key_and_types(everything: Path, name: str, kind: type, words: list[str]) -> None:
    with GGUFFile(everything) as file, pytest.raises(InvalidModelFileError) as error:
        file.require(name, kind)
    for word in [str(everything), repr(name), *words]:
        assert word in str(error.value)


# Mapping


def test_data_is_a_view(everything: Path) -> None:
    with GGUFFile(everything) as file:
        first, second = file.data("cube"), file.data("cube")
        assert first.dtype == np.uint8
        assert first.shape == (480,)
        assert not first.flags.writeable
        assert first.ctypes.data == second.ctypes.data
        with pytest.raises(KeyError):
            file.data("sphere")


def test_close_with_views_alive(everything: Path) -> None:
    file = GGUFFile(everything)
    view = file.data("cube")
    expected = view.tobytes()
    file.close()
    file.close()
    gc.collect()
    assert view.tobytes() == expected
    assert file.require("many.strings", StringArray)[1] == "a"
    assert file.require("many.int32", np.ndarray)[2] == 7
    with pytest.raises(ValueError, match="closed"):
        file.data("cube")
    if sys.platform == "linux":
        assert str(everything) in Path("/proc/self/maps").read_text()
        del view
        assert str(everything) not in Path("/proc/self/maps").read_text()


@on_linux
def test_no_descriptor_is_left_behind(opened: Any, everything: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        GGUFFile(everything).close()
        with contextlib.suppress(InvalidModelFileError):
            opened(b"GGUF" + bytes(3))
    assert len(os.listdir("/proc/self/fd")) <= before


def resident_bytes(path: Path) -> int:
    """Resident bytes of the mappings of a file."""
    mappings = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    ours = (m for m in mappings if str(path) in m)
    return sum(1024 * int(found[1]) for m in ours if (found := re.search(r"^Rss: +(\d+) kB", m, re.MULTILINE)))


@on_linux
def test_release_gives_memory_back(opened: Any) -> None:
    n = 32 << 20
    file = opened(file_of(tensors=(tensor(b"small", (8,)), tensor(b"big", (n // 4,), offset=32)), data=32 + n))
    view = file.data("big")
    assert not view.any()
    assert resident_bytes(file.path) >= n
    file.release("big", 0, n // 2)
    assert 0.4 * n < resident_bytes(file.path) < 0.6 * n
    file.release("big")
    assert resident_bytes(file.path) < 0.1 * n
    assert not view.any()


def test_release_checks_its_range(everything: Path) -> None:
    with GGUFFile(everything) as file:
        file.release("cube", 480, 0)
        for start, nbytes in ((0, 481), (480, 1), (-1, 2), (5, -1)):
            with pytest.raises(ValueError, match="not within the 480 bytes"):
                file.release("cube", start, nbytes)
        with pytest.raises(KeyError):
            file.release("sphere")


def test_release_without_madvise(everything: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("mmap.MADV_DONTNEED", raising=False)
    with GGUFFile(everything) as file:
        file.release("cube")


def test_a_large_vocabulary_opens_quickly(opened: Any) -> None:
    """The size of Llama 3's header; the limit leaves room for a slow machine."""
    n_tokens, n_merges = 128_256, 280_147
    tokens = key(b"tokens", ARRAY, array(STRING, n_tokens, b"".join(text(b"tok%d" % i) for i in range(n_tokens))))
    merges = key(b"merges", ARRAY, array(STRING, n_merges, b"".join(text(b"ab%d cd" % i) for i in range(n_merges))))
    types = key(b"types", ARRAY, array(5, n_tokens, struct.pack("<i", 1) * n_tokens))
    raw, times = file_of(tokens, merges, types), []
    for _ in range(3):
        file = opened(raw)
        file.close()
        start = time.perf_counter()
        file = GGUFFile(file.path)
        strings = [file.metadata[name].tolist() for name in ("tokens", "merges")]
        times.append(time.perf_counter() - start)
    assert [len(s) for s in strings] == [n_tokens, n_merges]
    assert strings[1][-1] == f"ab{n_merges - 1} cd"
    assert file.metadata["types"].sum() == n_tokens
    assert min(times) < 0.5


@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ4_NL", "TQ1_0", "MXFP4", "NVFP4", "I32", "F64", "Q1_0"])
def test_types_of_ggml_that_are_not_ours(opened: Any, name: str) -> None:
    raw = file_of(tensors=(tensor(b"blk.0.w", (256,), int(gguf.GGMLQuantizationType[name])),), data=4096)
    with pytest.raises(UnsupportedQuantTypeError) as error:
        opened(raw)
    for word in (name, "'blk.0.w'", "m.gguf", "Q4_K"):
        assert word in str(error.value)


def test_a_row_in_the_type_table_is_enough(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    added = QuantType("IQ4_NL", 20, 32, 18, BY_NAME["Q4_0"].role, (0,))
    monkeypatch.setitem(BY_GGML_ID, 20, added)
    file = opened(file_of(tensors=(tensor(b"t", (64, 3), 20),), data=6 * 18))
    assert file.tensors["t"].type is added
    assert file.tensors["t"].nbytes == 6 * 18


def test_every_type_of_ggml_is_known_by_name(opened: Any) -> None:
    """A type that the `gguf` package knows is either read or named."""
    for t in gguf.GGMLQuantizationType:
        raw = file_of(tensors=(tensor(b"t", (256,), int(t)),), data=4096)
        if int(t) in BY_GGML_ID:
            assert opened(raw).tensors["t"].type.name == t.name
        else:
            with pytest.raises(UnsupportedQuantTypeError, match=f" {t.name};"):
                opened(raw)


def test_opening_copies_no_weights(opened: Any) -> None:
    n = 16 << 20
    path = opened(file_of(tensors=(tensor(b"t", (n // 4,)),), data=n)).path
    assert peak_bytes(lambda: GGUFFile(path).data("t")) < 1 << 20
