"""Attention as other architectures than llama have it: soft-capped scores, windows, normed queries and keys, sinks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import hipquant as hq
from hipquant.models.llama import Llama
from models import write_llama
from reference import LlamaReference, nmse
from simulated_gpu import KINDS, SimulatedGpu, simulated_gpu

FLOAT_LIMIT = 2e-5  # with float weights only the KV cache is rounded, to half precision
SMALL: dict[str, Any] = {"n_vocab": 96, "n_embd": 64, "n_head": 4, "n_kv": 2, "n_ff": 96, "n_layer": 2, "context": 256}
VARIANTS = ("scale and cap", "window", "norms", "sinks", "all")


def change(model: hq.Model, reference: LlamaReference, which: str) -> None:
    """Gives a model's attention what a llama does not have, and its reference the same."""
    assert isinstance(model, Llama)
    rng, sizes = np.random.default_rng(0), model.blocks.sizes

    def chosen(name: str) -> bool:
        return which in (name, "all")

    def vector(n: int, mean: float) -> npt.NDArray[np.float32]:
        return (mean + 0.5 * rng.standard_normal(n)).astype(np.float32)

    if chosen("scale and cap"):
        reference.scale, reference.softcap = 0.4, 3.0
        model.blocks.sizes = dataclasses.replace(sizes, attn_scale=0.4, attn_softcap=3.0)
    if chosen("norms"):
        reference.q_norm, reference.k_norm = vector(sizes.head_dim, 1), vector(sizes.head_dim, 1)
    if chosen("sinks"):
        reference.sinks = vector(sizes.n_head, 1)
    reference.window = 17 if chosen("window") else 0
    for layer in model.layers:
        layer.window = reference.window
        for name in ("q_norm", "k_norm", "sinks"):
            values = getattr(reference, name)
            setattr(layer, name, None if values is None else model.device.upload(values))


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-waves-of-{p[1]}")
def gpu(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu]:
    with simulated_gpu(*request.param) as simulated:
        yield simulated


def check(model: hq.Model, reference: LlamaReference, n: int, few: tuple[int, ...]) -> None:
    """Long passes, and passes of a few tokens, from the first one on and behind others."""
    tokens = np.random.default_rng(1).integers(0, model.n_vocab, n).tolist()
    expected = reference.forward(tokens)
    assert nmse(model.forward(tokens, 0, logits="all"), expected) <= FLOAT_LIMIT
    for at in few:
        found = [model.forward(tokens[:at], 0, sequence=1), model.forward(tokens[at : at + 3], at, sequence=1)]
        assert nmse(found, expected[[at - 1, at + 2]]) <= FLOAT_LIMIT


@pytest.mark.parametrize("which", VARIANTS)
@pytest.mark.parametrize("shape", [{"head_dim": 64, "n_head": 8, "n_kv": 1}, {"head_dim": 20}], ids=str)
def test_on_the_cpu(which: str, shape: dict[str, Any], tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", type="F32", **(SMALL | shape))
    model, reference = hq.load(tmp_path / "m.gguf", device="cpu", sequences=2), LlamaReference(tmp_path / "m.gguf")
    without = reference.forward(range(40))
    change(model, reference, which)
    assert nmse(reference.forward(range(40)), without) > 0.01, "there is nothing to be seen"
    check(model, reference, 200, (3, 20, 150))


@pytest.mark.parametrize("which", VARIANTS)
def test_on_a_gpu(which: str, gpu: SimulatedGpu, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", type="F32", **SMALL)
    model, reference = hq.load(tmp_path / "m.gguf", device=gpu.device, sequences=2), LlamaReference(tmp_path / "m.gguf")
    change(model, reference, which)
    check(model, reference, 40, (3, 30))
