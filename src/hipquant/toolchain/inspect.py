"""What is in a code object: its kind, and for each target the kernels with arguments, registers, memory and limits.

Every file is taken for hostile: what is not a code object, or a damaged one, ends as `InvalidCodeObjectError`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import msgpack

from ..codeobjects import QUANTIZED
from ..codeobjects.bundle import COMPRESSED_MAGIC, ELF_MAGIC, MAGIC, amd_target, bundles
from ..errors import InvalidCodeObjectError
from ..targets import CPU_TARGETS
from . import disassemble, nvidia
from .elf import Elf, readable
from .kernel_info import ArgInfo, Facts, Inspection, KernelInfo, Problem

__all__ = ["ArgInfo", "Facts", "Inspection", "KernelInfo", "Problem", "inspect", "inspect_file", "inspect_installed"]

AMD, BUNDLE, COMPRESSED, EMBEDDED, PTX, CUBIN, CPU, HOST, INSTALLED = (
    "AMD code object",
    "offload bundle",
    "compressed offload bundle",
    "host object with an embedded bundle",
    "PTX",
    "cubin",
    "CPU code object",
    "host object",
    "installation",
)
PROBE = "hq_probe"  # what every CPU code object of ours exports
FATBIN_SECTION = ".hip_fatbin"
NT_AMDGPU_METADATA = 32
METADATA_TYPES = (NT_AMDGPU_METADATA, "NT_AMDGPU_METADATA")
DISASSEMBLY = 120  # seconds that llvm-objdump may take for one file
MAX_FILE = 2 << 30  # bytes
MAX_METADATA = 64 << 20  # bytes
MAX_KERNELS = 1 << 15  # of one object, and arguments of one kernel
_KINDS = {"global_buffer": "pointer", "by_value": "value"}
_ISA = re.compile(r"amdgcn-amd-amdhsa-(?:unknown)?-(gfx[\w-]+(?::\w+[+-])*)", re.ASCII)
_OTHERS = {
    b"BC\xc0\xde": "LLVM bitcode: link it (without -fgpu-rdc or -emit-llvm)",
    b"\x50\xed\x55\xba": "a CUDA fat binary: take a cubin out of it with `cuobjdump -xelf all`",
    b"!<ar": "a static library: take an object out of it with `ar x`",
    b"GGUF": "a GGUF model, not a code object",
}


def inspect(blob: bytes, name: str = "the file", instructions: bool = False) -> Inspection:
    """What is in a code object of any kind; with `instructions`, also facts by llvm-objdump where there is one.

    Raises `InvalidCodeObjectError`: what was found, and what was expected.
    """
    until = time.monotonic() + DISASSEMBLY if instructions else 0.0
    try:
        if blob.startswith(ELF_MAGIC):
            return _elf(blob, name, until)
        if blob.startswith((MAGIC, COMPRESSED_MAGIC)):
            found = Inspection(name, BUNDLE if blob.startswith(MAGIC) else COMPRESSED)
            return _add_bundles(found, [next(bundles(blob))], until)
        if nvidia.is_ptx(blob):
            target, kernels = nvidia.ptx(blob)
            return Inspection(name, PTX, {target: _with_facts(kernels, target, blob, until)})
        _refuse(blob)
    except InvalidCodeObjectError as error:
        raise InvalidCodeObjectError(f"{name}: {error}") from None


def _refuse(blob: bytes) -> NoReturn:
    if not blob:
        raise InvalidCodeObjectError("the file is empty; expected a code object")
    what = next((words for magic, words in _OTHERS.items() if blob.startswith(magic)), "")
    raise InvalidCodeObjectError(
        what
        or f"not a code object: the bytes begin with {blob[:8]!r}; expected an AMD code object, an offload bundle, "
        "a host object with one inside, PTX, a cubin or a CPU code object"
    )


def _elf(blob: bytes, name: str, until: float) -> Inspection:
    elf = Elf(blob)
    if elf.machine == "AMD GPU":
        found = Inspection(name, AMD)
        _add_amd(found, "", blob, until)
        return found
    if elf.machine == "NVIDIA GPU":
        target, kernels = nvidia.cubin(elf)
        return Inspection(name, CUBIN, {target: kernels})
    if elf.machine not in ("x86_64", "aarch64"):
        raise InvalidCodeObjectError(f"an ELF file for machine {elf.machine}, neither a GPU's nor x86-64 or aarch64")
    symbols = [s.name for s in elf.symbols(dynamic=elf.type != "ET_REL") if s.is_function]
    if PROBE in symbols:
        stem = Path(name).stem.removeprefix("cpu-")
        target = stem if stem in {t.name for t in CPU_TARGETS} else elf.machine
        return Inspection(name, CPU, {target: [KernelInfo(s) for s in sorted(symbols) if s != PROBE]})
    section = elf.section(FATBIN_SECTION)
    if section is not None and (data := elf.data(section)).strip(b"\0"):
        return _add_bundles(Inspection(name, EMBEDDED), bundles(data), until)
    return Inspection(name, HOST, {elf.machine: [KernelInfo(s) for s in sorted(symbols)]})


def _add_bundles(found: Inspection, some: Iterable[Mapping[str, bytes]], until: float) -> Inspection:
    for bundle in some:
        for target, image in bundle.items():
            try:
                _add_amd(found, target, image, until)
            except InvalidCodeObjectError as error:
                raise InvalidCodeObjectError(f"the entry for {target}: {error}") from None
    if not found.targets:
        raise InvalidCodeObjectError("the offload bundle holds no machine code for a GPU")
    return found


def _add_amd(found: Inspection, entry: str, image: bytes, until: float) -> None:
    """Adds the kernels of an AMD ELF, the entry of a bundle for a target or (`entry` empty) a file of its own."""
    if image.startswith(b"BC\xc0\xde"):
        found.targets.setdefault(entry, [])
        found.problems.append(Problem(entry, "LLVM bitcode instead of machine code", "link it, without -fgpu-rdc"))
        return
    elf = Elf(image)
    if elf.machine != "AMD GPU":
        raise InvalidCodeObjectError(f"an ELF file for {elf.machine}, expected AMD GPU")
    metadata, header = _metadata(elf), amd_target(image)
    isa = _ISA.fullmatch(str(metadata.get("amdhsa.target", "")))
    told = isa[1] if isa else header or f"an unknown AMD GPU (0x{elf.flags & 0xFF:x})"
    target = entry or told
    names = {
        n.partition(":")[0]: where for n, where in ((told, "metadata"), (header, "ELF header"), (entry, "entry")) if n
    }
    if len(names) > 1:
        listed = ", ".join(f"{where}: {n}" for n, where in names.items())
        fix = "build it again: a loader picks an image by the name of its entry, and compares it with the header"
        found.problems.append(Problem(target, f"the image does not agree with itself on its target ({listed})", fix))
    if elf.type != "ET_DYN":
        fix = "link it: ld.lld -shared"
        found.problems.append(Problem(target, "an object that is not linked, which no driver loads", fix))
    symbols = {s.name for s in elf.symbols(dynamic=elf.type == "ET_DYN")}
    rows = _list(metadata, "amdhsa.kernels")
    kernels = [_kernel(row, symbols) for row in rows]
    found.targets.setdefault(target, []).extend(_with_facts(kernels, target, image, until))


def _metadata(elf: Elf) -> dict[str, Any]:
    """The metadata of code object version 3 and later: a map in msgpack."""
    notes = list(elf.notes())
    for note in notes:
        if note.owner == "AMDGPU" and note.type in METADATA_TYPES:
            try:
                value = msgpack.unpackb(note.content[:MAX_METADATA], max_array_len=MAX_KERNELS, max_map_len=MAX_KERNELS)
            except Exception as error:  # msgpack has no base class for what hostile bytes make of it
                raise InvalidCodeObjectError(f"its metadata are damaged: {type(error).__name__} {error}") from None
            if isinstance(value, dict):
                return value
            raise InvalidCodeObjectError(f"its metadata are damaged: {type(value).__name__}, expected a map")
    if any(note.owner == "AMD" for note in notes):
        raise InvalidCodeObjectError("code object version 2; only 3 and later can be read: -mcode-object-version=5")
    raise InvalidCodeObjectError("machine code without metadata: expected a note AMDGPU that lists its kernels")


def _kernel(row: Any, symbols: set[str]) -> KernelInfo:
    if not isinstance(row, dict):
        raise InvalidCodeObjectError(f"its metadata are damaged: a kernel is {type(row).__name__}, expected a map")
    args = []
    for arg in _list(row, ".args"):
        if not isinstance(arg, dict):
            raise InvalidCodeObjectError(f"its metadata are damaged: an argument is {type(arg).__name__}")
        kind = _text(arg, ".value_kind")
        if kind.startswith("hidden_"):  # what the compiler adds for itself
            continue
        name = _text(arg, ".name").removesuffix(".coerce")  # clang's word for an address that it made global
        args.append(ArgInfo(name, _int(arg, ".offset"), _int(arg, ".size"), _KINDS.get(kind, kind)))
    name = _text(row, ".name")
    if not name:
        raise InvalidCodeObjectError("its metadata are damaged: a kernel has no name")
    return KernelInfo(
        name=name,
        args=args,
        vgprs=_int(row, ".vgpr_count"),
        sgprs=_int(row, ".sgpr_count"),
        agprs=_int(row, ".agpr_count") if ".agpr_count" in row else None,
        lds=_int(row, ".group_segment_fixed_size"),
        scratch=_int(row, ".private_segment_fixed_size"),
        vgpr_spills=_int(row, ".vgpr_spill_count") if ".vgpr_spill_count" in row else None,
        sgpr_spills=_int(row, ".sgpr_spill_count") if ".sgpr_spill_count" in row else None,
        wave=_int(row, ".wavefront_size"),
        max_workgroup=_int(row, ".max_flat_workgroup_size"),
        loadable=_text(row, ".symbol") in symbols,
    )


def _list(row: Mapping[str, Any], key: str) -> list[Any]:
    value = row.get(key, [])
    if not isinstance(value, list):
        raise InvalidCodeObjectError(f"its metadata are damaged: {key} is {type(value).__name__}, expected a list")
    return value


def _int(row: Mapping[str, Any], key: str) -> int:
    value = row.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InvalidCodeObjectError(f"its metadata are damaged: {key} is {str(value)[:40]!r}, expected a number")
    return value


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key, "")
    if not isinstance(value, str) or len(value) > MAX_KERNELS:
        raise InvalidCodeObjectError(f"its metadata are damaged: {key} is {str(value)[:40]!r}, expected text")
    return readable(value)


def inspect_file(path: str | Path, instructions: bool = False) -> Inspection:
    """`inspect` of a file; an image that this installation embeds is recognized by its hash."""
    return inspect(read_code_object(path), str(path), instructions)


def read_code_object(path: str | Path) -> bytes:
    """The bytes of a regular file of at most `MAX_FILE` bytes."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE:
        raise InvalidCodeObjectError(f"{path} is not a file of at most {MAX_FILE >> 20} MiB; expected a code object")
    return Path(path).read_bytes()


def inspect_installed() -> Inspection:
    """What this installation embeds: of a GPU's target the frameworks' kernels, and behind them the engine's."""
    found = Inspection("the installation", INSTALLED)
    paths = (p for p in QUANTIZED.folder.iterdir() if _is_code_object(p))
    for path in sorted(paths, key=lambda p: (p.stem.endswith(".engine"), p.name)):
        of_file = inspect(path.read_bytes(), path.name, instructions=True)
        found.problems += of_file.problems
        for target, kernels in of_file.targets.items():
            found.targets.setdefault(target, []).extend(kernels)
    return found


def _is_code_object(path: Path) -> bool:
    return path.suffix in (".hsaco", ".ptx", ".cubin") or (path.suffix == ".so" and path.stem.startswith("cpu-"))


def _with_facts(kernels: list[KernelInfo], target: str, image: bytes, until: float) -> list[KernelInfo]:
    """Adds instruction facts: those of the assembly where this installation built the image, else by llvm-objdump.

    Nothing is added after a time (`time.monotonic`), 0 for not at all.
    """
    if not until:
        return kernels
    path = QUANTIZED.path("facts.json")
    counts: Mapping[str, Facts] | None
    table = _built_facts(path, path.stat().st_mtime_ns) if path else {}
    name, sha256 = target.partition(":")[0], hashlib.sha256(image).hexdigest()
    built = next((b for stem in (name, f"{name}.engine") if (b := table.get(stem, {})).get("sha256") == sha256), None)
    if built is not None:
        counts = {kernel: Facts.from_json(row) for kernel, row in built["kernels"].items()}
    else:
        counts = disassemble.facts(image, until - time.monotonic())
    return kernels if counts is None else [replace(k, facts=counts.get(k.name, k.facts)) for k in kernels]


@lru_cache(maxsize=1)
def _built_facts(path: Path, changed: int) -> dict[str, dict[str, Any]]:
    """facts.json as it was when it changed last."""
    table: dict[str, dict[str, Any]] = json.loads(path.read_text())
    return table
