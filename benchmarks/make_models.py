"""Writes models of random weights with the shapes of models that people run, to measure speed with.

    python benchmarks/make_models.py FOLDER SHAPE:TYPE ... [--layers N]

The files are FOLDER/SHAPE-TYPE.gguf, with the types of tensors that `hipquant quantize` gives. A few random matrices
serve all layers, each time from another row on, so that writing takes hardly longer than the disk does. Weights have
the size that a model starts its training with: activations stay near 1, and tokens and positions matter.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt

from hipquant.errors import HipquantError
from hipquant.gguf_file import TensorInfo
from hipquant.gguf_writer import GGUFWriter, KeyValue, TensorEntry, Uint32, encode_key
from hipquant.quantize import FileType, file_type, quantize_rows
from hipquant.quantize.mixes import choose_types
from hipquant.quants import F32, FLOAT_TYPES, QuantType

SHIFT = 37  # rows by which each use of a matrix begins behind the one before: no layer is another one's copy
DISTINCT = 1 << 22  # weights of a matrix that are quantized; the rows of a larger one have their blocks at random

Raw = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Shape:
    """A model: its sizes, keys of its own, which go under the architecture's name, and what its layers have."""

    architecture: str
    n_embd: int
    n_layer: int
    n_head: int
    n_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    experts: int = 0  # feed-forward units of a layer, each n_ff wide
    used: int = 0  # of them by a token
    tied: bool = False
    embedding_scale: float = 1.0  # that the architecture multiplies embeddings by
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    head_norms: tuple[str, ...] = ()
    keys: Mapping[str, KeyValue] = field(default_factory=dict)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors, in the order of the file."""
        q, kv, experts = self.n_head * self.head_dim, self.n_kv * self.head_dim, (self.experts,) * (self.experts > 0)
        unit = "_exps" if self.experts else ""
        layer: dict[str, tuple[int, ...]] = dict.fromkeys(self.norms, (self.n_embd,))
        layer |= dict.fromkeys(self.head_norms, (self.head_dim,))
        layer |= {"attn_q": (q, self.n_embd), "attn_k": (kv, self.n_embd), "attn_v": (kv, self.n_embd)}
        layer |= {"attn_output": (self.n_embd, q)}
        if self.experts:
            layer["ffn_gate_inp"] = self.experts, self.n_embd
        layer |= {f"ffn_{name}{unit}": (*experts, self.n_ff, self.n_embd) for name in ("gate", "up")}
        layer[f"ffn_down{unit}"] = *experts, self.n_embd, self.n_ff
        names = {"token_embd": (self.n_vocab, self.n_embd), "output_norm": (self.n_embd,)}
        names |= {} if self.tied else {"output": (self.n_vocab, self.n_embd)}
        names |= {f"blk.{i}.{name}": shape for i in range(self.n_layer) for name, shape in layer.items()}
        return {f"{name}.weight": shape for name, shape in names.items()}

    def metadata(self) -> dict[str, KeyValue]:
        sizes = {"block_count": self.n_layer, "context_length": 8192, "embedding_length": self.n_embd}
        sizes |= {"feed_forward_length": self.n_ff, "attention.head_count": self.n_head}
        sizes |= {"attention.head_count_kv": self.n_kv, "attention.key_length": self.head_dim}
        sizes |= {"attention.value_length": self.head_dim, "rope.dimension_count": self.head_dim}
        sizes |= {"vocab_size": self.n_vocab}
        if self.experts:
            sizes |= {"expert_count": self.experts, "expert_used_count": self.used}
            sizes |= {"expert_feed_forward_length": self.n_ff}
        own = {"attention.layer_norm_rms_epsilon": 1e-6} | {k: Uint32(v) for k, v in sizes.items()} | dict(self.keys)
        found: dict[str, KeyValue] = {"general.architecture": self.architecture, "tokenizer.ggml.model": "none"}
        return found | {f"{self.architecture}.{key}": value for key, value in own.items()}

    def std(self, name: str, k: int) -> float:
        """Standard deviation of the weights of a matrix with rows of k: values that are near 1 stay so. What is added
        to them is small; a router's logits are large, as it is to tell experts apart."""
        if name == "token_embd.weight":
            return 1 / self.embedding_scale
        added = "attn_output" in name or "ffn_down" in name
        return k**-0.5 * (self.share if added else 3 if "ffn_gate_inp" in name else 1)

    @property
    def share(self) -> float:
        """Size of what a layer's attention or unit adds to a residual of 1. At 1, what rounding activations to 8 bits
        changes would grow from layer to layer: an NMSE of 1e-3 after the 26 of gemma2-2b, where this gives 9e-5."""
        return (8 * self.n_layer) ** -0.5

    def norm(self, name: str, n: int) -> npt.NDArray[np.float32]:
        """Weights of a norm: 1, but for those of what is added, and random signs for the last one: without them the
        best token of a tied output would always be the one that was read."""
        if name == "output_norm.weight":
            return np.random.default_rng(0).choice(np.array([-1, 1], np.float32), n)
        return np.full(n, self.share if "post" in name else 1, np.float32)


_QWEN3 = {"head_norms": ("attn_q_norm", "attn_k_norm"), "keys": {"rope.freq_base": 1e6}}
_GEMMA2_NORMS = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")
_GEMMA2_KEYS = {"attention.sliding_window": Uint32(4096), "attn_logit_softcapping": 50.0}
SHAPES = {
    #                             n_embd n_layer n_head n_kv head_dim n_ff n_vocab
    "tiny": Shape("llama", 256, 4, 4, 2, 64, 768, 4096),
    "1b": Shape("llama", 2048, 16, 32, 8, 64, 8192, 128256),
    "7b": Shape("llama", 4096, 32, 32, 32, 128, 11008, 32000),
    "8b": Shape("llama", 4096, 32, 32, 8, 128, 14336, 128256),
    "70b": Shape("llama", 8192, 80, 64, 8, 128, 28672, 128256),
    "gemma2-2b": Shape(
        "gemma2", 2304, 26, 8, 4, 256, 9216, 256000,
        tied=True, embedding_scale=math.sqrt(2304), norms=_GEMMA2_NORMS,
        keys=_GEMMA2_KEYS | {"final_logit_softcapping": 30.0},
    ),
    "qwen3-4b": Shape("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, **_QWEN3),
    # Qwen3-30B-A3B (its vocabulary too) and Mixtral-8x7B, cut to files of 6 GB.
    "qwen3moe-16l": Shape("qwen3moe", 2048, 16, 32, 4, 128, 768, 32000, experts=128, used=8, **_QWEN3),
    "mixtral-8l": Shape("llama", 4096, 8, 32, 8, 128, 14336, 32000, experts=8, used=2, keys={"rope.freq_base": 1e6}),
}  # fmt: skip


def write(path: Path, shape: Shape, kind: FileType) -> None:
    """Writes a model; raises `OutputFileError`. The file is there when it is whole, and not before."""
    infos = {name: TensorInfo(name, F32, of, 0, 0) for name, of in shape.tensors().items()}
    numbers = {k: v.value if isinstance(v, Uint32) else v for k, v in shape.metadata().items()}
    unwritten = SimpleNamespace(
        tensors=infos, metadata=numbers, get=lambda key, _, default=None: numbers.get(key, default)
    )
    entries = [TensorEntry(c.info.name, c.type, c.info.shape) for c in choose_types(unwritten, kind)]
    keys = [encode_key(name, value) for name, value in shape.metadata().items()]
    matrices, uses = {}, {}
    with GGUFWriter(path, keys, entries) as out:
        for t in entries:
            *above, k = t.shape
            if not above:
                out.write(shape.norm(t.name, k))
                continue
            drawn = t.type, prod(above), k, shape.std(t.name, k)
            if drawn not in matrices:
                matrices[drawn] = random_matrix(*drawn)
            at = uses.setdefault(drawn, 0) * SHIFT % prod(above)
            uses[drawn] += 1
            for part in (matrices[drawn][at:], matrices[drawn][:at]):
                if len(part):
                    out.write(part)


def random_matrix(kind: QuantType, rows: int, k: int, std: float) -> Raw:
    """Normal numbers of this standard deviation as rows of a type, uint8 [rows, bytes]."""
    rng = np.random.default_rng(zlib.crc32(f"{kind} {rows} {k} {std}".encode()))
    few = rows if kind in FLOAT_TYPES else min(rows, max(1, DISTINCT // k))
    raw = quantize_rows(rng.standard_normal((few, k), np.float32) * np.float32(std), kind)
    if few < rows:
        blocks = raw.reshape(-1, kind.block_bytes)
        raw = blocks[rng.integers(0, len(blocks), rows * k // kind.block_size)].reshape(rows, -1)
    return raw


def model_name(text: str) -> tuple[str, FileType]:
    """SHAPE:TYPE of a command line, the type in any case."""
    shape, _, kind = text.partition(":")
    if shape not in SHAPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not SHAPE:TYPE, with SHAPE one of {' '.join(SHAPES)}")
    try:
        return shape, file_type(kind)
    except HipquantError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not SHAPE:TYPE: {error}") from None


def file_name(shape: str, kind: FileType) -> str:
    return f"{shape}-{kind.name.replace('Q', 'q')}.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("models", type=model_name, nargs="+", metavar="SHAPE:TYPE", help=f"SHAPE: {' '.join(SHAPES)}")
    parser.add_argument("--layers", type=int, metavar="N", help="instead of the shape's own")
    o = parser.parse_args()
    if o.layers is not None and o.layers < 1:
        parser.error(f"--layers is {o.layers}, expected 1 or more")
    o.folder.mkdir(parents=True, exist_ok=True)
    for name, kind in o.models:
        shape = SHAPES[name]
        if o.layers is not None:
            name, shape = f"{name}-of-{o.layers}-layers", replace(shape, n_layer=o.layers)
        path, begun = o.folder / file_name(name, kind), time.perf_counter()
        try:
            write(path, shape, kind)
        except HipquantError as error:
            sys.exit(str(error))
        print(f"{path.name}: {path.stat().st_size / 2**20:,.0f} MiB written in {time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
