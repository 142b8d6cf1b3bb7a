"""Models in several files, NAME-00001-of-00003.gguf and so on, as llama.cpp's gguf-split writes them.

Each part is a GGUF file with tensors of its own; the metadata of the model is that of the first one. Keys: `split.no`
(from 0), `split.count` and `split.tensors.count` (of all parts together).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .gguf_file import GGUFFile

_MERGE = "or merge them with llama.cpp: `llama-gguf-split --merge FIRST_PART.gguf MERGED.gguf`"


def open_others(first: GGUFFile, count: int) -> list[GGUFFile]:
    """The parts behind the first; their tensors are added to its own. Raises `InvalidModelFileError`."""
    number = first.get("split.no", int, 0) + 1
    name = re.fullmatch(rf"(.*)-{number:05d}-of-{count:05d}", first.path.stem)
    if number != 1:
        begin = f": {name[1]}-00001-of-{count:05d}.gguf" if name else ""
        first.fail(f"this is part {number} of a model in {count} files; give the first one{begin}")
    if name is None:
        first.fail(
            f"this is the first of {count} parts, and its name does not end in -00001-of-{count:05d}.gguf, by which "
            f"the others are found; give the parts their names again, {_MERGE}"
        )
    others: list[GGUFFile] = []
    try:
        for part in range(1, count):
            path = first.path.with_name(f"{name[1]}-{part + 1:05d}-of-{count:05d}{first.path.suffix}")
            if not path.exists():
                first.fail(f"part {part + 1} of {count} is missing: {path.name}; download it into the same folder")
            others.append(type(first)(path, part=part))
            _add(first, others[-1], part, count)
        total = first.get("split.tensors.count", int, len(first.tensors))
        if total != len(first.tensors):
            first.fail(f"the {count} parts have {len(first.tensors)} tensors, expected {total}; download them again")
    except BaseException:
        for other in others:
            other.close()
        raise
    return others


def _add(first: GGUFFile, other: GGUFFile, part: int, count: int) -> None:
    found = other.get("split.no", int, 0), other.get("split.count", int, 1)
    if found != (part, count):
        other.fail(f"this says that it is part {found[0] + 1} of {found[1]}, expected {part + 1} of {count}")
    for info in other.tensors.values():
        if info.name in first.tensors:
            other.fail(f"tensor {info.name!r} is in an earlier part, too: the parts are not of one model")
        first.tensors[info.name] = replace(info, part=part)
