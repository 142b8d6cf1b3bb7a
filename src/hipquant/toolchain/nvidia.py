"""Kernels of PTX text and of cubins (NVIDIA's ELF).

PTX is read line by line, so that the time is in proportion to its size. It does not tell registers, nor scratch memory:
what it declares as `.local` the driver's compiler mostly keeps in registers. A cubin's arguments, registers, memory and
limits are in its sections `.nv.info*` (the numbers of attributes are those that NVIDIA's own tools print).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from ..errors import InvalidCodeObjectError
from .elf import Elf, readable
from .kernel_info import ArgInfo, Facts, KernelInfo

MAX_PTX = 64 << 20  # bytes
MAX_LINE, MAX_PARAM = 1 << 20, 1000  # characters
MAX_ATTRIBUTES = 1 << 16  # of a cubin's section
_ENTRY = re.compile(r"(?:\.visible |\.weak )?\s*\.entry\s+([\w$]+)")
_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d{1,4})\s+)?\.([a-z]\d{1,3})\s+(\.ptr\b.*?)?\s*([\w$%]+)(?:\[(\d{1,6})\])?\s*,?$"
)
_MEMORY = re.compile(r"(?:\.visible |\.weak )?\.shared\s+(?:\.align\s+\d+\s+)?\.[a-z](\d{1,3})\s+([\w$]+)\[(\d{1,9})\]")
_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+([\d, ]{1,40})")
_LOAD = re.compile(r"ld(?:\.[a-z_]+)*?\.global(?:\.[a-z_:\d]*?)*?(?:\.v([248]))?\.[a-z](\d+)\s")
_INSTRUCTION = re.compile(r"(?:@!?%\w+\s+)?([a-z][\w.:]*)[\s;]")
_MATRIX = ("mma.", "wmma.mma", "wgmma.mma", "tcgen05.mma")
_VERSION = re.compile(rb"^[ \t]*\.version[ \t]+\d", re.MULTILINE)

EM_CUDA_NEW_ABI = 8  # from here on the architecture is in the second byte of e_flags
RESERVED = 1024  # bytes of shared memory that the system takes from sm_90 on
_MAX_THREADS, _REQUIRED, _FRAME, _PARAM_INFO, _REGISTERS = 0x05, 0x10, 0x11, 0x17, 0x2F


def is_ptx(blob: bytes) -> bool:
    """Whether bytes look like PTX: text with a `.version`."""
    return b"\0" not in blob[:4096].rstrip(b"\0") and _VERSION.search(blob[:65536]) is not None


@dataclass
class _Entry:
    """A kernel of PTX while its lines are read."""

    name: str
    args: list[ArgInfo] = field(default_factory=list)
    threads: int | None = None
    lds: int = 0
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(Facts.__dataclass_fields__, 0))

    def param(self, line: str) -> None:
        match = _PARAM.match(line[:MAX_PARAM])
        if match is None:
            raise InvalidCodeObjectError(f"the PTX is damaged: {self.name} has a parameter {line[:80]!r}")
        align, kind, pointer, name, length = match.groups()
        element = int(kind[1:]) // 8
        size = element * int(length or 1)
        alignment = max(int(align or element), 1)
        end = self.args[-1].offset + self.args[-1].size if self.args else 0
        offset = -(-end // alignment) * alignment
        told = "pointer" if pointer else "" if size == 8 else "value"  # 64 bits may be an address
        self.args.append(ArgInfo(name, offset, size, told))

    def instruction(self, line: str) -> None:
        match = _INSTRUCTION.match(line)
        if match is None:
            return
        counts, word = self.counts, match[1]
        counts["instructions"] += 1
        counts["dot4"] += word.startswith("dp4a.")
        counts["matrix"] += word.startswith(_MATRIX)
        if load := _LOAD.match(line[match.start(1) :]):
            counts["loads"] += 1
            counts["widest_load"] = max(counts["widest_load"], int(load[1] or 1) * int(load[2]) // 8)

    def info(self) -> KernelInfo:
        return KernelInfo(
            self.name, self.args, lds=self.lds, wave=32, max_workgroup=self.threads,
            facts=Facts(**self.counts),
        )  # fmt: skip


def ptx(blob: bytes) -> tuple[str, list[KernelInfo]]:
    """The target that PTX was compiled for, and its kernels."""
    if len(blob) > MAX_PTX:
        raise InvalidCodeObjectError(f"the PTX has {len(blob)} bytes; at most {MAX_PTX} are read")
    try:
        lines = blob.rstrip(b"\0").decode("ascii", errors="strict").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidCodeObjectError(f"the PTX is damaged: byte {error.start} is not ASCII") from None
    target, module_shared, found = "", {}, list[_Entry]()
    entry: _Entry | None = None
    depth = 0  # of braces: 0 between functions
    for raw in lines:
        line = raw.partition("//")[0].strip()
        if not line:
            continue
        if len(line) > MAX_LINE:
            raise InvalidCodeObjectError(f"the PTX is damaged: a line has {len(line)} characters")
        if depth == 0:
            if line.startswith(".target"):
                target = readable(line.split(None, 1)[1].split(",")[0].strip()) if " " in line else ""
            elif match := _ENTRY.match(line):
                entry = _Entry(match[1])
                found.append(entry)
            elif line.startswith((".func", ".visible .func", ".weak .func")):
                entry = None
            elif entry is None and (memory := _MEMORY.match(line)):
                module_shared[memory[2]] = int(memory[1]) // 8 * int(memory[3])
            if entry is not None:
                _head(entry, line)
        elif entry is not None:
            _body(entry, line, module_shared)
        depth += line.count("{") - line.count("}")
        if depth < 0:
            raise InvalidCodeObjectError("the PTX is damaged: a brace closes that was not opened")
        if depth == 0 and line.endswith("}"):
            entry = None
    if depth or entry or not target:
        raise InvalidCodeObjectError(
            "the PTX is truncated: " + ("a function has no end" if depth or entry else "no .target")
        )
    return target, [e.info() for e in found]


def _head(entry: _Entry, line: str) -> None:
    """A line between a kernel's name and its body."""
    if ".param" in line:
        for part in line[line.index(".param") :].rstrip("){").split(", .param"):
            entry.param(part if part.startswith(".param") else ".param" + part)
    if match := _THREADS.search(line):
        entry.threads = 1
        for n in match[1].split(","):
            entry.threads *= int(n) if n.strip() else 1


def _body(entry: _Entry, line: str, module_shared: dict[str, int]) -> None:
    """A line of a kernel's body."""
    if line.startswith("."):
        if memory := _MEMORY.match(line):
            entry.lds += int(memory[1]) // 8 * int(memory[3])
        return
    entry.instruction(line)
    if module_shared:
        for word in re.findall(r"[\w$]+", line):
            entry.lds += module_shared.pop(word, 0)


def cubin(elf: Elf) -> tuple[str, list[KernelInfo]]:
    """The target of a cubin, and its kernels."""
    number = (elf.flags >> 8 if elf.abi_version >= EM_CUDA_NEW_ABI else elf.flags) & 0xFF
    per_symbol = _by_symbol(elf)
    kernels = []
    for section in elf.sections:
        name = section.name.removeprefix(".nv.info.")
        text = elf.section(f".text.{name}") if name != section.name else None
        if text is None:
            continue
        of_symbol = per_symbol.get(text.info & 0xFFFFFF, {})
        kernels.append(_cubin_kernel(elf, name, elf.data(section), of_symbol, RESERVED if number >= 90 else 0))
    return f"sm_{number}", kernels


def _cubin_kernel(elf: Elf, name: str, attributes: bytes, of_symbol: dict[int, int], reserved: int) -> KernelInfo:
    info = KernelInfo(name, wave=32, vgprs=of_symbol.get(_REGISTERS), scratch=of_symbol.get(_FRAME, 0))
    shared, args = elf.section(f".nv.shared.{name}"), list[tuple[int, ArgInfo]]()
    for attribute, value in _attributes(attributes):
        if attribute == _PARAM_INFO and len(value) == 12:
            ordinal, offset, flags = struct.unpack_from("<HHI", value, 4)
            size = flags >> 18
            args.append((ordinal, ArgInfo("", offset, size, "" if size == 8 else "value")))
        elif attribute in (_MAX_THREADS, _REQUIRED) and len(value) == 12:
            x, y, z = struct.unpack("<3I", value)
            info = replace(info, max_workgroup=x * y * z)
    ordered = [a for _, a in sorted(args, key=lambda pair: pair[0])]
    return replace(info, args=ordered, lds=max(0, shared.size - reserved) if shared else 0)


def _by_symbol(elf: Elf) -> dict[int, dict[int, int]]:
    """Attributes that `.nv.info` gives for the symbols of kernels, by index."""
    section, found = elf.section(".nv.info"), dict[int, dict[int, int]]()
    for attribute, value in _attributes(elf.data(section)) if section else ():
        if attribute in (_REGISTERS, _FRAME) and len(value) == 8:
            symbol, number = struct.unpack("<II", value)
            found.setdefault(symbol, {})[attribute] = number
    return found


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, value) of a section `.nv.info*`: u8 format, u8 number, u16 value, or size of the value that follows."""
    at = 0
    for _ in range(MAX_ATTRIBUTES):
        if at + 4 > len(data):
            return
        form, attribute, value = struct.unpack_from("<BBH", data, at)
        size = value if form == 4 else 0
        if at + 4 + size > len(data):
            raise InvalidCodeObjectError(f"the cubin is damaged: an attribute at byte {at} claims {size} bytes")
        yield attribute, data[at + 4 : at + 4 + size]
        at += 4 + size
