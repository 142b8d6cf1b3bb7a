"""What the metadata of a model file says of its sizes, each key checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from ..gguf_file import GGUFFile
from .layers import EMBEDDING, Rope, Sizes

MAX_HEAD_DIM = 512
MAX_CONTEXT = 1 << 30
MAX_EXPERTS = 512  # kernels/cpu/experts.h
MAX_EXPERTS_USED = 32  # by a token
SCALINGS = ("none", "linear", "yarn")


class Keys:
    """The keys of a model under the name of its architecture. All raise `InvalidModelFileError`."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.architecture = file, file.require("general.architecture", str)

    def name(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def __contains__(self, key: str) -> bool:
        return self.name(key) in self.file.metadata

    def size(self, key: str, default: int | None = None, most: int = 1 << 24, least: int = 1) -> int:
        """A whole number within limits."""
        name, file = self.name(key), self.file
        value = file.require(name, int) if default is None else file.get(name, int, default)
        if not least <= value <= most:
            file.fail(f"key {name!r} is {value}, expected {least} to {most}; convert the model again")
        return value

    def positive(self, key: str, most: float, default: float | None = None) -> float:
        """A number above 0."""
        name, file = self.name(key), self.file
        value = file.require(name, float) if default is None else file.get(name, float, default)
        if not 0 < value <= most:
            expected = f"expected a number above 0 and at most {most:g}"
            file.fail(f"key {name!r} is {value}, {expected}; convert the model again")
        return value

    def softcap(self, key: str, default: float = 0.0) -> float:
        """The bound of scores or logits; 0, as well as no key where that is the default, is none."""
        cap = self.file.get(self.name(key), float, default)
        return self.positive(key, 1e6, default) if cap else 0.0

    def rope(self, n_rot: int, n_context: int, scalings: tuple[str, ...] = SCALINGS) -> Rope:
        """How positions are encoded."""
        scaling = self.file.get(self.name("rope.scaling.type"), str, "linear")  # a factor alone means linear scaling
        legacy = self.file.get(self.name("rope.scale_linear"), float, 0.0)
        if scaling not in scalings:
            known = ", ".join(scalings)
            self.file.fail(f"key {self.name('rope.scaling.type')!r} is {scaling!r}; supported: {known}")
        return Rope(
            n_rot,
            self.rope_base("rope.freq_base", 10000.0),
            scaling,
            self.positive("rope.scaling.factor", 1e6, legacy or 1.0),
            self.size("rope.scaling.original_context_length", n_context, MAX_CONTEXT),
            self.positive("rope.scaling.attn_factor", 1e6, 1.0),
        )

    def rope_base(self, key: str, default: float) -> float:
        base = self.positive(key, 1e30, default)
        if base <= 1:
            self.file.fail(f"key {self.name(key)!r} is {base}, expected a number above 1")
        return base

    def windows(self, n_layer: int, window: int, period: int) -> tuple[int, ...]:
        """The sliding window of each layer, 0 for those that attend to all positions; with defaults.

        The pattern is a list with an entry a layer, or a period: its last layer has no window.
        """
        window = self.size("attention.sliding_window", window, MAX_CONTEXT, least=0)
        name = self.name("attention.sliding_window_pattern")
        pattern = self.file.metadata.get(name, period)
        if isinstance(pattern, np.ndarray):
            if pattern.ndim != 1 or len(pattern) < n_layer or pattern.dtype.kind not in "biu":
                self.file.fail(f"key {name!r} is not a list of yes or no for {n_layer} layers; convert the model again")
            return tuple(window if local else 0 for local in pattern[:n_layer].tolist())
        period = self.size("attention.sliding_window_pattern", period, 1024)
        return tuple(window if i % period < period - 1 else 0 for i in range(n_layer))


@dataclass(frozen=True, kw_only=True)
class Config(Sizes):
    """Sizes of a model, read from the metadata and checked against each other."""

    n_context: int  # that the model was trained for
    windows: tuple[int, ...] = ()  # of the layers, where some have one

    @classmethod
    def read(
        cls,
        keys: Keys,
        *,
        eps: str = "layer_norm_rms_epsilon",
        scalings: tuple[str, ...] = SCALINGS,
        experts: bool = False,
    ) -> Self:
        """What all architectures have, and the numbers of `experts` where it may have some. Raises
        `InvalidModelFileError` for what is missing or contradictory."""
        file = keys.file
        n_expert = keys.size("expert_count", 0, MAX_EXPERTS, least=0)
        if n_expert and not experts:
            file.fail(f"a mixture of experts is not supported for {keys.architecture!r}; use a dense model")
        n_embd, n_head = keys.size("embedding_length"), keys.size("attention.head_count", most=4096)
        head_dim = keys.size("attention.key_length", max(1, n_embd // n_head), MAX_HEAD_DIM)
        if "attention.key_length" not in keys and n_embd % n_head:
            file.fail(f"{n_head} heads do not divide an embedding of {n_embd}; convert the model again")
        if keys.size("attention.value_length", head_dim, MAX_HEAD_DIM) != head_dim:
            file.fail("keys and values of different lengths are not supported")
        n_head_kv = keys.size("attention.head_count_kv", n_head, 4096)
        if n_head % n_head_kv:
            file.fail(f"{n_head_kv} key-value heads do not divide {n_head} heads; convert the model again")
        embedding = file.tensors.get(EMBEDDING)
        if embedding is None or len(embedding.shape) != 2:
            file.fail(f"tensor {EMBEDDING!r} is missing or not a matrix; the file is not a whole model")
        n_rot = keys.size("rope.dimension_count", head_dim, MAX_HEAD_DIM)
        if n_rot > head_dim or n_rot % 2:
            name = keys.name("rope.dimension_count")
            file.fail(f"key {name!r} is {n_rot}, expected an even number of at most {head_dim}")
        n_context = keys.size("context_length", most=MAX_CONTEXT)
        return cls(
            n_layer=keys.size("block_count", most=1024),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_dim=head_dim,
            n_ff=keys.size("feed_forward_length"),
            n_vocab=embedding.shape[0],
            n_context=n_context,
            eps=keys.positive(f"attention.{eps}", 1.0),
            rope=keys.rope(n_rot, n_context, scalings),
            n_expert=n_expert,
            n_expert_used=keys.size("expert_used_count", most=min(n_expert, MAX_EXPERTS_USED)) if n_expert else 0,
        )
