"""The gemma3 architecture: the text models of Gemma 3.

As gemma2 without soft-capping of scores, but queries and keys are RMS-normed by head. Five layers of six see a window
of positions only, and have rotary positions of their own, which are not scaled.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .config import Config, Keys
from .layers import L, Layer, Weights, matrix
from .model import Model

LAYERS_OF_27B = 62
PERIOD, LOCAL_BASE = 6, 10000.0  # where the metadata have none


class Gemma3(Model):
    """A gemma3 model on a device; see `Model` for its use."""

    @classmethod
    def read_config(cls, keys: Keys) -> Config:
        c = Config.read(keys)
        base = keys.rope_base("rope.freq_base_swa", LOCAL_BASE)
        return replace(
            c,
            split_pairs=True,
            activation="gelu",
            embedding_scale=math.sqrt(c.n_embd),
            attn_scale=(c.n_embd / c.n_head) ** -0.5 if c.n_layer == LAYERS_OF_27B else c.head_dim**-0.5,
            logit_softcap=keys.softcap("final_logit_softcapping"),
            windows=keys.windows(c.n_layer, 0, PERIOD),
            local_rope=replace(c.rope, base=base, scaling="none", factor=1.0),
        )

    @classmethod
    def layer(cls, w: Weights[L], c: Config, i: int) -> Layer[L]:
        b, q = f"blk.{i}.", c.n_head * c.head_dim
        return Layer(
            attn_norm=w.vector(f"{b}attn_norm.weight", c.n_embd),
            qkv=w.queries_keys_values(c, b),
            q_norm=w.head_norm(c, f"{b}attn_q_norm.weight"),
            k_norm=w.head_norm(c, f"{b}attn_k_norm.weight"),
            window=c.windows[i],
            attn_output=w.products(q, matrix(f"{b}attn_output", c.n_embd)),
            attn_post_norm=w.vector(f"{b}post_attention_norm.weight", c.n_embd),
            ffn_norm=w.vector(f"{b}ffn_norm.weight", c.n_embd),
            gate_up=w.products(c.n_embd, matrix(f"{b}ffn_gate", c.n_ff), matrix(f"{b}ffn_up", c.n_ff)),
            down=w.products(c.n_ff, matrix(f"{b}ffn_down", c.n_embd)),
            ffn_post_norm=w.vector(f"{b}post_ffw_norm.weight", c.n_embd),
        )

    def _step(self, n: int) -> None:
        self.blocks.embed(n)
        for i, layer in enumerate(self.layers):
            self.blocks.attention(layer, i, n)
            self.blocks.feed_forward(layer, n)
        self.blocks.finish(self.norm, n)


load = Gemma3.load
