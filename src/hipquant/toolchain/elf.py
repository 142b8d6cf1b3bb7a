"""ELF files as far as code objects need them: sections, notes and symbols, of bytes that nobody vouches for.

pyelftools knows the structures. It trusts offsets, sizes and counts (a hash table that claims a billion buckets is
read), so the tables are walked here, within bounds that are checked first.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator
from io import BytesIO
from typing import NamedTuple

from elftools.common.utils import struct_parse
from elftools.elf.elffile import ELFFile
from elftools.elf.notes import iter_notes

from ..errors import InvalidCodeObjectError

MACHINES = {"EM_AMDGPU": "AMD GPU", "EM_CUDA": "NVIDIA GPU", "EM_X86_64": "x86_64", "EM_AARCH64": "aarch64"}
MAX_NAME = 1 << 16  # bytes; mangled names can be long
MAX_SHARED = 4  # times that a byte of a table of names may be part of one; linkers share the ends of names
MAX_SYMBOLS = 1 << 20
MAX_NOTES = 1024
_SYMBOL = struct.Struct("<IBBHQQ")


class Section(NamedTuple):
    """A row of the section table; `offset` and `size` in bytes, `size` 0 in the file for NOBITS."""

    name: str
    type: str | int
    offset: int
    size: int
    link: int
    info: int


class Note(NamedTuple):
    """A note: owner, type as pyelftools names or numbers it, content."""

    owner: str
    type: str | int
    content: bytes


class Symbol(NamedTuple):
    """A defined symbol that other objects see."""

    name: str
    is_function: bool


class Elf:
    """A checked 64-bit little-endian ELF file. Raises `InvalidCodeObjectError` for anything that is not one, whole."""

    def __init__(self, blob: bytes) -> None:
        self.blob = blob
        _check_header(blob)
        try:
            self._file = ELFFile(BytesIO(blob))
            header = self._file.header
            self.machine: str = MACHINES.get(header["e_machine"], str(header["e_machine"]))
            self.type: str = str(header["e_type"])  # "ET_REL", "ET_DYN", "ET_EXEC"
            self.flags: int = header["e_flags"]
            self.abi_version: int = header["e_ident"]["EI_ABIVERSION"]
            self.sections = self._sections()
            self._note_ranges = list(self._note_segments()) or [
                (s.offset, s.size) for s in self.sections if s.type == "SHT_NOTE"
            ]
        except InvalidCodeObjectError:
            raise
        except Exception as error:  # pyelftools has no base class for what hostile bytes make of it
            raise _damaged(f"{type(error).__name__} {error}") from None

    def section(self, name: str) -> Section | None:
        """The first section of a name."""
        return next((s for s in self.sections if s.name == name), None)

    def data(self, section: Section) -> bytes:
        """What a section holds in the file."""
        return b"" if section.type == "SHT_NOBITS" else self.blob[section.offset : section.offset + section.size]

    def notes(self) -> Iterator[Note]:
        """The notes that a loader sees (of the note segments; of the sections where there are none)."""
        try:
            for offset, size in self._note_ranges:
                for note in itertools.islice(iter_notes(self._file, offset, size), MAX_NOTES):
                    content = note["n_descdata"]
                    yield Note(
                        str(note["n_name"]), note["n_type"], content if isinstance(content, bytes) else content.encode()
                    )
        except Exception as error:
            raise _damaged(f"its notes cannot be read: {type(error).__name__} {error}") from None

    def symbols(self, dynamic: bool = True) -> Iterator[Symbol]:
        """The defined global symbols: those that a loader sees, or those of an object that is not linked yet."""
        wanted = "SHT_DYNSYM" if dynamic else "SHT_SYMTAB"
        table = next((s for s in self.sections if s.type == wanted), None)
        if table is None:
            return
        if table.link >= len(self.sections) or table.size > MAX_SYMBOLS * _SYMBOL.size or table.size % _SYMBOL.size:
            raise _damaged(f"its symbol table has {table.size} bytes and names in section {table.link}")
        names = _Names(self.data(self.sections[table.link]))
        for at, info, _, index, _, _ in _SYMBOL.iter_unpack(self.data(table)):
            if info >> 4 in (1, 2) and index:  # global or weak, and defined
                yield Symbol(names.at(at), info & 15 in (2, 10))

    def _sections(self) -> list[Section]:
        header, stream = self._file.header, self._file.stream
        raw = [
            struct_parse(self._file.structs.Elf_Shdr, stream, header["e_shoff"] + i * header["e_shentsize"])
            for i in range(header["e_shnum"])
        ]
        if not raw:
            return []
        where = raw[header["e_shstrndx"]]
        names = _Names(self.blob[where["sh_offset"] : where["sh_offset"] + where["sh_size"]])
        found = []
        for i, s in enumerate(raw):
            name = names.at(s["sh_name"])
            if s["sh_type"] not in ("SHT_NOBITS", "SHT_NULL") and s["sh_offset"] + s["sh_size"] > len(self.blob):
                end = s["sh_offset"] + s["sh_size"]
                raise _damaged(f"section {i} should end at byte {end}, the file ends at {len(self.blob)}")
            found.append(Section(name, s["sh_type"], s["sh_offset"], s["sh_size"], s["sh_link"], s["sh_info"]))
        return found

    def _note_segments(self) -> Iterator[tuple[int, int]]:
        header = self._file.header
        for i in range(header["e_phnum"]):
            at = header["e_phoff"] + i * header["e_phentsize"]
            s = struct_parse(self._file.structs.Elf_Phdr, self._file.stream, at)
            end = s["p_offset"] + s["p_filesz"]
            if end > len(self.blob):
                raise _damaged(f"segment {i} should end at byte {end}, the file ends at {len(self.blob)}")
            if s["p_type"] == "PT_NOTE":
                yield s["p_offset"], s["p_filesz"]


def _damaged(why: str) -> InvalidCodeObjectError:
    return InvalidCodeObjectError(f"the ELF file is damaged or truncated: {why[:300]}")


def _check_header(blob: bytes) -> None:
    """That this is a 64-bit little-endian ELF file whose section and program header tables lie within it."""
    if blob[:4] != b"\x7fELF":
        raise InvalidCodeObjectError(f"not an ELF file: the bytes begin with {blob[:8]!r}")
    if len(blob) < 64:
        raise _damaged(f"{len(blob)} bytes, the header takes 64")
    if blob[4:6] != b"\x02\x01":
        raise InvalidCodeObjectError("an ELF file of 32 bits or of a big-endian machine; code objects are neither")
    segments, sections = struct.unpack_from("<QQ", blob, 32)
    size, segment_size, segment_count, section_size, section_count, names = struct.unpack_from("<6H", blob, 52)
    if size != 64 or (segment_count and segment_size != 56) or (section_count and section_size != 64):
        raise _damaged(f"its headers have {size}, {segment_size} and {section_size} bytes; expected 64, 56 and 64")
    for what, at, count, each in (("program", segments, segment_count, 56), ("section", sections, section_count, 64)):
        if count and at + count * each > len(blob):
            raise _damaged(f"its {count} {what} headers at byte {at} are not within the file of {len(blob)} bytes")
    if sections and not section_count:
        raise _damaged("it claims more than 65279 sections")
    if section_count and names >= section_count:
        raise _damaged(f"the names of its {section_count} sections should be in section {names}")


class _Names:
    """A table of names, each ended by a zero."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.left = raw, MAX_SHARED * len(raw)

    def at(self, start: int) -> str:
        """The name that begins at a byte."""
        if not start and not self.raw:
            return ""
        end = self.raw.find(b"\0", start, start + MAX_NAME + 1) if start < len(self.raw) else -1
        self.left -= max(0, end - start)
        if end < 0 or self.left < 0:
            raise _damaged(f"the name at byte {start} of {len(self.raw)} bytes of names has no end, or names overlap")
        return readable(self.raw[start:end])


def readable(raw: bytes | str) -> str:
    """A name that may be shown on a terminal; anything else is refused."""
    try:
        text = raw.decode() if isinstance(raw, bytes) else raw
    except UnicodeDecodeError:
        raise _damaged(f"the name {raw[:40]!r} is not text") from None
    if not text.isprintable():
        raise _damaged(f"the name {text[:40]!r} is not printable")
    return text
