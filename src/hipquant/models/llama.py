"""The llama architecture: Llama 2 and 3, Mistral, TinyLlama, SmolLM and what else GGUF files call `llama`.

Pre-norm blocks with grouped-query attention, rotary positions on neighbouring pairs, and a SiLU-gated unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .. import wiring
from ..driver import Buffer, Device
from ..gguf_file import GGUFFile
from .layers import Activations, Floats, KVCache, Linear, Rope, Weights
from .model import CHUNK, Model

MAX_DEFAULT_CONTEXT = 8192
MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class Config:
    """Sizes of a llama model, read from the metadata and checked against each other."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    n_context: int  # that the model was trained for
    eps: float
    rope: Rope

    @classmethod
    def read(cls, file: GGUFFile) -> Config:
        """Raises `InvalidModelFileError` for what is missing or contradictory."""

        def size(key: str, default: int | None = None, most: int = 1 << 24) -> int:
            value = file.require(f"llama.{key}", int) if default is None else file.get(f"llama.{key}", int, default)
            if not 1 <= value <= most:
                file.fail(f"key 'llama.{key}' is {value}, expected 1 to {most}; convert the model again")
            return value

        if file.get("llama.expert_count", int, 0):
            file.fail("the model has a mixture of experts, which is not supported yet; use a dense model")
        n_embd, n_head = size("embedding_length"), size("attention.head_count", most=4096)
        head_dim = size("attention.key_length", max(1, n_embd // n_head), MAX_HEAD_DIM)
        if "llama.attention.key_length" not in file.metadata and n_embd % n_head:
            file.fail(f"{n_head} heads do not divide an embedding of {n_embd}; convert the model again")
        if size("attention.value_length", head_dim, MAX_HEAD_DIM) != head_dim:
            file.fail("keys and values of different lengths are not supported")
        n_head_kv = size("attention.head_count_kv", n_head, 4096)
        if n_head % n_head_kv:
            file.fail(f"{n_head_kv} key-value heads do not divide {n_head} heads; convert the model again")
        embedding = file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            file.fail("tensor 'token_embd.weight' is missing or not a matrix; the file is not a whole model")
        n_rot = size("rope.dimension_count", head_dim, MAX_HEAD_DIM)
        if n_rot > head_dim or n_rot % 2:
            file.fail(f"key 'llama.rope.dimension_count' is {n_rot}, expected an even number of at most {head_dim}")
        return cls(
            n_layer=size("block_count", most=1024),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_ff=size("feed_forward_length"),
            n_vocab=embedding.shape[0],
            n_context=size("context_length", most=1 << 30),
            eps=_positive(file, "llama.attention.layer_norm_rms_epsilon", 1.0),
            rope=_rope(file, n_rot, size("context_length", most=1 << 30)),
        )


def _positive(file: GGUFFile, key: str, most: float, default: float | None = None) -> float:
    value = file.require(key, float) if default is None else file.get(key, float, default)
    if not 0 < value <= most:
        file.fail(f"key {key!r} is {value}, expected a number above 0 and at most {most:g}; convert the model again")
    return value


def _rope(file: GGUFFile, n_rot: int, n_context: int) -> Rope:
    scaling = file.get("llama.rope.scaling.type", str, "linear")  # a factor alone means linear scaling
    legacy = file.get("llama.rope.scale_linear", float, 0.0)
    if scaling not in ("none", "linear", "yarn"):
        file.fail(f"key 'llama.rope.scaling.type' is {scaling!r}; supported: none, linear, yarn")
    factor = _positive(file, "llama.rope.scaling.factor", 1e6, legacy or 1.0)
    base = _positive(file, "llama.rope.freq_base", 1e30, 10000.0)
    if base <= 1:
        file.fail(f"key 'llama.rope.freq_base' is {base}, expected a number above 1")
    original = file.get("llama.rope.scaling.original_context_length", int, n_context)
    if original < 1:
        file.fail(f"key 'llama.rope.scaling.original_context_length' is {original}, expected at least 1")
    attention = _positive(file, "llama.rope.scaling.attn_factor", 1e6, 1.0)
    return Rope(n_rot, base, scaling, factor, original, attention)


@dataclass
class Layer:
    """The weights of one block."""

    attn_norm: Buffer
    q: Linear
    k: Linear
    v: Linear
    attn_output: Linear
    ffn_norm: Buffer
    gate: Linear
    up: Linear
    down: Linear

    @classmethod
    def load(cls, w: Weights, c: Config, i: int) -> Layer:
        b, q, kv = f"blk.{i}.", c.n_head * c.head_dim, c.n_head_kv * c.head_dim
        return cls(
            attn_norm=w.vector(b + "attn_norm.weight", c.n_embd),
            q=w.linear(b + "attn_q.weight", q, c.n_embd, b + "attn_q.bias"),
            k=w.linear(b + "attn_k.weight", kv, c.n_embd, b + "attn_k.bias"),
            v=w.linear(b + "attn_v.weight", kv, c.n_embd, b + "attn_v.bias"),
            attn_output=w.linear(b + "attn_output.weight", c.n_embd, q, b + "attn_output.bias"),
            ffn_norm=w.vector(b + "ffn_norm.weight", c.n_embd),
            gate=w.linear(b + "ffn_gate.weight", c.n_ff, c.n_embd, b + "ffn_gate.bias"),
            up=w.linear(b + "ffn_up.weight", c.n_ff, c.n_embd, b + "ffn_up.bias"),
            down=w.linear(b + "ffn_down.weight", c.n_embd, c.n_ff, b + "ffn_down.bias"),
        )


class Llama(Model):
    """A llama model on a device; see `Model` for its use."""

    def __init__(self, file: GGUFFile, config: Config, weights: Weights, context: int, sequences: int) -> None:
        c, device = config, weights.device
        self.config = c
        self.embedding = weights.matrix("token_embd.weight", c.n_vocab, c.n_embd)
        self.embedding_type = file.tensors["token_embd.weight"].type
        self.layers = [Layer.load(weights, c, i) for i in range(c.n_layer)]
        self.output_norm = weights.vector("output_norm.weight", c.n_embd)
        tied = "output.weight" not in file.tensors
        self.output = weights.linear("token_embd.weight" if tied else "output.weight", c.n_vocab, c.n_embd)
        self.cache = KVCache(device, c.n_layer, sequences, c.n_head_kv, c.head_dim, context)
        rope = c.rope.table(self.cache.n_context)
        self.rope = device.allocate(rope.nbytes, "the RoPE table")
        self.rope.write(rope)
        n = CHUNK
        self.x = device.allocate(4 * n * c.n_embd, "activations")
        self.normed = Activations(weights.kernels, c.n_embd, n)
        self.attended = Activations(weights.kernels, c.n_head * c.head_dim, n)
        self.gated = Activations(weights.kernels, c.n_ff, n)
        self.q = device.allocate(4 * n * c.n_head * c.head_dim, "activations")
        self.k, self.v = (device.allocate(4 * n * c.n_head_kv * c.head_dim, "activations") for _ in range(2))
        self.gate, self.up = (device.allocate(4 * n * c.n_ff, "activations") for _ in range(2))
        self.branch = device.allocate(4 * n * c.n_embd, "activations")  # what the next norm adds to x
        super().__init__(file, weights, c.n_vocab, context, sequences, self.cache)

    def _norm(self, residual: Buffer | None, weight: Buffer, n: int) -> None:
        kernel = wiring.kernel("add_rms_norm_f32")
        c = self.config
        self.kernels(kernel, kernel.grid(rows=n), self.x, residual, weight, self.normed.floats, c.n_embd, c.eps)

    def _attention(self, layer: Layer, i: int, n: int) -> None:
        c, rope, attention = self.config, wiring.kernel("rope_store_kv"), wiring.kernel("attention_f16")
        self._quantize(self.normed, n, layer.q, layer.k, layer.v)
        layer.q(self.normed, self.q, n)
        layer.k(self.normed, self.k, n)
        layer.v(self.normed, self.v, n)
        where = (self.cache.keys[i], self.cache.values[i])
        sizes = (c.n_head, c.n_head_kv, c.head_dim)
        tokens = (self.positions, self.slots)
        self.kernels(rope, rope.grid(ntokens=n), self.q, self.k, self.v, *where, self.rope, *tokens, *sizes,
                     c.rope.n_rot, self.cache.n_context)  # fmt: skip
        self.kernels(attention, attention.grid(n_head_kv=c.n_head_kv, ntokens=n), self.q, *where,
                     self.attended.floats, *tokens, *sizes, self.cache.n_context, c.head_dim**-0.5)  # fmt: skip
        self._quantize(self.attended, n, layer.attn_output)
        layer.attn_output(self.attended, self.branch, n)

    def _feed_forward(self, layer: Layer, n: int) -> None:
        silu = wiring.kernel("silu_mul_f32")
        self._quantize(self.normed, n, layer.gate, layer.up)
        layer.gate(self.normed, self.gate, n)
        layer.up(self.normed, self.up, n)
        count = n * self.config.n_ff
        self.kernels(silu, silu.grid(n=count), self.gate, self.up, self.gated.floats, count)
        self._quantize(self.gated, n, layer.down)
        layer.down(self.gated, self.branch, n)

    def _step(self, n: int, logits: Buffer | Floats, first: int) -> None:
        """Launches the pass over n tokens that lie in the input buffers; logits[i] are of token first + i < n."""
        get_rows, c = wiring.find("get_rows", self.embedding_type), self.config
        self.kernels(get_rows, get_rows.grid(nids=n, k=c.n_embd), self.embedding, self.tokens, self.x, c.n_embd,
                     self.embedding_type.row_bytes(c.n_embd))  # fmt: skip
        residual = None
        for i, layer in enumerate(self.layers):
            self._norm(residual, layer.attn_norm, n)
            self._attention(layer, i, n)
            self._norm(self.branch, layer.ffn_norm, n)
            self._feed_forward(layer, n)
            residual = self.branch
        if first == n:
            return
        self._norm(residual, self.output_norm, n)
        if self.output.quantized:
            self.normed.quantize(n - first, first)
        self.output(self.normed, logits, n - first, first)

    @staticmethod
    def _quantize(x: Activations, n: int, *consumers: Linear) -> None:
        if any(linear.quantized for linear in consumers):
            x.quantize(n)


def load(
    file: GGUFFile, device: Device, context: int | None, sequences: int, progress: Callable[[int, int], None] | None
) -> Llama:
    """A llama model from an open file; see `hipquant.load`."""
    config = Config.read(file)
    if context is not None and not 1 <= context <= config.n_context:
        raise ValueError(f"context must be from 1 to the {config.n_context} that the model was made for, not {context}")
    if not 1 <= sequences <= 1024:
        raise ValueError(f"sequences must be from 1 to 1024, not {sequences}")
    factors = file.tensors.get("rope_freqs.weight")
    weights = Weights(file, device, progress)
    if factors is not None:
        n = config.rope.n_rot // 2
        values = weights.vector("rope_freqs.weight", n).read(np.float32, (n,))
        if not (values > 0).all():
            file.fail("tensor 'rope_freqs.weight' must be above 0 everywhere; convert the model again")
        config = replace(config, rope=replace(config.rope, factors=values))
    return Llama(file, config, weights, context or min(config.n_context, MAX_DEFAULT_CONTEXT), sequences)
