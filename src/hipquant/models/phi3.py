"""The phi3 architecture: Phi 3, 3.5 and 4.

As llama, with queries, keys and values in one matrix, gate and up in another, and rotary positions on pairs that are
half a head apart. Long contexts have other frequencies (LongRoPE, arXiv 2402.13753). The sliding window that some files
name is not applied: llama.cpp, which makes these files, does not either.
"""

from __future__ import annotations

from dataclasses import replace

from .config import SCALINGS, Config, Keys
from .layers import L, Layer, Rope, Weights, matrix
from .model import Model


class Phi3(Model):
    """A phi3 model on a device; see `Model` for its use."""

    @classmethod
    def read_config(cls, keys: Keys) -> Config:
        return replace(Config.read(keys, scalings=(*SCALINGS, "longrope")), split_pairs=True)

    @classmethod
    def rope(cls, config: Config, weights: Weights[L], context: int) -> Rope:
        """Frequencies for contexts up to the original one, and for longer ones: chosen once, for the context loaded."""
        rope = config.rope
        name = f"rope_factors_{'long' if context > rope.original_context else 'short'}.weight"
        if name not in weights.file.tensors:
            return rope
        return replace(rope, factors=weights.rope_factors(name, rope.n_rot))

    @classmethod
    def layer(cls, w: Weights[L], c: Config, i: int) -> Layer[L]:
        b, q = f"blk.{i}.", c.n_head * c.head_dim
        gate, up = (matrix(f"{b}ffn_up", c.n_ff, first, 2 * c.n_ff) for first in (0, c.n_ff))
        return Layer(
            attn_norm=w.vector(f"{b}attn_norm.weight", c.n_embd),
            qkv=w.queries_keys_values(c, b),
            attn_output=w.products(q, matrix(f"{b}attn_output", c.n_embd)),
            ffn_norm=w.vector(f"{b}ffn_norm.weight", c.n_embd),
            gate_up=w.products(c.n_embd, gate, up),
            down=w.products(c.n_ff, matrix(f"{b}ffn_down", c.n_embd)),
        )

    def _step(self, n: int) -> None:
        self.blocks.embed(n)
        for i, layer in enumerate(self.layers):
            self.blocks.attention(layer, i, n)
            self.blocks.feed_forward(layer, n)
        self.blocks.finish(self.norm, n)


load = Phi3.load
