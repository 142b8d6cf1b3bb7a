"""The llama architecture: Llama 2 and 3, Mistral, Mixtral, TinyLlama, SmolLM and what else GGUF files call `llama`.

Pre-norm blocks with grouped-query attention, rotary positions on neighbouring pairs, and a SiLU-gated unit, or several
of them, the experts, of which a router chooses some for each token.
"""

from __future__ import annotations

from dataclasses import replace

from .config import Config, Keys
from .layers import L, Layer, Rope, Weights, matrix
from .model import Model


class Llama(Model):
    """A llama model on a device; see `Model` for its use."""

    @classmethod
    def read_config(cls, keys: Keys) -> Config:
        return Config.read(keys, experts=True)

    @classmethod
    def rope(cls, config: Config, weights: Weights[L], context: int) -> Rope:
        """Llama 3 has factors of the frequencies in a tensor."""
        if "rope_freqs.weight" not in weights.file.tensors:
            return config.rope
        return replace(config.rope, factors=weights.rope_factors("rope_freqs.weight", config.rope.n_rot))

    @classmethod
    def layer(cls, w: Weights[L], c: Config, i: int) -> Layer[L]:
        b, q = f"blk.{i}.", c.n_head * c.head_dim
        router: L | None = None
        if c.n_expert:
            router, gate_up, down = w.mixture_of_experts(c, b)
        else:
            gate_up = w.products(c.n_embd, matrix(f"{b}ffn_gate", c.n_ff), matrix(f"{b}ffn_up", c.n_ff))
            down = w.products(c.n_ff, matrix(f"{b}ffn_down", c.n_embd))
        return Layer(
            attn_norm=w.vector(f"{b}attn_norm.weight", c.n_embd),
            qkv=w.queries_keys_values(c, b),
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


load = Llama.load
