"""The GGUF reader: agreement with the `gguf` package, and every way in which a file can be wrong."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import struct
import sys
import time
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipquant.errors import InvalidModelFileError, UnsupportedQuantTypeError
from hipquant.gguf_file import GGUFFile, StringArray, TensorInfo, find_invalid_scales
from hipquant.quants import BY_GGML_ID, BY_NAME, F32, MATRIX_TYPES, QUANT_TYPES, QuantType, padded
from models import ROPE_VARIANTS, finish, llama3_divisors, random_blocks, write_llama
from reference import LlamaReference, dequantize, nmse, quantize_q8_1

MAX_SECONDS, MAX_BYTES = 1.0, 64 << 20  # what opening a file of a few KiB may take, whatever is in it
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


# A second, minimal writer: the `gguf` package does not write wrong files.


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


@pytest.fixture
def opened(tmp_path: Path) -> Any:
    """Opens bytes as a file."""

    def open_bytes(raw: bytes) -> GGUFFile:
        path = tmp_path / "m.gguf"
        path.write_bytes(raw)
        return GGUFFile(path)

    return open_bytes


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


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "everything.gguf"
    write_everything(path)
    assert path.stat().st_size < 20_000
    return path


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


# Files that are wrong

HUGE = 2**64 - 1
WRONG: dict[str, tuple[bytes, str]] = {
    "magic": (b"GGUG" + bytes(60), r"not a GGUF file \(it starts with b'GGUG"),
    "page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "zip": (b"PK\x03\x04" + bytes(60), "PyTorch"),
    "ggml": (b"tjgg" + bytes(60), "before GGUF"),
    "safetensors": (struct.pack("<Q", 60) + b'{"__metadata__": {}}', "safetensors"),
    "version 0": (file_of(version=0), "GGUF version 0, expected 2 or 3"),
    "version 1": (file_of(version=1), r"version 1 \(2023\)"),
    "version 4": (file_of(version=4), "GGUF version 4"),
    "big endian": (file_of(version=3 << 24), "big-endian"),
    "many keys": (file_of(n_keys=HUGE), f"announces {HUGE} keys"),
    "many tensors": (file_of(n_tensors=2**40), f"announces {2**40} tensors"),
    "more keys than bytes": (file_of(n_keys=9), "9 keys, expected at most 2"),
    "more keys than are there": (file_of(u32(b"a", 1), n_keys=2, data=64), "name of key 1"),
    "empty key": (file_of(u32(b"", 1), data=64), "name of key 0 at byte 24 is 0 bytes"),
    "long key": (file_of(u32(b"k" * 70000, 1)), "70000 bytes long, expected 1 to 65535"),
    "endless key": (file_of(struct.pack("<Q", HUGE) + b"abc", data=64), "ends within the name of key 0"),
    "key not utf8": (file_of(u32(b"\xff\xfe", 1)), r"name of key 0 at byte 24 is not UTF-8: b'\\xff\\xfe'"),
    "twice a key": (file_of(u32(b"a", 1), u32(b"a", 2)), "key 'a' occurs a second time at byte 41"),
    "value type": (file_of(key(b"a", 13, bytes(8))), "key 'a' has type 13 at byte 33"),
    "bool": (file_of(key(b"a", BOOL, b"\x02"), data=64), "key 'a' at byte 37 holds 2"),
    "bools": (file_of(key(b"a", ARRAY, array(BOOL, 3, b"\0\1\3"))), "holds 3, expected booleans"),
    "endless string": (file_of(key(b"a", STRING, struct.pack("<Q", 2**63))), "ends within the value of key 'a'"),
    "endless numbers": (file_of(key(b"a", ARRAY, array(10, 2**61, b""))), "ends within the value of key 'a'"),
    "endless strings": (file_of(key(b"a", ARRAY, array(STRING, HUGE, b""))), "ends within the value of key 'a'"),
    "endless string in an array": (
        file_of(key(b"a", ARRAY, array(STRING, 2, text(b"x") + struct.pack("<Q", HUGE)))),
        "ends within the value of key 'a'",
    ),
    "missing string in an array": (
        file_of(key(b"a", ARRAY, array(STRING, 2, text(b"12345678")))).rstrip(b"\0"),
        "ends within the value of key 'a'",
    ),
    "nested array": (file_of(key(b"a", ARRAY, array(ARRAY, 1, array(U32, 1, bytes(4))))), "array of arrays"),
    "array type": (file_of(key(b"a", ARRAY, array(99, 1, bytes(4)))), "array of type 99"),
    "alignment 0": (file_of(u32(b"general.alignment", 0)), "'general.alignment' is 0, expected a power of two"),
    "alignment 4": (file_of(u32(b"general.alignment", 4)), "is 4, expected a power of two from 8"),
    "alignment 48": (file_of(u32(b"general.alignment", 48)), "is 48, expected a power of two"),
    "alignment 2**31": (file_of(u32(b"general.alignment", 2**31)), "expected a power of two"),
    "alignment text": (file_of(key(b"general.alignment", STRING, text(b"32"))), "is a string .'32'., expected an int"),
    "parts": (
        file_of(key(b"split.count", 2, b"\3\0"), key(b"split.no", 2, b"\1\0")),
        "part 2 of a model in 3 files; give the first one",
    ),
    "empty tensor name": (file_of(tensors=(tensor(b""),), data=128), "name in the entry of tensor 0"),
    "tensor name not utf8": (file_of(tensors=(tensor(b"\xc3"),), data=128), "not UTF-8"),
    "twice a tensor": (
        file_of(tensors=(tensor(b"t"), tensor(b"t", offset=128)), data=256),
        "tensor 't' occurs a second time at byte 57",
    ),
    "no dimensions": (file_of(tensors=(tensor(b"t", ()),), data=128), "'t' has 0 dimensions, expected 1 to 4"),
    "5 dimensions": (file_of(tensors=(tensor(b"t", (1,) * 5),), data=128), "'t' has 5 dimensions"),
    "2**32 - 1 dimensions": (file_of(tensors=(tensor(b"t", n_dims=2**32 - 1),), data=128), "4294967295 dimensions"),
    "dimension 0": (file_of(tensors=(tensor(b"t", (32, 0)),), data=128), r"shape \(0, 32\), expected no zero"),
    "row of half a block": (
        file_of(tensors=(tensor(b"t", (48, 2), BY_NAME["Q4_0"].ggml_id),), data=128),
        r"'t' \(Q4_0\) has shape \(2, 48\), expected no zero and the last a multiple of 32",
    ),
    "overflowing product": (file_of(tensors=(tensor(b"t", (2**32, 2**32, 2**32)),), data=128), "the file ends at byte"),
    "product of zero modulo 2**64": (file_of(tensors=(tensor(b"t", (2**62,)),), data=128), "the file ends at byte"),
    "past the end": (file_of(tensors=(tensor(b"t", (33,)),), data=128), "takes bytes 64 to 196, but the file ends at"),
    "offset past the end": (file_of(tensors=(tensor(b"t", offset=2**63),), data=128), "but the file ends at"),
    "misaligned": (file_of(tensors=(tensor(b"t", offset=16),), data=256), "at offset 16, expected a multiple of 32"),
    "overlap": (
        file_of(tensors=(tensor(b"a"), tensor(b"b", offset=96)), data=256),
        "tensors 'a' and 'b' overlap at byte 192",
    ),
    "unknown type": (file_of(tensors=(tensor(b"t", kind=4096),), data=128), "'t' has ggml type 4096, which is unknown"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(opened: Any, name: str) -> None:
    raw, words = WRONG[name]
    with pytest.raises(InvalidModelFileError, match=f"(?s)m.gguf: .*{words}") as error:
        opened(raw)
    assert len(str(error.value)) < 600


def parts_of(folder: Path, *tensors: tuple[bytes, ...], count: int | None = None, **more: int) -> Path:
    """A model in parts with these tensors, each of them filled with its number; the path of the first."""
    count = len(tensors) if count is None else count
    for i, names in enumerate(tensors):
        keys = [u32(b"split.no", i), u32(b"split.count", count)]
        keys += [u32(key.encode().replace(b"_", b"."), value) for key, value in more.items()]
        infos = tuple(tensor(name, offset=128 * j) for j, name in enumerate(names))
        raw = file_of(*keys, tensors=infos)
        values = np.repeat(np.arange(len(names), dtype="<f4") + 10 * i, 32)
        (folder / f"m-{i + 1:05d}-of-{count:05d}.gguf").write_bytes(raw + values.tobytes())
    return folder / f"m-00001-of-{count:05d}.gguf"


def test_parts_are_one_model(tmp_path: Path) -> None:
    path = parts_of(tmp_path, (), (b"a", b"b"), (b"c",), split_tensors_count=3)
    with GGUFFile(path) as file:
        assert {name: info.part for name, info in file.tensors.items()} == {"a": 1, "b": 1, "c": 2}
        assert [file.data(name).view("<f4")[31] for name in "abc"] == [10, 11, 20]
        file.release("c")
        file.check_scales("c")
    with pytest.raises(ValueError, match="is closed"):
        file.data("c")


def test_parts_of_another_writer(tmp_path: Path) -> None:
    values = {f"t{i}": np.full((3, 32), i, np.float32) for i in range(5)}
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=2)
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with GGUFFile(tmp_path / "m-00001-of-00003.gguf") as file:
        assert file.require("general.architecture", str) == "llama"
        for name, value in values.items():
            assert np.array_equal(file.data(name).view("<f4").reshape(file.tensors[name].shape), value)


@on_linux
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: (p.parent / "m-00002-of-00003.gguf").unlink(), "part 2 of 3 is missing: m-00002-of-00003.gguf"),
        (
            lambda p: p.rename(p.with_name("x.gguf")),
            r"does not end in -00001-of-00003\.gguf.*llama-gguf-split --merge",
        ),
        (
            lambda p: shutil.copy(p.parent / "m-00002-of-00003.gguf", p.parent / "m-00003-of-00003.gguf"),
            "says that it is part 2 of 3, expected 3 of 3",
        ),
        (lambda p: parts_of(p.parent, (b"a",), (b"b",), (b"a",)), "tensor 'a' is in an earlier part, too"),
        (lambda p: parts_of(p.parent, (b"a",), (b"b",), (b"c",), split_tensors_count=4), "have 3 tensors, expected 4"),
        (lambda p: (p.parent / "m-00003-of-00003.gguf").write_bytes(b"GGUF"), "the file ends within the version"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    path = parts_of(tmp_path, (b"a",), (b"b",), (b"c",))
    change(path)
    with pytest.raises(InvalidModelFileError, match=message):
        GGUFFile(path if path.exists() else path.with_name("x.gguf"))
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


def test_a_later_part_names_the_first(tmp_path: Path) -> None:
    parts_of(tmp_path, (b"a",), (b"b",))
    with pytest.raises(InvalidModelFileError, match=r"part 2 of a model in 2 files; .*: m-00001-of-00002\.gguf"):
        GGUFFile(tmp_path / "m-00002-of-00002.gguf")


def test_a_model_in_one_part(opened: Any) -> None:
    opened(file_of(u32(b"split.count", 1))).close()


def test_a_header_may_not_be_huge(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hipquant.gguf_file._MAX_HEADER", 100)
    for value in (array(STRING, 5, text(b"x" * 20) * 5), array(STRING, 50, bytes(400)), array(0, 90, bytes(90))):
        with pytest.raises(InvalidModelFileError, match=r"header, which may take 100"):
            opened(file_of(key(b"a", ARRAY, value), data=1000))
    opened(file_of(key(b"a", ARRAY, array(0, 30, bytes(30))), data=1000)).close()


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


def test_paths_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").touch()
    cases = [
        ("missing", "no such file"),
        (".", "a folder"),
        ("empty", "the file is empty; download it"),
        ("a\0b", "cannot be opened"),
    ]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        cases.append(("pipe", "not a regular file"))
    for name, words in cases:
        with pytest.raises(InvalidModelFileError, match=words):
            GGUFFile(tmp_path / name)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(InvalidModelFileError, match="no permission"):
        GGUFFile(tmp_path / "empty")


def test_truncated_anywhere(tmp_path: Path, everything: Path) -> None:
    """At every byte of the header and at a sample of the data; padding after the last tensor may be missing."""
    raw, path = everything.read_bytes(), tmp_path / "m.gguf"
    with GGUFFile(everything) as file:
        data = min(t.offset for t in file.tensors.values())
        end = max(t.offset + t.nbytes for t in file.tensors.values())
    path.write_bytes(raw)
    for cut in [*range(len(raw) - 1, end - 1, -1), *range(end - 1, data, -97), *range(data, -1, -1)]:
        os.truncate(path, cut)
        if cut >= end:
            GGUFFile(path).close()
            continue
        with pytest.raises(InvalidModelFileError, match=r"incomplete|empty"):
            GGUFFile(path)


# Files that are wrong at random

BOUNDARIES = [0, 1, 2, 31, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**63 - 1, 2**63, 2**64 - 1]


def mutated(raw: bytes, op: int, at: int, length: int, value: int) -> bytes:
    """One of the ways in which bytes go wrong."""
    at %= len(raw) + 1
    if op == 0:  # flip a bit
        return raw[:at] + bytes(b ^ (1 << value % 8) for b in raw[at : at + 1]) + raw[at + 1 :]
    if op in (1, 2):  # overwrite a field of 4 or 8 bytes
        field = (value % 2 ** (32 * op)).to_bytes(4 * op, "little")
        return raw[:at] + field + raw[at + 4 * op :]
    if op == 3:  # truncate
        return raw[:at]
    if op == 4:  # cut out
        return raw[:at] + raw[at + length :]
    if op == 5:  # duplicate
        return raw[:at] + raw[at : at + length] * 2 + raw[at + length :]
    other = value % (len(raw) + 1)  # splice
    return raw[:at] + raw[other : other + length] + raw[at + length :]


def read_all(path: Path) -> bool:
    """Opens a file that may be wrong and reads all that it holds; true if nothing was found to be wrong. Any error but
    the two of the contract fails the test."""
    try:
        with GGUFFile(path) as file:
            for value in file.metadata.values():
                if isinstance(value, StringArray):
                    value.tolist()
            for name, info in file.tensors.items():
                assert file.data(name).size == info.nbytes
                file.check_scales(name)
    except (InvalidModelFileError, UnsupportedQuantTypeError):
        return False
    return True


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that a call allocates at any moment."""
    tracemalloc.start(1)
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def survives(path: Path, raw: bytes, measure_memory: bool = True) -> bool:
    """As `read_all`; much time or much memory fails the test too."""
    path.write_bytes(raw)
    start = time.process_time()
    sound = read_all(path)
    assert time.process_time() - start < MAX_SECONDS
    assert not measure_memory or peak_bytes(lambda: read_all(path)) < MAX_BYTES
    return sound


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutated") / "m.gguf"


def header_length(path: Path) -> int:
    with GGUFFile(path) as file:
        return min(t.offset for t in file.tensors.values())


OPERATION = st.tuples(st.integers(0, 6), st.integers(0, 2**16), st.integers(1, 200), st.sampled_from(BOUNDARIES))


@settings(max_examples=3000, deadline=None, derandomize=True)
@given(st.lists(OPERATION, min_size=1, max_size=4))
def test_mutated_files(scratch: Path, everything: Path, operations: list[tuple[int, int, int, int]]) -> None:
    raw = everything.read_bytes()
    for op, at, length, value in operations:
        raw = mutated(raw, op, at, length, value)
    survives(scratch, raw)


def test_many_mutated_files(scratch: Path, everything: Path) -> None:
    """20,000 of them, most wrong within the header; some must pass, many must not, or the test tests nothing."""
    sound, raw, header = 0, everything.read_bytes(), header_length(everything)
    rng = np.random.default_rng(1)
    where = np.where(rng.random(20_000) < 0.9, rng.integers(0, header, 20_000), rng.integers(0, len(raw), 20_000))
    operations, lengths = rng.integers(0, 7, 20_000), rng.integers(1, 100, 20_000)
    values = rng.choice(np.array(BOUNDARIES, np.uint64), 20_000)
    draws = zip(*(drawn.tolist() for drawn in (operations, where, lengths, values)), strict=True)
    for i, draw in enumerate(draws):
        sound += survives(scratch, mutated(raw, *draw), measure_memory=i % 8 == 0)
    assert 500 < sound < 10_000


# Scales

NOT_FINITE = {"F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001], "BF16": [0x7F80, 0xFF80, 0x7FC0, 0xFF81]}
NOT_FINITE["Q8_K"] = NOT_FINITE["F32"]
LARGEST = {"F32": 0xFF7FFFFF, "Q8_K": 0xFF7FFFFF, "BF16": 0xFF7F}


def scale_fields(kind: QuantType) -> tuple[tuple[int, ...], int]:
    return kind.scales or (0,), 4 if kind.name in ("F32", "Q8_K") else 2


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
def test_invalid_scales_are_found(kind: QuantType) -> None:
    """With all other bits set, so that only the scales can tell."""
    offsets, width = scale_fields(kind)
    n = (1 << 16) + 3  # more than are looked at at once
    raw = np.full((n, kind.block_bytes), 0xFF, np.uint8)
    for at in offsets:
        raw[:, at : at + width] = list(LARGEST.get(kind.name, 0xFBFF).to_bytes(width, "little"))
    assert find_invalid_scales(kind, raw.reshape(-1)) is None
    for at, bits in product(offsets, NOT_FINITE.get(kind.name, [0x7C00, 0xFC00, 0x7E00, 0x7C01])):
        broken = raw.copy()
        for block in (n - 1, 1 << 16, (1 << 16) - 1, 5, 0):
            broken[block, at : at + width] = list(bits.to_bytes(width, "little"))
            assert find_invalid_scales(kind, broken.reshape(-1)) == block


def test_the_first_invalid_scale_counts() -> None:
    raw = np.zeros((10, 20), np.uint8)
    raw[7, 1] = raw[3, 3] = 0x7C  # d of block 7, m of block 3
    assert find_invalid_scales(BY_NAME["Q4_1"], raw.reshape(-1)) == 3


def test_no_blocks_and_parts_of_blocks() -> None:
    assert find_invalid_scales(F32, np.empty(0, np.uint8)) is None
    with pytest.raises(ValueError, match="17 bytes"):
        find_invalid_scales(BY_NAME["Q4_0"], np.zeros(17, np.uint8))


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=str)
def test_scales_are_checked_without_copies(kind: QuantType) -> None:
    raw = np.zeros((16 << 20) // kind.block_bytes * kind.block_bytes, np.uint8)
    assert peak_bytes(lambda: find_invalid_scales(kind, raw)) < 1 << 20


def test_opening_copies_no_weights(opened: Any) -> None:
    n = 16 << 20
    path = opened(file_of(tensors=(tensor(b"t", (n // 4,)),), data=n)).path
    assert peak_bytes(lambda: GGUFFile(path).data("t")) < 1 << 20


def test_check_scales_names_tensor_and_block(opened: Any) -> None:
    raw = bytearray(file_of(tensors=(tensor(b"w", (64, 3), BY_NAME["Q4_0"].ggml_id),), data=6 * 18))
    raw[-18:-16] = b"\x00\x7e"
    file = opened(bytes(raw))
    with pytest.raises(InvalidModelFileError, match=r"'w' \(Q4_0\) .* scale of a block at row 2, column 32 \(block 5"):
        file.check_scales("w")


# The helpers themselves


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
def test_random_blocks(kind: QuantType) -> None:
    raw = random_blocks(np.random.default_rng(0), kind, 64, 1024, 0.05)
    assert raw.shape == (64, kind.row_bytes(1024))
    values = dequantize(kind, raw, (64, 1024))
    assert abs(values.std() / 0.05 - 1) < 0.15
    assert abs(values.mean()) < 0.15 * 0.05
    assert find_invalid_scales(kind, raw.reshape(-1)) is None


def test_quantize_q8_1() -> None:
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    x[1, 32:64] = 0
    raw = quantize_q8_1(x)
    assert raw.shape == (3, padded(96) // 32 * 36)
    values = dequantize("Q8_1", raw, (3, padded(96)))
    steps = np.abs(x).reshape(3, 3, 32).max(axis=2).repeat(32, axis=1) / 127
    assert (np.abs(values[:, :96] - x) <= 0.57 * steps).all()  # half a step, and d rounded to half precision
    assert not values[:, 96:].any()
    assert not values[1, 32:64].any()
    sums = raw.reshape(3, -1, 36)[:, :3, 2:4].copy().view("<f2")[..., 0]
    assert np.allclose(sums, x.reshape(3, 3, 32).sum(axis=2), rtol=1e-3, atol=1e-3)


def test_llama3_divisors() -> None:
    """The endpoints and the blend of the published rule."""
    found = llama3_divisors(128, 500000.0, 8.0, 8192)
    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
    assert (found[waves < 8192 / 4] == 1).all()
    assert np.allclose(found[waves > 8192], 8)
    assert (np.diff(found) >= 0).all()


# The last logits, of tokens 7, 77, 177 and 477, that llama.cpp (ggml 0.25.3, CPU, float32 cache) computed.
GOLDEN_TOKENS = np.arange(300) * 37 % 512
GOLDEN_WEIGHTS = [2.040919, -2.555665]
GOLDEN: dict[str, list[float]] = {
    "plain": [0.5250328, 0.6043035, -0.6447118, -0.1487359],
    "base": [1.093771, 1.366913, -0.03409183, 0.3162255],
    "linear": [0.6146307, 0.8797181, -0.3111422, 0.4612435],
    "yarn": [1.160175, 0.6357808, -0.4003487, 0.7528318],
    "yarn_long": [1.364592, 0.7787944, 0.9704025, 0.04656953],
    "yarn_attn_factor": [1.278019, 0.947798, -0.0992595, -0.2127737],
    "llama3": [1.199212, 1.613529, -0.703438, 0.05009148],
}


@pytest.mark.parametrize("name", ROPE_VARIANTS)
def test_reference_agrees_with_llama_cpp(tmp_path: Path, name: str) -> None:
    """300 tokens, more than any of these models was trained for, with grouped heads and biases."""
    model = write_llama(tmp_path / "m.gguf", type="F32", rope=ROPE_VARIANTS[name], context=128, biases=True, seed=3)
    first = model.tensors["token_embd.weight"][0, :2]
    assert np.allclose(first, GOLDEN_WEIGHTS), "numpy's random numbers changed: record the logits of llama.cpp again"
    found = LlamaReference(model.path).forward(GOLDEN_TOKENS)[-1, [7, 77, 177, 477]]
    assert nmse(found, GOLDEN[name]) < 1e-8
