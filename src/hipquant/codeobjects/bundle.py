"""Offload bundles: the machine code of several AMD targets in one file, as hipModuleLoadData takes it.

Format, little-endian: the magic, u64 count, then for each entry u64 offset, u64 size, u64 length of the id, the id
(`hipv4-amdgcn-amd-amdhsa--gfx1100`). Compressed (*CCOB*): the magic `CCOB`, u16 version, u16 method (0 zlib, 1 zstd),
total size (version 2: u32, 3: u64), uncompressed size (u32; version 3: u64), u64 hash, the compressed bundle.
Source: LLVM's clang/docs/ClangOffloadBundler.rst. Sizes and offsets are taken for lies until they are shown to fit.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Protocol

from ..errors import InvalidCodeObjectError

MAGIC = b"__CLANG_OFFLOAD_BUNDLE__"
COMPRESSED_MAGIC = b"CCOB"
ELF_MAGIC = b"\x7fELF"
EM_AMDGPU = 224
ALIGNMENT = 4096
HOST_ID = "host-x86_64-unknown-linux-gnu-"  # HIP's loader expects a host entry, empty, at the first place
ID_PREFIX = "hipv4-amdgcn-amd-amdhsa--"
MAX_ENTRIES = 1024
MAX_ID = 256  # bytes
MAX_UNCOMPRESSED = 1 << 30  # bytes
MAX_RATIO = 1000  # of the uncompressed to the compressed size; bundles of many targets reach about 50
PIECE = 1 << 20  # bytes decompressed at a time

_ENTRY = struct.Struct("<QQQ")
_HEADERS = {1: struct.Struct("<4sHHIQ"), 2: struct.Struct("<4sHHIIQ"), 3: struct.Struct("<4sHHQQQ")}
_GPU_ID = re.compile(r"\w+-amdgcn-amd-amdhsa-(?:unknown)?-?(gfx[\w-]+(?::\w+[+-])*)", re.ASCII)

# EF_AMDGPU_MACH, the low byte of e_flags. Source: LLVM's docs/AMDGPUUsage.rst.
_MACHINES = {
    0x20: "gfx600", 0x21: "gfx601", 0x22: "gfx700", 0x23: "gfx701", 0x24: "gfx702", 0x25: "gfx703", 0x26: "gfx704",
    0x28: "gfx801", 0x29: "gfx802", 0x2A: "gfx803", 0x2B: "gfx810", 0x2C: "gfx900", 0x2D: "gfx902", 0x2E: "gfx904",
    0x2F: "gfx906", 0x30: "gfx908", 0x31: "gfx909", 0x32: "gfx90c", 0x33: "gfx1010", 0x34: "gfx1011", 0x35: "gfx1012",
    0x36: "gfx1030", 0x37: "gfx1031", 0x38: "gfx1032", 0x39: "gfx1033", 0x3A: "gfx602", 0x3B: "gfx705", 0x3C: "gfx805",
    0x3D: "gfx1035", 0x3E: "gfx1034", 0x3F: "gfx90a", 0x40: "gfx940", 0x41: "gfx1100", 0x42: "gfx1013",
    0x43: "gfx1150", 0x44: "gfx1103", 0x45: "gfx1036", 0x46: "gfx1101", 0x47: "gfx1102", 0x48: "gfx1200",
    0x49: "gfx1250", 0x4A: "gfx1151", 0x4B: "gfx941", 0x4C: "gfx942", 0x4E: "gfx1201", 0x4F: "gfx950",
    0x51: "gfx9-generic", 0x52: "gfx10-1-generic", 0x53: "gfx10-3-generic", 0x54: "gfx11-generic", 0x55: "gfx1152",
    0x58: "gfx1153", 0x59: "gfx12-generic", 0x5A: "gfx1251", 0x5F: "gfx9-4-generic",
}  # fmt: skip


def pack(objects: Mapping[str, bytes]) -> bytes:
    """One bundle of the machine code of AMD targets, by target name (`gfx1100`); the same bytes for the same input."""
    entries = [(HOST_ID, b""), *((ID_PREFIX + target, objects[target]) for target in sorted(objects))]
    header = len(MAGIC) + 8 + sum(_ENTRY.size + len(name) for name, _ in entries)
    table, body, at = bytearray(MAGIC + struct.pack("<Q", len(entries))), bytearray(), _aligned(header)
    body += bytes(at - header)
    for name, image in entries:
        body += bytes(at - header - len(body))
        table += _ENTRY.pack(at, len(image), len(name)) + name.encode("ascii")
        body += image
        at = _aligned(at + len(image))
    return bytes(table + body)


def unpack(blob: bytes) -> dict[str, bytes]:
    """The ELF images in a bundle, compressed or not, by target (`gfx90a`, `gfx90a:xnack+`); of a plain AMD ELF, itself.

    Raises `InvalidCodeObjectError` if the bytes are something else, or a bundle that is damaged.
    """
    if blob[:4] == ELF_MAGIC:
        target = amd_target(blob)
        if not target:
            raise InvalidCodeObjectError("an ELF file, but not AMD machine code; expected a code object or a bundle")
        return {target: blob}
    for bundle in bundles(blob):
        return bundle
    raise InvalidCodeObjectError(f"not an offload bundle: the bytes begin with {blob[:8]!r}")


def bundles(section: bytes) -> Iterator[dict[str, bytes]]:
    """The bundles that lie one after the other in a section `.hip_fatbin` (one for each source that was linked)."""
    at = 0
    while (at := _skip_zeros(section, at)) < len(section):
        if section.startswith(COMPRESSED_MAGIC, at):
            whole, nbytes = _decompress(section, at)
            bundle, _ = _read(whole, 0)
            at += nbytes
        elif section.startswith(MAGIC, at):
            bundle, at = _read(section, at)
        else:
            raise InvalidCodeObjectError(f"no offload bundle at byte {at}: it begins with {section[at : at + 8]!r}")
        yield bundle


def amd_target(elf: bytes) -> str:
    """The target that an AMD ELF's header names, such as `gfx1100`; empty if it is not one, or of an unknown GPU."""
    if len(elf) < 64 or elf[:6] != ELF_MAGIC + b"\x02\x01" or struct.unpack_from("<H", elf, 18)[0] != EM_AMDGPU:
        return ""
    return _MACHINES.get(elf[48], "")


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


def _skip_zeros(blob: bytes, at: int) -> int:
    found = re.compile(rb"[^\0]").search(blob, at)
    return found.start() if found else len(blob)


def _read(blob: bytes, base: int) -> tuple[dict[str, bytes], int]:
    """The bundle that begins at a byte, and where it ends."""
    found: dict[str, bytes] = {}
    size, at, total = len(blob) - base, len(MAGIC) + 8, 0
    if size < at:
        raise InvalidCodeObjectError(f"the offload bundle is truncated: {size} bytes, its header takes {at}")
    (count,) = struct.unpack_from("<Q", blob, base + len(MAGIC))
    if not 1 <= count <= MAX_ENTRIES:
        raise InvalidCodeObjectError(f"the offload bundle claims {count} entries; expected 1 to {MAX_ENTRIES}")
    end = at
    for i in range(count):
        name, start, length, at = _entry(blob, base, at, i)
        total, end = total + length, max(end, start + length, at)
        if total > size:
            raise InvalidCodeObjectError("the offload bundle is damaged: its entries overlap")
        match = _GPU_ID.fullmatch(name)
        if match and length:
            if match[1] in found:
                raise InvalidCodeObjectError(f"the offload bundle is damaged: it holds {match[1]} twice")
            found[match[1]] = blob[base + start : base + start + length]
    return found, base + end


def _entry(blob: bytes, base: int, at: int, i: int) -> tuple[str, int, int, int]:
    """Row `i` of the table: id, offset and size of its image, and where the next row begins."""
    size = len(blob) - base
    if at + _ENTRY.size > size:
        raise InvalidCodeObjectError(f"the offload bundle is truncated in its table, at entry {i}, byte {at} of {size}")
    start, length, id_length = _ENTRY.unpack_from(blob, base + at)
    at += _ENTRY.size
    if not 1 <= id_length <= min(MAX_ID, size - at):
        raise InvalidCodeObjectError(f"the offload bundle is damaged: entry {i} claims an id of {id_length} bytes")
    raw = blob[base + at : base + at + id_length]
    if not (raw.isascii() and (name := raw.decode("ascii")).isprintable()):
        raise InvalidCodeObjectError(f"the offload bundle is damaged: the id of entry {i} is {raw[:40]!r}")
    if start + length > size:
        raise InvalidCodeObjectError(
            f"the offload bundle is truncated: {name} should end at byte {start + length}, the file ends at {size}"
        )
    return name, start, length, at + id_length


class _Reader(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Zlib:
    """zlib as a file, so that no more is decompressed than is asked for."""

    def __init__(self, data: bytes) -> None:
        self._stream, self._rest = zlib.decompressobj(), data

    def read(self, size: int, /) -> bytes:
        piece = self._stream.decompress(self._rest, size)
        self._rest = self._stream.unconsumed_tail
        return piece


class _Compressed(NamedTuple):
    method: int
    body: bytes
    claimed: int  # bytes of the bundle in it
    nbytes: int  # of the whole, with its header


def _decompress(blob: bytes, at: int) -> tuple[bytes, int]:
    """The bundle in the compressed one that begins at a byte, and how many bytes that one takes."""
    head = _header(blob, at)
    reader, whole = _reader(head.method, head.body), bytearray()
    try:
        while piece := reader.read(min(PIECE, head.claimed + 1 - len(whole))):
            whole += piece
            if len(whole) > head.claimed:
                break
    except Exception as error:  # zlib.error, zstandard.ZstdError
        raise InvalidCodeObjectError(f"the compressed offload bundle is damaged: {error}") from None
    if len(whole) != head.claimed:
        more = "more" if len(whole) > head.claimed else f"{len(whole)}"
        raise InvalidCodeObjectError(
            f"the compressed offload bundle is damaged: it claims {head.claimed} bytes uncompressed, there are {more}"
        )
    if not whole.startswith(MAGIC):
        raise InvalidCodeObjectError(f"the compressed file is not an offload bundle: it begins {bytes(whole[:8])!r}")
    return bytes(whole), head.nbytes


def _header(blob: bytes, at: int) -> _Compressed:
    version = struct.unpack_from("<H", blob, at + 4)[0] if len(blob) >= at + 6 else 0
    layout = _HEADERS.get(version)
    if layout is None or len(blob) < at + layout.size:
        raise InvalidCodeObjectError(
            f"the compressed offload bundle has version {version} and {len(blob) - at} bytes; expected version 1 to 3"
        )
    _, _, method, *sizes, claimed, _ = layout.unpack_from(blob, at)
    total = sizes[0] if sizes else len(blob) - at  # version 1 does not tell
    if not layout.size <= total <= len(blob) - at:
        raise InvalidCodeObjectError(
            f"the compressed offload bundle is truncated: it claims {total} bytes, there are {len(blob) - at}"
        )
    if claimed > min(MAX_UNCOMPRESSED, MAX_RATIO * total):
        raise InvalidCodeObjectError(
            f"the compressed offload bundle claims {claimed} bytes uncompressed; "
            f"at most {MAX_UNCOMPRESSED} and {MAX_RATIO} times its own {total} are accepted"
        )
    return _Compressed(method, blob[at + layout.size : at + total], claimed, total)


def _reader(method: int, body: bytes) -> _Reader:
    if method == 0:
        return _Zlib(body)
    if method != 1:
        raise InvalidCodeObjectError(f"the compressed offload bundle uses method {method}; expected 0 (zlib), 1 (zstd)")
    try:
        import zstandard
    except ImportError:
        raise InvalidCodeObjectError(
            "the offload bundle is compressed with zstd: pip install zstandard, or build it without --offload-compress"
        ) from None
    reader: _Reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(body)
    return reader
