"""Loops of AMD assembly listings, and which of a kernel's pointers each load goes through.

Control flow: basic blocks, dominators, natural loops. Data flow: a register is *from* an argument where it is computed
from the pointer that the kernel was passed there; sets of registers are bits of an integer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

_FIRST = {"v": 0, "a": 256, "s": 512}  # bit of register 0
_REGISTER = re.compile(r"\b([vas])(?:(\d+)\b|\[(\d+):(\d+)\])|\bvcc\w*|\bexec\w*|\bm0\b")
_SPECIAL = {"vcc": 3 << 700, "vcc_lo": 1 << 700, "vcc_hi": 2 << 700, "exec": 3 << 702, "exec_lo": 1 << 702}
_SPECIAL |= {"exec_hi": 2 << 702, "m0": 1 << 704}
_NO_RESULT = re.compile(
    r"s_(cmp|bitcmp|c?branch|waitcnt|wait_|barrier|nop|delay|clause|endpgm|code_end|sleep|set_|setprio|inst_prefetch)"
    r"|v_cmpx|v_nop|global_store|flat_store|buffer_store|scratch_store|ds_(write|store)|;|\."
)
_TWO_RESULTS = re.compile(r"v_(add|sub|subrev)(_co|c_co|b_co|brev_co)\w*|v_mad_[ui]64|v_div_scale")
_LOAD = re.compile(r"(?:global|flat|buffer)_load_(?:lds_)?(\w+)")
_BYTES = (  # the first that the name has in it
    ("x4", 16), ("b128", 16), ("x3", 12), ("b96", 12), ("x2", 8), ("b64", 8), ("byte", 1), ("u8", 1), ("i8", 1),
    ("b8", 1), ("short", 2), ("u16", 2), ("i16", 2), ("b16", 2), ("dword", 4), ("b32", 4),
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction, or one half of a pair: what it writes and reads as sets of registers."""

    text: str
    op: str
    writes: int
    reads: int
    load: int = 0  # bytes that a lane loads from global memory


@dataclass
class Loop:
    """A natural loop: its instructions, each once, and the bytes of its loads by argument: 0, 1, ..."""

    instructions: list[Instruction] = field(default_factory=list)
    loads: list[tuple[int, int]] = field(default_factory=list)  # (argument, bytes)

    def count(self, pattern: str) -> int:
        """How many instructions have a name that begins like this."""
        return sum(bool(re.match(pattern, i.op)) for i in self.instructions)


def functions(listing: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each function's name and lines, without comments."""
    name, body = "", list[str]()
    for line in listing.splitlines():
        text = line.partition(";")[0].strip()
        if label := re.match(r"([A-Za-z_][\w.$]*):$", text):
            name, body = label[1], []
        elif text.startswith(".Lfunc_end") and name:
            yield name, tuple(body)
            name = ""
        elif name and text and not re.match(r"\.(?!L)", text):
            body.append(text)


@lru_cache(maxsize=1 << 16)
def _registers(text: str) -> int:
    found = 0
    for kind, single, first, last in _REGISTER.findall(text):
        if kind:
            low, high = (int(single), int(single)) if single else (int(first), int(last))
            found |= (1 << high - low + 1) - 1 << _FIRST[kind] + low
    for name in re.findall(r"\b(?:vcc|exec)(?:_lo|_hi)?\b|\bm0\b", text):
        found |= _SPECIAL[name]
    return found


@lru_cache(maxsize=1 << 16)
def parse(text: str) -> tuple[Instruction, ...]:
    """An instruction; the two of a dual issue."""
    return tuple(_half(half.strip()) for half in text.split("::"))


def _half(text: str) -> Instruction:
    op, _, rest = text.partition(" ") if " " in text else text.partition("\t")
    operands = rest.split(",")
    results = 0 if _NO_RESULT.match(op) else 2 if _TWO_RESULTS.match(op) else 1
    load = _LOAD.match(op)
    size = next((n for word, n in _BYTES if word in load[1]), 4) if load else 0
    writes, reads = _registers(",".join(operands[:results])), _registers(",".join(operands[results:]))
    return Instruction(text, op, writes, reads, size)


@dataclass
class _Block:
    lines: list[str] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


def _blocks(body: Sequence[str]) -> list[_Block]:
    """Basic blocks, with the numbers of those that may come next."""
    blocks, names = [_Block()], dict[str, int]()
    for line in body:
        if line.endswith(":"):
            if blocks[-1].lines:
                blocks.append(_Block())
            names[line[:-1]] = len(blocks) - 1
            continue
        blocks[-1].lines.append(line)
        if line.startswith(("s_branch", "s_cbranch", "s_endpgm")):
            blocks.append(_Block())
    for i, block in enumerate(blocks):
        last = block.lines[-1].split() if block.lines else [""]
        if last[0].startswith(("s_branch", "s_cbranch")) and last[-1] in names:
            block.after.append(names[last[-1]])
        if not last[0].startswith(("s_branch", "s_endpgm")) and i + 1 < len(blocks):
            block.after.append(i + 1)
    return blocks


def _natural_loops(blocks: Sequence[_Block]) -> list[set[int]]:
    """The blocks of each loop; loops that begin at the same block are one."""
    before: list[list[int]] = [[] for _ in blocks]
    for i, block in enumerate(blocks):
        for j in block.after:
            before[j].append(i)
    every = (1 << len(blocks)) - 1
    dominators, changed = [1] + [every] * (len(blocks) - 1), True
    while changed:
        changed = False
        for i in range(1, len(blocks)):
            common = every
            for j in before[i]:
                common &= dominators[j]
            if (found := common | 1 << i) != dominators[i]:
                dominators[i], changed = found, True
    loops: dict[int, set[int]] = {}
    for i, block in enumerate(blocks):
        for head in block.after:
            if dominators[i] >> head & 1 and dominators[i] != every:
                members, todo = loops.setdefault(head, {head}), [i]
                while todo:
                    j = todo.pop()
                    if j not in members:
                        members.add(j)
                        todo += before[j]
    return list(loops.values())


@lru_cache(maxsize=4096)
def loops(body: tuple[str, ...], pointers: int = 2) -> tuple[Loop, ...]:
    """The loops of a kernel whose first arguments are pointers; loads of each by the pointer that they go through.

    Raises `ValueError` for a load that goes through none of them, or several. `pointers` 0: `Loop.loads` stays empty.
    """
    blocks = _blocks(body)
    parsed = [[i for line in b.lines for i in parse(line)] for b in blocks]
    begin = _origins(blocks, parsed, pointers)
    found = []
    for members in _natural_loops(blocks):
        loop = Loop()
        for b in sorted(members):
            state = list(begin[b])
            loop.instructions += [i for line in blocks[b].lines for i in parse(line)[:1]]
            for instruction in parsed[b]:
                if instruction.load and pointers:
                    through = [n for n in range(pointers) if state[n] & instruction.reads]
                    if len(through) != 1:
                        raise ValueError(f"which pointer does {instruction.text!r} go through? {through}")
                    loop.loads.append((through[0], instruction.load))
                _step(instruction, state)
        found.append(loop)
    return tuple(found)


def _origins(blocks: Sequence[_Block], parsed: Sequence[Sequence[Instruction]], pointers: int) -> list[list[int]]:
    """For each block and argument, the registers that are from it when the block begins."""
    begin = [[0] * pointers for _ in blocks]
    todo = list(range(len(blocks)))
    while todo:
        b = todo.pop(0)
        state = list(begin[b])
        for instruction in parsed[b]:
            _step(instruction, state)
        for next_one in blocks[b].after:
            merged = [old | new for old, new in zip(begin[next_one], state, strict=True)]
            if merged != begin[next_one]:
                begin[next_one] = merged
                if next_one not in todo:
                    todo.append(next_one)
    return begin


def _step(instruction: Instruction, state: list[int]) -> None:
    """What is from which argument after an instruction."""
    writes, op = instruction.writes, instruction.op
    if op.startswith("s_load") and not any(s & instruction.reads for s in state):  # arguments of the kernel
        first = int(instruction.text.split(",")[-1].split()[-1], 0)
        start = (writes & -writes).bit_length() - 1
        for n in range(len(state)):
            state[n] &= ~writes
            for at in range(first, first + 4 * writes.bit_count(), 4):
                if at // 8 == n:
                    state[n] |= 1 << start + (at - first) // 4
        return
    loaded = bool(instruction.load) or op.startswith(("s_load", "ds_"))
    for n, of in enumerate(state):
        state[n] = of & ~writes | (writes if not loaded and of & instruction.reads else 0)
