"""Models on a GPU: the engine's passes, captured steps, and memory, on a driver that runs simulated kernels."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import hipquant as hq
from hipquant.codeobjects import ENGINE
from hipquant.errors import InvalidCodeObjectError, InvalidModelFileError, OutOfDeviceMemoryError
from hipquant.quants import FLOAT_TYPES, MATRIX_TYPES, QuantType
from models import write_llama
from reference import LlamaReference, nmse
from simulated_gpu import KINDS, SimulatedGpu, simulated_gpu

LIMIT = 1e-3  # NMSE between the logits of a GPU and the CPU's: both round activations to 8 bits, each in its own way
FLOAT_LIMIT = 1e-6  # with float weights only keys and values are rounded, alike
SMALL = {"n_vocab": 96, "n_embd": 64, "n_head": 4, "n_kv": 2, "n_ff": 96, "n_layer": 2, "context": 128}
WIDE = SMALL | {"n_embd": 256, "n_ff": 256}  # rows of super-blocks
ROUNDED_SUMS = 4e-3  # types with a minimum: q8_1 has the sum of 32 activations as a half, and random minima are large


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-waves-of-{p[1]}")
def gpu(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu]:
    with simulated_gpu(*request.param) as simulated:
        yield simulated


@pytest.fixture(scope="module")
def cuda() -> Iterator[SimulatedGpu]:
    with simulated_gpu("cuda", 32) as simulated:
        yield simulated


def ids(n: int, n_vocab: int = 96, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


def both(path: Path, gpu: SimulatedGpu, **options: int) -> tuple[hq.Model, hq.Model]:
    return hq.load(path, device=gpu.device, **options), hq.load(path, device="cpu", **options)


@pytest.mark.parametrize(("kind", "limit"), [("F32", FLOAT_LIMIT), ("Q8_0", LIMIT)])
def test_prompts_steps_and_batches(kind: str, limit: float, gpu: SimulatedGpu, tmp_path: Path) -> None:
    """Long passes, passes that are captured, several sequences at once: the same logits as the CPU's."""
    write_llama(tmp_path / "m.gguf", type=kind, **SMALL)
    model, reference = both(tmp_path / "m.gguf", gpu, sequences=3)
    tokens = ids(21)
    assert nmse(model.forward(tokens, 0, logits="all"), reference.forward(tokens, 0, logits="all")) <= limit
    for n in (1, 2, 7, 8, 9):
        for _ in range(3):  # launched, captured, replayed
            found, expected = (m.forward(tokens[:n], 0, sequence=1) for m in (model, reference))
            assert nmse(found, expected) <= limit, n
    for m in (model, reference):
        m.forward(tokens[:5], 0, sequence=2)
    for step in range(3):
        where = [21 + step, 9 + step, 5 + step], [0, 1, 2]
        found, expected = (m.forward_batch(tokens[step : step + 3], *where) for m in (model, reference))
        assert nmse(found, expected) <= limit
    assert model.cached(2) == [*tokens[:5], tokens[2], tokens[3], tokens[4]]


def test_a_batch_of_many_sequences(cuda: SimulatedGpu, tmp_path: Path) -> None:
    """More than a pass takes: passes of 8, with the logits that those have alone."""
    write_llama(tmp_path / "m.gguf", type="Q8_0", **SMALL)
    model, tokens = hq.load(tmp_path / "m.gguf", device=cuda.device, sequences=19), ids(19)
    for s in range(19):
        model.forward(tokens[: s % 3 + 1], 0, sequence=s)
    held, where = [s % 3 + 1 for s in range(19)], range(19)
    batch = model.forward_batch(tokens, held, where)
    assert [model.cached(s)[held[s] :] for s in where] == [[token] for token in tokens]
    for s in where:  # as if the last token had not been
        model.forward(tokens[: held[s]], 0, sequence=s)
    parts = (slice(0, 8), slice(8, 16), slice(16, 19))
    alone = [model.forward_batch(tokens[p], held[p], where[p]) for p in parts]
    np.testing.assert_array_equal(batch, np.concatenate(alone))


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=str)
def test_each_type(kind: QuantType, cuda: SimulatedGpu, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", type=kind.name, **WIDE)
    model, reference = hq.load(tmp_path / "m.gguf", device=cuda.device), LlamaReference(tmp_path / "m.gguf")
    tokens, limit = ids(11), FLOAT_LIMIT if kind in FLOAT_TYPES else ROUNDED_SUMS if len(kind.scales) == 2 else LIMIT
    expected = reference.forward(tokens)
    assert nmse(model.forward(tokens, 0, logits="all"), expected) <= limit
    assert nmse([model.forward([token], i) for i, token in enumerate(tokens)], expected) <= limit


@pytest.mark.parametrize(
    "shape",
    [
        {"tied": True, "type": "Q4_0"},
        {"biases": True, "type": "Q4_0"},
        {"biases": True, "type": "F32"},
        {"n_head": 7, "n_kv": 1, "n_embd": 224, "head_dim": 32},
        {"head_dim": 24, "n_head": 3, "n_kv": 3, "n_embd": 40, "n_ff": 50, "n_vocab": 61, "type": "F32"},
        {"head_dim": 128, "type": "F16"},
        {"types": {"*.attn_v.*": "Q5_1", "*.ffn_up.*": "F16", "token_embd.*": "F16"}, "type": "Q4_1"},
        {"rope": {"type": "yarn", "factor": 4.0, "original_context": 32}},
    ],
    ids=str,
)
def test_shapes(shape: dict[str, object], cuda: SimulatedGpu, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", **(SMALL | shape))  # type: ignore[arg-type]
    model, reference = hq.load(tmp_path / "m.gguf", device=cuda.device), LlamaReference(tmp_path / "m.gguf")
    tokens = ids(10, model.n_vocab)
    limit = FLOAT_LIMIT if shape.get("type") in ("F32", "F16") else ROUNDED_SUMS
    expected = reference.forward(tokens)
    assert nmse(model.forward(tokens, 0, logits="all"), expected) <= limit
    assert nmse([model.forward([token], i) for i, token in enumerate(tokens)], expected) <= limit
    assert model.weights_bytes == hq.load(tmp_path / "m.gguf", device="cpu").weights_bytes


def test_the_same_text(gpu: SimulatedGpu, tmp_path: Path) -> None:
    """Greedy tokens are the CPU's, or differ first where the two best logits are as close as the engines' are."""
    write_llama(tmp_path / "m.gguf", type="Q8_0", **SMALL)
    model, reference = both(tmp_path / "m.gguf", gpu)
    token = 5
    for position in range(24):
        found, expected = (m.forward([token], position) for m in (model, reference))
        if found.argmax() != expected.argmax():
            best = np.sort(expected)[-2:]
            assert best[1] - best[0] <= 2 * np.abs(found - expected).max()
            break
        token = int(expected.argmax())
    else:
        assert model.cached() == reference.cached()


def test_what_does_not_fit_is_said_before_anything_is_allocated(tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", **(SMALL | {"context": 1 << 20}))
    with simulated_gpu("cuda", 32, memory=64 << 20) as gpu:
        device = gpu.device
        hq.load(tmp_path / "m.gguf", device=device, context=128)  # loads modules, which stay
        live = gpu.live()
        with pytest.raises(OutOfDeviceMemoryError, match=r"m.gguf with 1 x 1048576 positions \(a context of \d+ would"):
            hq.load(tmp_path / "m.gguf", device=device, context=1 << 20)
        assert gpu.live() == live
        gpu.memory = 1 << 16
        with pytest.raises(OutOfDeviceMemoryError, match=r"1 x 8192 positions \([\d.]+ MiB even with none\) needs"):
            hq.load(tmp_path / "m.gguf", device=device)
        gpu.memory = 64 << 20
        hq.load(tmp_path / "m.gguf", device=device, context=128).forward([1], 0)


def test_heads_that_no_kernel_takes(cuda: SimulatedGpu, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", **(SMALL | {"head_dim": 320, "n_head": 1, "n_kv": 1}))
    with pytest.raises(InvalidModelFileError, match="heads of 320 values do not run on a GPU"):
        hq.load(tmp_path / "m.gguf", device=cuda.device)


def test_nothing_leaks(cuda: SimulatedGpu, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", type="Q4_0", **SMALL)
    hq.load(tmp_path / "m.gguf", device=cuda.device).forward([1], 0)  # loads modules, which stay
    gc.collect()
    live, free = cuda.live(), cuda.device.free_memory
    for _ in range(20):
        model = hq.load(tmp_path / "m.gguf", device=cuda.device)
        for position in range(3):
            model.forward([1], position)
        del model
    gc.collect()
    assert (cuda.live(), cuda.device.free_memory) == (live, free)


def test_an_installation_without_objects_for_the_gpu(
    cuda: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before the weights are read, with the command that builds them."""
    write_llama(tmp_path / "m.gguf", **SMALL)
    monkeypatch.setattr(ENGINE, "targets", dict)
    monkeypatch.setattr(cuda.device, "_modules", {})
    with pytest.raises(InvalidCodeObjectError, match="engine holds none.*hipquant build --target sm_90a"):
        hq.load(tmp_path / "m.gguf", device=cuda.device)
