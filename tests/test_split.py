"""Models of which only some layers run on a GPU (`gpu_layers`), on the stand-in of simulated_gpu.py."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import hipquant as hq
from hipquant import ceiling
from hipquant.cli.app import cli
from hipquant.driver import Device
from hipquant.errors import DriverError, OutOfDeviceMemoryError
from models import write_llama
from reference import nmse
from simulated_gpu import KINDS, SimulatedGpu, simulated_gpu
from vocabulary import write_speaker

LIMIT = 1e-3  # NMSE between the logits of two engines: both round activations to 8 bits, each in its own way
FLOAT_LIMIT = 1e-6  # with float weights only keys and values are rounded, alike
SMALL: dict[str, Any] = {
    **{"n_vocab": 96, "n_embd": 64, "n_head": 4, "n_kv": 2, "n_ff": 96, "n_layer": 3, "context": 160},
}
TINY: dict[str, Any] = {"n_vocab": 32, "n_embd": 32, "n_head": 1, "n_kv": 1, "n_ff": 32, "n_layer": 2, "context": 32}


@pytest.fixture(scope="module", params=KINDS, ids=lambda p: f"{p[0]}-waves-of-{p[1]}")
def gpu(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu]:
    with simulated_gpu(*request.param) as simulated:
        yield simulated


@pytest.fixture(scope="module")
def cuda() -> Iterator[SimulatedGpu]:
    with simulated_gpu("cuda", 32) as simulated:
        yield simulated


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("split") / "m.gguf"
    write_llama(file, type="F32", **SMALL)
    return file


def ids(n: int, n_vocab: int = 96, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, n_vocab, n).tolist()


def placed(model: hq.Model) -> list[tuple[str, int]]:
    return [(part.device.kind, part.layers) for part in model.parts]


# --- results ---


@pytest.mark.parametrize(
    ("kind", "gpu_layers", "limit"), [("F32", 1, FLOAT_LIMIT), ("F32", 2, FLOAT_LIMIT), ("Q4_0", 2, LIMIT)]
)
def test_prompts_steps_and_batches(kind: str, gpu_layers: int, limit: float, gpu: SimulatedGpu, tmp_path: Path) -> None:
    """Long passes, also several, captured passes, several sequences at once: the same logits as the CPU's."""
    write_llama(tmp_path / "m.gguf", type=kind, **SMALL)
    model = hq.load(tmp_path / "m.gguf", device=gpu.device, gpu_layers=gpu_layers, sequences=3)
    reference = hq.load(tmp_path / "m.gguf", sequences=3)
    assert placed(model) == [("cpu", 3 - gpu_layers), (gpu.kind, gpu_layers)]
    tokens = ids(140)  # more than a pass takes
    assert nmse(model.forward(tokens, 0), reference.forward(tokens, 0)) <= limit
    assert nmse(*(m.forward(tokens[:21], 0, logits="all") for m in (model, reference))) <= limit
    for n in (1, 7, 8, 9):
        for _ in range(3):  # launched, captured, replayed
            assert nmse(*(m.forward(tokens[:n], 0, sequence=1) for m in (model, reference))) <= limit, n
    for m in (model, reference):
        m.forward(tokens[:5], 0, sequence=2)
    for step in range(3):
        where = [21 + step, 9 + step, 5 + step], [0, 1, 2]
        found, expected = (m.forward_batch(tokens[step : step + 3], *where) for m in (model, reference))
        assert nmse(found, expected) <= limit
    for m in (model, reference):  # what the caches held from there on is replaced
        m.forward(tokens[30:34], 4, sequence=2)
    assert model.cached(2) == [*tokens[:4], *tokens[30:34]]
    assert nmse(*(m.forward([7], 8, sequence=2) for m in (model, reference))) <= limit


@pytest.mark.parametrize(("kind", "limit"), [("F32", FLOAT_LIMIT), ("Q4_0", LIMIT)])
def test_a_batch_of_many_sequences(kind: str, limit: float, cuda: SimulatedGpu, tmp_path: Path) -> None:
    """More than a pass takes, and than a pass of the CPU: launched, captured on both devices, and replayed."""
    write_llama(tmp_path / "m.gguf", type=kind, **SMALL)
    n = 37
    model = hq.load(tmp_path / "m.gguf", cuda.device, gpu_layers=1, sequences=n)
    reference, tokens = hq.load(tmp_path / "m.gguf", sequences=n), ids(n)
    for step in range(3):
        found, expected = (m.forward_batch(tokens, [step] * n, range(n)) for m in (model, reference))
        assert nmse(found, expected) <= limit, step
    assert list(model.blocks.passes(n, model.blocks.batch)) == [32, 5]
    assert model.cached(36) == reference.cached(36) == [tokens[36]] * 3


@pytest.mark.parametrize(
    "shape",
    [
        {"tied": True, "type": "F16"},
        {"biases": True, "type": "F32"},
        {"types": {"blk.0.*": "Q5_1", "blk.1.*": "F16", "token_embd.*": "Q8_0"}, "type": "Q4_1"},
        {"rope": {"freqs": "llama3", "factor": 8.0, "original_context": 64}, "type": "F32"},
    ],
    ids=str,
)
def test_shapes(shape: dict[str, Any], cuda: SimulatedGpu, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", **(SMALL | shape))
    model, reference = hq.load(tmp_path / "m.gguf", cuda.device, gpu_layers=2), hq.load(tmp_path / "m.gguf")
    limit, tokens = LIMIT if shape["type"] == "Q4_1" else FLOAT_LIMIT, ids(12)
    assert nmse(*(m.forward(tokens, 0, logits="all") for m in (model, reference))) <= limit
    assert nmse(*(m.forward([9], 12) for m in (model, reference))) <= limit
    assert model.weights_bytes == reference.weights_bytes


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.5, "top_k": 0, "seed": 4}], ids=str)
def test_the_same_text(params: dict[str, Any], cuda: SimulatedGpu, path: Path) -> None:
    """Tokens are drawn on the GPU: each is read before the CPU goes on with it. Two generations take turns."""
    model, reference = hq.load(path, cuda.device, gpu_layers=1, sequences=2), hq.load(path)
    assert model.device_sampling
    prompts = [3, 1, 4, 1, 5], [2, 7]
    expected = [reference.generate(prompt, max_tokens=12, **params).text for prompt in prompts]
    generations = [model.generate(prompt, max_tokens=12, **params) for prompt in prompts]
    found = ["", ""]
    for pieces in zip(*generations, strict=True):
        found = [text + piece for text, piece in zip(found, pieces, strict=True)]
    assert found == expected
    assert model.cached(0) == [*prompts[0], *generations[0].tokens[:-1]]
    again = model.generate(prompts[0], max_tokens=12, **params)
    assert again.text == expected[0]
    assert again.timings.prompt_computed == 1


def test_steps_are_captured_on_both_devices(cuda: SimulatedGpu, tmp_path: Path) -> None:
    """A step that is replayed takes as many calls of the driver for 4 layers as for 1."""
    write_llama(tmp_path / "m.gguf", **(TINY | {"n_layer": 5}))
    calls = []
    for gpu_layers in (1, 4):
        model = hq.load(tmp_path / "m.gguf", cuda.device, gpu_layers=gpu_layers)
        for position in range(2):
            model.forward([1], position)
        cuda.fail_nth(-1)
        expected, ran = model.forward([1], 2), len(cuda.ran)
        calls.append(cuda.calls)
        np.testing.assert_array_equal(model.forward([1], 2), expected)
        assert len(cuda.ran) - ran >= 5 * gpu_layers, "the graph runs all kernels of its layers"
    assert calls[0] == calls[1]


# --- how many layers ---


def test_all_layers_or_none(cuda: SimulatedGpu, path: Path) -> None:
    for gpu_layers in (3, 99, "auto"):
        assert placed(hq.load(path, cuda.device, gpu_layers=gpu_layers)) == [("cuda", 3)]  # type: ignore[arg-type]
    ran = len(cuda.ran)
    model = hq.load(path, cuda.device, gpu_layers=0)
    assert (placed(model), model.device.kind, model.sequences) == ([("cpu", 3)], "cpu", 4)
    model.forward([1], 0)
    assert len(cuda.ran) == ran
    assert placed(hq.load(path, "cpu", gpu_layers=0)) == [("cpu", 3)]


def test_what_is_not_a_number_of_layers(cuda: SimulatedGpu, path: Path) -> None:
    for wrong in (-1, "x", 1.5, None):
        with pytest.raises(ValueError, match="gpu_layers must be 'auto' or a number of layers from 0 on, not"):
            hq.load(path, cuda.device, gpu_layers=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 layers are to run on a GPU, but the device is the CPU: name a GPU"):
        hq.load(path, "cpu", gpu_layers=2)


def asked(path: Path, device: Device, gpu_layers: Any) -> tuple[int, str]:
    """Bytes that a load asks for in vain, and what it says; 0 and nothing where it works."""
    try:
        hq.load(path, device, gpu_layers=gpu_layers)
        return 0, ""
    except OutOfDeviceMemoryError as error:
        return error.asked, str(error)


@pytest.mark.parametrize("tied", [False, True])
def test_as_many_layers_as_are_said_to_fit(tied: bool, tmp_path: Path) -> None:
    """The number in the error fits into what is free, and one more does not; what is asked for is enough."""
    shape = SMALL | {"n_layer": 6, "n_embd": 256, "n_ff": 512, "n_vocab": 2048, "tied": tied}
    write_llama(tmp_path / "m.gguf", type="F16", **shape)
    with simulated_gpu("cuda", 32) as gpu:
        device = gpu.device
        hq.load(tmp_path / "m.gguf", device, gpu_layers=1).forward([1], 0)  # loads modules, which stay
        used = gpu.memory - device.free_memory
        found = set()
        for free in range(35 << 20, 60 << 20, 3 << 18):
            gpu.memory, live, held = used + free, gpu.live(), hq.device("cpu").allocated
            said = asked(tmp_path / "m.gguf", device, "auto")[1]
            if not said:
                break
            hint = re.search(r"; --gpu-layers (\d) would fit\) needs", said)
            fits = int(hint[1]) if hint else 0
            found.add(fits)
            if fits:
                assert hq.load(tmp_path / "m.gguf", device, gpu_layers=fits).forward([1], 0).shape == (2048,)
            if fits < 5:
                nbytes, again = asked(tmp_path / "m.gguf", device, fits + 1)
                assert (f"--gpu-layers {fits} would fit" in again) == (fits > 0)
                gpu.memory = used + nbytes
                hq.load(tmp_path / "m.gguf", device, gpu_layers=fits + 1).forward([1], 0)
                gpu.memory = used + nbytes - 1
                assert asked(tmp_path / "m.gguf", device, fits + 1)[0] == nbytes
            assert (gpu.live(), hq.device("cpu").allocated) == (live, held)
        assert found == set(range(6))


# --- the commands ---


def call(*args: str) -> Result:
    result = CliRunner().invoke(cli, list(args), prog_name="hipquant")
    assert result.exit_code == 0, result.output
    return result


def test_a_line_says_what_runs_where(cuda: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = hq.device("cpu")
    monkeypatch.setattr(cpu, "threads", 2)  # and back, at the end
    file = str(write_speaker(tmp_path / "m.gguf", ends=False, n_layer=3).path)
    run = "run", file, "-p", "in the", "-n", "3", "--temp", "0", "--device", "cuda", "--threads", "1"
    shown = call(*run, "--gpu-layers", "1")
    assert shown.stderr.startswith("1 of 3 layers on cuda:0, 2 on the CPU\n")
    assert cpu.threads == 1
    assert "sm_90): 1 of 3 layers on cuda:0, 2 on the CPU" in shown.stderr
    assert call(*run, "--gpu-layers", "9").stderr.startswith("3 of 3 layers on cuda:0\n")
    assert call(*run, "--gpu-layers", "0").stderr.startswith("3 of 3 layers on the CPU\n")
    assert " layers on " not in call(*run[:-2], "--gpu-layers", "auto").stderr
    assert call(*run, "--gpu-layers", "1", "--json").stdout.count("\n") == 1


def test_bench_of_two_devices(cuda: SimulatedGpu, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ceiling: each device reads its own weights, one after the other."""
    monkeypatch.setattr(ceiling, "read_ceiling", lambda device: {"cpu": 1e9, "cuda": 4e9}[device.kind])
    report = tmp_path / "report.json"
    bench = "bench", str(path), "-p", "3", "-n", "2", "-r", "1", "--batch", "9", "--device", "cuda"
    shown = call(*bench, "--gpu-layers", "1", "--report", str(report))
    assert "layers     1 of 3 layers on cuda:0, 2 on the CPU" in shown.stdout
    found = json.loads(report.read_text())
    sizes = [(part["device"], part["layers"], part["weights_bytes"]) for part in found["parts"]]
    (_, _, on_cpu), (_, _, on_gpu) = sizes
    assert [size[:2] for size in sizes] == [("cpu", 2), ("cuda", 1)]
    assert found["read_ceiling_bytes_per_second"] == pytest.approx((on_cpu + on_gpu) / (on_cpu / 1e9 + on_gpu / 4e9))
    assert found["cpu"]["name"] == "cpu"
    batch = found["results"][-1]
    weights = 2 * (on_cpu + on_gpu)  # of 2 tokens, in a pass each
    assert batch["weights_bytes_per_second"] == pytest.approx(weights / (9 * 2 / batch["median"]))


# --- faults ---


@pytest.mark.parametrize("code", [2, 719], ids=["out of memory", "launch failed"])
def test_any_call_may_fail(code: int, cuda: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a load, or of a step that is launched, captured or replayed: all is given back at once."""
    write_llama(tmp_path / "m.gguf", type="Q4_0", **TINY)

    def use() -> list[Any]:
        model = hq.load(tmp_path / "m.gguf", cuda.device, gpu_layers=1)
        return [model.forward([token], position) for position, token in enumerate((3, 1, 4))]

    expected, cpu = use(), hq.device("cpu")
    live, held = cuda.live(), cpu.allocated
    cuda.fail_nth(-1)
    use()
    calls, failed = cuda.calls, 0
    gc.freeze()  # so that collecting what is left takes no time
    monkeypatch.setattr(cuda, "run", lambda name, geometry, params: 0)  # kernels need not run
    for n in range(calls):
        cuda.fail_nth(n, code)
        try:
            use()
        except (DriverError, OutOfDeviceMemoryError):
            failed += 1
        assert cpu.allocated == held, (n, cuda.failed)
        quiet = "Free" in cuda.failed or "Destroy" in cuda.failed  # what the driver does not take back stays
        cuda.fail_nth(-1)
        now = cuda.live()
        assert now == live or quiet, (n, cuda.failed)
        live = now
    assert failed > calls // 2
    gc.unfreeze()
    monkeypatch.undo()
    np.testing.assert_array_equal(use(), expected)


def test_a_step_that_fails_on_the_way(cuda: SimulatedGpu, path: Path) -> None:
    """Between the two devices: the same step, and those that follow, give the right logits."""
    model, reference = hq.load(path, cuda.device, gpu_layers=2), hq.load(path)
    for position, token in enumerate(ids(6)):
        cuda.fail_nth(1)
        with pytest.raises(DriverError):
            model.forward([token], position)
        cuda.fail_nth(-1)
        assert nmse(*(m.forward([token], position) for m in (model, reference))) <= FLOAT_LIMIT


def test_fifty_loads_leave_nothing(cuda: SimulatedGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_llama(tmp_path / "m.gguf", type="Q4_0", **TINY)

    def use() -> None:
        model = hq.load(tmp_path / "m.gguf", cuda.device, gpu_layers=1)
        for position in range(3):
            model.forward([1], position)

    def held() -> tuple[object, ...]:
        return cuda.live(), cuda.device.allocated, cuda.device.free_memory, hq.device("cpu").allocated

    use()
    before = held()
    monkeypatch.setattr(cuda, "run", lambda name, geometry, params: 0)  # kernels need not run
    for _ in range(50):
        use()
    assert held() == before
