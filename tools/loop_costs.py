"""Counts the machine code of the mat-vecs' inner loops, and writes docs/loop_costs.md.

python tools/loop_costs.py            the document; builds what is not up to date
python tools/loop_costs.py --check    exit code 1 where it is not what would be written
"""

from __future__ import annotations

import argparse
import gzip
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import machine_code
from hipquant.quants import WEIGHT_TYPES
from hipquant.targets import AMD_TARGETS, GpuTarget, gpu_target
from hipquant.toolchain.build import plan
from hipquant.toolchain.compile import OUTPUT, PARTS, build_objects
from hipquant.wiring import MAX_BATCH, Kernel, find
from machine_code import Loop

DOCUMENT = Path(__file__).parent.parent / "docs" / "loop_costs.md"
TYPES = [t.suffix for t in WEIGHT_TYPES]
# llama.cpp's mat-vec at batch 1, compiled by clang 22 for each target (2026-11-22): instructions and vector loads of
# the innermost loop per 32 weights, in the order of TYPES.
LLAMA_CPP = {
    "gfx1030": ((50, 52, 134, 136, 68, 142, 188, 134, 158, 144), (10, 10, 12, 10, 16, 28, 38, 24, 28, 36)),
    "gfx1100": ((48, 50, 132, 134, 64, 126, 178, 126, 150, 136), (10, 10, 12, 10, 16, 28, 38, 24, 28, 36)),
    "gfx1201": ((50, 52, 134, 136, 64, 128, 178, 132, 156, 136), (10, 10, 12, 10, 16, 28, 38, 24, 28, 36)),
    "gfx90a": ((52, 54, 136, 138, 68, 144, 224, 138, 162, 144), (10, 10, 12, 10, 16, 28, 38, 24, 28, 36)),
}
MOST_INSTRUCTIONS, MOST_LOADS = 0.7, 0.6  # of llama.cpp's, in the mean over the types
WIDE, LEAST_WIDE = 8, 0.75  # bytes of a load; share of the weights' bytes

_ONES = re.compile(r"\b0x0?1010101\b")
_DOT, _VALU = r"v_dot4|v_dot8|v_dual_dot", r"v_(?!dot|wmma|swmmac|mfma|smfmac|dual_dot)"
_LOAD, _SHARED_READ = r"global_load|buffer_load|flat_load", r"ds_(read|load)"


@dataclass(frozen=True)
class Cost:
    """Per 32 weights and lane: VALU and dot instructions, loads (of shared memory too); `plain`: instructions if every
    dot product counted for four weights."""

    instructions: float
    loads: float
    plain: float


def listing(target: GpuTarget, source: str) -> dict[str, tuple[str, ...]]:
    """The functions of a source's assembly, of which the target's embedded object is made."""
    return dict(machine_code.functions(_text(gpu_target(target.twin) if target.twin else target, source)))


@cache
def _text(target: GpuTarget, source: str) -> str:
    (whole,) = plan([target])
    build_objects([whole], OUTPUT)
    (part,) = (p for p in whole.parts if p.name.endswith(f".{source}.s.gz"))
    return gzip.decompress((OUTPUT / PARTS / part.name).read_bytes()).decode()


def hot_loops(body: tuple[str, ...]) -> list[Loop]:
    """The loops that run once per weight: all that load from global memory or multiply."""
    return [loop for loop in machine_code.loops(body) if loop.loads or loop.count(_DOT)]


def cost(body: tuple[str, ...]) -> Cost:
    """What the hot loop of a mat-vec costs. Raises `ValueError` where there is not exactly one."""
    loops = hot_loops(body)
    if len(loops) != 1:
        raise ValueError(f"{len(loops)} loops run once per weight; expected one")
    (loop,) = loops
    dots = [i for i in loop.instructions if re.match(_DOT, i.op)]
    ones = _ones(body)
    of_weights = [i for i in dots if not _ONES.search(i.text) and not i.reads & ones]
    instructions, loads = loop.count(_VALU) + len(dots), loop.count(_LOAD) + loop.count(_SHARED_READ)
    return Cost(
        *(32 * n / (4 * len(of)) for n, of in ((instructions, of_weights), (loads, of_weights), (instructions, dots)))
    )


def _ones(body: tuple[str, ...]) -> int:
    """The registers that hold four ones: a product with them is a sum of activations, not of weights."""
    moves = (i for line in body if _ONES.search(line) for i in machine_code.parse(line) if "_mov_" in i.op)
    found = 0
    for move in moves:
        found |= move.writes
    return found


def wide_share(body: tuple[str, ...]) -> float:
    """Of the bytes of weights that a lane loads in the hot loop, the share that comes by loads of `WIDE` bytes."""
    sizes = [size for loop in hot_loops(body) for argument, size in loop.loads if argument == 0]
    return sum(s for s in sizes if s >= WIDE) / sum(sizes)


def costs(target: str) -> dict[str, Cost]:
    """Each type's mat-vec at batch 1."""
    bodies = listing(gpu_target(target), "mat_vec")
    return {t.suffix: cost(bodies[find("mul_mat_vec", t, batch=1).name]) for t in WEIGHT_TYPES}


def shares(target: GpuTarget) -> dict[str, float]:
    """By type, the least share of all its mat-vecs: by q8_1 at each batch, and by floats."""
    bodies = listing(target, "mat_vec") | listing(target, "dequantize_mat_vec")
    return {t.suffix: min(wide_share(bodies[k.name]) for k in mat_vecs(t.suffix)) for t in WEIGHT_TYPES}


def mat_vecs(suffix: str) -> Iterator[Kernel]:
    """The mat-vecs of a type."""
    (kind,) = (t for t in WEIGHT_TYPES if t.suffix == suffix)
    yield from (find("mul_mat_vec", kind, batch=b) for b in range(1, MAX_BATCH + 1))
    yield find("dequantize_mul_mat_vec", kind)


def ratios(target: str) -> tuple[list[float], list[float]]:
    """Instructions and loads as parts of llama.cpp's, by type."""
    ours, (instructions, loads) = list(costs(target).values()), LLAMA_CPP[target]
    return (
        [c.instructions / n for c, n in zip(ours, instructions, strict=True)],
        [c.loads / n for c, n in zip(ours, loads, strict=True)],
    )


def document() -> str:
    """docs/loop_costs.md."""
    return "\n".join([_HEAD, *_cost_tables(), _SHARES_HEAD, *_share_table(), ""])


_HEAD = f"""\
# What the inner loops cost on AMD

Generated by `python tools/loop_costs.py` from the assembly that the embedded code objects are made of; a test holds it
against them. It counts machine code: no AMD card has run it, and no time is claimed.

## Instructions and loads per 32 weights
`mul_mat_vec_*_q8_1_hip1`, beside llama.cpp's mat-vec at batch 1 (compiled by the same clang 22). For one lane and 32
weights: VALU and dot-product instructions, and in brackets vector loads, reads of shared memory among them. Counted is
every instruction of the loops that load from global memory or multiply, on both sides of a branch; such a loop is a
natural loop of the control flow, and each kernel has exactly one.

A turn of the loop takes two rows, so that the activations are loaded once for both. Its weights are four to a dot
product, but for the products with four ones that q2_K sums activations by: these count as instructions, not as weights.
llama.cpp's figures count every dot product for four weights; the row "plain" is ours counted like that, where it
differs.

Bounds: none above llama.cpp's, and in the mean over the types at most {MOST_INSTRUCTIONS} of its instructions and \
{MOST_LOADS} of its loads.
"""
_SHARES_HEAD = f"""\
## Loads of {WIDE} bytes and more
Of the bytes of weights that a lane loads in the inner loop, the share that comes by loads of at least {WIDE} bytes: the
least of `mul_mat_vec_*_q8_1_hip1` to `hip{MAX_BATCH}` and of `dequantize_mul_mat_vec_*`. Which loads are of weights
follows from the data flow: their address is computed from the kernel's first argument. Bound: {LEAST_WIDE:.0%}.
"""


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cost_tables() -> Iterator[str]:
    for target, (instructions, loads) in LLAMA_CPP.items():
        ours = costs(target)
        by_instructions, by_loads = ratios(target)
        yield _row(target, *TYPES, "mean of ratios")
        yield "|--" * (len(TYPES) + 2) + "|"
        yield _row("hipquant", *(f"{_short(c.instructions)} ({_short(c.loads)})" for c in ours.values()), "")
        yield _row("llama.cpp", *(f"{i} ({n})" for i, n in zip(instructions, loads, strict=True)), "")
        for name, found in (("instructions", by_instructions), ("loads", by_loads)):
            yield _row(f"ratio of {name}", *(f"{r:.2f}" for r in found), f"**{statistics.mean(found):.2f}**")
        plain = ["" if c.plain == c.instructions else _short(c.plain) for c in ours.values()]
        if any(plain):
            yield _row("plain", *plain, "")
        yield ""


def _short(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0")


def _share_table() -> Iterator[str]:
    """Targets with the same figures share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for target in AMD_TARGETS:
        rows.setdefault(tuple(f"{share:.0%}" for share in shares(target).values()), []).append(target.name)
    yield _row("target", *TYPES)
    yield "|--" * (len(TYPES) + 1) + "|"
    for figures, names in rows.items():
        yield _row("all" if len(rows) == 1 else " ".join(names), *figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    check, text = parser.parse_args().check, document()
    if check and DOCUMENT.read_text() != text:
        print(f"{DOCUMENT.name} is out of date: python tools/loop_costs.py", file=sys.stderr)
        return 1
    if not check:
        DOCUMENT.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
