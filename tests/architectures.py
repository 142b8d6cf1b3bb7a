"""A small model of each architecture, with weights that are the same everywhere and always.

Their logits by llama.cpp are kept in tests/data/architectures.npz, which tools/reference_logits.py makes.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt

from models import finish, llama3_divisors

F32Array = npt.NDArray[np.float32]
PROMPTS = (1, 7, 64, 300)  # tokens; logits of the last one are kept
KINDS = ("F32", "Q8_0")
FIGURES = Path(__file__).parent / "data" / "architectures.npz"


@dataclass(frozen=True)
class Shape:
    """A model: its sizes, keys of its own, which go under the architecture's name, and what its layers have."""

    architecture: str
    n_embd: int = 128
    n_head: int = 2
    n_kv: int = 1
    head_dim: int = 64
    n_layer: int = 2
    n_ff: int = 160
    n_vocab: int = 48
    context: int = 512
    tied: bool = True
    keys: Mapping[str, Any] = field(default_factory=dict)
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    head_norms: tuple[str, ...] = ()  # of head_dim values
    biases: tuple[str, ...] = ()  # matrices and norms that have one
    fused: tuple[str, ...] = ()  # "attn_qkv", "ffn_up" with the gate in front
    gated: bool = True
    experts: int = 0  # feed-forward units of a layer, each n_ff wide
    vectors: Mapping[str, F32Array] = field(default_factory=dict)

    def matrices(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes (rows, columns), or (experts, rows, columns), of the weight matrices."""
        q, kv = self.n_head * self.head_dim, self.n_kv * self.head_dim
        layer: dict[str, tuple[int, ...]] = {"attn_qkv": (q + 2 * kv, self.n_embd)}
        if "attn_qkv" not in self.fused:
            layer = {name: (rows, self.n_embd) for name, rows in (("attn_q", q), ("attn_k", kv), ("attn_v", kv))}
        layer |= {"attn_output": (self.n_embd, q), "ffn_down": (self.n_embd, self.n_ff)}
        if self.gated and "ffn_up" not in self.fused:
            layer["ffn_gate"] = self.n_ff, self.n_embd
        layer["ffn_up"] = (2 if "ffn_up" in self.fused else 1) * self.n_ff, self.n_embd
        if self.experts:
            one = {name: layer.pop(name) for name in ("ffn_gate", "ffn_up", "ffn_down")}
            layer |= {f"{name}_exps": (self.experts, *shape) for name, shape in one.items()}
            layer["ffn_gate_inp"] = self.experts, self.n_embd
        shapes: dict[str, tuple[int, ...]] = {"token_embd": (self.n_vocab, self.n_embd)} | (
            {} if self.tied else {"output": (48, self.n_embd)}
        )
        return shapes | {f"blk.{i}.{name}": shape for i in range(self.n_layer) for name, shape in layer.items()}

    def lengths(self) -> dict[str, int]:
        """Names and lengths of the norms' weights."""
        layer = dict.fromkeys(self.norms, self.n_embd) | dict.fromkeys(self.head_norms, self.head_dim)
        norms = {f"blk.{i}.{name}": n for i in range(self.n_layer) for name, n in layer.items()}
        return {"output_norm": self.n_embd} | norms


_LONG = {f"rope_factors_{which}.weight": (1 + np.arange(32) ** 2 / n).astype(np.float32) for which, n in
         (("long", 32), ("short", 900))}  # fmt: skip
_PHI3 = {"fused": ("attn_qkv", "ffn_up"), "tied": False}
_PHI2 = {
    "n_embd": 160,
    "n_kv": 2,
    "head_dim": 80,
    "tied": False,
    "gated": False,
    "keys": {"rope.dimension_count": 32, "attention.layer_norm_epsilon": 1e-5},
    "norms": ("attn_norm",),
}
_PHI2_BIASES = ("attn_norm", "output_norm", "output", "attn_output", "ffn_up", "ffn_down")
_GEMMA = {"n_head": 4, "n_kv": 2, "head_dim": 72, "n_layer": 4}
_POST_NORMS = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")

SHAPES = {
    "llama": Shape(
        "llama",
        keys={"rope.freq_base": 5e5},
        vectors={"rope_freqs.weight": llama3_divisors(64, 5e5, 8.0, 64)},
    ),
    "qwen2": Shape("qwen2", biases=("attn_q", "attn_k", "attn_v"), keys={"rope.freq_base": 1e6}),
    "qwen2_yarn": Shape(
        "qwen2",
        biases=("attn_q", "attn_k", "attn_v"),
        tied=False,
        keys={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 96,
        },
    ),
    "qwen3": Shape("qwen3", n_head=4, n_kv=2, head_dim=80, head_norms=("attn_q_norm", "attn_k_norm")),
    "mixtral": Shape(
        "llama", experts=8, keys={"expert_count": 8, "expert_used_count": 2, "rope.freq_base": 1e6}
    ),
    "qwen3moe": Shape(
        "qwen3moe",
        n_head=4,
        n_kv=2,
        n_ff=96,
        experts=40,
        head_norms=("attn_q_norm", "attn_k_norm"),
        keys={
            "expert_count": 40,
            "expert_used_count": 5,
            "expert_feed_forward_length": 96,
            "feed_forward_length": 384,
        },
    ),
    "phi2": Shape("phi2", biases=(*_PHI2_BIASES, "attn_q", "attn_k", "attn_v"), **_PHI2),
    "phi2_fused": Shape("phi2", biases=(*_PHI2_BIASES, "attn_qkv"), fused=("attn_qkv",), **_PHI2),
    "phi3": Shape("phi3", keys={"attention.sliding_window": 100}, **_PHI3),
    "phi3_long": Shape(
        "phi3",
        vectors=_LONG,
        keys={"rope.scaling.original_context_length": 256, "rope.scaling.attn_factor": 1.19},
        **_PHI3,
    ),
    "phi3_short": Shape(
        "phi3",
        vectors=_LONG,
        keys={"rope.scaling.original_context_length": 512, "rope.scaling.attn_factor": 1.19},
        **_PHI3,
    ),
    "gemma2": Shape(
        "gemma2",
        norms=_POST_NORMS,
        keys={
            "attention.sliding_window": 40,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 4.0,
        },
        **_GEMMA,
    ),
    "gemma3": Shape(
        "gemma3",
        norms=_POST_NORMS,
        head_norms=("attn_q_norm", "attn_k_norm"),
        keys={"attention.sliding_window": 40, "rope.freq_base": 1e6, "rope.scaling.type": "linear",
              "rope.scaling.factor": 8.0, "attention.sliding_window_pattern": 3},
        **_GEMMA,
    ),
}  # fmt: skip


def normal(name: str, *shape: int) -> F32Array:
    """Nearly normal numbers that a name stands for: sums of four uniform ones, from bits that numpy keeps the same."""
    n = int(np.prod(shape))
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(n).astype("<u8").view("<u2").reshape(n, 4)
    return ((bits.astype(np.int64).sum(1) - 131070) / 37837.0).astype(np.float32).reshape(shape)


def tokens(n: int, n_vocab: int = 48) -> list[int]:
    """The prompt of n tokens."""
    return (np.random.PCG64(n).random_raw(n) % np.uint64(n_vocab)).astype(int).tolist()


def write(path: Path, shape: Shape, kind: str, types: Mapping[str, str] | None = None) -> int:
    """Writes a model with matrices of this type, but for those whose names `types` has; a checksum of its tensors."""
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_tokenizer_model("none")
    for key, value in _keys(shape).items():
        _add(writer, f"{shape.architecture}.{key}", value)
    checksum = 0

    def add(name: str, values: F32Array, kind: str = "F32") -> None:
        nonlocal checksum
        type = gguf.GGMLQuantizationType[kind]
        raw = gguf.quants.quantize(values, type)
        checksum = zlib.crc32(raw.tobytes(), checksum)
        writer.add_tensor(name, raw, raw_dtype=type)

    for name, of in shape.matrices().items():
        own = name.rpartition(".")[2]
        factor = {"attn_q": 1.3, "attn_k": 1.3, "attn_qkv": 1.3, "ffn_gate_inp": 3}.get(own, 1)
        std = 0.5 if name == "token_embd" else of[-1] ** -0.5 * factor
        own_kind = "F32" if own == "ffn_gate_inp" else kind  # it chooses experts: no tool quantizes it
        add(f"{name}.weight", std * normal(name, *of), (types or {}).get(own, own_kind))
        if own in shape.biases:
            add(f"{name}.bias", 0.2 * normal(f"{name}.bias", of[-2]))
    for name, n in shape.lengths().items():
        add(f"{name}.weight", 1 + 0.2 * normal(name, n))
        if name.rpartition(".")[2] in shape.biases:
            add(f"{name}.bias", 0.2 * normal(f"{name}.bias", n))
    for name, values in shape.vectors.items():
        add(name, values)
    finish(writer)
    return checksum


def _keys(s: Shape) -> dict[str, Any]:
    keys: dict[str, Any] = {"block_count": s.n_layer, "context_length": s.context, "embedding_length": s.n_embd}
    keys |= {"feed_forward_length": s.n_ff, "attention.head_count": s.n_head, "attention.head_count_kv": s.n_kv}
    keys |= {"vocab_size": s.n_vocab, "rope.dimension_count": s.head_dim}
    if s.head_dim * s.n_head != s.n_embd:
        keys |= {"attention.key_length": s.head_dim, "attention.value_length": s.head_dim}
    if "attention.layer_norm_epsilon" not in s.keys:
        keys |= {"attention.layer_norm_rms_epsilon": 1e-5}
    return keys | dict(s.keys)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    add[type(value)](key, value)


def figures(name: str, kind: str) -> tuple[int, F32Array]:
    """What is kept of a model: the checksum, and llama.cpp's logits after each of the prompts."""
    with np.load(FIGURES) as file:
        at = file["names"].tolist().index(name), KINDS.index(kind)
        return int(file["checksums"][at]), file["logits"][at].astype(np.float32)
