"""inspect on files that lie or are damaged: each is inspected or refused with one sentence."""

from __future__ import annotations

import random
import re
import struct
import tracemalloc
from pathlib import Path

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from code_objects import (
    assembled,
    compressed,
    cubin,
    damaged,
    host_object,
    one,
    right,
    two_kernels,
)
from hipquant.codeobjects.bundle import pack
from hipquant.errors import InvalidCodeObjectError
from hipquant.toolchain import inspect as module
from hipquant.toolchain import nvidia
from hipquant.toolchain.inspect import inspect

SHT_NOBITS = 8


def refusal(blob: bytes) -> str:
    """Why a file is refused; empty if it is inspected."""
    try:
        assert inspect(blob).kind
    except InvalidCodeObjectError as error:
        return str(error)
    return ""


def with_metadata(content: bytes, folder: Path) -> bytes:
    """An AMD ELF whose metadata are these bytes."""
    folder.mkdir(exist_ok=True)
    (folder / "metadata").write_bytes(content)
    note = '.section .note,"a",@note\n.long 7, 2f - 1f, 32\n.asciz "AMDGPU"\n.balign 4\n'
    blob = bytearray(assembled(f'{note}1: .incbin "{folder / "metadata"}"\n2: .balign 4\n', folder))
    struct.pack_into("<H", blob, 18, 224)
    blob[48] = 0x41
    return bytes(blob)


KERNEL = {
    ".name": "k", ".symbol": "k.kd", ".args": [], ".vgpr_count": 1, ".sgpr_count": 1, ".group_segment_fixed_size": 0,
    ".private_segment_fixed_size": 0, ".wavefront_size": 32, ".max_flat_workgroup_size": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({".name": "k\x1b[2J"}, "not printable"),
        ({".name": ""}, "has no name"),
        ({".name": 3}, ".name is '3', expected text"),
        ({".vgpr_count": -1}, ".vgpr_count is '-1', expected a number"),
        ({".wavefront_size": "many"}, "expected a number"),
        ({".args": {}}, ".args is dict, expected a list"),
        ({".args": [1]}, "an argument is int"),
        ({".args": [{".value_kind": "by_value", ".offset": None, ".size": 1}]}, ".offset is 'None'"),
    ],
)
def test_metadata_that_make_no_sense(change: dict[str, object], message: str, tmp_path: Path) -> None:
    packed = msgpack.packb({"amdhsa.kernels": [{**KERNEL, **change}]})
    with pytest.raises(InvalidCodeObjectError, match=re.escape(message)):
        inspect(with_metadata(packed, tmp_path))
    good = inspect(with_metadata(msgpack.packb({"amdhsa.kernels": [KERNEL]}), tmp_path))
    assert (one(good, "k").vgprs, one(good, "k").loadable) == (1, False)


@pytest.mark.parametrize(
    "content",
    [
        b"\x91" * 100_000,
        b"\xdd\x7f\xff\xff\xff" * 1000,
        b"\xdd\x00\x00\x7f\xff" * 2000,
        b"\xdf\xff\xff\xff\xff" * 1000,
        b"\xc6\xff\xff\xff\xff",
        b"\xc1",
        b"",
        b"\x90",
        msgpack.packb({"amdhsa.kernels": 5}),
        msgpack.packb({1: 2}),
    ],
    ids=lambda c: f"{c[:3].hex()}x{len(c)}",
)
def test_metadata_that_lie(content: bytes, tmp_path: Path) -> None:
    blob = with_metadata(content, tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidCodeObjectError, match="metadata"):
            inspect(blob)
        assert tracemalloc.get_traced_memory()[1] < 700 << 20
    finally:
        tracemalloc.stop()


def test_elf_without_or_with_old_metadata(tmp_path: Path) -> None:
    blob = with_metadata(msgpack.packb({}), tmp_path)
    with pytest.raises(InvalidCodeObjectError, match="machine code without metadata"):
        inspect(blob.replace(b"AMDGPU\0", b"OTHERS\0"))
    with pytest.raises(InvalidCodeObjectError, match="code object version 2"):
        inspect(blob.replace(b"\x07\0\0\0", b"\x04\0\0\0", 1).replace(b"AMDGPU\0\0", b"AMD\0" + bytes(4)))


def test_hostile_tables_of_an_elf() -> None:
    image = right()["gfx1100"]
    sections, count = struct.unpack_from("<Q", image, 40)[0], struct.unpack_from("<H", image, 60)[0]
    for at, value, message in (
        (40, struct.pack("<Q", len(image) - 10), "section headers at byte"),
        (60, b"\xff\xff", "65535 section headers"),
        (60, b"\0\0", "more than 65279 sections"),
        (62, b"\xfe\xff", "should be in section 65534"),
        (58, b"\x00\x01", "expected 64, 56 and 64"),
        (32, struct.pack("<Q", 1 << 63), "program headers at byte"),
    ):
        with pytest.raises(InvalidCodeObjectError, match=message):
            inspect(image[:at] + value + image[at + len(value) :])
    for i in range(1, count):  # each section in turn claims to be huge, or to begin far behind the end
        for field in (24, 32):
            at = sections + 64 * i + field
            message = refusal(image[:at] + struct.pack("<Q", 1 << 60) + image[at + 8 :])
            takes_no_room = struct.unpack_from("<I", image, sections + 64 * i + 4)[0] == SHT_NOBITS
            assert takes_no_room or "the file ends at" in message or "bytes of names" in message


def test_names_that_overlap_are_refused(tmp_path: Path) -> None:
    """A symbol table in which every symbol has the same long name would take a multiple of the file's size."""
    lines = "\n".join(f".globl s{i}\n.type s{i},@function\ns{i}: ret" for i in range(2000))
    blob = bytearray(
        assembled(f".globl {'a' * 30000}\n.type {'a' * 30000},@function\n{'a' * 30000}: ret\n{lines}\n", tmp_path)
    )
    name = blob.index(b"a" * 30000)
    sections, count = struct.unpack_from("<Q", blob, 40)[0], struct.unpack_from("<H", blob, 60)[0]
    rows = [struct.unpack_from("<IIQQQQIIQQ", blob, sections + 64 * i) for i in range(count)]
    table = next(r for r in rows if r[1] == 2)
    strings = rows[table[6]][4]
    for at in range(table[4], table[4] + table[5], 24):
        struct.pack_into("<I", blob, at, name - strings)
    with pytest.raises(InvalidCodeObjectError, match="names overlap"):
        inspect(bytes(blob))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b".version 8.0\n.target sm_80\n.entry k(\n.param .u64 a\n)\n{\nret;\n", "has no end"),
        (b".version 8.0\n.entry k()\n{\nret;\n}\n", "no .target"),
        (b".version 8.0\n.target sm_80\n}\n", "closes that was not opened"),
        (b".version 8.0\n.target sm_80\n.entry k(\n.param what\n)\n", "has a parameter"),
        (b".version 8.0\n.target sm_80\n// \xff\n", "is not ASCII"),
        (b".version 8.0\n.target sm_80\n.entry k()\n{\n" + b"a" * (1 << 21) + b"\n}\n", "a line has"),
    ],
)
def test_damaged_ptx(text: bytes, message: str) -> None:
    with pytest.raises(InvalidCodeObjectError, match=message):
        inspect(text)


def test_big_ptx_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia, "MAX_PTX", 1000)
    with pytest.raises(InvalidCodeObjectError, match="at most 1000 are read"):
        inspect(right()["sm_90a"])


def test_big_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(2000))
    monkeypatch.setattr(module, "MAX_FILE", 1000)
    with pytest.raises(InvalidCodeObjectError, match="is not a file of at most"):
        module.inspect_file(tmp_path / "file")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=600),
    st.sampled_from(
        [b"", b"\x7fELF\x02\x01\x01\x40\x03", b".version 8.0\n.target sm_80\n.entry k(", b"CCOB\x01\0\0\0"]
    ),
)
def test_any_bytes(data: bytes, begin: bytes) -> None:
    assert len(refusal(begin + data)) > 20


def test_damaged_files(tmp_path: Path) -> None:
    """Each is inspected or refused with the one error there is for it; none takes much memory."""
    gpu = {t: b for t, b in two_kernels().items() if t.startswith("gfx")}
    originals = [*two_kernels().values(), pack(gpu), compressed(pack(gpu), 3)]
    originals += [cubin(tmp_path), host_object([pack(gpu)], tmp_path)]
    rng = random.Random(1)
    tracemalloc.start()
    try:
        messages = [refusal(damaged(rng.choice(originals), rng)) for _ in range(1000)]
        refused = [m for m in messages if m]
        assert 400 < len(refused) < 975
        assert min(map(len, refused)) > 20
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
