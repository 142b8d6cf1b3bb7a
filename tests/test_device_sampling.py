"""Tokens drawn on a GPU are the sampler's own, and generations that are launched ahead are the ones that are not.

The kernels are simulated under AddressSanitizer and UBSan; where AMD_EMULATOR names a checkout of tinygrad, also
emulated. Generations are those of a model on the CPU whose tokens the simulated kernels draw.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import hipquant as hq
from emulator import Emulator
from engine_runs import EMULATED, needs_sanitizers, started
from hipquant import generate, wiring
from hipquant.models.passes import Drawing
from hipquant.sampling import SAMPLES, STATE_WORDS, Sampler, SamplingParams, state, work_words
from hipquant.toolchain import gpu, simulate
from hipquant.toolchain.simulate import InProcess
from models import write_llama
from planes import Backend

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
SOURCE = gpu.SOURCES / "engine" / "sample.hip"
HEADER = 16 + 2048  # words of the work that are counters
NAMES = ("sample_best_f32", "sample_bins_f32", "sample_draw_f32")

WAVES = [pytest.param(wave, id=f"wave{wave}", marks=needs_sanitizers) for wave in (32, 64)]


@pytest.fixture(scope="module", params=WAVES + EMULATED)
def simulator(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with started(request.param, SOURCE) as found:
        yield found


class DeviceSampling:
    """The kernels' memory for some sequences, as the engine holds it."""

    def __init__(self, simulator: Backend, n_vocab: int, sequences: int = 1, n_context: int = 64) -> None:
        self.simulator, self.n_vocab, self.n_context = simulator, n_vocab, n_context
        self.states = np.zeros((sequences, STATE_WORDS), np.int32)
        self.history = np.full((sequences, n_context), -1, np.int32)
        self.samples = np.full((sequences, SAMPLES), -99, np.int32)
        self.work = np.zeros((sequences, work_words(n_vocab)), np.int32)

    def begin(self, sequence: int, sampler: Sampler, tokens: list[int]) -> None:
        self.states[sequence] = state(sampler, len(tokens), self.n_vocab).view(np.int32)
        self.history[sequence, : len(tokens)] = tokens

    def draw(self, logits: Floats, sequences: list[int]) -> list[int]:
        """A token for each row of logits, by the state of its sequence."""
        rows, slot = len(logits), np.array(sequences, np.int32)
        at = self.states[sequences, 0].copy()
        token, position = np.full((2, rows), -99, np.int32)
        sizes = self.n_vocab, self.n_context
        outputs = token, position, self.samples
        for name in NAMES:
            row = wiring.kernel(name)
            params = logits, slot, self.states, self.history, self.work, *(outputs if name == NAMES[-1] else ()), *sizes
            self.simulator.launch(row, row.grid(n=self.n_vocab, rows=rows), params)
        drawn = self.samples[sequences, at % SAMPLES]
        np.testing.assert_array_equal(position, at)
        np.testing.assert_array_equal(token, np.maximum(drawn, 0))
        np.testing.assert_array_equal(self.history[sequences, at], token)
        np.testing.assert_array_equal(self.states[sequences, 0], at + 1)
        assert not self.work[:, :HEADER].any(), "counters must be 0 again"
        return drawn.tolist()


CHAINS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=1.5, repetition_window=5),
    SamplingParams(),
    SamplingParams(temperature=2.5, top_k=7, top_p=1.0, min_p=0.0),
    SamplingParams(temperature=1.0, top_k=1, top_p=1.0, min_p=0.0),
    SamplingParams(temperature=1.0, top_k=0, top_p=0.9, min_p=0.0),
    SamplingParams(temperature=1.0, top_k=0, top_p=0.0, min_p=0.0),
    SamplingParams(temperature=0.7, top_k=0, top_p=0.9999, min_p=0.01, repetition_penalty=1.2),
    SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.1, repetition_penalty=0.7, repetition_window=3),
    SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=1.0),
    SamplingParams(temperature=5.0, top_k=1500, top_p=0.99, min_p=0.0),
]


def logits_of(kind: str, rng: np.random.Generator, n: int) -> Floats:
    if kind == "equal":
        return np.where(rng.random(n) < 0.5, 0.0, -0.0).astype(np.float32)
    x = (rng.standard_normal(n) * {"sharp": 6, "flat": 0.1, "ties": 1, "holes": 3, "far": 1}[kind]).astype(np.float32)
    if kind == "ties":
        x = np.round(x * 4) / 4
    if kind == "holes":
        x[rng.random(n) < 0.9] = -np.inf
        x[n // 2] = 5
    if kind == "far":  # what is far from the best is drawn too where top-p is off and the temperature high
        x = np.float32(-200) * np.abs(x)
        x[n // 3] = 300
    return x


@pytest.mark.parametrize("params", CHAINS, ids=str)
@pytest.mark.parametrize(
    ("kind", "n"),
    [("sharp", 3001), ("flat", 1500), ("ties", 2048), ("holes", 777), ("far", 1030), ("equal", 1), ("equal", 900)],
)
def test_the_samplers_tokens(simulator: Backend, params: SamplingParams, kind: str, n: int) -> None:
    rng = np.random.default_rng(n)
    draws = 2 if isinstance(simulator, Emulator) else 5
    params = SamplingParams(**(vars(params) | {"seed": int(rng.integers(1 << 62))}))
    device, sampler, logits = DeviceSampling(simulator, n), Sampler(params), logits_of(kind, rng, n)
    tokens = rng.integers(0, n, 6).tolist()
    device.begin(0, sampler, tokens)
    for _ in range(draws):
        expected = sampler.sample(logits, tokens)
        assert device.draw(logits[None], [0]) == [expected]
        tokens.append(expected)


@pytest.mark.parametrize("top_k", [0, 5000])
def test_lists_longer_than_shared_memory(simulator: Backend, top_k: int) -> None:
    if isinstance(simulator, Emulator):
        pytest.skip("takes minutes on the emulator")
    n, rng = 6000, np.random.default_rng(0)
    logits = (rng.standard_normal(n) * 0.5).astype(np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, top_k=top_k, top_p=0.999, min_p=0.0, seed=1))
    device = DeviceSampling(simulator, n)
    device.begin(0, sampler, [1])
    assert device.draw(logits[None], [0]) == [sampler.sample(logits, [1])]


def test_the_window_of_the_penalty(simulator: Backend) -> None:
    logits, tokens = np.zeros(1030, np.float32), [1027, 1, 2, 3, 4]
    logits[[1027, 1028]] = 5, 4
    for window, expected in ((3, 1027), (4, 1027), (5, 1028), (6, 1028)):
        sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=2.0, repetition_window=window))
        device = DeviceSampling(simulator, len(logits))
        device.begin(0, sampler, tokens)
        assert device.draw(logits[None], [0]) == [sampler.sample(logits, tokens)] == [expected]


def test_sequences_with_parameters_of_their_own(simulator: Backend) -> None:
    """Rows in another order than their sequences, one of which is not drawn for."""
    n, rng = 1100, np.random.default_rng(3)
    chosen = enumerate([(1.0, 0), (0.0, 9), (2.0, 9), (1.0, 3)])
    samplers = [Sampler(SamplingParams(temperature=t, top_k=k, seed=s)) for s, (t, k) in chosen]
    device, texts = DeviceSampling(simulator, n, 4), [[5], [6, 7], [8, 9, 10], [1]]
    for s, sampler in enumerate(samplers):
        sampler.draws = 3 * s  # in the middle of their random numbers
        device.begin(s, sampler, texts[s])
    for _ in range(3):
        logits, rows = rng.standard_normal((3, n)).astype(np.float32), [2, 0, 3]
        expected = [samplers[s].sample(x, texts[s]) for s, x in zip(rows, logits, strict=True)]
        assert device.draw(logits, rows) == expected
        for s, token in zip(rows, expected, strict=True):
            texts[s].append(token)
    assert device.states[1, 0] == 2
    assert (device.samples[1] == -99).all()


@pytest.mark.parametrize("params", [CHAINS[0], CHAINS[2], CHAINS[8]], ids=str)
def test_logits_that_are_not_finite(simulator: Backend, params: SamplingParams) -> None:
    """The first one's place instead of a token; the next draw is right again."""
    n, device = 1300, DeviceSampling(simulator, 1300)
    sampler = Sampler(SamplingParams(**(vars(params) | {"seed": 9})))
    device.begin(0, sampler, [4])
    good = np.random.default_rng(1).standard_normal(n).astype(np.float32)
    for values, first in (
        ([(1200, np.nan), (30, np.inf)], 30),
        ([(1299, np.nan)], 1299),
        ([(slice(None), -np.inf)], 0),
    ):
        bad = good.copy()
        for at, value in values:
            bad[at] = value
        assert device.draw(bad[None], [0]) == [~first]
        with pytest.raises(ValueError, match=f"found NaN or infinity for token {first},"):
            sampler.sample(bad)
    sampler.draws = 3
    assert device.draw(good[None], [0]) == [sampler.sample(good)]


# Generations


class NotCaptured(set[object]):
    """What a model takes for the passes that it has seen: none, so that none is captured without its drawing."""

    def add(self, element: object) -> None:
        pass


class DrawnOnADevice:
    """Lets the kernels draw for a model on the CPU, in its memory; counts."""

    def __init__(self, model: hq.Model, kernels: InProcess) -> None:
        self.model, self.kernels, self.blocks = model, kernels, model.blocks
        self.states = np.zeros((model.sequences, STATE_WORDS), np.uint32)
        self.history = np.zeros((model.sequences, self.blocks.n_context), np.int32)
        self.work = np.zeros((8, work_words(model.n_vocab)), np.int32)
        self.samples = np.full((model.sequences, SAMPLES), -99, np.int32)
        self.begun = self.launched = 0
        self.bad_at = -1  # the launch whose logits are spoilt
        model._passes.seen = NotCaptured()  # type: ignore[assignment]
        for name in ("samples", "set_sampling", "sample"):
            setattr(self.blocks, name, getattr(self, name))
        self.blocks.device_sampling = True  # type: ignore[attr-defined]

    def set_sampling(self, slot: int, state: npt.NDArray[np.uint32], history: Ints, first: int) -> None:
        self.begun += 1
        self.states[slot] = state
        self.history[slot, first : first + len(history)] = history

    def sample(self, n: int) -> None:
        b, n_vocab = self.blocks, self.model.n_vocab
        b.kernels.stream.synchronize()
        if self.launched == self.bad_at:
            b.logits.array(np.float32, [n_vocab])[7] = np.nan
        self.launched += 1
        arrays = (a.ctypes.data for a in (self.states, self.history, self.work))
        inputs = b.logits.address, b.slots.address, *arrays
        outputs = b.tokens.address, b.positions.address, self.samples.ctypes.data
        for name in NAMES:
            row = wiring.kernel(name)
            params = *inputs, *(outputs if name == NAMES[-1] else ()), n_vocab, b.n_context
            self.kernels.launch(row, row.grid(n=n_vocab, rows=n), row.block, params)


@pytest.fixture(scope="module")
def kernels() -> InProcess:
    return InProcess(simulate.build(32, sources=[SOURCE]))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "small.gguf"
    write_llama(path, type="Q8_0", context=96)
    return path


@pytest.fixture
def drawn(path: Path, kernels: InProcess) -> DrawnOnADevice:
    return DrawnOnADevice(hq.load(path, sequences=3), kernels)


@pytest.fixture(scope="module")
def host(path: Path) -> hq.Model:
    return hq.load(path)


PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
WILD = SamplingParams(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=5)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=1),
        WILD,
        SamplingParams(temperature=2.0, repetition_penalty=1.3, repetition_window=10, seed=3),
    ],
    ids=str,
)
def test_the_same_text(drawn: DrawnOnADevice, host: hq.Model, params: SamplingParams) -> None:
    found, expected = (m.generate(PROMPT, max_tokens=30, params=params) for m in (drawn.model, host))
    assert found.text == expected.text
    assert found.tokens == expected.tokens
    assert (found.finish_reason, drawn.begun) == ("length", 1)
    assert drawn.launched == 30, "nothing is launched for a token that is not asked for"
    assert drawn.model.cached() == [*PROMPT, *found.tokens[:-1]]
    assert found.timings.generated_tokens == 30
    assert found.timings.prompt_computed == len(PROMPT)
    assert found.timings.generated_tokens_per_second > 0


def test_the_next_pass_is_launched_before_a_token_is_waited_for(
    drawn: DrawnOnADevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead: list[int] = []
    wait = Drawing.wait
    waited = iter(range(1, 100))
    monkeypatch.setattr(Drawing, "wait", lambda self: (ahead.append(drawn.launched - next(waited)), wait(self)))
    list(drawn.model.generate(PROMPT, max_tokens=6, params=WILD))
    assert ahead == [0, 1, 1, 1, 1, 0]


def test_the_context_ends(drawn: DrawnOnADevice, host: hq.Model) -> None:
    prompt = list(range(90))
    found, expected = (m.generate(prompt, temperature=0) for m in (drawn.model, host))
    assert found.text == expected.text
    assert found.finish_reason == expected.finish_reason == "context"
    assert drawn.launched == len(found.tokens) == 6


def test_tokens_behind_the_end_are_not_seen(
    drawn: DrawnOnADevice, host: hq.Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was launched behind an end token or a stop string; the next turn begins from the same cache."""
    tokens = [int(t) for t in host.generate(PROMPT, max_tokens=12, params=WILD).text.split()]
    stop = f"{tokens[6]} "
    for turn in range(2):
        if turn == 0:
            found = drawn.model.generate(PROMPT, params=WILD, stop=[stop])
            assert found.text == "".join(f"{t} " for t in tokens[: tokens.index(tokens[6])])
            assert found.finish_reason == "stop"
        else:

            class Ended(generate._Text):
                def __init__(self, *given: object) -> None:
                    super().__init__(*given)  # type: ignore[arg-type]
                    self.end_ids = frozenset([tokens[6]])

            monkeypatch.setattr(generate, "_Text", Ended)
            found = drawn.model.generate(PROMPT, params=WILD)
            assert found.text == "".join(f"{t} " for t in tokens[: tokens.index(tokens[6])])
            assert found.finish_reason == "end"
        monkeypatch.undo()
        said = [*PROMPT, *found.tokens]
        assert drawn.model.cached()[: len(said)] == said
        following, expected = (m.generate([*said, 7, 8], max_tokens=5, params=WILD) for m in (drawn.model, host))
        assert following.text == expected.text
        assert following.timings.prompt_computed == 2


def test_generations_in_turns(drawn: DrawnOnADevice, host: hq.Model) -> None:
    """More of them than sequences, each asked for a token in turn: chains break, and each goes on where it was."""
    prompts = [[s, 17, *PROMPT] for s in range(5)]
    expected = [host.generate(prompt, max_tokens=9, params=WILD).text for prompt in prompts]
    generations = [drawn.model.generate(prompt, max_tokens=9, params=WILD) for prompt in prompts]
    found = [""] * 5
    for _ in range(9):
        for i, generation in enumerate(generations):
            found[i] += next(generation)
    assert found == expected
    assert [next(generation, "") for generation in generations] == [""] * 5
    assert not drawn.model._busy


def test_generations_of_threads(drawn: DrawnOnADevice, host: hq.Model) -> None:
    prompts = [[s, 19, *PROMPT] for s in range(5)]
    expected = [host.generate(prompt, max_tokens=15, params=WILD).text for prompt in prompts]
    found: dict[int, str] = {}

    def work(i: int) -> None:
        found[i] = drawn.model.generate(prompts[i], max_tokens=15, params=WILD).text

    workers = [threading.Thread(target=work, args=(i,)) for i in range(5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [found[i] for i in range(5)] == expected


def test_others_in_between(drawn: DrawnOnADevice, host: hq.Model) -> None:
    """Logits asked for on the same sequence and on another one, while a token is on its way."""
    expected = host.generate(PROMPT, max_tokens=12, params=WILD).text
    generation = drawn.model.generate(PROMPT, max_tokens=12, params=WILD, sequence=1)
    text = "".join(next(generation) for _ in range(4))
    assert -1 not in drawn.model.cached(1)
    np.testing.assert_array_equal(drawn.model.forward([1, 2], 0, sequence=1), host.forward([1, 2], 0))
    text += next(generation) + next(generation)
    others = list(range(20, 40))
    drawn.model.forward(others, 0, sequence=1)
    text += next(generation)  # was on its way
    assert drawn.model.cached(1) == others, "a token of one text is none of another's cache"
    np.testing.assert_array_equal(drawn.model.forward([4], 0, sequence=2), host.forward([4], 0))
    assert text + generation.text == expected


@pytest.mark.parametrize("where", ["wait", "launch", "between"])
def test_interrupts(drawn: DrawnOnADevice, host: hq.Model, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = host.generate(PROMPT, max_tokens=12, params=WILD).text

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    generation = drawn.model.generate(PROMPT, max_tokens=12, params=WILD)
    for _ in range(3):
        next(generation)
    if where == "between":
        generation.close()
    else:
        with monkeypatch.context() as patch:
            if where == "wait":
                patch.setattr(Drawing, "wait", interrupt)
            else:
                patch.setattr(drawn.blocks, "sample", interrupt)
            with pytest.raises(KeyboardInterrupt):
                next(generation)
    assert not drawn.model._busy
    again = drawn.model.generate(PROMPT, max_tokens=12, params=WILD)
    assert again.text == expected


@pytest.mark.parametrize("at", [0, 1, 4])
def test_a_model_that_gives_nan(drawn: DrawnOnADevice, host: hq.Model, at: int) -> None:
    drawn.bad_at = at
    generation = drawn.model.generate(PROMPT, max_tokens=12, params=WILD)
    with pytest.raises(ValueError, match="logits: found NaN or infinity for token 7"):
        list(generation)
    assert len(generation.tokens) == at
    expected = host.generate(PROMPT, max_tokens=12, params=WILD).text
    assert drawn.model.generate(PROMPT, max_tokens=12, params=WILD).text == expected
