"""Faults at every call of a GPU's driver during a load and three steps, and Ctrl-C there: what is said, what is given
back, and that the process goes on. On the stand-in GPU of simulated_gpu.py, with the smallest of models.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import hipquant as hq
from hipquant import driver
from hipquant.driver import gpu as gpu_driver
from hipquant.driver import gpu_symbols
from hipquant.errors import ContextLengthError, DeviceNotFoundError, DriverError, OutOfDeviceMemoryError
from models import write_llama
from simulated_gpu import SimulatedGpu, simulated_gpu

TINY: dict[str, Any] = {"n_vocab": 32, "n_embd": 32, "n_head": 1, "n_kv": 1, "n_ff": 32, "n_layer": 1, "context": 32}
TOKENS = (3, 1, 4)  # a step each: launched, captured, replayed
LAUNCH_FAILED, LOST = 719, 999
CODES = {"out of memory": 2, "launch failed": LAUNCH_FAILED, "no device": 100}
GIVE_BACK = {  # rows of the symbols that give something back, and what stays where the driver does not take it
    **{"free": "memory", "free_host": "pinned", "unload_module": "modules", "destroy_stream": "streams"},
    **{"destroy_event": "events", "destroy_graph": "graphs", "destroy_instance": "instances"},
}
Logits = list[npt.NDArray[np.float32]]

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fake driver is linked for Linux"),
    pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", params=["cuda", "hip"])
def gpu(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu]:
    with simulated_gpu(request.param, 32) as simulated:
        yield simulated
        gc.unfreeze()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("faults") / "m.gguf"
    write_llama(file, type="Q4_0", **TINY)
    return file


@pytest.fixture(scope="module")
def expected(gpu: SimulatedGpu, path: Path) -> Logits:
    return steps(hq.load(path, device=gpu.device))


@contextlib.contextmanager
def idle(gpu: SimulatedGpu) -> Iterator[None]:
    """Where only the calls of the driver matter, kernels need not run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "run", lambda name, geometry, params: 0)
        yield


def steps(model: hq.Model, n: int = len(TOKENS)) -> Logits:
    return [model.forward([token], position) for position, token in enumerate(TOKENS[:n])]


def step_of(model: hq.Model, position: int) -> Callable[[], object]:
    return functools.partial(model.forward, [TOKENS[position]], position)


def start_anew() -> None:
    """As in a new process: no driver library has been opened. What devices keep, they keep for good."""
    for known in (gpu_driver._libraries, gpu_driver._devices, gpu_driver._missing):
        known.clear()
    gc.collect()
    gc.freeze()  # so that collecting the next one's garbage takes no time


def difference(now: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: n for name in now | before if (n := now.get(name, 0) - before.get(name, 0))}


# --- calls that fail ---


@pytest.mark.parametrize("code", CODES.values(), ids=CODES)
def test_any_call_may_fail(code: int, gpu: SimulatedGpu, path: Path, expected: Logits) -> None:
    """From the driver's first call on: an error that names it, all given back, and the next load works."""
    start_anew()
    gpu.fail_nth(-1)
    live = gpu.live()
    steps(hq.load(path, device=gpu.device))
    calls, own, failed = gpu.calls, difference(gpu.live(), live), set()
    assert calls > 100
    assert own.keys() == {"streams", "modules"}, "which a device keeps"
    for n in range(calls):
        start_anew()
        before, said = gpu.live(), ""
        gpu.fail_nth(n, code)
        with idle(gpu):
            try:
                steps(hq.load(path, device=f"{gpu.kind}:0"))
            except (OutOfDeviceMemoryError, DeviceNotFoundError) as error:
                said = f"{gpu.failed}: {error}"
            except DriverError as error:
                said = str(error)
        symbol = gpu.failed
        gpu.fail_nth(-1)
        gpu_driver._missing.clear()
        row = next(row for row, name in gpu.symbols.items() if name == symbol)
        failed.add(row)
        quiet = row in GIVE_BACK or row in ("get_context", "get_device")
        assert re.match(rf"{symbol}( failed with .+ \({code}\))?: ", said) or (quiet and not said), (n, symbol, said)
        assert ("start a new process" in said) == ("failed with" in said and code in gpu_symbols.LOST), said
        with idle(gpu) if n % 16 else contextlib.nullcontext():
            found = steps(hq.load(path, device=f"{gpu.kind}:0"))
        if n % 16 == 0:
            np.testing.assert_array_equal(found, expected)
        stays = {GIVE_BACK[row]: 1} if row in GIVE_BACK else {}
        assert difference(gpu.live(), before) == {name: own.get(name, 0) + stays.get(name, 0) for name in own | stays}
    launch = "launch_config" if gpu.kind == "cuda" else "launch"
    wanted = {"allocate", "allocate_host", "free", "load_module", "get_function", "to_device", "to_host", launch}
    assert failed >= wanted | {"init", "create_stream", "begin_capture", "end_capture", "instantiate", "launch_graph"}


def test_a_device_that_is_lost(gpu: SimulatedGpu, path: Path) -> None:
    """From any call of a step on, all fail: each use is an error that says what to do, and nothing worse."""
    steps(hq.load(path, device=gpu.device))
    before = gpu.live()
    with idle(gpu):
        model = hq.load(path, device=gpu.device)
        gpu.fail_nth(-1)
        steps(model)
        for n in range(gpu.calls):
            model = hq.load(path, device=gpu.device)
            gpu.fail(nth=n, code=LOST, lost=True)
            for use in (lambda m=model: steps(m), step_of(model, 0), lambda: hq.load(path, device=gpu.device)):
                with pytest.raises(DriverError, match=r"failed with .*\(999\): .*\. .*: start a new process"):
                    use()
            gpu.fail()
        del model
    del use
    assert gpu.live() == before


def test_a_launch_that_fails_in_a_graph(gpu: SimulatedGpu, path: Path, expected: Logits) -> None:
    model, run, ran = hq.load(path, device=gpu.device), gpu.run, len(gpu.ran)
    steps(model, 2)
    launches = (len(gpu.ran) - ran) // 2
    for n in range(launches):
        left = n

        def fails(name: str, geometry: tuple[int, ...], params: Any) -> int:
            nonlocal left
            left -= 1
            return LAUNCH_FAILED if left < 0 else run(name, geometry, params)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu, "run", fails)
            with pytest.raises(DriverError, match=r"GraphLaunch failed with .*\(719\): launching a graph"):
                model.forward([TOKENS[2]], 2)
        np.testing.assert_array_equal(model.forward([TOKENS[2]], 2), expected[2])


# --- Ctrl-C ---


class Interrupter:
    """Raises KeyboardInterrupt at one of the driver's calls: before it, or when it has done its work."""

    def __init__(self) -> None:
        self.left, self.behind = -1, False

    def calls(self, work: Callable[[], object]) -> int:
        """How many calls some work takes."""
        self.left = 1 << 30
        work()
        n, self.left = (1 << 30) - self.left, -1
        return n

    def at(self, n: int, behind: bool, work: Callable[[], object]) -> None:
        self.left, self.behind = n, behind
        with pytest.raises(KeyboardInterrupt):
            work()
        assert self.left == -1

    def wrap(self, function: Callable[..., int]) -> Callable[..., int]:
        def call(*args: object) -> int:
            now = self.left == 0
            self.left -= self.left >= 0
            if now and not self.behind:
                raise KeyboardInterrupt
            code = function(*args)
            if now:
                raise KeyboardInterrupt
            return code

        return call


@pytest.fixture
def interrupter(gpu: SimulatedGpu, monkeypatch: pytest.MonkeyPatch) -> Iterator[Interrupter]:
    """For a device that is opened anew. What gives something back is left alone: Python lets nothing out of there."""
    result = Interrupter()

    def wrapped(self: Any, *args: Any, init: Any = gpu_symbols.Library.__init__) -> None:
        init(self, *args)
        for row, function in list(self.functions.items()):
            if row not in GIVE_BACK and not row.startswith(("get_context", "get_device", "error_name")):
                self.functions[row] = result.wrap(function)

    monkeypatch.setattr(gpu_symbols.Library, "__init__", wrapped)
    start_anew()
    yield result
    start_anew()


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_ctrl_c_at_any_call_of_a_step(
    behind: bool, interrupter: Interrupter, gpu: SimulatedGpu, path: Path, expected: Logits
) -> None:
    """The same step, and those that follow, give the right logits."""
    steps(hq.load(path, device=gpu.device))
    whole = hq.load(path, device=gpu.device)
    calls = [interrupter.calls(step_of(whole, i)) for i in range(3)]
    live = gpu.live()
    del whole
    for step, n in enumerate(calls):
        for call in range(n):
            model = hq.load(path, device=gpu.device)
            steps(model, step)
            interrupter.at(call, behind, step_of(model, step))
            for i in range(step, 3):
                np.testing.assert_array_equal(model.forward([TOKENS[i]], i), expected[i], err_msg=f"{step} {call} {i}")
            if step:
                assert gpu.live() == live, (step, call)
            del model
    assert min(calls) >= 4


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_ctrl_c_at_any_call_of_a_load(
    behind: bool, interrupter: Interrupter, gpu: SimulatedGpu, path: Path, expected: Logits
) -> None:
    """All memory is given back, and the next load works."""
    steps(hq.load(path, device=gpu.device))
    before, calls = gpu.live(), interrupter.calls(lambda: hq.load(path, device=gpu.device))
    for call in range(calls):
        interrupter.at(call, behind, lambda: hq.load(path, device=gpu.device))
        assert (gpu.live(), gpu.device.allocated) == (before, 0), call
    np.testing.assert_array_equal(steps(hq.load(path, device=gpu.device)), expected)
    assert calls > 20


def test_ctrl_c_between_calls(gpu: SimulatedGpu, path: Path, expected: Logits) -> None:
    """Where a function of the driver's or the models' code is entered, which is where Python looks for signals."""
    start_anew()
    steps(hq.load(path, device=gpu.device))
    whole = hq.load(path, device=gpu.device)
    counts = [entries(step_of(whole, i)) for i in range(3)]
    live = gpu.live()
    del whole
    for step, n in enumerate(counts):
        for entry in range(step, n, 11 if step < 2 else 1):
            model = hq.load(path, device=gpu.device)
            steps(model, step)
            with pytest.raises(KeyboardInterrupt):
                entries(step_of(model, step), entry)
            for i in range(step, 3):
                np.testing.assert_array_equal(model.forward([TOKENS[i]], i), expected[i], err_msg=f"{step} {entry} {i}")
            assert gpu.live() == live, (step, entry)
            del model
    assert min(counts) > 15


def entries(work: Callable[[], object], interrupt_at: int = -1) -> int:
    """How many functions of driver/ and models/ some work enters; KeyboardInterrupt is raised at one."""
    package, count, before = Path(driver.__file__).parents[1], 0, sys.gettrace()
    folders = str(package / "driver"), str(package / "models")

    def trace(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        code = frame.f_code
        swallowed = code.co_name in ("_give_back", "<genexpr>")  # what runs when something goes lets nothing out
        if code.co_filename.startswith(folders) and not swallowed:
            count += 1
            if count - 1 == interrupt_at:
                sys.settrace(before)
                raise KeyboardInterrupt

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


# --- one process ---


def test_two_models_take_turns(gpu: SimulatedGpu, path: Path, tmp_path: Path, expected: Logits) -> None:
    write_llama(tmp_path / "other.gguf", type="Q8_0", seed=1, **TINY)
    alone = steps(hq.load(tmp_path / "other.gguf", device=gpu.device))
    models = [hq.load(p, device=gpu.device) for p in (path, tmp_path / "other.gguf")]
    for position, token in enumerate(TOKENS):
        for model, logits in zip(models, (expected, alone), strict=True):
            np.testing.assert_array_equal(model.forward([token], position), logits[position])
    first = models.pop(0)
    del first
    gc.collect()
    np.testing.assert_array_equal(models[0].forward([TOKENS[2]], 2), alone[2])
    assert not np.array_equal(alone, expected)


def test_the_context_fills_without_memory(gpu: SimulatedGpu, path: Path) -> None:
    """All that a context takes is taken at load: it fills to its end where nothing is left."""
    steps(hq.load(path, device=gpu.device))
    memory, model = gpu.memory, hq.load(path, device=gpu.device, sequences=2)
    try:
        gpu.memory -= gpu.device.free_memory
        held = gpu.device.allocated
        with pytest.raises(OutOfDeviceMemoryError, match="1 bytes|needs 0 MiB, 0 MiB are free"):
            gpu.device.allocate(1)
        for sequence in range(2):
            for position in range(model.context):
                model.forward([1], position, sequence=sequence)
            with pytest.raises(ContextLengthError, match="33 tokens do not fit into the context of 32"):
                model.forward([1], model.context, sequence=sequence)
        with pytest.raises(ContextLengthError, match="sequence 0 has filled the context of 32"):
            model.forward_batch([1, 1], [32, 32], [0, 1])
        assert (gpu.device.allocated, gpu.device.free_memory) == (held, 0)
    finally:
        gpu.memory = memory


def test_fifty_loads_leave_nothing(gpu: SimulatedGpu, path: Path, expected: Logits) -> None:
    def held() -> tuple[dict[str, int], int, int, int]:
        return gpu.live(), gpu.device.allocated, gpu.device.free_memory, len(os.listdir("/proc/self/fd"))

    steps(hq.load(path, device=gpu.device))
    before = held()
    with idle(gpu):
        for _ in range(50):
            steps(hq.load(path, device=gpu.device))
    assert held() == before
    np.testing.assert_array_equal(steps(hq.load(path, device=gpu.device)), expected)
