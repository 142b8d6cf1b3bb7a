"""File types: which tensor of a model gets which quant type.

The choice is that of llama.cpp's `llama-quantize`, so that files of one name are alike: tensors that a model feels
most (values of attention, the matrix after the gated units, the output) get more bits, in some layers or in all.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from ..errors import QuantizationError
from ..gguf_file import GGUFFile, TensorInfo
from ..quants import BY_NAME, F16, MATRIX_TYPES, QuantType, Role

Q4_1, Q5_0, Q5_1, Q8_0 = (BY_NAME[n] for n in ("Q4_1", "Q5_0", "Q5_1", "Q8_0"))
Q4_0, Q3_K, Q4_K, Q5_K, Q6_K = (BY_NAME[n] for n in ("Q4_0", "Q3_K", "Q4_K", "Q5_K", "Q6_K"))


@dataclass(frozen=True)
class FileType:
    """A name that `hipquant quantize` takes: its number in `general.file_type`, and the type of most tensors."""

    name: str
    id: int
    base: QuantType


def _file_types() -> Iterable[FileType]:
    ids = {"F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7}
    mixes = {"Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16}
    for name, number in (ids | mixes | {"Q5_K_M": 17, "Q6_K": 18}).items():
        yield FileType(name, number, BY_NAME[name if name in BY_NAME else name[:-2]])


FILE_TYPES: dict[str, FileType] = {t.name: t for t in _file_types()}
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def file_type(name: str) -> FileType:
    """A file type by name, in any case; `QuantizationError` with the nearest names otherwise."""
    upper = name.upper().replace("-", "_")
    found = FILE_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        near = difflib.get_close_matches(upper, FILE_TYPES, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise QuantizationError(f"there is no file type {name!r}; {hint}there are: {' '.join(FILE_TYPES)}")
    return found


def matrix_type(name: str) -> QuantType:
    """The type of a tensor by name; `QuantizationError` with the nearest names otherwise."""
    names = [t.name for t in MATRIX_TYPES]
    if name.upper() not in names:
        near = difflib.get_close_matches(name.upper(), names, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise QuantizationError(f"there is no type {name!r} for a tensor; {hint}there are: {' '.join(names)}")
    return BY_NAME[name.upper()]


class Part(Enum):
    """What a tensor does in a model, as far as its type depends on it."""

    OUTPUT, EMBEDDING, VALUE, KEY, ATTENTION_OUTPUT, DOWN, OTHER = range(7)


# The first that a tensor's name contains. Q, K and V in one matrix count as V.
_PARTS = (
    ("attn_qkv.weight", Part.VALUE),
    ("attn_kv_b.weight", Part.VALUE),
    ("attn_v.weight", Part.VALUE),
    ("attn_k.weight", Part.KEY),
    ("attn_output.weight", Part.ATTENTION_OUTPUT),
    ("ffn_down", Part.DOWN),
)
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")

# Matrices that stay as they are, by parts of their names: small ones, and those that choose experts or positions.
_KEPT = (
    "_norm.weight ffn_gate_inp.weight altup laurel per_layer_model_proj ssm_conv1d shortconv.conv.weight "
    "indexer.k_proj.weight indexer.q_proj.weight time_mix_first.weight time_mix_w0.weight time_mix_w1.weight "
    "time_mix_w2.weight time_mix_v0.weight time_mix_v1.weight time_mix_v2.weight time_mix_a0.weight time_mix_a1.weight "
    "time_mix_a2.weight time_mix_g1.weight time_mix_g2.weight time_mix_decay_w1.weight time_mix_decay_w2.weight "
    "time_mix_lerp_fused.weight attn_rel_b.weight .position_embd .rel_pos .patch_embd .patch_merger"
).split()
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")

# Where a row is not a multiple of 256 long.
_FALLBACKS = {"Q2_K": Q4_0, "Q3_K": Q4_0, "Q4_K": Q5_0, "Q5_K": Q5_1, "Q6_K": Q8_0}


@dataclass(frozen=True)
class Choice:
    """The type that a tensor is to have, and what is to be said about it (nothing in most cases)."""

    info: TensorInfo
    type: QuantType
    note: str = ""


def is_quantized(info: TensorInfo) -> bool:
    """Whether quantizing a model changes this tensor: a matrix of weights that is not among the exceptions."""
    if len(info.shape) - sum(1 for _ in _leading_ones(info.shape)) < 2 or not info.name.endswith("weight"):
        return False
    return info.name not in _KEPT_NAMES and not any(part in info.name for part in _KEPT)


def _leading_ones(shape: tuple[int, ...]) -> Iterable[int]:
    for n in shape:
        if n != 1:
            return
        yield n


def part_of(name: str) -> Part:
    if name == "output.weight":
        return Part.OUTPUT
    if name in _EMBEDDINGS:
        return Part.EMBEDDING
    return next((part for piece, part in _PARTS if piece in name), Part.OTHER)


def choose_types(
    file: GGUFFile,
    kind: FileType,
    *,
    output: QuantType | None = None,
    embedding: QuantType | None = None,
    has_importance: bool = False,
) -> list[Choice]:
    """The type of each tensor, in the order of the file. `output` and `embedding` are for those two tensors."""
    mix = _Mix(file, kind, has_importance)
    chosen = {}
    for info in sorted(file.tensors.values(), key=_by_layer):
        chosen[info.name] = _choose(info, kind, mix, output, embedding)
    return [chosen[name] for name in file.tensors]


def _choose(
    info: TensorInfo, kind: FileType, mix: _Mix, output: QuantType | None, embedding: QuantType | None
) -> Choice:
    part, type = part_of(info.name), kind.base
    if not is_quantized(info):
        return Choice(info, info.type)
    asked = embedding if part is Part.EMBEDDING else output if part is Part.OUTPUT else None
    if asked is not None:
        if info.shape[-1] % asked.block_size:
            raise QuantizationError(
                f"tensor {info.name!r} has rows of {info.shape[-1]}, which {asked} cannot hold: its blocks are of "
                f"{asked.block_size}; choose another type for it"
            )
        return Choice(info, asked)
    if kind.base.role is Role.FLOAT:
        return Choice(info, type)
    if part is Part.OUTPUT or (part is Part.EMBEDDING and mix.tied):
        type = output or (Q8_0 if info.shape[-1] % type.block_size or type is Q8_0 else Q6_K)
    else:
        type = mix.type(info.name, part)
    return _fall_back(info, type)


def _fall_back(info: TensorInfo, type: QuantType) -> Choice:
    k = info.shape[-1]
    if k % type.block_size == 0:
        return Choice(info, type)
    smaller = _FALLBACKS.get(type.name, F16)
    if k % smaller.block_size:
        smaller = F16
    return Choice(info, smaller, f"{info.name}: rows of {k} are no multiple of {type.block_size}, {smaller} for {type}")


def _by_layer(info: TensorInfo) -> tuple[int, str]:
    """Layers count in their order, names within a layer too."""
    return _layer(info.name), info.name


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth of the layers, and every third of those between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


class _Mix:
    """The rules of one file type for one model; `type` is asked for the tensors in the order of the layers."""

    def __init__(self, file: GGUFFile, kind: FileType, has_importance: bool) -> None:
        names = [t for t in file.tensors if part_of(t) is Part.VALUE]
        architecture = file.get("general.architecture", str, "")
        self.kind, self.has_importance = kind, has_importance
        self.layers = file.get(f"{architecture}.block_count", int, 0)
        self.experts = file.get(f"{architecture}.expert_count", int, 0)
        heads, kv = (_first(file, f"{architecture}.attention.head_count{end}") for end in ("", "_kv"))
        kv = heads if kv is None else kv
        self.shared = (heads or 0) // kv if kv else 0  # query heads for each head of keys and values
        self.is_70b = self.layers == 80 and (architecture == "qwen2" or (architecture == "llama" and heads != kv))
        self.tied = "output.weight" not in file.tensors
        self.values, self.value, self.down = len(names), 0, 0

    def type(self, name: str, part: Part) -> QuantType:
        rule = {
            Part.VALUE: self._value,
            Part.DOWN: self._down,
            Part.KEY: self._key,
            Part.ATTENTION_OUTPUT: self._attention_output,
        }.get(part)
        return (rule(name) if rule is not None else None) or self.kind.base

    def _value(self, name: str) -> QuantType | None:
        i, self.value = self.value, self.value + 1
        if self.experts == 8:
            return Q8_0
        more, base = _more_bits(i, self.values), self.kind.base
        found = {
            "Q2_K": Q4_K if self.shared >= 4 else Q3_K,
            "Q3_K_M": Q5_K if i < 2 else Q4_K,
            "Q3_K_L": Q5_K,
            "Q4_K_S": Q5_K if i < 4 else base,
            "Q4_K_M": Q6_K if more else base,
            "Q5_K_M": Q6_K if more else base,
        }.get(self.kind.name, base)
        return Q5_K if self.is_70b and found in (Q3_K, Q4_K) else found

    def _key(self, name: str) -> QuantType | None:
        return Q8_0 if self.experts == 8 else None

    def _down(self, name: str) -> QuantType | None:
        i, self.down = self.down, self.down + 1
        if self.experts > 1:  # one a layer, or one an expert and layer
            i = _layer(name)
        more, first, base = _more_bits(i, self.layers), i < self.layers // 8, self.kind.base
        return {
            "Q2_K": Q3_K,
            "Q3_K_M": Q5_K if i < self.layers // 16 else Q4_K,
            "Q3_K_L": Q5_K,
            "Q4_K_S": Q5_K if first else base,
            "Q4_K_M": Q6_K if more else base,
            "Q5_K_M": Q6_K if more else base,
            "Q4_0": Q4_1 if first and self.has_importance else base,
            "Q5_0": Q5_1 if first and self.has_importance else base,
        }.get(self.kind.name)

    def _attention_output(self, name: str) -> QuantType | None:
        if self.experts == 8:
            return Q5_K if self.kind.name in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else None
        return {"Q2_K": Q3_K, "Q3_K_M": Q4_K, "Q3_K_L": Q5_K}.get(self.kind.name)


def _first(file: GGUFFile, key: str) -> int | None:
    """A number, or the first of an array of them, one a layer."""
    value = file.metadata.get(key)
    numbers: Sequence[int] = [value] if isinstance(value, int) else getattr(value, "tolist", list)()
    return next(iter(numbers), None)
