"""Instruction facts out of the assembly of a build: what the instructions of each kernel are.

Of a kernel: `instructions`, `dot4` (int8 dot products), `matrix` (matrix instructions), `loads` (vector loads from
global memory), `widest_load` (bytes of one load and lane); and `loop`, the same for its innermost loop with the most
dot products, with `loads` as {bytes: how many} and `lds` (reads of shared memory); None where no loop has any.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .compile import Facts

_AMD_LOAD = re.compile(r"(?:global|flat|buffer)_load_(?:lds_)?(\w+)")
_AMD_BYTES = (  # the first that the suffix has in it
    ("x4", 16), ("b128", 16), ("x3", 12), ("b96", 12), ("x2", 8), ("b64", 8), ("byte", 1), ("u8", 1), ("i8", 1),
    ("b8", 1), ("short", 2), ("u16", 2), ("i16", 2), ("b16", 2), ("dword", 4), ("b32", 4),
)  # fmt: skip
_AMD_BRANCH = re.compile(r"s_c?branch\w*\s+(\.LBB\w+)")
_PTX_LOAD = re.compile(r"ld\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[busf](\d+)")
_PTX_BRANCH = re.compile(r"bra(?:\.uni)?\s+(\$L\w+)")


def amd_facts(assembly: str) -> Facts:
    """Facts of every kernel of an AMD assembly listing."""
    kernels = set(re.findall(r"^\s*\.amdhsa_kernel\s+(\S+)", assembly, re.MULTILINE))
    functions = ((name, body) for name, body in _amd_functions(assembly) if name in kernels)
    return {name: _facts(body, _amd_branch, amd_instruction) for name, body in functions}


def ptx_facts(assembly: str) -> Facts:
    """Facts of every kernel of a PTX module."""
    return {name: _facts(body, _ptx_branch, _ptx) for name, body in _ptx_functions(assembly)}


def _amd_functions(assembly: str) -> Iterator[tuple[str, list[str]]]:
    name, body = "", list[str]()
    for line in assembly.splitlines():
        line = line.partition(";")[0].strip()
        label = re.match(r"([A-Za-z_][\w.$]*):$", line)
        if label:
            name, body = label[1], []
        elif line.startswith(".Lfunc_end") and name:
            yield name, body
            name = ""
        elif name and line:
            body.append(line)


def _ptx_functions(assembly: str) -> Iterator[tuple[str, list[str]]]:
    for match in re.finditer(r"^\.visible \.entry (\w+)\(.*?^\{\n(.*?)^\}", assembly, re.MULTILINE | re.DOTALL):
        lines = (line.partition("//")[0].strip() for line in match[2].splitlines())
        statements = (statement for line in lines for statement in _ptx_statements(line))
        yield match[1], [re.sub(r"^@!?%?\w+\s+", "", statement) for statement in statements if statement]


def _ptx_statements(line: str) -> list[str]:
    """What a line says: inline assembly may have several statements in braces on one, as that of wgmma does."""
    if braced := re.fullmatch(r"\{\s*(.*;)\s*\}", line):
        return [f"{statement.strip()};" for statement in braced[1].split(";")[:-1]]
    return [line]


def _amd_branch(line: str) -> str | None:
    match = _AMD_BRANCH.match(line)
    return match[1] if match else None


def _ptx_branch(line: str) -> str | None:
    match = _PTX_BRANCH.match(line)
    return match[1] if match else None


def amd_instruction(line: str) -> tuple[str, int]:
    """What an instruction is, and the bytes that it loads: (dot4 | matrix | load | lds | other | "", bytes)."""
    if line.startswith(".") or line.endswith(":"):
        return "", 0
    if load := _AMD_LOAD.match(line):
        return "load", next((size for word, size in _AMD_BYTES if word in load[1]), 4)
    if re.match(r"v_(dual_)?dot4", line):
        return "dot4", 0
    if re.match(r"v_(wmma|swmmac|mfma|smfmac)", line):
        return "matrix", 0
    return ("lds" if re.match(r"ds_(read|load)", line) else "other"), 0


def _ptx(line: str) -> tuple[str, int]:
    if not line.endswith(";") or line.startswith((".", "//")):
        return "", 0
    if load := _PTX_LOAD.match(line):
        return "load", int(load[1] or 1) * int(load[2]) // 8
    if line.startswith("dp4a"):
        return "dot4", 0
    if line.startswith(("mma.", "wmma.mma", "wgmma.mma_async")):
        return "matrix", 0
    return ("lds" if line.startswith(("ld.shared", "ldmatrix")) else "other"), 0


def _facts(
    body: list[str], branch: Callable[[str], str | None], classify: Callable[[str], tuple[str, int]]
) -> dict[str, Any]:
    whole = _count(map(classify, body))
    loops = [_count(map(classify, loop)) for loop in _loops(body, branch)]
    hot = max(loops, key=_heat, default=None)
    sizes = whole.pop("loads")
    del whole["lds"]
    return {
        **whole,
        "loads": sum(sizes.values()),
        "widest_load": max(map(int, sizes), default=0),
        "loop": hot if hot and hot["dot4"] + hot["matrix"] else None,
    }


def _heat(loop: dict[str, Any]) -> tuple[int, int, int]:
    """A loop may be there twice, the second time with narrow loads for the edges of a matrix."""
    return loop["dot4"] + loop["matrix"], max(map(int, loop["loads"]), default=0), -loop["instructions"]


def _loops(body: list[str], branch: Callable[[str], str | None]) -> Iterator[list[str]]:
    """What lies between a label and a branch back to it."""
    at = {line[:-1]: i for i, line in enumerate(body) if line.endswith(":")}
    for i, line in enumerate(body):
        label = branch(line)
        if label is not None and at.get(label, i) < i:
            yield body[at[label] : i + 1]


def _count(kinds: Iterable[tuple[str, int]]) -> dict[str, Any]:
    counts = Counter(kind for kind in kinds if kind[0])
    by_kind = Counter[str]()
    for (kind, _), n in counts.items():
        by_kind[kind] += n
    return {
        "instructions": counts.total(),
        "dot4": by_kind["dot4"],
        "matrix": by_kind["matrix"],
        "lds": by_kind["lds"],
        "loads": {str(size): n for (kind, size), n in sorted(counts.items()) if kind == "load"},
    }
