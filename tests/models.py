"""Small GGUF models for tests, written with the `gguf` package.

Weights are random *valid* blocks, made from the type table alone, so that a new quant type needs no change here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from hipquant.quants import FLOAT_TYPES, QuantType, quant_type
from reference import dequantize, quantize_q8_1

F32Array = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]

# Arguments for `write_llama(rope=…)`: one of each kind that a llama-architecture file can ask for.
ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "base": {"base": 500000.0},
    "linear": {"type": "linear", "factor": 4.0},
    "yarn": {"type": "yarn", "factor": 4.0, "original_context": 32},
    "yarn_long": {"type": "yarn", "factor": 4.0, "original_context": 1024},
    "yarn_attn_factor": {"type": "yarn", "factor": 8.0, "original_context": 24, "attn_factor": 0.75, "base": 50000.0},
    "llama3": {"freqs": "llama3", "factor": 8.0, "original_context": 64, "base": 500000.0},
}


def random_blocks(rng: np.random.Generator, which: QuantType | str, rows: int, cols: int, std: float = 1.0) -> Raw:
    """Random valid rows of a type: uint8 [rows, row_bytes(cols)], whose values have about this standard deviation and
    a mean near zero. Every quant and sub-scale is random; only the scales of the blocks are chosen."""
    kind = quant_type(which)
    if kind in FLOAT_TYPES:
        return _float_rows(kind, (rng.standard_normal((rows, cols)) * std).astype(np.float32))
    if kind.name == "Q8_1":
        x = (rng.standard_normal((rows, cols)) * std).astype(np.float32)
        return quantize_q8_1(x)[:, : kind.row_bytes(cols)].copy()
    raw = np.frombuffer(rng.bytes(rows * kind.row_bytes(cols)), np.uint8).reshape(-1, kind.block_bytes).copy()
    jitter = rng.uniform(0.5, 1.5, len(raw))
    if kind.name == "Q8_K":
        _fill_q8_k(raw, jitter * std / 74)  # the standard deviation of a random int8
    else:
        scales = _scales_for(rng, kind, std)
        for at, scale in zip(kind.scales, scales, strict=True):
            raw[:, at : at + 2] = (jitter * scale).astype("<f2").view(np.uint8).reshape(-1, 2)
    return raw.reshape(rows, kind.row_bytes(cols))


def _scales_for(rng: np.random.Generator, kind: QuantType, std: float) -> npt.NDArray[np.float64]:
    """Scales that give random blocks this standard deviation and, where there is an offset, mean zero: values are
    linear in the scales, so the effect of each is measured alone."""
    sample = np.frombuffer(rng.bytes(256 * kind.block_bytes), np.uint8).reshape(-1, kind.block_bytes).copy()

    def values(scales: npt.NDArray[np.float64]) -> F32Array:
        for at, scale in zip(kind.scales, scales, strict=True):
            sample[:, at : at + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return dequantize(kind, sample, (len(sample), kind.block_size))

    weights = np.ones(len(kind.scales))
    if len(weights) == 2:
        means = [values(np.array(one)).mean() for one in ([1.0, 0.0], [0.0, 1.0])]
        weights[1] = -means[0] / means[1]
    return weights * std / values(weights).std()


def _fill_q8_k(raw: Raw, scale: npt.NDArray[np.float64]) -> None:
    """float32 d, 256 int8, then the 16 sums of 16 of them."""
    raw[:, :4] = scale.astype("<f4").view(np.uint8).reshape(-1, 4)
    sums = raw[:, 4:260].view(np.int8).reshape(-1, 16, 16).sum(axis=2, dtype=np.int16)
    raw[:, 260:] = sums.astype("<i2").view(np.uint8).reshape(-1, 32)


def _float_rows(kind: QuantType, x: F32Array) -> Raw:
    if kind.name == "BF16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(np.uint8)
    return x.astype({"F32": "<f4", "F16": "<f2"}[kind.name]).view(np.uint8)


def llama3_divisors(head_dim: int, base: float, factor: float, original_context: int) -> F32Array:
    """What Llama 3.1 stores as rope_freqs.weight: [head_dim / 2] divisors of the frequencies; 1 for short waves,
    `factor` for long ones, in between (from 1/4 to 1 of the context) a blend."""
    waves = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original_context / waves - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


@dataclass
class LlamaFile:
    """A model file that was written: `tensors` are its tensors dequantized, `raw` their bytes by row."""

    path: Path
    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_kv: int
    n_ff: int
    head_dim: int
    context: int
    types: dict[str, QuantType] = field(default_factory=dict)
    raw: dict[str, Raw] = field(default_factory=dict)
    tensors: dict[str, F32Array] = field(default_factory=dict)

    def matrices(self, tied: bool) -> dict[str, tuple[int, int]]:
        """Names and shapes of the weight matrices."""
        q, kv = self.n_head * self.head_dim, self.n_kv * self.head_dim
        layer = {"attn_q": (q, self.n_embd), "attn_k": (kv, self.n_embd), "attn_v": (kv, self.n_embd)}
        layer |= {"attn_output": (self.n_embd, q), "ffn_gate": (self.n_ff, self.n_embd)}
        layer |= {"ffn_up": (self.n_ff, self.n_embd), "ffn_down": (self.n_embd, self.n_ff)}
        shapes = {"token_embd.weight": (self.n_vocab, self.n_embd)}
        for i in range(self.n_layer):
            shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
        return shapes if tied else shapes | {"output.weight": (self.n_vocab, self.n_embd)}

    def vectors(self, biases: bool) -> dict[str, tuple[int, float]]:
        """Names, lengths and means of the float32 vectors: norms near 1, biases near 0."""
        found: dict[str, tuple[int, float]] = {"output_norm.weight": (self.n_embd, 1.0)}
        for i in range(self.n_layer):
            found |= {f"blk.{i}.{name}.weight": (self.n_embd, 1.0) for name in ("attn_norm", "ffn_norm")}
        if biases:
            rows = {name.replace(".weight", ".bias"): shape[0] for name, shape in self.matrices(True).items()}
            found |= {name: (n, 0.0) for name, n in rows.items() if name.startswith("blk.")}
        return found


def write_llama(
    path: str | Path,
    *,
    type: str = "Q4_0",
    types: Mapping[str, str] | None = None,
    n_vocab: int = 512,
    n_embd: int = 256,
    n_layer: int = 2,
    n_head: int = 4,
    n_kv: int = 2,
    n_ff: int = 512,
    head_dim: int | None = None,
    tied: bool = False,
    biases: bool = False,
    rope: Mapping[str, Any] | None = None,
    context: int = 256,
    rms_eps: float = 1e-5,
    seed: int = 0,
    version: int = 3,
    extra: Callable[[gguf.GGUFWriter], object] | None = None,
) -> LlamaFile:
    """Writes a llama-architecture model with random weights of one type.

    `types` gives other types to the matrices whose names match a pattern ({"*.ffn_down.weight": "Q6_K"}); `rope` is
    one of `ROPE_VARIANTS` or the like; `extra` may add keys (a tokenizer) before the file is written. Weights have a
    standard deviation of cols**-0.5, q and k more, so that attention is far from uniform and feels positions.
    """
    shape = head_dim or n_embd // n_head
    model = LlamaFile(Path(path), n_vocab, n_embd, n_layer, n_head, n_kv, n_ff, shape, context)
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(model.path, "llama")
    _add_keys(writer, model, rms_eps)
    _add_rope(writer, model, dict(rope or {}))
    if extra is None:
        writer.add_tokenizer_model("none")
    else:
        extra(writer)
    for name, (rows, cols) in model.matrices(tied).items():
        chosen = next((t for pattern, t in (types or {}).items() if fnmatchcase(name, pattern)), type)
        std = 1.0 if name == "token_embd.weight" else cols**-0.5 * (1.7 if "attn_q" in name or "attn_k" in name else 1)
        _add_tensor(writer, model, name, quant_type(chosen), random_blocks(rng, chosen, rows, cols, std), (rows, cols))
    for name, (n, mean) in model.vectors(biases).items():
        values = (mean + 0.1 * rng.standard_normal(n)).astype(np.float32)
        _add_tensor(writer, model, name, quant_type("F32"), values.view(np.uint8), (n,))
    finish(writer, version)
    return model


def finish(writer: gguf.GGUFWriter, version: int = 3) -> None:
    """Writes everything out. Versions 2 and 3 differ in the number alone as long as the file is little endian."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()
    with open(writer.path, "r+b") as file:
        file.seek(4)
        file.write(version.to_bytes(4, "little"))


def _add_tensor(
    writer: gguf.GGUFWriter, model: LlamaFile, name: str, kind: QuantType, raw: Raw, shape: tuple[int, ...]
) -> None:
    model.types[name], model.raw[name] = kind, raw
    model.tensors[name] = dequantize(kind, raw, shape)
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType(kind.ggml_id))


def _add_keys(writer: gguf.GGUFWriter, model: LlamaFile, rms_eps: float) -> None:
    writer.add_block_count(model.n_layer)
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(model.n_ff)
    writer.add_head_count(model.n_head)
    writer.add_head_count_kv(model.n_kv)
    writer.add_layer_norm_rms_eps(rms_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(model.n_vocab)
    if model.head_dim != model.n_embd // model.n_head:
        writer.add_key_length(model.head_dim)
        writer.add_value_length(model.head_dim)


def _add_rope(writer: gguf.GGUFWriter, model: LlamaFile, rope: dict[str, Any]) -> None:
    base = rope.get("base", 10000.0)
    if "base" in rope:
        writer.add_rope_freq_base(base)
    if "freqs" in rope:
        freqs = rope["freqs"]
        if isinstance(freqs, str):
            freqs = llama3_divisors(model.head_dim, base, rope["factor"], rope["original_context"])
        values = np.asarray(freqs, np.float32)
        _add_tensor(writer, model, "rope_freqs.weight", quant_type("F32"), values.view(np.uint8), values.shape)
        return
    if "type" in rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["type"]))
    if "factor" in rope:
        writer.add_rope_scaling_factor(rope["factor"])
    if "original_context" in rope:
        writer.add_rope_scaling_orig_ctx_len(rope["original_context"])
    if "attn_factor" in rope:
        writer.add_rope_scaling_attn_factors(rope["attn_factor"])
