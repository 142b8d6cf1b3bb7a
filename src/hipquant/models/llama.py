"""The llama architecture: Llama 2 and 3, Mistral, TinyLlama, SmolLM and what else GGUF files call `llama`.

Pre-norm blocks with grouped-query attention, rotary positions on neighbouring pairs, and a SiLU-gated unit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..driver import Device
from ..gguf_file import GGUFFile
from .layers import EMBEDDING, OUTPUT, Blocks, L, Layer, Matrix, Rope, Sizes, Weights
from .model import Model, open_weights

MAX_DEFAULT_CONTEXT = 8192
MAX_HEAD_DIM = 512


@dataclass(frozen=True)
class Config(Sizes):
    """Sizes of a llama model, read from the metadata and checked against each other."""

    n_context: int  # that the model was trained for

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


def _layer(w: Weights[L], c: Config, i: int) -> Layer[L]:
    b, q, kv = f"blk.{i}.", c.n_head * c.head_dim, c.n_head_kv * c.head_dim

    def matrix(name: str, rows: int) -> Matrix:
        return Matrix(f"{b}{name}.weight", rows, f"{b}{name}.bias")

    return Layer(
        attn_norm=w.vector(b + "attn_norm.weight", c.n_embd),
        qkv=w.products(c.n_embd, matrix("attn_q", q), matrix("attn_k", kv), matrix("attn_v", kv)),
        attn_output=w.products(q, matrix("attn_output", c.n_embd)),
        ffn_norm=w.vector(b + "ffn_norm.weight", c.n_embd),
        gate_up=w.products(c.n_embd, matrix("ffn_gate", c.n_ff), matrix("ffn_up", c.n_ff)),
        down=w.products(c.n_ff, matrix("ffn_down", c.n_embd)),
    )


class Llama(Model):
    """A llama model on a device; see `Model` for its use."""

    def __init__(self, config: Config, weights: Weights[L], blocks: Blocks[L], context: int, sequences: int) -> None:
        super().__init__(weights, blocks, context, sequences)
        self.config, self.layers = config, [_layer(weights, config, i) for i in range(config.n_layer)]
        self.norm = weights.vector("output_norm.weight", config.n_embd)
        weights.finish()

    def _step(self, n: int) -> None:
        self.blocks.embed(n)
        for i, layer in enumerate(self.layers):
            self.blocks.attention(layer, i, n)
            self.blocks.feed_forward(layer, n)
        self.blocks.finish(self.norm, n)


def load(
    file: GGUFFile,
    device: Device,
    context: int | None,
    sequences: int,
    progress: Callable[[int, int], None] | None,
    gpu_layers: int | None = None,
) -> Llama:
    """A llama model from an open file; see `hipquant.load`."""
    config = Config.read(file)
    if context is not None and not 1 <= context <= config.n_context:
        raise ValueError(f"context must be from 1 to the {config.n_context} that the model was made for, not {context}")
    if not 1 <= sequences <= 1024:
        raise ValueError(f"sequences must be from 1 to 1024, not {sequences}")
    context = context or min(config.n_context, MAX_DEFAULT_CONTEXT)
    weights = open_weights(file, device, progress, gpu_layers)
    if "rope_freqs.weight" in file.tensors:
        factors = weights.floats("rope_freqs.weight", config.rope.n_rot // 2)
        if not (factors > 0).all():
            file.fail("tensor 'rope_freqs.weight' must be above 0 everywhere; convert the model again")
        config = replace(config, rope=replace(config.rope, factors=factors))
    output = OUTPUT if OUTPUT in file.tensors else EMBEDDING
    return Llama(config, weights, weights.blocks(config, EMBEDDING, output, sequences, context), context, sequences)
