"""Every way in which a GGUF file can be wrong: a sentence for each, and neither much time nor much memory."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_bytes import ARRAY, BOOL, STRING, U32, array, file_of, key, peak_bytes, tensor, text, u32
from hipquant.errors import InvalidModelFileError, UnsupportedQuantTypeError
from hipquant.gguf_file import GGUFFile, StringArray
from hipquant.quants import BY_NAME

MAX_SECONDS, MAX_BYTES = 1.0, 64 << 20  # what opening a file of a few KiB may take, whatever is in it


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


def test_a_header_may_not_be_huge(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hipquant.gguf_file._MAX_HEADER", 100)
    for value in (array(STRING, 5, text(b"x" * 20) * 5), array(STRING, 50, bytes(400)), array(0, 90, bytes(90))):
        with pytest.raises(InvalidModelFileError, match=r"header, which may take 100"):
            opened(file_of(key(b"a", ARRAY, value), data=1000))
    opened(file_of(key(b"a", ARRAY, array(0, 30, bytes(30))), data=1000)).close()


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
