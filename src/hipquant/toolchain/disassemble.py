"""Instruction facts of AMD machine code by `llvm-objdump`, where the machine has one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from ..codeobjects.bundle import amd_target
from .facts import amd_instruction
from .kernel_info import Facts

MAX_ELF = 32 << 20  # bytes
_SYMBOL = re.compile(r"[0-9a-f]{8,16} <(.+)>:$")
_PADDING = ("s_code_end", "s_nop")


@cache
def objdump() -> str | None:
    """The newest llvm-objdump on the PATH or in ROCm's folder, or None."""
    folders = [*os.environ.get("PATH", "").split(os.pathsep), "/opt/rocm/llvm/bin"]
    found = {
        int(name.partition("-objdump-")[2] or 0): str(Path(folder, name))
        for folder in reversed(folders)
        if folder and os.path.isdir(folder)
        for name in os.listdir(folder)
        if re.fullmatch(r"llvm-objdump(-\d{1,3})?", name) and shutil.which(name, path=folder)
    }
    return found[max(found)] if found else None


def facts(elf: bytes, seconds: float) -> dict[str, Facts] | None:
    """The facts of each function of an AMD ELF; None where no tool on this machine tells within some seconds."""
    tool, target = objdump(), amd_target(elf)
    if tool is None or not target or len(elf) > MAX_ELF or seconds <= 0:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "code_object")
        path.write_bytes(elf)
        arguments = [tool, "-d", "--no-show-raw-insn", f"--mcpu={target}", str(path)]
        try:
            done = subprocess.run(arguments, capture_output=True, timeout=seconds, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
    return count(done.stdout.decode(errors="replace")) if done.returncode == 0 else None


def count(listing: str) -> dict[str, Facts]:
    """The facts of each function in a listing of llvm-objdump."""
    found: dict[str, dict[str, int]] = {}
    row: dict[str, int] = {}
    for line in listing.splitlines():
        if match := _SYMBOL.match(line):
            row = found[match[1]] = dict.fromkeys(Facts.__dataclass_fields__, 0)
        word = line.split(None, 1)[0] if line[:1] == "\t" and line.strip() else ""
        if not word or not row or word.startswith(_PADDING):
            continue
        kind, nbytes = amd_instruction(word)
        row["instructions"] += 1
        row["dot4"] += kind == "dot4"
        row["matrix"] += kind == "matrix"
        row["loads"] += kind == "load"
        row["widest_load"] = max(row["widest_load"], nbytes)
    return {name: Facts(**row) for name, row in found.items()}
