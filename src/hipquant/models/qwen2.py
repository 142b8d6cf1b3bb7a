"""The qwen2 architecture: Qwen 1.5, 2 and 2.5, QwQ, and DeepSeek's distillations into them.

As llama, with biases of queries, keys and values, and rotary positions on pairs that are half a head apart.
"""

from __future__ import annotations

from dataclasses import replace

from .config import Config, Keys
from .layers import L, Layer, Weights, matrix
from .model import Model


class Qwen2(Model):
    """A qwen2 model on a device; see `Model` for its use."""

    @classmethod
    def read_config(cls, keys: Keys) -> Config:
        return replace(Config.read(keys), split_pairs=True)

    @classmethod
    def layer(cls, w: Weights[L], c: Config, i: int) -> Layer[L]:
        b, q = f"blk.{i}.", c.n_head * c.head_dim
        return Layer(
            attn_norm=w.vector(f"{b}attn_norm.weight", c.n_embd),
            qkv=w.queries_keys_values(c, b),
            attn_output=w.products(q, matrix(f"{b}attn_output", c.n_embd)),
            ffn_norm=w.vector(f"{b}ffn_norm.weight", c.n_embd),
            gate_up=w.products(c.n_embd, matrix(f"{b}ffn_gate", c.n_ff), matrix(f"{b}ffn_up", c.n_ff)),
            down=w.products(c.n_ff, matrix(f"{b}ffn_down", c.n_embd)),
        )

    def _step(self, n: int) -> None:
        self.blocks.embed(n)
        for i, layer in enumerate(self.layers):
            self.blocks.attention(layer, i, n)
            self.blocks.feed_forward(layer, n)
        self.blocks.finish(self.norm, n)


load = Qwen2.load
