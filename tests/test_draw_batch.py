"""Tokens drawn on a GPU for several sequences at once are those that the sampler draws from the same logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import hipquant as hq
from hipquant.errors import ContextLengthError, DriverError
from hipquant.models.gpu import GpuBlocks
from hipquant.models.layers import MAX_CAPTURED
from hipquant.models.passes import Drawing
from hipquant.sampling import SAMPLES, Sampler, SamplingParams
from models import write_llama
from simulated_gpu import SimulatedGpu, simulated_gpu

SMALL: dict[str, Any] = {
    **{"n_vocab": 96, "n_embd": 64, "n_head": 4, "n_kv": 2, "n_ff": 96, "n_layer": 1, "context": 32},
}
CHAINS = ({"temperature": 2.0}, {"temperature": 0.0}, {"temperature": 3.0, "top_k": 0, "top_p": 0.9}, {"top_p": 1.0})


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 8 sequences in one pass, as where there are so many that it is the faster way."""
    monkeypatch.setattr(GpuBlocks, "wide", MAX_CAPTURED + 1)


@pytest.fixture(scope="module", params=[("cuda", 32), ("hip", 64)], ids=lambda p: f"{p[0]}-waves-of-{p[1]}")
def gpu(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu]:
    with simulated_gpu(*request.param) as simulated:
        yield simulated


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "m.gguf"
    write_llama(path, type="Q8_0", **SMALL)
    return path


def samplers(n: int) -> list[Sampler]:
    penalty = {"repetition_penalty": 1.3, "repetition_window": 4}
    return [Sampler(SamplingParams(seed=s, **CHAINS[s % 4], **(penalty if s % 3 else {}))) for s in range(n)]


def prompt(sequence: int) -> list[int]:
    return [5 + sequence, 1, 4, 1, 5][: 1 + sequence % 5]


class Texts:
    """What a host draws, by `forward_batch`: the texts of sequences."""

    def __init__(self, model: hq.Model, n: int) -> None:
        self.model, self.samplers, self.texts = model, samplers(n), [prompt(s) for s in range(n)]
        for s, text in enumerate(self.texts):
            text.append(self.samplers[s].sample(model.forward(text, 0, sequence=s), text))

    def step(self, sequences: Sequence[int]) -> list[int]:
        given = [self.texts[s][-1] for s in sequences], [len(self.texts[s]) - 1 for s in sequences]
        for s, logits in zip(sequences, self.model.forward_batch(*given, sequences), strict=True):
            self.texts[s].append(self.samplers[s].sample(logits, self.texts[s]))
        return [self.texts[s][-1] for s in sequences]


class Drawn:
    """The same by `draw_batch`."""

    def __init__(self, model: hq.Model, n: int) -> None:
        self.model, self.samplers = model, samplers(n)
        self.last = [model.draw(prompt(s), self.samplers[s], s)[0] for s in range(n)]

    def step(self, sequences: Sequence[int]) -> list[Drawing]:
        given = [self.last[s] for s in sequences], [self.samplers[s] for s in sequences]
        for s, drawing in zip(sequences, self.model.draw_batch(*given), strict=True):
            self.last[s] = drawing
        return [self.last[s] for s in sequences]

    def tokens(self, sequences: Sequence[int]) -> list[int]:
        return [self.model.drawn(self.last[s]) for s in sequences]


@pytest.mark.parametrize("gpu_layers", [99, 1])
@pytest.mark.parametrize("n", [3, 11])
def test_the_samplers_tokens(n: int, gpu_layers: int, gpu: SimulatedGpu, tmp_path: Path) -> None:
    """Some and all of the sequences, in changing orders, in short passes and long ones, with others in between."""
    write_llama(tmp_path / "m.gguf", type="Q8_0", **(SMALL | {"n_layer": 2}))
    models = [hq.load(tmp_path / "m.gguf", gpu.device, sequences=n + 1, gpu_layers=gpu_layers) for _ in range(2)]
    host, device = Texts(models[0], n), Drawn(models[1], n)
    everyone, some = list(range(n)), list(range(n))[::-2]
    for chosen in (everyone, everyone, everyone, some, some, everyone, everyone[::-1]):
        expected = host.step(chosen)
        device.step(chosen)
        assert device.tokens(chosen) == expected
        if chosen is some:
            models[1].forward([3, 4], 0, sequence=n)
    assert [s.draws for s in device.samplers] == [s.draws for s in host.samplers]
    assert [models[1].cached(s) for s in everyone] == [text[:-1] for text in host.texts]
    again = models[1].draw_ahead(device.last[0], device.samplers[0])
    assert again is None, "others have used the device"


def test_more_sequences_than_a_pass_takes(gpu: SimulatedGpu, path: Path) -> None:
    n = 67
    models = [hq.load(path, gpu.device, sequences=n) for _ in range(2)]
    host, device = Texts(models[0], n), Drawn(models[1], n)
    for _ in range(3):  # launched, captured, replayed
        expected = host.step(range(n))
        device.step(range(n))
        assert device.tokens(range(n)) == expected


def test_tokens_need_not_be_known(gpu: SimulatedGpu, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the sequences stay the same nothing is waited for; what is not read in time is kept."""
    n, waited = 10, []
    models = [hq.load(path, gpu.device, sequences=n) for _ in range(2)]
    host, device = Texts(models[0], n), Drawn(models[1], n)
    device.step(range(n))  # reads what the prompts have given
    wait = Drawing.wait
    monkeypatch.setattr(Drawing, "wait", lambda self: (waited.append(self), wait(self)))
    steps = [device.step(range(n)) for _ in range(SAMPLES - 1)]
    assert not waited
    steps += [device.step(range(n)) for _ in range(3)]
    assert len(waited) == 3 * n
    expected = [host.step(range(n)) for _ in range(1 + len(steps))][1:]
    assert [[models[1].drawn(drawing) for drawing in step] for step in steps] == expected


def test_a_pass_that_fails(gpu: SimulatedGpu, path: Path) -> None:
    """No token is counted; each sequence begins anew, and draws what it would have drawn."""
    n = 9
    models = [hq.load(path, gpu.device, sequences=n) for _ in range(2)]
    host, device = Texts(models[0], n), Drawn(models[1], n)
    first, expected = device.tokens(range(n)), host.step(range(n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "run", lambda name, geometry, params: 719)
        with pytest.raises(DriverError, match=r"\(719\)"):
            device.step(range(n))
    with pytest.raises(ValueError, match="begin anew with `draw`"):
        device.step(range(n))
    assert [models[1].cached(s) for s in range(n)] == [prompt(s) for s in range(n)]
    for s, sampler in enumerate(device.samplers):
        device.last[s] = models[1].draw([*prompt(s), first[s]], sampler, s)[0]
    assert device.tokens(range(n)) == expected
    host.step(range(n))
    device.step(range(n))
    assert device.tokens(range(n)) == [text[-1] for text in host.texts]


def test_what_cannot_be_drawn(gpu: SimulatedGpu, path: Path) -> None:
    model = hq.load(path, gpu.device, sequences=3)
    device = Drawn(model, 3)
    first = device.last[0]
    with pytest.raises(ValueError, match="expected drawings of different sequences, and as many samplers"):
        model.draw_batch([first, first], device.samplers[:2])
    with pytest.raises(ValueError, match="expected drawings of different sequences, and as many samplers"):
        model.draw_batch([first], [])
    device.step([0, 1])
    with pytest.raises(ValueError, match="sequence 0 was used otherwise since .*: begin anew with `draw`"):
        model.draw_batch([first, device.last[2]], device.samplers[:2])
    model.forward([1], 1, sequence=1)
    model.forward_batch([1], [len(prompt(2))], [2])
    for s in (1, 2):
        with pytest.raises(ValueError, match=f"sequence {s} was used otherwise"):
            device.step([0, s])
    while device.last[0].position < model.context:
        device.step([0])
    with pytest.raises(ContextLengthError, match="sequence 0 has filled the context of 32"):
        device.step([0])
    assert 0 <= model.drawn(device.last[0]) < 96
    assert len(model.cached(0)) == 32
    assert model.draw_batch([], []) == []
