"""The gemma2 architecture: Gemma 2.

What attention and the GELU-gated unit give is normed once more before it is added. Every other layer sees a window of
positions only; scores of attention and logits are soft-capped; the embedding is scaled.
"""

from __future__ import annotations

import math
from dataclasses import replace

from .config import Config, Keys
from .layers import L, Layer, Weights, matrix
from .model import Model

LAYERS_OF_27B = 46
WINDOW, PERIOD = 4096, 2  # where the metadata have none
ATTN_SOFTCAP, LOGIT_SOFTCAP = 50.0, 30.0


class Gemma2(Model):
    """A gemma2 model on a device; see `Model` for its use."""

    @classmethod
    def read_config(cls, keys: Keys) -> Config:
        c = Config.read(keys)
        base = keys.rope_base("rope.freq_base_swa", c.rope.base)
        return replace(
            c,
            split_pairs=True,
            activation="gelu",
            embedding_scale=math.sqrt(c.n_embd),
            attn_scale=(c.n_embd / c.n_head) ** -0.5 if c.n_layer == LAYERS_OF_27B else c.head_dim**-0.5,
            attn_softcap=keys.softcap("attn_logit_softcapping", ATTN_SOFTCAP),
            logit_softcap=keys.softcap("final_logit_softcapping", LOGIT_SOFTCAP),
            windows=keys.windows(c.n_layer, WINDOW, PERIOD),
            local_rope=replace(c.rope, base=base),
        )

    @classmethod
    def layer(cls, w: Weights[L], c: Config, i: int) -> Layer[L]:
        b, q = f"blk.{i}.", c.n_head * c.head_dim
        return Layer(
            attn_norm=w.vector(f"{b}attn_norm.weight", c.n_embd),
            qkv=w.queries_keys_values(c, b),
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


load = Gemma2.load
