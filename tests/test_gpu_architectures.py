"""Each architecture on a simulated GPU: the logits of the CPU, which are held against llama.cpp's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hipquant as hq
from architectures import SHAPES, tokens, write
from hipquant.models import gpu_weights
from reference import nmse
from simulated_gpu import SimulatedGpu, simulated_gpu

NAMES = ("qwen2", "qwen3", "mixtral", "qwen3moe", "phi2", "phi2_fused", "phi3_long", "gemma2", "gemma3")
LIMITS = {"F32": 1e-6, "Q8_0": 1e-3}  # NMSE; with float weights only keys and values are rounded, alike
CACHE_LIMIT = 2e-3  # where keys and values are rounded to 8 bits, too
LONG = 45  # tokens: more than the windows of the models


@pytest.fixture(scope="module", params=[("cuda", 32), ("hip", 64)], ids=lambda p: f"{p[0]}-waves-of-{p[1]}")
def gpu(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu]:
    with simulated_gpu(*request.param) as simulated:
        yield simulated


def check(path: Path, gpu: SimulatedGpu, limit: float) -> hq.Model:
    """A long pass, and short ones behind it: launched, captured and replayed."""
    model, reference = (hq.load(path, device, context=64) for device in (gpu.device, "cpu"))
    ids = tokens(LONG + 4)
    found, expected = (m.forward(ids[:LONG], 0, logits="all") for m in (model, reference))
    assert nmse(found, expected) <= limit
    for at in range(LONG, len(ids)):
        found, expected = (m.forward(ids[at : at + 1], at) for m in (model, reference))
        assert nmse(found, expected) <= limit, at
    found, expected = (m.forward(ids[:7], 0) for m in (model, reference))
    assert nmse(found, expected) <= limit
    assert model.weights_bytes == reference.weights_bytes
    return model


@pytest.mark.parametrize("kind", LIMITS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_cpus(name: str, kind: str, gpu: SimulatedGpu, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", SHAPES[name], kind)
    check(tmp_path / "m.gguf", gpu, LIMITS[kind])


@pytest.mark.parametrize(
    ("name", "types"),
    [
        ("phi2", {"ffn_up": "F16"}),  # what is normed is wanted as floats and in planes
        ("phi2", {"attn_q": "F16", "ffn_down": "F32"}),
        ("phi3_long", {"attn_qkv": "F32"}),
        ("gemma2", {"ffn_gate": "F16", "attn_output": "BF16"}),
        ("mixtral", {"ffn_gate_exps": "F16", "ffn_gate_inp": "Q8_0"}),
        ("mixtral", {"ffn_down_exps": "F32"}),
    ],
)
def test_matrices_of_different_types(name: str, types: dict[str, str], gpu: SimulatedGpu, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", SHAPES[name], "Q8_0", types)
    check(tmp_path / "m.gguf", gpu, LIMITS["Q8_0"])


@pytest.mark.parametrize(
    ("name", "cache_type"),
    [("qwen3", "f16"), ("phi2", "f16"), ("gemma2", "f16"), ("mixtral", "f16"), ("llama", "q8_0")],
)
def test_batches_are_the_cpus(name: str, cache_type: str, gpu: SimulatedGpu, tmp_path: Path) -> None:
    """A token for each of many sequences, some of which are longer than windows: launched, captured and replayed."""
    n = 11
    write(tmp_path / "m.gguf", SHAPES[name], "Q8_0", {"attn_output": "F16"})
    model = hq.load(tmp_path / "m.gguf", gpu.device, context=64, sequences=n, cache_type=cache_type)
    reference = hq.load(tmp_path / "m.gguf", "cpu", context=64, sequences=n)
    ids, held = tokens(64), [LONG, 5, 1, 40, 2, 33, 9, 3, LONG, 17, 8]
    for s in range(n):
        for m in (model, reference):
            m.forward(ids[s : s + held[s]], 0, sequence=s)
    for step in range(3):
        where = [h + step for h in held], range(n)
        found, expected = (m.forward_batch(ids[step : step + n], *where) for m in (model, reference))
        assert nmse(found, expected) <= (CACHE_LIMIT if cache_type == "q8_0" else LIMITS["Q8_0"]), step


@pytest.mark.parametrize("kind", LIMITS)
def test_rows_are_taken_part_by_part(
    kind: str, gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of a tensor, in an order of their own, in pieces that end within a head."""
    write(tmp_path / "m.gguf", SHAPES["phi3"], kind)
    expected = hq.load(tmp_path / "m.gguf", gpu.device).forward(tokens(5), 0)
    monkeypatch.setattr(gpu_weights, "PART", 9000)
    found = hq.load(tmp_path / "m.gguf", gpu.device).forward(tokens(5), 0)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "launches"), [("qwen2", 5), ("phi2", 7), ("phi3", 5), ("gemma2", 7), ("mixtral", 6), ("qwen3moe", 7)]
)
def test_launches_of_a_layer(name: str, launches: int, gpu: SimulatedGpu, tmp_path: Path) -> None:
    """In a short pass; beside them the embedding and its scale, the first or last norm, logits and their bound, and
    `quantize_q8`, as heads of 80 and 72 are no whole blocks of 32."""
    shape = SHAPES[name]
    write(tmp_path / "m.gguf", shape, "Q8_0")
    model = hq.load(tmp_path / "m.gguf", gpu.device)
    gpu.ran.clear()
    model.forward([1], 0)
    beside = {"get_rows_planes_q8_0", "scale_rows_f32", "softcap_rows_f32", "quantize_q8"}
    assert len([name for name, _ in gpu.ran if name not in beside]) == launches * shape.n_layer + 2
