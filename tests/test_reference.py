"""What other tests count on: random blocks, the numpy reference, and its agreement with llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hipquant.gguf_file import find_invalid_scales
from hipquant.quants import QUANT_TYPES, QuantType, padded
from models import ROPE_VARIANTS, llama3_divisors, random_blocks, write_llama
from reference import LlamaReference, dequantize, nmse, quantize_q8_1


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
def test_random_blocks(kind: QuantType) -> None:
    raw = random_blocks(np.random.default_rng(0), kind, 64, 1024, 0.05)
    assert raw.shape == (64, kind.row_bytes(1024))
    values = dequantize(kind, raw, (64, 1024))
    assert abs(values.std() / 0.05 - 1) < 0.15
    assert abs(values.mean()) < 0.15 * 0.05
    assert find_invalid_scales(kind, raw.reshape(-1)) is None


def test_quantize_q8_1() -> None:
    x = np.random.default_rng(0).standard_normal((3, 96)).astype(np.float32)
    x[1, 32:64] = 0
    raw = quantize_q8_1(x)
    assert raw.shape == (3, padded(96) // 32 * 36)
    values = dequantize("Q8_1", raw, (3, padded(96)))
    steps = np.abs(x).reshape(3, 3, 32).max(axis=2).repeat(32, axis=1) / 127
    assert (np.abs(values[:, :96] - x) <= 0.57 * steps).all()  # half a step, and d rounded to half precision
    assert not values[:, 96:].any()
    assert not values[1, 32:64].any()
    sums = raw.reshape(3, -1, 36)[:, :3, 2:4].copy().view("<f2")[..., 0]
    assert np.allclose(sums, x.reshape(3, 3, 32).sum(axis=2), rtol=1e-3, atol=1e-3)


def test_llama3_divisors() -> None:
    """The endpoints and the blend of the published rule."""
    found = llama3_divisors(128, 500000.0, 8.0, 8192)
    waves = 2 * np.pi * 500000.0 ** (np.arange(0, 128, 2) / 128)
    assert (found[waves < 8192 / 4] == 1).all()
    assert np.allclose(found[waves > 8192], 8)
    assert (np.diff(found) >= 0).all()


# The last logits, of tokens 7, 77, 177 and 477, that llama.cpp (ggml 0.25.3, CPU, float32 cache) computed.
GOLDEN_TOKENS = np.arange(300) * 37 % 512
GOLDEN_WEIGHTS = [2.040919, -2.555665]
GOLDEN: dict[str, list[float]] = {
    "plain": [0.5250328, 0.6043035, -0.6447118, -0.1487359],
    "base": [1.093771, 1.366913, -0.03409183, 0.3162255],
    "linear": [0.6146307, 0.8797181, -0.3111422, 0.4612435],
    "yarn": [1.160175, 0.6357808, -0.4003487, 0.7528318],
    "yarn_long": [1.364592, 0.7787944, 0.9704025, 0.04656953],
    "yarn_attn_factor": [1.278019, 0.947798, -0.0992595, -0.2127737],
    "llama3": [1.199212, 1.613529, -0.703438, 0.05009148],
}


@pytest.mark.parametrize("name", ROPE_VARIANTS)
def test_reference_agrees_with_llama_cpp(tmp_path: Path, name: str) -> None:
    """300 tokens, more than any of these models was trained for, with grouped heads and biases."""
    model = write_llama(tmp_path / "m.gguf", type="F32", rope=ROPE_VARIANTS[name], context=128, biases=True, seed=3)
    first = model.tensors["token_embd.weight"][0, :2]
    assert np.allclose(first, GOLDEN_WEIGHTS), "numpy's random numbers changed: record the logits of llama.cpp again"
    found = LlamaReference(model.path).forward(GOLDEN_TOKENS)[-1, [7, 77, 177, 477]]
    assert nmse(found, GOLDEN[name]) < 1e-8
