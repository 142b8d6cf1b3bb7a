"""A real GPU as a device, where HIPQUANT_TEST_DEVICE names one. Its machine may lack gguf."""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import hipquant as hq
from gpu_devices import ADD, HEADER
from hipquant.driver import Event, gpu
from hipquant.driver.gpu_module import Module
from hipquant.driver.gpu_stream import Stream
from hipquant.errors import DriverError, InvalidCodeObjectError, KernelNotFoundError, OutOfDeviceMemoryError
from hipquant.gguf_file import GGUFFile
from hipquant.models import DEMO
from hipquant.quantize import plan, quantize_file
from hipquant.quantize.mixes import file_type
from hipquant.quants import FLOAT_TYPES, WEIGHT_TYPES, quant_type
from hipquant.sampling import Sampler, SamplingParams

KINDS = [t.name for t in FLOAT_TYPES + WEIGHT_TYPES]
MIXES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # file types of these names have other tensors besides
REAL = os.environ.get("HIPQUANT_TEST_DEVICE", "")
needs_device = pytest.mark.skipif(not REAL.startswith("cuda"), reason="HIPQUANT_TEST_DEVICE names no NVIDIA device")


@pytest.fixture
def real() -> gpu.Device:
    found = hq.device(REAL)
    assert isinstance(found, gpu.Device)
    return found


@needs_device
def test_real_memory(real: gpu.Device) -> None:
    free = real.free_memory
    assert real.target.name.startswith("sm_")
    assert (real.wave_size, real.compute_units > 0) == (32, True)
    assert 0 < free <= real.memory
    data = np.random.default_rng(0).integers(0, 256, 64 << 20, np.uint8)
    buffer = real.upload(data)
    np.testing.assert_array_equal(buffer.read(np.uint8, data.shape), data)
    pinned, stream = real.allocate_host(1 << 20), real.create_stream()
    pinned[:] = 5
    buffer.write_async(pinned, stream, offset=123)
    buffer.view(0, 100).fill(9, stream)
    stream.synchronize()
    data[123 : 123 + (1 << 20)], data[:100] = 5, 9
    np.testing.assert_array_equal(buffer.read(np.uint8, data.shape), data)
    buffer.free()
    assert real.free_memory >= free - (4 << 20)
    with pytest.raises(OutOfDeviceMemoryError, match="are free"):
        real.allocate(1 << 50)
    for _ in range(1000):
        real.allocate(1 << 20)
    assert real.free_memory >= free - (4 << 20)


@needs_device
def test_real_launches_graphs_and_their_time(real: gpu.Device) -> None:
    n, rng = 100_000, np.random.default_rng(0)
    a, b = rng.integers(0, 1 << 30, (2, n), np.int32)
    function = real.get_or_load_func("add_i32", ADD.encode())
    x, y, z = real.upload(a), real.upload(b), real.allocate(4 * n)
    grid, block, params = (-(-n // 256), 1, 1), (256, 1, 1), [x, y, z, ctypes.c_uint32(n)]
    z.fill(0xFF)
    function.launch(grid, block, 0, real.stream, params)
    np.testing.assert_array_equal(z.read(np.int32, (n,)), a + b)

    stream = real.create_stream()
    with stream.capture() as graph:  # x += y, twice
        for _ in range(2):
            function.launch(grid, block, 0, stream, [x, y, x, ctypes.c_uint32(n)])
    assert len(graph) == 2
    for _ in range(3):
        graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(x.read(np.int32, (n,)), a + 6 * b)
    with stream.capture() as other:
        for _ in range(2):
            function.launch(grid, block, 0, stream, [z, y, z, ctypes.c_uint32(n)])
    graph.update(other)
    graph.launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(z.read(np.int32, (n,)), a + 3 * b)
    with stream.capture() as longer:
        for _ in range(3):
            function.launch(grid, block, 0, stream, [z, y, z, ctypes.c_uint32(n)])
    graph.update(longer)
    graph.launch(Stream.from_handle(real, stream.handle))
    stream.synchronize()
    np.testing.assert_array_equal(z.read(np.int32, (n,)), a + 6 * b)

    first, second = Event(), Event()
    first.record(stream)
    for _ in range(100):
        graph.launch(stream)
    second.record(stream)
    assert 0 < second.elapsed(first) < 10


@needs_device
def test_real_time_of_a_launch(real: gpu.Device, capsys: pytest.CaptureFixture[str]) -> None:
    """Prints what one launch costs the caller; nothing is asserted of it but that it is there."""
    module = Module(
        real, (HEADER + ".visible .entry add_bias_f32(.param .u64 x, .param .u64 b, .param .u32 n) { ret; }").encode()
    )
    function, x = module.get_function("add_bias_f32"), real.allocate(64)
    params = [x, x, 1]
    times = []
    for _ in range(20):
        real.synchronize()
        begun = time.perf_counter()
        for _ in range(500):
            function.launch((1, 1, 1), (32, 1, 1), 0, real.stream, params)
        times.append((time.perf_counter() - begun) / 500)
    real.synchronize()
    with capsys.disabled():
        print(f"\none launch from Python: {1e6 * min(times):.1f} µs, median {1e6 * sorted(times)[10]:.1f} µs")
    assert min(times) > 0


@needs_device
def test_real_errors(real: gpu.Device) -> None:
    with pytest.raises(InvalidCodeObjectError, match=r"CUDA_ERROR_INVALID_PTX \(218\)\. ptxas.*line"):
        Module(real, ADD.replace("add.u32 %r7", "add.u33 %r7").encode())
    with pytest.raises(KernelNotFoundError):
        real.get_or_load_func("sub_i32", ADD.encode())
    function = real.get_or_load_func("add_i32", ADD.encode())
    with pytest.raises(DriverError, match=r"cuLaunchKernel(Ex)? failed with CUDA_ERROR_INVALID_VALUE \(1\)"):
        function.launch((1, 1, 1), (2048, 1, 1), 0, real.stream, [*[ctypes.c_void_p(0)] * 3, ctypes.c_uint32(0)])
    done: list[object] = []

    def work() -> None:
        done.append(real.upload(np.arange(5)).read(np.int64, (5,)).tolist())

    worker = threading.Thread(target=work)  # a thread that has no context yet
    worker.start()
    worker.join()
    assert done == [[0, 1, 2, 3, 4]]


def _nmse(found: np.ndarray, expected: np.ndarray) -> float:
    exact = expected.astype(np.float64)
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


@pytest.fixture(scope="module")
def text() -> list[int]:
    return np.random.default_rng(0).integers(0, hq.load().n_vocab, 2048).tolist()


def _demo_of(kind: str, folder: Path, context: int = 1024) -> Path:
    """The demo model with all matrices in a type, said to be made for a context."""
    folder.mkdir(exist_ok=True)
    with GGUFFile(DEMO) as file:
        type = quant_type(kind)
        made = plan(file, file_type(MIXES.get(kind, kind)), allow_requantize=True, output=type, embedding=type)
        quantize_file(made, path := folder / f"{kind}-{context}.gguf")
    key = b"llama.context_length" + struct.pack("<I", 4)
    whole = path.read_bytes()
    assert whole.count(key + struct.pack("<I", 1024)) == 1
    path.write_bytes(whole.replace(key + struct.pack("<I", 1024), key + struct.pack("<I", context)))
    return path


@needs_device
@pytest.mark.parametrize("kind", ["as it is", *KINDS])
def test_real_logits(real: gpu.Device, kind: str, text: list[int], tmp_path: Path) -> None:
    """The demo model's logits are the CPU's, in a prompt, in steps of one token and of eight."""
    path = None if kind == "as it is" else _demo_of(kind, tmp_path)
    model, reference = (hq.load(path, device, sequences=8) for device in (real, "cpu"))
    expected = reference.forward(text[:64], 0, logits="all")
    assert _nmse(model.forward(text[:64], 0, logits="all"), expected) <= 1e-4
    steps = [model.forward([token], i, sequence=1) for i, token in enumerate(text[:64])]
    assert _nmse(np.array(steps), expected) <= 1e-4
    at_once = [model.forward_batch([t] * 6, [i] * 6, [2, 3, 4, 5, 6, 7]) for i, t in enumerate(text[:64])]
    assert _nmse(np.array(at_once), np.repeat(expected[:, None], 6, axis=1)) <= 1e-4


@needs_device
@pytest.mark.parametrize("kind", ["as it is", *KINDS])
def test_real_batches(real: gpu.Device, kind: str, text: list[int], tmp_path: Path) -> None:
    """Logits of many sequences at once are the CPU's, the same each time; tokens drawn there are the sampler's."""
    path, n, steps = None if kind == "as it is" else _demo_of(kind, tmp_path), 20, 12
    model, again, reference = (hq.load(path, device, sequences=n) for device in (real, real, "cpu"))
    expected = reference.forward(text[:64], 0, logits="all")
    held = [3 * s % 48 for s in range(n)]  # tokens of each
    for m in (model, again):
        for s in range(n):
            m.forward(text[: held[s] or 1], 0, sequence=s)
    for step in range(steps):
        at = [max(1, h) + step for h in held]
        found, same = (m.forward_batch([text[i] for i in at], at, range(n)) for m in (model, again))
        assert _nmse(found, expected[at]) <= 1e-4
        np.testing.assert_array_equal(found, same)
    samplers, drawing = ([Sampler(SamplingParams(seed=s)) for s in range(n)] for _ in range(2))
    texts = [text[: max(1, h) + steps] for h in held]
    last = [model.draw(texts[s], drawing[s], s)[0] for s in range(n)]
    for tokens, s in zip(texts, range(n), strict=True):
        logits = again.forward(tokens[-1:], len(tokens) - 1, sequence=s)
        tokens.append(samplers[s].sample(logits, tokens))
    for _ in range(steps):
        rows = again.forward_batch([t[-1] for t in texts], [len(t) - 1 for t in texts], range(n))
        for s, logits in enumerate(rows):
            texts[s].append(samplers[s].sample(logits, texts[s]))
        last = model.draw_batch(last, drawing)
        assert [model.drawn(drawn) for drawn in last] == [tokens[-1] for tokens in texts]


@needs_device
def test_real_greedy_tokens(real: gpu.Device, text: list[int]) -> None:
    """256 tokens are the CPU's, or differ first where the two best are as close as the logits of the two devices."""
    model, reference = hq.load(device=real), hq.load(device="cpu")
    token = text[0]
    for position in range(256):
        found, expected = (m.forward([token], position) for m in (model, reference))
        if found.argmax() != expected.argmax():
            best = np.sort(expected)[-2:]
            assert best[1] - best[0] <= 2 * np.abs(found - expected).max(), position
            return
        token = int(expected.argmax())


@needs_device
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
@pytest.mark.parametrize("kind", KINDS)
def test_real_long_context(real: gpu.Device, kind: str, cache_type: str, tmp_path: Path) -> None:
    """Far beyond what the model was made for, in a prompt and in steps at its ends."""
    path = _demo_of(kind, tmp_path, 4096)
    model, reference = hq.load(path, real, context=4096, cache_type=cache_type), hq.load(path, "cpu", context=4096)
    ids = np.random.default_rng(1).integers(0, model.n_vocab, 4096).tolist()
    found, expected = (m.forward(ids, 0, logits="all") for m in (model, reference))
    for position in (1, 1023, 4095):
        assert _nmse(found[position], expected[position]) <= 1e-3, position
    for position in (1, 1023, 4095):
        step = model.forward(ids[position : position + 1], position)
        assert _nmse(step, expected[position]) <= 1e-3, position
        model.forward(ids, 0)


@needs_device
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_real_architectures(real: gpu.Device, kind: str, tmp_path: Path) -> None:
    """Logits of a small model of each architecture are llama.cpp's, for prompts and steps."""
    architectures = pytest.importorskip("architectures", reason="gguf, which writes the models, is not installed")
    limit = {"F32": 1e-4, "Q8_0": 1e-3}[kind]
    for name, shape in architectures.SHAPES.items():
        path, (checksum, expected) = tmp_path / f"{name}.gguf", architectures.figures(name, kind)
        assert architectures.write(path, shape, kind) == checksum
        model = hq.load(path, real, context=shape.context, sequences=1)
        for n, logits in zip(architectures.PROMPTS, expected, strict=True):
            assert _nmse(model.forward(architectures.tokens(n), 0), logits) <= limit, (name, n)
        last = architectures.tokens(architectures.PROMPTS[-1])
        model.forward(last[:290], 0)
        for at in range(290, len(last)):
            found = model.forward(last[at : at + 1], at)
        assert _nmse(found, expected[-1]) <= limit, name


@needs_device
def test_real_models_come_and_go(real: gpu.Device) -> None:
    """Two at once, and many one after the other: the memory is there again."""
    hq.load(device=real).forward([1], 0)
    free = real.free_memory
    one, two = hq.load(device=real), hq.load(device=real)
    assert one.forward([1, 2], 0).tolist() == two.forward([1, 2], 0).tolist()
    del one, two
    for _ in range(1000):
        model = hq.load(device=real, context=256)
        for position in range(3):
            model.forward([1], position)
    del model
    assert real.free_memory >= free - (4 << 20)
