"""Offload bundles: packing, unpacking, agreement with LLVM's tool, compression, and files that lie."""

from __future__ import annotations

import builtins
import random
import shutil
import struct
import subprocess
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code_objects import compressed, damaged, right, right_amd
from hipquant.codeobjects.bundle import ALIGNMENT, HOST_ID, MAGIC, amd_target, bundles, pack, unpack
from hipquant.errors import InvalidCodeObjectError
from hipquant.targets import AMD_TARGETS
from hipquant.toolchain import zig

BUNDLERS = [f"clang-offload-bundler{v}" for v in ("", *(f"-{n}" for n in range(23, 14, -1)))]
bundler = next((b for b in BUNDLERS if shutil.which(b)), None)
images = st.dictionaries(st.sampled_from([t.name for t in AMD_TARGETS]), st.binary(min_size=1, max_size=9000))


@given(images)
def test_unpack_gives_what_was_packed(objects: dict[str, bytes]) -> None:
    packed = pack(objects)
    assert unpack(packed) == objects
    assert pack(dict(reversed(objects.items()))) == packed


def test_layout() -> None:
    packed = pack({"gfx1100": b"a" * 5000, "gfx90a": b"b"})
    assert packed.startswith(MAGIC + struct.pack("<QQQQ", 3, ALIGNMENT, 0, len(HOST_ID)) + HOST_ID.encode())
    assert packed[ALIGNMENT : ALIGNMENT + 5000] == b"a" * 5000
    assert packed[3 * ALIGNMENT :] == b"b"


@pytest.mark.skipif(bundler is None, reason="clang-offload-bundler is not installed")
def test_llvms_tool_reads_it(tmp_path: Path) -> None:
    objects = right_amd()
    path, to = tmp_path / "ours.hsaco", tmp_path / "one"
    path.write_bytes(pack(objects))
    assert bundler is not None
    command = [bundler, "--type=o", f"--input={path}"]
    listed = subprocess.run([*command, "--list"], capture_output=True, text=True, check=True).stdout.split()
    assert sorted(listed) == sorted([HOST_ID, *(f"hipv4-amdgcn-amd-amdhsa--{t}" for t in objects)])
    for target, image in objects.items():
        one = [f"--targets=hipv4-amdgcn-amd-amdhsa--{target}", f"--output={to}", "--unbundle"]
        subprocess.run([*command, *one], check=True)
        assert to.read_bytes() == image


@pytest.mark.skipif(bundler is None, reason="clang-offload-bundler is not installed")
@pytest.mark.parametrize("options", [[], ["--compress"]], ids=["plain", "compressed"])
def test_what_llvms_tool_writes_is_read(options: list[str], tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    objects = {"gfx1100": right()["gfx1100"], "gfx90a:xnack+": right()["gfx90a"]}
    (tmp_path / "host").touch()
    inputs = [f"--input={tmp_path / 'host'}"]
    for i, image in enumerate(objects.values()):
        (tmp_path / str(i)).write_bytes(image)
        inputs.append(f"--input={tmp_path / str(i)}")
    targets = ",".join([HOST_ID, *(f"hipv4-amdgcn-amd-amdhsa--{t}" for t in objects)])
    to = tmp_path / "theirs.hsaco"
    assert bundler is not None
    subprocess.run([bundler, "--type=o", f"--targets={targets}", *inputs, f"--output={to}", *options], check=True)
    assert to.read_bytes().startswith(b"CCOB" if options else MAGIC)
    assert unpack(to.read_bytes()) == objects


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("method", [0, 1], ids=["zlib", "zstd"])
def test_compressed(version: int, method: int) -> None:
    if method:
        pytest.importorskip("zstandard")
    packed = pack(right_amd())
    assert unpack(compressed(packed, version, method)) == right_amd()


def test_bundles_one_after_the_other() -> None:
    a, b = pack({"gfx1100": b"a" * 100}), pack({"gfx90a": b"b"})
    c = compressed(pack({"gfx906": b"c"}), 3)
    section = a + bytes(-len(a) % 4096) + c + bytes(8) + b + bytes(100)
    assert list(bundles(section)) == [{"gfx1100": b"a" * 100}, {"gfx906": b"c"}, {"gfx90a": b"b"}]
    with pytest.raises(InvalidCodeObjectError, match="no offload bundle at byte"):
        list(bundles(a + b"?"))


def test_entries_of_others_are_left_out() -> None:
    packed = pack({"gfx1100": b"code"})
    assert unpack(packed.replace(b"hipv4-amdgcn-amd-amdhsa-", b"hipv4-spirv64-amd-amdhsa")) == {}
    old = packed.replace(b"hipv4-amdgcn-amd-amdhsa--gfx1100", b"hip-amdgcn-amd-amdhsa--gfx906:x+")
    assert unpack(old) == {"gfx906:x+": b"code"}


def test_a_plain_elf_is_its_own_bundle() -> None:
    image = right()["gfx1100"]
    assert unpack(image) == {"gfx1100": image}
    with pytest.raises(InvalidCodeObjectError, match="not AMD machine code"):
        unpack(image[:18] + b"\x3e\0" + image[20:])


@pytest.mark.parametrize("target", AMD_TARGETS, ids=lambda t: t.name)
def test_the_target_in_the_header(target: Any, tmp_path: Path) -> None:
    """As the assembler writes it, for every target."""
    (tmp_path / "empty.s").touch()
    machine = ["-target", "amdgcn-amd-amdhsa", f"-mcpu={target.name}"]
    zig.clang([*machine, "-c", tmp_path / "empty.s", "-o", tmp_path / "o"], "assembling")
    assert amd_target((tmp_path / "o").read_bytes()) == target.name


def test_the_target_of_something_else() -> None:
    image = right()["gfx1100"]
    assert amd_target(b"") == amd_target(b"\x7fELF") == amd_target(image[:63]) == ""
    assert amd_target(image[:48] + b"\xff" + image[49:]) == ""


def _entry(offset: int, size: int, name: bytes, id_size: int | None = None) -> bytes:
    return struct.pack("<QQQ", offset, size, len(name) if id_size is None else id_size) + name


ID = b"hipv4-amdgcn-amd-amdhsa--gfx1100"
LIES = {
    "no entries": (0, b"", "claims 0 entries"),
    "too many entries": (1 << 60, b"", "claims 1152921504606846976 entries"),
    "the table ends early": (2, _entry(0, 0, ID), "truncated in its table"),
    "an id that is too long": (1, _entry(0, 0, ID, 1 << 40), "claims an id of 1099511627776 bytes"),
    "an id without text": (1, _entry(0, 0, b"\x1b[31mred"), "the id of entry 0 is"),
    "an image behind the end": (1, _entry(1 << 20, 8, ID), "should end at byte 1048584, the file ends at"),
    "an offset that overflows": (1, _entry((1 << 64) - 8, 16, ID), "should end at byte 18446744073709551624"),
    "a target twice": (2, _entry(0, 1, ID) + _entry(1, 1, ID), "holds gfx1100 twice"),
    "images that overlap": (900, b"".join(_entry(0, 5000, ID + b"-%d" % i) for i in range(900)), "overlap"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str) -> None:
    count, table, message = LIES[lie]
    with pytest.raises(InvalidCodeObjectError, match=message):
        unpack(MAGIC + struct.pack("<Q", count) + table)


@pytest.mark.parametrize("begin", [b"", b"ELF", b"\x7fELF", MAGIC, b"CCOB", b"CCOB\x03\0", b"\0" * 100])
def test_what_is_no_bundle(begin: bytes) -> None:
    with pytest.raises(InvalidCodeObjectError):
        unpack(begin)


def test_bombs_are_refused() -> None:
    """Neither what is claimed nor what comes out may be much bigger than the file."""
    zeros = zlib.compress(MAGIC + bytes(200 << 20), 9)
    tracemalloc.start()
    try:
        for claimed in (1000, 1 << 29, 1 << 40, (1 << 64) - 1):
            bomb = struct.pack("<4sHHQQQ", b"CCOB", 3, 0, 32 + len(zeros), claimed, 0) + zeros
            with pytest.raises(InvalidCodeObjectError, match="claims"):
                unpack(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[:4] + b"\x04" + b[5:], "version 4"),
        (lambda b: b[:6] + b"\x07" + b[7:], "method 7"),
        (lambda b: b[:-20], "truncated: it claims"),
        (lambda b: b[:16] + struct.pack("<Q", 100) + b[24:], "claims 100 bytes uncompressed, there are more"),
        (lambda b: b[:40] + b"\xff" * 8 + b[48:], "is damaged: "),
    ],
)
def test_damaged_compression(change: Any, message: str) -> None:
    with pytest.raises(InvalidCodeObjectError, match=message):
        unpack(change(compressed(pack(right_amd()), 3)))
    with pytest.raises(InvalidCodeObjectError, match="not an offload bundle: it begins"):
        unpack(compressed(b"something else", 3))


def test_zstandard_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = compressed(pack(right_amd()), 3)
    importer = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "zstandard":
            raise ImportError(name)
        return importer(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert unpack(packed) == right_amd()  # zlib is always there
    with pytest.raises(InvalidCodeObjectError, match="pip install zstandard"):
        unpack(packed[:6] + b"\x01" + packed[7:])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.sampled_from([b"", MAGIC, MAGIC + b"\x02" + bytes(7), b"CCOB\x02\0\0\0"]))
def test_any_bytes(data: bytes, begin: bytes) -> None:
    with pytest.raises(InvalidCodeObjectError, match=".{20}"):
        unpack(begin + data)


def test_damaged_bundles() -> None:
    """Each is read or refused with the one error there is for it, at once."""
    rng, refused = random.Random(0), 0
    originals = [pack(right_amd()), compressed(pack(right_amd()), 2), compressed(pack({"gfx1100": b"x" * 99}), 3)]
    for _ in range(1500):
        blob = damaged(rng.choice(originals), rng)
        try:
            found = unpack(blob)
        except InvalidCodeObjectError:
            refused += 1
        else:
            assert sum(map(len, found.values())) < 1 << 20
    assert 500 < refused < 1500
