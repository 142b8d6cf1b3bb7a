"""The phi2 architecture: Phi 1, 1.5 and 2.

Attention and a GELU unit without a gate take the same layer norm and are added to the residual stream together. All
matrices have biases, and rotary positions turn a part of a head only.
"""

from __future__ import annotations

from dataclasses import replace

from .config import Config, Keys
from .layers import L, Layer, Weights, matrix
from .model import Model


class Phi2(Model):
    """A phi2 model on a device; see `Model` for its use."""

    @classmethod
    def read_config(cls, keys: Keys) -> Config:
        config = Config.read(keys, eps="layer_norm_epsilon")
        return replace(config, split_pairs=True, layer_norm=True, activation="gelu", gated=False)

    @classmethod
    def layer(cls, w: Weights[L], c: Config, i: int) -> Layer[L]:
        b, q = f"blk.{i}.", c.n_head * c.head_dim
        return Layer(
            attn_norm=w.vector(f"{b}attn_norm.weight", c.n_embd),
            attn_norm_bias=w.vector(f"{b}attn_norm.bias", c.n_embd),
            qkv=w.queries_keys_values(c, b),
            attn_output=w.products(q, matrix(f"{b}attn_output", c.n_embd)),
            ffn_norm=None,
            gate_up=w.products(c.n_embd, matrix(f"{b}ffn_up", c.n_ff)),
            down=w.products(c.n_ff, matrix(f"{b}ffn_down", c.n_embd)),
        )

    def _step(self, n: int) -> None:
        self.blocks.embed(n)
        for i, layer in enumerate(self.layers):
            self.blocks.attention(layer, i, n)
            self.blocks.feed_forward(layer, n)
        self.blocks.finish(self.norm, n, self.norm_bias)


load = Phi2.load
