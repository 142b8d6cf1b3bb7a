"""What tests compare with: block formats by the `gguf` package or by definition, and a plain numpy llama.

Nothing here uses hipquant's own reader or kernels. The forward pass follows llama.cpp, against which it was checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import gguf.quants
import numpy as np
import numpy.typing as npt

from hipquant.quants import QK8_1, QuantType, padded, quant_type

F32Array = npt.NDArray[np.float32]
Raw = npt.NDArray[np.uint8]


def nmse(found: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Normalized mean squared error: |found - expected|² / |expected|²; infinite if anything found is not finite."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: found {a.shape}, expected {b.shape}")
    if not np.isfinite(a).all():
        return float("inf")
    error, power = float(((a - b) ** 2).sum()), float((b**2).sum())
    return error / power if power else (0.0 if error == 0 else float("inf"))


def dequantize(which: QuantType | str, raw: Raw, shape: tuple[int, ...]) -> F32Array:
    """Values of rows of a type: float32 of this (row-major) shape."""
    kind = quant_type(which)
    blocks = np.ascontiguousarray(raw).reshape(-1, kind.block_bytes)
    if kind.name == "Q8_K":
        values = blocks[:, :4].copy().view("<f4") * blocks[:, 4:260].view(np.int8)
    elif kind.name == "Q8_1":
        values = blocks[:, :2].copy().view("<f2").astype(np.float32) * blocks[:, 4:].view(np.int8)
    else:
        rows = blocks.reshape(-1, kind.row_bytes(shape[-1]))
        values = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind.ggml_id))
    return np.asarray(values, np.float32).reshape(shape)


def quantize_q8_1(x: F32Array) -> Raw:
    """Activations float32 [rows, k] as q8_1: uint8 [rows, padded(k) / 32 * 36]; blocks of half d = max|x| / 127, half
    s = Σx and 32 int8 round(x / d), ties away from zero. What pads a row is zero."""
    rows, k = x.shape
    wide = np.zeros((rows, padded(k)), np.float32)
    wide[:, :k] = x
    blocks = wide.reshape(-1, QK8_1)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    q = np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0)
    q = np.trunc(q + np.copysign(np.float32(0.5), q)).astype(np.int8)
    scales = np.concatenate([d, blocks.sum(axis=1, keepdims=True)], axis=1).astype("<f2")
    return np.concatenate([scales.view(np.uint8), q.view(np.uint8)], axis=1).reshape(rows, -1)


class LlamaReference:
    """A llama-architecture model in float32 numpy: `forward` computes all positions at once, with no cache."""

    def __init__(self, path: str | Path) -> None:
        reader = gguf.GGUFReader(path)
        self.keys: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors: dict[str, F32Array] = {}
        for t in reader.tensors:
            shape = tuple(int(n) for n in reversed(t.shape))
            self.tensors[t.name] = dequantize(int(t.tensor_type), np.ascontiguousarray(t.data).view(np.uint8), shape)
        self.n_layer, self.n_head = self._key("block_count"), self._key("attention.head_count")
        self.n_kv = self._key("attention.head_count_kv", self.n_head)
        self.n_embd = self._key("embedding_length")
        self.head_dim = self._key("attention.key_length", self.n_embd // self.n_head)
        self.eps = np.float32(self._key("attention.layer_norm_rms_epsilon"))
        self.output = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        # What a llama does not have; tests may set it.
        self.scale, self.softcap, self.window = self.head_dim**-0.5, 0.0, 0
        self.q_norm: F32Array | None = None
        self.k_norm: F32Array | None = None
        self.sinks: F32Array | None = None
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._key(key, self.head_dim) != self.head_dim:
                raise NotImplementedError(f"{key} differs from the head's dimension")

    def _key(self, key: str, default: Any = None) -> Any:
        value = self.keys.get(f"llama.{key}", default)
        if value is None:
            raise KeyError(key)
        return value

    def forward(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]], start: int = 0) -> F32Array:
        """Logits float32 [n_tokens, n_vocab] of tokens at the positions start, start + 1, …"""
        x = self.tensors["token_embd.weight"][np.asarray(tokens)]
        cos, sin = self.rotations(np.arange(start, start + len(tokens)))
        for i in range(self.n_layer):
            h = self._norm(x, f"blk.{i}.attn_norm.weight")
            x = x + self._attention(i, h, cos, sin)
            h = self._norm(x, f"blk.{i}.ffn_norm.weight")
            gate, up = self._linear(i, "ffn_gate", h), self._linear(i, "ffn_up", h)
            x = x + self._linear(i, "ffn_down", gate / (1 + np.exp(-gate)) * up)
        return self._norm(x, "output_norm.weight") @ self.output.T

    def _norm(self, x: F32Array, name: str) -> F32Array:
        return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * self.tensors[name]

    def _linear(self, layer: int, name: str, x: F32Array) -> F32Array:
        y = x @ self.tensors[f"blk.{layer}.{name}.weight"].T
        bias = self.tensors.get(f"blk.{layer}.{name}.bias")
        return y if bias is None else y + bias

    def _attention(self, layer: int, x: F32Array, cos: F32Array, sin: F32Array) -> F32Array:
        """Causal attention of groups of n_head / n_kv query heads to one key and value head each."""
        n, d, group = len(x), self.head_dim, self.n_head // self.n_kv
        q = rotate(self._norm_heads(self._linear(layer, "attn_q", x).reshape(n, self.n_head, d), self.q_norm), cos, sin)
        k = rotate(self._norm_heads(self._linear(layer, "attn_k", x).reshape(n, self.n_kv, d), self.k_norm), cos, sin)
        v = self._linear(layer, "attn_v", x).reshape(n, self.n_kv, d)
        k, v = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
        scores = np.einsum("ihd,jhd->hij", q, k) * np.float32(self.scale)
        if self.softcap:
            scores = self.softcap * np.tanh(scores / self.softcap)
        seen = np.tri(n, dtype=bool) & ~np.tri(n, k=-(self.window or n), dtype=bool)
        scores = np.where(seen, scores, np.float32(-np.inf))
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - top)
        sinks = 0 if self.sinks is None else np.exp(self.sinks[:, None, None] - top)
        weights /= weights.sum(axis=-1, keepdims=True) + sinks
        return self._linear(layer, "attn_output", np.einsum("hij,jhd->ihd", weights, v).reshape(n, -1))

    def _norm_heads(self, x: F32Array, weight: F32Array | None) -> F32Array:
        return x if weight is None else x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + self.eps) * weight

    def rotations(self, positions: npt.NDArray[np.integer[Any]]) -> tuple[F32Array, F32Array]:
        """Cosines and sines, float32 [n, head_dim / 2] each, of the rotation of every pair at every position.

        An angle is position · base^(-2i/d), divided by rope_freqs.weight if there is one. Linear scaling divides all
        angles by the factor; YaRN divides those of long waves, keeps those of short waves, blends in between, and
        makes the result longer by 1 + ln(factor)/10, as in ggml's rope_yarn.
        """
        d, base = self.head_dim, float(self._key("rope.freq_base", 10000.0))
        kind, factor = self._key("rope.scaling.type", "linear"), float(self._key("rope.scaling.factor", 0.0))
        factor = 1.0 if factor == 0 or kind == "none" else factor
        speed = base ** (-np.arange(0, d, 2) / d) / self.tensors.get("rope_freqs.weight", 1.0)
        length = float(self._key("rope.scaling.attn_factor", 1.0))
        if kind == "yarn":
            keep = self._yarn_keep(base)
            speed = speed / factor * (1 - keep) + speed * keep
            length *= 1 + 0.1 * np.log(max(factor, 1.0))
        elif kind in ("linear", "none"):
            speed = speed / factor
        else:
            raise NotImplementedError(f"rope scaling {kind!r}")
        angles = positions[:, None] * speed
        return (np.cos(angles) * length).astype(np.float32), (np.sin(angles) * length).astype(np.float32)

    def _yarn_keep(self, base: float) -> npt.NDArray[np.float64]:
        """How much of its own angle each pair keeps: 1 for pairs that turn more than 32 times in the original
        context, 0 for less than once, in between linear in the index of the pair."""
        d, context = self.head_dim, self._key("rope.scaling.original_context_length", self._key("context_length"))
        first, last = (d * np.log(context / (turns * 2 * np.pi)) / (2 * np.log(base)) for turns in (32, 1))
        low, high = max(0.0, np.floor(first)), min(d - 1.0, np.ceil(last))
        return 1 - np.clip((np.arange(d // 2) - low) / max(0.001, high - low), 0, 1)


def rotate(x: F32Array, cos: F32Array, sin: F32Array) -> F32Array:
    """Rotates the pairs (2i, 2i + 1) of heads [n, heads, head_dim]: ggml's "norm" RoPE."""
    even, odd, cos, sin = x[..., 0::2], x[..., 1::2], cos[:, None], sin[:, None]
    return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
