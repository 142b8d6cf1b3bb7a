"""The qwen3moe architecture: Qwen 3 with a mixture of experts.

As qwen3, but each feed-forward unit is one of many experts; a router chooses some of them for each token.
"""

from __future__ import annotations

from dataclasses import replace

from .config import Config, Keys
from .layers import L, Layer, Weights, matrix
from .model import Model


class Qwen3Moe(Model):
    """A qwen3moe model on a device; see `Model` for its use."""

    @classmethod
    def read_config(cls, keys: Keys) -> Config:
        config = Config.read(keys, experts=True)
        if not config.n_expert:
            keys.file.fail(f"key {keys.name('expert_count')!r} is missing or 0; convert the model again")
        n_ff = keys.size("expert_feed_forward_length")
        return replace(config, split_pairs=True, n_ff=n_ff)

    @classmethod
    def layer(cls, w: Weights[L], c: Config, i: int) -> Layer[L]:
        b, q = f"blk.{i}.", c.n_head * c.head_dim
        router, gate_up, down = w.mixture_of_experts(c, b)
        return Layer(
            attn_norm=w.vector(f"{b}attn_norm.weight", c.n_embd),
            qkv=w.queries_keys_values(c, b),
            q_norm=w.head_norm(c, f"{b}attn_q_norm.weight"),
            k_norm=w.head_norm(c, f"{b}attn_k_norm.weight"),
            attn_output=w.products(q, matrix(f"{b}attn_output", c.n_embd)),
            ffn_norm=w.vector(f"{b}ffn_norm.weight", c.n_embd),
            gate_up=gate_up,
            down=down,
            router=router,
        )

    def _step(self, n: int) -> None:
        self.blocks.embed(n)
        for i, layer in enumerate(self.layers):
            self.blocks.attention(layer, i, n)
            self.blocks.feed_forward(layer, n)
        self.blocks.finish(self.norm, n)


load = Qwen3Moe.load
