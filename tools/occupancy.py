"""Waves of the engine's kernels that a SIMD of AMD's GPUs holds, from the objects that are built: docs/occupancy.md.

python tools/occupancy.py            writes it
python tools/occupancy.py --check    exit code 1 where it is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hipquant.codeobjects import ENGINE
from hipquant.toolchain.inspect import inspect
from hipquant.toolchain.occupancy import occupancy, simd_of
from hipquant.wiring import GPU_ENGINE

DOCUMENT = Path(__file__).parent.parent / "docs" / "occupancy.md"
TARGETS = ("gfx900", "gfx908", "gfx90a", "gfx942", "gfx1010", "gfx1030", "gfx1100", "gfx1102", "gfx1201")
HEAD = """# Occupancy of the engine's kernels on AMD

Waves that a SIMD holds at a time, as vector and scalar registers, shared memory and whole blocks allow: counted from
the code objects (`tools/occupancy.py`, by the rules of LLVM 22), not measured. Of several kernels, the least and the
most. The number of columns that a kernel is for stands behind its family.
"""


def waves_of(target: str) -> tuple[dict[str, list[float]], int]:
    """By family and columns; and how many a SIMD holds at most."""
    path = ENGINE.targets()[target]
    (kernels,) = inspect(path.read_bytes(), path.name).targets.values()
    by_name, found, most = {k.name: k for k in kernels}, dict[str, list[float]](), 0
    for row in GPU_ENGINE:
        kernel = by_name[row.name]
        assert kernel.wave is not None
        waves, most = occupancy(target, kernel), simd_of(target, kernel.wave).waves
        assert waves is not None
        found.setdefault(f"{row.family} {row.batch}" if row.batch else row.family, []).append(waves)
    return found, most


def document() -> str:
    columns = {target: waves_of(target) for target in TARGETS}
    lines = [HEAD, "| | " + " | ".join(TARGETS) + " |", "|--" * (len(TARGETS) + 1) + "|"]
    lines.append("| a SIMD holds at most | " + " | ".join(str(most) for _, most in columns.values()) + " |")
    for family in next(iter(columns.values()))[0]:
        cells = [sorted(found[family]) for found, _ in columns.values()]
        shown = (f"{c[0]:g}" if c[0] == c[-1] else f"{c[0]:g} to {c[-1]:g}" for c in cells)
        lines.append(f"| `{family}` | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    written = document()
    if not parser.parse_args().check:
        DOCUMENT.write_text(written)
    elif DOCUMENT.read_text() != written:
        sys.exit(f"{DOCUMENT.name} is not what the code objects say: run python tools/occupancy.py")


if __name__ == "__main__":
    main()
