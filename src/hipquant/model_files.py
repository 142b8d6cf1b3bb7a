"""Which files of a folder or a repository are a model, what their names say of them, and which one to take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from .errors import ModelNotFoundError, OutOfDeviceMemoryError, UnsupportedQuantTypeError
from .quants import MATRIX_TYPES

_PART = re.compile(r"-(\d{5})-of-(\d{5})$")
# The quant at the end of a name: "Q4_K_M", "IQ2_XXS", "UD-Q2_K_XL", "f16", or only "q4".
_QUANT = re.compile(r"[-._]((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|NVFP4\w*|BF16|FP?16|FP?32))$", re.IGNORECASE)
_NO_MODEL = re.compile(r"mmproj|imatrix|ggml-vocab", re.IGNORECASE)  # projectors of images, statistics, vocabularies
_FLOATS = ("F32", "FP32", "F16", "FP16", "BF16")
_OVERHEAD = 0.05, 1 << 29  # beside the weights: padding, a small context, buffers


@dataclass(frozen=True)
class ModelFile:
    """A model: the path of its file, or of its parts in their order, and the bytes of all of them."""

    paths: tuple[str, ...]
    nbytes: int

    @property
    def stem(self) -> str:
        """The name without number and suffix."""
        return _PART.sub("", PurePosixPath(self.paths[0]).stem)

    @property
    def quant(self) -> str:
        """What the name says of the quant type, in capitals; "" where it says nothing."""
        found = _QUANT.search(self.stem)
        return found[1].upper() if found else ""

    @property
    def family(self) -> str:
        """The name without the quant."""
        return _QUANT.sub("", self.stem).lower()

    @property
    def runs(self) -> bool:
        """Whether hipquant runs the type that the name tells; names such as "q4" tell none."""
        base = re.sub(r"_(S|M|L|XL)$", "", re.sub("^FP", "F", self.quant).removeprefix("UD-"))
        return base in (t.name for t in MATRIX_TYPES) or re.fullmatch(r"Q\d|", base) is not None

    @property
    def memory(self) -> int:
        """About what it takes on a device."""
        return int(self.nbytes * (1 + _OVERHEAD[0])) + _OVERHEAD[1]

    def __str__(self) -> str:
        parts = f" in {len(self.paths)} parts" if len(self.paths) > 1 else ""
        return f"{self.paths[0]} ({gib(self.nbytes)}{parts})"


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"


def models_among(files: Mapping[str, int]) -> list[ModelFile]:
    """The models among paths and their sizes, the greatest first. Of a model in parts, all must be there."""
    found, parts = [], dict[tuple[str, str], dict[int, str]]()
    for path in files:
        if not path.lower().endswith(".gguf") or _NO_MODEL.search(PurePosixPath(path).name):
            continue
        part = _PART.search(path[: -len(".gguf")])
        if part is None:
            found.append(ModelFile((path,), files[path]))
        else:
            parts.setdefault((path[: part.start()], part[2]), {})[int(part[1])] = path
    for (_, count), paths in parts.items():
        if sorted(paths) == list(range(1, int(count) + 1)):
            ordered = tuple(paths[i] for i in sorted(paths))
            found.append(ModelFile(ordered, sum(files[path] for path in ordered)))
    return sorted(found, key=lambda model: (-model.nbytes, model.paths))


def choose(
    models: Sequence[ModelFile],
    wanted: str | None,
    where: str,
    free: int | None,
    say: Callable[[str], None],
    held: Iterable[ModelFile] = (),
) -> ModelFile:
    """The model that is meant by `wanted`, a quant such as Q4_K_M or a file's name.

    Without one: the greatest quantized one that fits into `free` bytes, among those that are already `held` on this
    machine where there are any. `where` names the folder or repository. Raises `ModelNotFoundError`,
    `UnsupportedQuantTypeError` or `OutOfDeviceMemoryError`.
    """
    if wanted is not None:
        return _named(models, wanted, where)
    if len(models) == 1 and models[0].runs:
        return models[0]
    families = {model.family for model in models}
    if len(families) > 1:
        raise ModelNotFoundError(f"{where} has several models; put one behind the name: {_names(models, files=True)}")
    # Unsloth's dynamic mixes often have types that the name does not tell.
    runs = [model for model in models if model.runs and not model.quant.startswith("UD-")]
    if not runs:
        raise UnsupportedQuantTypeError(_quants(models), f"loading {where}", (t.name for t in MATRIX_TYPES))
    quantized = [model for model in runs if model.quant not in _FLOATS] or runs
    fits = [model for model in quantized if free is None or model.memory <= free]
    if not fits:
        least = quantized[-1]
        raise OutOfDeviceMemoryError(least.memory, free, f"{least.paths[0]}, the smallest of {where},")
    here = [model for model in fits if model in set(held)]
    chosen = (here or fits)[0]
    which = "of those on this machine the best" if here else "the best"
    room = "" if free is None else f" for {gib(free)} of free memory"
    others = _names([model for model in models if model.runs])
    say(f"{where}: {chosen.quant or chosen.stem} is {which}{room}; for another one put it behind: {others}")
    return chosen


def _named(models: Sequence[ModelFile], wanted: str, where: str) -> ModelFile:
    found = [model for model in models if wanted in (model.paths[0], PurePosixPath(model.paths[0]).name)]
    found = found or [model for model in models if wanted.upper() in (model.quant, model.stem.upper())]
    if not found:
        raise ModelNotFoundError(f"{where} has no {wanted!r}; there are: {_names(models)}")
    if len(found) > 1:
        raise ModelNotFoundError(f"{where} has several {wanted!r}; name a file: {_names(found, files=True)}")
    if not found[0].runs:
        raise UnsupportedQuantTypeError(found[0].quant, f"loading {where}", (t.name for t in MATRIX_TYPES))
    return found[0]


def _names(models: Sequence[ModelFile], files: bool = False) -> str:
    """How the models may be asked for, at most 30 of them."""
    names = [model.paths[0] if files or not model.quant else model.quant for model in models]
    more = f" and {len(names) - 30} more" if len(names) > 30 else ""
    return " ".join(f":{name}" for name in names[:30]) + more


def _quants(models: Sequence[ModelFile]) -> str:
    return " ".join(dict.fromkeys(model.quant for model in models))
