"""Attention as other architectures than llama have it: soft-capped scores, windows, normed queries and keys, sinks;
and a KV cache of q8_0.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

import hipquant as hq
from hipquant.cli.app import cli
from hipquant.models.llama import Llama
from models import write_llama
from reference import LlamaReference, nmse
from simulated_gpu import KINDS, SimulatedGpu, simulated_gpu
from vocabulary import write_speaker

FLOAT_LIMIT = 2e-5  # with float weights only the KV cache is rounded, to half precision
CACHE_LIMIT = 1e-3  # keys and values of 8 bits
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


def check(model: hq.Model, reference: LlamaReference, n: int, few: tuple[int, ...], limit: float = FLOAT_LIMIT) -> None:
    """Long passes, and passes of a few tokens, from the first one on and behind others."""
    tokens = np.random.default_rng(1).integers(0, model.n_vocab, n).tolist()
    expected = reference.forward(tokens)
    assert nmse(model.forward(tokens, 0, logits="all"), expected) <= limit
    for at in few:
        found = [model.forward(tokens[:at], 0, sequence=1), model.forward(tokens[at : at + 3], at, sequence=1)]
        assert nmse(found, expected[[at - 1, at + 2]]) <= limit


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


@pytest.mark.parametrize("which", ["none", "all"])
def test_a_quantized_cache(which: str, gpu: SimulatedGpu, tmp_path: Path) -> None:
    """Nearly the same logits, more than one cache in a model, and 17 / 32 of the memory."""
    write_llama(tmp_path / "m.gguf", type="F32", **(SMALL | {"head_dim": 32}))
    halves = hq.load(tmp_path / "m.gguf", device=gpu.device, sequences=2)
    model = hq.load(tmp_path / "m.gguf", device=gpu.device, sequences=2, cache_type="q8_0")
    reference = LlamaReference(tmp_path / "m.gguf")
    change(model, reference, which)
    check(model, reference, 40, (3, 30), CACHE_LIMIT)
    positions = 2 * 256  # sequences, context
    assert sum(part.nbytes for part in model.blocks.cache) == positions * model.blocks.nbytes_per_position
    assert model.blocks.nbytes_per_position * 32 == halves.blocks.nbytes_per_position * 17
    assert any("q8_0" in name for name, _ in gpu.ran)


def test_the_estimate_follows_the_cache(tmp_path: Path) -> None:
    """The contexts that are said to fit take the same memory."""
    write_llama(tmp_path / "m.gguf", type="Q4_0", **(SMALL | {"head_dim": 32, "context": 1 << 20}))
    taken = []
    for cache_type in ("f16", "q8_0"):
        with simulated_gpu("cuda", 32, memory=64 << 20) as simulated:
            options = {"device": simulated.device, "cache_type": cache_type}
            with pytest.raises(hq.OutOfDeviceMemoryError, match="a context of") as error:
                hq.load(tmp_path / "m.gguf", context=1 << 20, **options)
            fits = int(re.findall(r"a context of (\d+) would fit", str(error.value))[0])
            each = hq.load(tmp_path / "m.gguf", context=64, **options).blocks.nbytes_per_position
            taken.append(fits * (each + 4 * 32 + 4))  # with RoPE's table and sampling's tokens
    assert min(taken) > 20 << 20
    assert abs(taken[0] - taken[1]) < 1 << 16


def test_caches_that_there_are_not(gpu: SimulatedGpu, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", type="F32", **(SMALL | {"head_dim": 24}))
    with pytest.raises(ValueError, match="cache_type must be one of f16, q8_0, not 'q4_0'"):
        hq.load(tmp_path / "m.gguf", device="cpu", cache_type="q4_0")
    with pytest.raises(ValueError, match="the KV cache of the CPU is f16, not q8_0"):
        hq.load(tmp_path / "m.gguf", device="cpu", cache_type="q8_0")
    with pytest.raises(ValueError, match="heads of 24 values are not whole blocks of 32"):
        hq.load(tmp_path / "m.gguf", device=gpu.device, cache_type="q8_0")


def test_cache_type_on_the_command_line(tmp_path: Path) -> None:
    path = str(write_speaker(tmp_path / "m.gguf", ends=False).path)
    arguments = ["run", path, "-p", "in", "-n", "1", "--device", "cpu", "--cache-type"]
    refused, taken = (CliRunner().invoke(cli, [*arguments, cache_type]) for cache_type in ("q8_0", "f16"))
    assert refused.exit_code == 1
    assert "the KV cache of the CPU is f16" in refused.output
    assert taken.exit_code == 0
