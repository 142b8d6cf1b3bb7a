"""Models on a GPU: the engine's passes, captured steps, and memory, on a driver that runs simulated kernels."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

import hipquant as hq
from hipquant.codeobjects import ENGINE
from hipquant.errors import InvalidCodeObjectError, InvalidModelFileError, OutOfDeviceMemoryError
from hipquant.models import gpu as engine
from hipquant.models import passes
from hipquant.models.layers import MAX_AT_ONCE, MAX_CAPTURED, Floats
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


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> int:
    """More than 8 tokens in one pass, which is the faster way only where they are many; from how many on that is."""
    usual = engine.GpuBlocks.wide
    monkeypatch.setattr(engine.GpuBlocks, "wide", MAX_CAPTURED + 1)
    return usual


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


def fill(models: Iterable[hq.Model], tokens: list[int]) -> list[int]:
    """Sequences of 1 to 3 tokens, and some of 50; how many each one holds."""
    held = [50 if s % 11 == 3 else s % 3 + 1 for s in range(len(tokens))]
    for s, n in enumerate(held):
        for model in models:
            model.forward((tokens * 50)[:n], 0, sequence=s)
    return held


@pytest.mark.parametrize(("kind", "limit"), [("F32", FLOAT_LIMIT), ("Q8_0", LIMIT)])
def test_a_batch_of_many_sequences(
    kind: str, limit: float, gpu: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In short passes, long ones, and several: launched, captured, replayed; each token is its sequence's next one."""
    monkeypatch.setattr(engine, "BLOCKS_TO_UNIT", 128)  # as on a larger GPU: positions of all sequences are split
    write_llama(tmp_path / "m.gguf", type=kind, **(SMALL | {"n_layer": 1}))
    model, reference = both(tmp_path / "m.gguf", gpu, sequences=MAX_AT_ONCE + 3)
    tokens = ids(MAX_AT_ONCE + 3)
    held = fill((model, reference), tokens)
    for n, times in ((1, 1), (7, 1), (8, 1), (9, 3), (16, 1), (33, 3), (64, 1), (67, 3)):
        where = list(range(len(tokens) - n, len(tokens)))[::-1]
        for _ in range(times):
            given = [tokens[(s + held[s]) % 64] for s in where], [held[s] for s in where], where
            found, expected = (m.forward_batch(*given) for m in (model, reference))
            assert nmse(found, expected) <= limit, n
            assert np.max([nmse(*rows) for rows in zip(found, expected, strict=True)]) <= 4 * limit, n
            for s in where:
                held[s] += 1
    found, expected = (m.forward((2 * tokens)[:100], 0, logits="all") for m in (model, reference))
    assert nmse(found, expected) <= limit
    assert [model.cached(s) for s in range(len(tokens))] == [reference.cached(s) for s in range(len(tokens))]


def test_a_pass_of_many_sequences_reads_the_weights_once(cuda: SimulatedGpu, tmp_path: Path) -> None:
    """The same launches for 9 as for 64, from a graph, the same logits each time, and about those of passes of 8."""
    write_llama(tmp_path / "m.gguf", type="Q8_0", **(SMALL | {"n_layer": 1}))
    model, tokens = hq.load(tmp_path / "m.gguf", cuda.device, sequences=MAX_AT_ONCE), ids(MAX_AT_ONCE)

    def batches(size: int, n: int = MAX_AT_ONCE) -> Floats:
        held = fill([model], tokens[:n])
        cuda.ran.clear()
        cuda.fail_nth(-1)  # counts calls from here on
        parts = (slice(at, at + size) for at in range(0, n, size))
        return np.concatenate([model.forward_batch(tokens[p], held[p], range(n)[p]) for p in parts])

    expected, launches = batches(MAX_AT_ONCE), [name for name, _ in cuda.ran]
    assert not any(name.startswith("attention_prefill") for name in launches)
    for _ in range(2):  # captured, replayed
        np.testing.assert_array_equal(batches(MAX_AT_ONCE), expected)
        assert [name for name, _ in cuda.ran] == launches
    assert cuda.calls < len(launches)
    for n in (9, 40):
        batches(n, n)
        assert [name for name, _ in cuda.ran] == launches, n
    assert nmse(batches(8), expected) <= LIMIT
    assert len(cuda.ran) > 4 * len(launches)


def test_few_tokens_take_short_passes(
    wide: int, cuda: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.GpuBlocks, "wide", wide)
    write_llama(tmp_path / "m.gguf", type="Q8_0", **SMALL)
    model, tokens = hq.load(tmp_path / "m.gguf", cuda.device), ids(wide + 10)
    assert list(model.blocks.passes(wide - 1, 512)) == [8] * ((wide - 1) // 8) + [(wide - 1) % 8] * ((wide - 1) % 8 > 0)
    assert list(model.blocks.passes(512 + wide + 520, 512)) == [512, 512, wide + 8]
    assert list(model.blocks.passes(512 + 10, 512)) == [512, 8, 2]
    for n in (wide - 1, wide):
        cuda.ran.clear()
        model.forward(tokens[:n], 0)
        assert any(name.startswith("attention_prefill") for name, _ in cuda.ran) == (n == wide)


def test_gates_out_of_reach(cuda: SimulatedGpu, tmp_path: Path) -> None:
    """Rows of gate and up that 32 bits do not reach between are gated by a launch of its own."""
    write_llama(tmp_path / "m.gguf", type="Q8_0", **SMALL)
    model = hq.load(tmp_path / "m.gguf", cuda.device)
    expected = model.forward([5], 0)
    gates = [name.startswith("mul_mat_vec_gate") for name, _ in cuda.ran]
    for layer in model.layers:
        (run,) = layer.gate_up.runs
        assert layer.gate_up.can_gate
        run.weights.nbytes = 8 << 30
        assert not layer.gate_up.can_gate
    cuda.ran.clear()
    assert nmse(model.forward([5, 6], 0, logits="all")[0], expected) <= LIMIT
    names = [name for name, _ in cuda.ran]
    assert (sum(gates), names.count("silu_mul_q8")) == (len(model.layers), len(model.layers))


def test_logits_of_all_tokens_after_a_long_pass(cuda: SimulatedGpu, tmp_path: Path) -> None:
    """A pass that is replayed leaves what it normed as it did when it was launched."""
    write_llama(tmp_path / "m.gguf", type="Q8_0", **SMALL)
    model, tokens = hq.load(tmp_path / "m.gguf", cuda.device), ids(20)
    expected = model.forward(tokens[:5], 0, logits="all")
    for _ in range(3):
        model.forward(tokens, 0)
        np.testing.assert_array_equal(model.forward(tokens[:5], 0, logits="all"), expected)


def test_graphs_that_are_not_used_go(cuda: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "m.gguf", type="Q8_0", **SMALL)
    monkeypatch.setattr(passes, "MAX_GRAPHS", 3)
    model, tokens = hq.load(tmp_path / "m.gguf", cuda.device), ids(7)
    before = cuda.live().get("graphs", 0)
    expected = [model.forward(tokens[:n], 0) for n in range(1, 8)]
    for n in (1, 2, 3, 1, 4, 1, 5, 1, 6, 1, 7):
        np.testing.assert_array_equal(model.forward(tokens[:n], 0), expected[n - 1])
    kept = sorted(what.n for _, what in model._passes.graphs)
    assert (kept, cuda.live()["graphs"] - before) == ([1, 6, 7], 3)


@pytest.mark.parametrize("sequences", [4, 40])
def test_memory_for_a_batch(sequences: int, tmp_path: Path) -> None:
    """What is asked for is enough for all sequences at once, and a byte less is not."""
    write_llama(tmp_path / "m.gguf", type="Q8_0", **(SMALL | {"n_vocab": 1024}))
    with simulated_gpu("cuda", 32) as gpu:
        device = gpu.device
        hq.load(tmp_path / "m.gguf", device).forward([1], 0)  # loads modules, which stay
        used = gpu.memory - device.free_memory
        gpu.memory = used
        with pytest.raises(OutOfDeviceMemoryError) as refused:
            hq.load(tmp_path / "m.gguf", device, sequences=sequences)
        gpu.memory = used + refused.value.asked - 1
        with pytest.raises(OutOfDeviceMemoryError, match=f"m.gguf with {sequences} x 128 positions"):
            hq.load(tmp_path / "m.gguf", device, sequences=sequences)
        gpu.memory += 1
        model = hq.load(tmp_path / "m.gguf", device, sequences=sequences)
        for position in range(3):
            model.forward_batch([1] * sequences, [position] * sequences, range(sequences))


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
