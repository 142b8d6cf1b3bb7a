"""What the quantizer is tried on: arrays of weights, and models of which only names and shapes matter.

`data/llamacpp_quantize.json` holds what llama.cpp made of the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from hipquant.models import DEMO
from models import write_llama
from reference import dequantize

F32Array = npt.NDArray[np.float32]
KINDS = ("gaussian", "heavy", "outliers", "demo")
ROWS = 2  # of the matrices of `MODELS`


def weights(kind: str) -> F32Array:
    """Rows of weights: normal, Student's t of 3 degrees of freedom, one in 300 twenty times too large, or the demo
    model's first matrices, which are dequantized Q4_0."""
    rng = np.random.default_rng(7)
    if kind == "demo":
        reader = gguf.GGUFReader(DEMO)
        names = [f"blk.{i}.{name}.weight" for i in range(2) for name in ("attn_q", "attn_output", "ffn_up")]
        found = {t.name: t for t in reader.tensors}
        return np.concatenate([dequantize(int(found[n].tensor_type), found[n].data, (-1, 512))[:128] for n in names])
    x = rng.standard_t(3, (128, 512)) if kind == "heavy" else rng.standard_normal((128, 512))
    if kind == "outliers":
        x[rng.random(x.shape) < 1 / 300] *= 20
    return (0.02 * x).astype(np.float32)


def importance(columns: int) -> F32Array:
    """Mean squares of activations: a few columns matter much more than others."""
    return np.random.default_rng(8).lognormal(0, 1, columns).astype(np.float32)


# By name, what is not the default of `write_model`.
MODELS: dict[str, dict[str, Any]] = {
    "16 layers": {"layers": 16},
    "grouped queries": {"layers": 9, "kv": 2},
    "tied": {"layers": 5, "tied": True},
    "rows of 288 and 96": {"layers": 3, "heads": 9, "kv": 3, "embd": 288, "ff": 96},
    "rows of 240": {"layers": 3, "embd": 240},
    "8 experts": {"layers": 8, "kv": 2, "experts": 8},
    "4 experts": {"layers": 9, "experts": 4},
    "80 layers": {"layers": 80, "kv": 1},
    "q, k and v in one": {"architecture": "phi2", "layers": 8, "joined": True},
    "what is kept": {
        "layers": 2,
        "beside": {
            "position_embd.weight": (64, 256),
            "blk.0.attn_k_norm.weight": (64, 256),
            "one.weight": (1, 256),
            "conv.weight": (3, 2, 256),
            "blk.1.ssm_conv1d.weight": (4, 256),
            "some.bias": (4, 256),
        },
    },
}


def write_model(name: str, path: str | Path) -> None:
    """Writes one of `MODELS`: the names of its tensors, F32, with `ROWS` rows of the right length."""
    _write(Path(path), **MODELS[name])


def _write(
    path: Path,
    layers: int,
    architecture: str = "llama",
    heads: int = 8,
    kv: int = 8,
    embd: int = 256,
    ff: int = 512,
    experts: int = 0,
    tied: bool = False,
    joined: bool = False,
    beside: dict[str, tuple[int, ...]] | None = None,
) -> None:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(embd)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_dimension_count(embd // heads)
    writer.add_vocab_size(ROWS)
    writer.add_tokenizer_model("none")
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (ROWS, embd), "output_norm.weight": (embd,)}
    if not tied:
        shapes["output.weight"] = (ROWS, embd)
    layer: dict[str, tuple[int, ...]] = {"attn_norm": (embd,), "attn_output": (ROWS, embd)}
    layer |= dict.fromkeys(["attn_qkv"] if joined else ["attn_q", "attn_k", "attn_v"], (ROWS, embd))
    some, end = ((experts,), "_exps") if experts else ((), "")
    layer |= {f"ffn_{n}{end}": (*some, ROWS, ff if n == "down" else embd) for n in ("gate", "up", "down")}
    if experts:
        layer["ffn_gate_inp"] = (experts, embd)
    for i in range(layers):
        shapes |= {f"blk.{i}.{n}.weight": shape for n, shape in layer.items()}
    rng = np.random.default_rng(0)
    for tensor, shape in (shapes | (beside or {})).items():
        writer.add_tensor(tensor, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_float_model(path: Path) -> Path:
    """A model of F32 weights, with a vocabulary's kinds of metadata."""

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("none")
        writer.add_array("test.strings", ["a", "bé", ""])
        writer.add_array("test.floats", [0.5, -1.5])
        writer.add_bool("test.flag", True)
        writer.add_file_type(0)
        writer.add_custom_alignment(64)

    write_llama(path, type="F32", n_vocab=64, n_layer=1, extra=extra)
    return path
