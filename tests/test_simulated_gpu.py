"""The stand-in GPU of tests/simulated_gpu.py: the framework functions on it against the CPU, captured graphs, and what
it tells of mistakes."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections.abc import Callable

import numpy as np
import pytest

import hipquant as hq
from hipquant import ops, quants, wiring
from hipquant.codeobjects import ENGINE, QUANTIZED
from hipquant.driver import gpu
from hipquant.errors import DeviceNotFoundError, DriverError, KernelNotFoundError, OutOfDeviceMemoryError
from hipquant.toolchain import simulate
from hipquant.toolchain.simulate import SimulationError
from hipquant.wiring import Arg, Kernel
from models import random_blocks
from simulated_gpu import SimulatedGpu, simulated_gpu, simulated_gpus  # noqa: F401

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the fake driver is linked for Linux")
K, ROWS = 512, 9
Blocks = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]


def q8_1_fields(blocks: Blocks) -> tuple[Blocks, Blocks]:
    """Scale and sum of each block as floats, and its 32 values."""
    by_block = blocks.reshape(-1, 36)
    return by_block[:, :4].copy().view(np.float16).astype(np.float32), by_block[:, 4:].view(np.int8)


def test_it_is_the_device(simulated: SimulatedGpu) -> None:
    device = simulated.device
    assert hq.device(simulated.kind) is device
    wave = 32 if simulated.kind == "cuda" else simulated.library.wave
    assert (device.wave_size, device.kind) == (wave, simulated.kind)
    assert device.target.name == {"cuda": "sm_90", "hip": {32: "gfx1100", 64: "gfx90a"}[wave]}[simulated.kind]
    other = {"cuda": "hip", "hip": "cuda"}[simulated.kind]
    with pytest.raises(DeviceNotFoundError):
        hq.device(other)
    assert np.isnan(device.allocate(8).read(np.float32, (2,))).all()


def test_activations(simulated: SimulatedGpu) -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 32), (3, K), (2, K + 33)):
        x = rng.standard_normal(shape).astype(np.float32)
        result = ops.quantize_q8_1(hq.Tensor.from_numpy(x, device=simulated.device))
        (scales, values), (expected, integers) = map(q8_1_fields, (result.numpy(), ops.quantize_q8_1(x).numpy()))
        np.testing.assert_array_equal(values, integers)
        np.testing.assert_allclose(scales, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("type", quants.WEIGHT_TYPES, ids=lambda t: t.name)
def test_products_and_rows(type: quants.QuantType, simulated: SimulatedGpu) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((11, K)).astype(np.float32)
    blocks = random_blocks(rng, type, ROWS, K, K**-0.5)
    w, on_cpu = (hq.Tensor.from_numpy(blocks, type.name, (ROWS, K), device=d) for d in (simulated.device, "cpu"))
    products: list[Callable[[hq.Tensor], hq.Tensor]] = [
        lambda w: ops.dequantize_mul_mat_vec(w, x[0]),
        lambda w: ops.mul_mat_vec_via_q8_1(w, x[0]),
        lambda w: ops.mul_mat_vec_via_q8_1(w, x[:3]),
        lambda w: ops.mul_mat_vec_via_q8_1(w, x[:8]),
        lambda w: ops.mul_mat_via_q8_1(w, x),
    ]
    tolerance = 1e-10 if len(type.scales) == 1 else 1e-3  # with minimums, GPUs take the sums of x, CPUs those of q8_1
    for product in products:
        expected = product(on_cpu).numpy()
        assert np.mean((product(w).numpy() - expected) ** 2) < tolerance * np.mean(expected**2)
    for exact in (lambda w: ops.get_rows(w, np.array([3, 0, 3])), ops.dequantize_f32):
        np.testing.assert_array_equal(exact(w).numpy(), exact(on_cpu).numpy())
    assert {name for name, _ in simulated.ran} >= {f"mul_mat_vec_{type.suffix}_q8_1_hip{n}" for n in (1, 3, 8)}


def test_a_captured_graph(simulated: SimulatedGpu) -> None:
    rng = np.random.default_rng(0)
    device, stream = simulated.device, simulated.device.create_stream()
    w = hq.Tensor.from_numpy(random_blocks(rng, "Q4_0", ROWS, K, 1), "Q4_0", (ROWS, K), device=device)
    ids = device.upload(np.zeros(1, np.uint32))
    row = wiring.kernel("get_rows_q4_0")
    with stream.capture() as graph:
        x = hq.Tensor.empty((K,), "F32", device)
        function = device.get_or_load_func(row.name, QUANTIZED)
        function.launch(row.grid(nids=1, k=K), row.block, 0, stream, [w, ids, x, K, w.row_bytes])
        y = ops.mul_mat_vec_via_q8_1(w, ops.quantize_q8_1(x, stream=stream), stream=stream)
    assert (len(graph), simulated.ran) == (3, [])
    exact = ops.dequantize_f32(w).numpy()
    for i in (2, 5):
        ids.write(np.array([i], np.uint32))
        graph.launch(stream)
        stream.synchronize()
        np.testing.assert_allclose(y.numpy(), exact @ exact[i], rtol=0.02, atol=0.02 * K)
        assert np.argmax(y.numpy()) == i
    assert [name for name, _ in simulated.ran[1:]] == 2 * [row.name, "quantize_q8_1", "mul_mat_vec_q4_0_q8_1_hip1"]


def test_thousands_of_nodes() -> None:
    with simulated_gpu() as gpu:
        x = gpu.device.allocate(4)
        with gpu.device.stream.capture() as graph:
            for i in range(5000):
                x.fill(i % 251, gpu.device.stream)
        graph.launch(gpu.device.stream)
        assert len(graph) == 5000
        assert x.read(np.uint8, (1,)) == 4999 % 251
        del graph
        assert gpu.live().keys() == {"memory", "streams"}


# What it tells


def test_which_code_object_has_a_kernel(simulated: SimulatedGpu) -> None:
    device, own, other = simulated.device, "get_rows_f32", "rope_store_kv_f16"
    for container, has, lacks in ((QUANTIZED, own, other), (ENGINE, other, own)):
        device.get_or_load_func(has, container)
        with pytest.raises(KernelNotFoundError, match=lacks):
            device.get_or_load_func(lacks, container)


def test_a_fault_fails_the_launch_alone(simulated: SimulatedGpu, capfd: pytest.CaptureFixture[str]) -> None:
    device, row = simulated.device, wiring.kernel("quantize_q8_1")
    x, y = device.upload(np.ones(32, np.float32)), device.allocate(8 * 36)
    function = device.get_or_load_func(row.name, QUANTIZED)
    for _ in range(2):
        with pytest.raises(DriverError, match=r"719.*launching quantize_q8_1 on grid \(1, 1, 1\)"):
            function.launch((1, 1, 1), (48, 1, 1), 0, device.stream, [x, y, 32, 256])
        assert simulated.fault in capfd.readouterr().err
        assert "a shuffle over 32 lanes reads lane 16, which does not exist" in simulated.fault
        function.launch((1, 1, 1), row.block, 0, device.stream, [x, y, 32, 256])
        assert (y.read(np.uint8, (36,))[4:] == 127).all()
    with device.stream.capture() as graph:
        function.launch((1, 1, 1), (48, 1, 1), 0, device.stream, [x, y, 32, 256])
    with pytest.raises(DriverError, match="719"):
        graph.launch(device.stream)


def test_what_is_written_behind_a_buffer() -> None:
    def too_much(device: gpu.Device) -> None:
        x, y = device.upload(np.ones(64, np.float32)), device.allocate(2 * 36 - 1)
        row = wiring.kernel("quantize_q8_1")
        function = device.get_or_load_func(row.name, QUANTIZED)
        function.launch((1, 1, 1), row.block, 0, device.stream, [x, y, 64, 64])

    with simulated_gpu() as gpu:
        too_much(gpu.device)
        assert (gpu.overruns(), gpu.overruns()) == (1, 0)
    with pytest.raises(hq.errors.HipquantError, match="behind the end of 1 buffers"), simulated_gpu() as gpu:
        too_much(gpu.device)


def test_failing_calls_and_leaks() -> None:
    with simulated_gpu() as gpu:
        device, x = gpu.device, hq.Tensor.from_numpy(np.ones(64, np.float32), device=gpu.device)

        def work() -> None:
            stream = device.create_stream()
            with stream.capture() as graph:
                ops.quantize_q8_1(x, stream=stream)
            graph.launch(stream)
            stream.synchronize()

        work()
        gpu.fail_nth(-1)
        work()
        failed = []
        for n in range(gpu.calls):
            before = gpu.live()
            gpu.fail_nth(n)
            with contextlib.suppress(DriverError):  # what gives something back raises nothing, and cannot
                work()
            failed.append(gpu.failed)
            gpu.fail_nth(-1)
            if not re.search("Destroy|Free|SetCurrent", failed[-1]):
                assert gpu.live() == before
        assert {"cuLaunchKernelEx", "cuGraphLaunch", "cuMemAlloc_v2", "cuStreamCreate"} <= set(failed)


def test_out_of_memory() -> None:
    with simulated_gpu(memory=600 << 20) as gpu:
        most = gpu.device.allocate(512 << 20)
        with pytest.raises(OutOfDeviceMemoryError):
            gpu.device.allocate(128 << 20)
        assert (gpu.device.memory, gpu.device.free_memory) == (600 << 20, 88 << 20)
        gpu.memory = 512 << 20
        with pytest.raises(OutOfDeviceMemoryError):
            gpu.device.allocate(1)
        most.free()
        gpu.device.allocate(1)


# The simulator as a library

MIX = """#include "device.h"
HQ_KERNEL(32) mix(double* out, int a, float b, int64_t c, float d, const int* e, int f, float g, uint64_t h, int i,
                  int j, float k, int l, int m, int n, int o) {
    if (thread_x() == 0) {
        const double all[] = {(double)a, b, (double)c, d, (double)*e, (double)f, g, (double)h, (double)i, (double)j,
                              k, (double)l, (double)m, (double)n, (double)o};
        for (int x = 0; x < 15; x++) out[x] = all[x];
    }
}
HQ_KERNEL(32) shared(float* out, int writer) {
    HQ_SHARED float v[32];
    if ((int)block_x() == writer) v[thread_x()] = 1;
    if (block_x() == 1) out[thread_x()] = v[thread_x()];
}
HQ_KERNEL(32) stuck(int threads) {
    if (thread_x() < threads) barrier();
}
"""


def row(name: str, *args: str) -> Kernel:
    pairs = (a.rpartition(" ") for a in args)
    return Kernel(name, name, tuple(Arg(ctype, n) for ctype, _, n in pairs), (32, 1, 1), lambda: (2, 1, 1))


MIX_ROW = row(
    "mix",
    *"double* out|int a|float b|int64_t c|float d|const int* e|int f|float g|size_t h|int i|int j|float k|int l".split(
        "|"
    ),
    *"int m|int n|int o".split("|"),
)


SHARED_ROW = row("shared", "float* out", "int writer")


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> simulate.Simulator:
    folder = tmp_path_factory.mktemp("library")
    (folder / "mix.hip").write_text(MIX)
    return simulate.build(32, sources=folder, folder=folder)


def test_sixteen_parameters_of_every_kind(simulator: simulate.Simulator) -> None:
    values = [-3, 0.5, -(1 << 40), 1.25, 7, 1 << 30, -8.0, 1 << 52, -9, 10, 1e9, 11, -12, 13, -14]
    out, e = np.full(15, np.nan), np.array([7], np.int32)
    params: list[np.ndarray[tuple[int, ...], np.dtype[np.generic]] | float] = [out, *values[:4], e, *values[5:]]
    simulator.launch(MIX_ROW, (1, 1, 1), params)
    simulator.close()
    assert out.tolist() == values
    out[:] = np.nan
    addresses = [p.ctypes.data if isinstance(p, np.ndarray) else p for p in params]
    simulate.InProcess(simulator).launch(MIX_ROW, (1, 1, 1), (32, 1, 1), addresses)
    assert out.tolist() == values


def test_shared_memory_between_blocks(simulator: simulate.Simulator) -> None:
    """What a block has written to shared memory does not reach the next one, nor the next launch."""
    library, out, kernel = simulate.InProcess(simulator), np.zeros(32, np.float32), SHARED_ROW
    for writer, expected in ((1, 1), (0, np.nan), (1, 1), (2, np.nan)):
        library.launch(kernel, (2, 1, 1), (32, 1, 1), [out.ctypes.data, writer])
        np.testing.assert_array_equal(out, np.full(32, expected, np.float32))


def test_a_barrier_for_some_ends_the_launch(simulator: simulate.Simulator) -> None:
    library, stuck = simulate.InProcess(simulator), row("stuck", "int threads")
    for threads in range(33):
        if threads in (0, 32):
            library.launch(stuck, (2, 2, 1), (32, 1, 1), [threads])
            continue
        story = r"block \(0, 0\): threads wait for .*\n  thread 0 waits at the barrier in mix.hip:\d+\n  thread 31 has"
        with pytest.raises(SimulationError, match=story):
            library.launch(stuck, (2, 2, 1), (32, 1, 1), [threads])


def test_many_threads_launch(simulator: simulate.Simulator) -> None:
    libraries, kernel = [simulate.InProcess(simulator) for _ in range(2)], SHARED_ROW
    outs = [np.zeros(32, np.float32) for _ in range(4)]

    def launch(out: np.ndarray[tuple[int, ...], np.dtype[np.float32]], library: simulate.InProcess) -> None:
        for _ in range(50):
            library.launch(kernel, (2, 1, 1), (32, 1, 1), [out.ctypes.data, 1])

    threads = [threading.Thread(target=launch, args=(out, libraries[i % 2])) for i, out in enumerate(outs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.stack(outs).all()


def test_what_a_library_refuses(simulator: simulate.Simulator) -> None:
    library = simulate.InProcess(simulator)
    assert "mix" in library
    assert "quantize_q8_1" not in library
    with pytest.raises(SimulationError, match="quantize_q8_1, simulated on waves of 32: .* no such kernel"):
        library.launch(wiring.kernel("quantize_q8_1"), (1, 1, 1), (32, 1, 1), [0, 0, 0, 0])
    with pytest.raises(SimulationError, match="2048 threads, 2 parameters"):
        library.launch(SHARED_ROW, (1, 1, 1), (32, 64, 1), [0, 0])
    with pytest.raises(ValueError, match="build it without sanitizers"):
        simulate.InProcess(simulate.Simulator(simulator.program, 32, sanitize=True))
