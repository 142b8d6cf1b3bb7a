"""The CPU as a device: launches, graphs, memory, threads, forks, and how a code object is chosen."""

from __future__ import annotations

import itertools
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import hipquant as hq
from hipquant import ops, wiring
from hipquant.codeobjects import QUANTIZED, CodeObjects
from hipquant.driver import Device, Event
from hipquant.driver import cpu as driver
from hipquant.errors import DeviceNotFoundError, DriverError, InvalidCodeObjectError, OutOfDeviceMemoryError
from hipquant.targets import cpu_targets, host_machine, runtime_filename

ADD = wiring.kernel("add_bias_f32")


def add(cpu: Device, x: np.ndarray, bias: np.ndarray) -> None:
    function = cpu.get_or_load_func("add_bias_f32", QUANTIZED)
    function.launch((len(x), 1, 1), (1, 1, 1), 0, cpu.stream, [x, bias, x.shape[1]])


def test_devices() -> None:
    assert hq.device("auto") is hq.device("cpu") is hq.devices()[0]
    assert hq.device("cpu").kind == "cpu"
    with pytest.raises(DeviceNotFoundError, match="no device 'tpu'; there are: auto, cpu"):
        hq.device("tpu")


def test_launch_runs_every_block_once(cpu: Device) -> None:
    for rows in (1, 2, 31, 32, 33, 1000, 4097):
        x = np.zeros((rows, 3), np.float32)
        add(cpu, x, np.ones(3, np.float32))
        assert (x == 1).all(), rows


def test_launch_checks_its_parameters(cpu: Device) -> None:
    function = cpu.get_or_load_func("add_bias_f32", QUANTIZED)
    x = np.zeros((2, 4), np.float32)

    def launch(*params: object, grid: tuple[int, int, int] = (1, 1, 1)) -> None:
        function.launch(grid, (1, 1, 1), 0, cpu.stream, params)

    with pytest.raises(TypeError, match=r"takes 3 parameters \(float\* x, const float\* bias, int n\), 2 were given"):
        launch(x, x)
    with pytest.raises(TypeError, match="does not fit its type"):
        launch(x, x, 1 << 31)
    with pytest.raises(TypeError, match="does not fit its type"):
        launch(x, x, 1.5)
    with pytest.raises(TypeError, match=r"parameter bias \(const float\*\) must be a Buffer"):
        launch(x, "bias", 1)
    with pytest.raises(ValueError, match="must be C-contiguous"):
        launch(x.T, x, 1)
    with pytest.raises(ValueError, match="at least 1 in each direction"):
        launch(x, x, 1, grid=(0, 1, 1))
    freed = cpu.allocate(16)
    freed.free()
    with pytest.raises(ValueError, match="has been freed"):
        launch(freed, x, 1)
    assert not x.any()


def test_events_take_the_time(cpu: Device) -> None:
    first, second = Event(), Event()
    with pytest.raises(ValueError, match="must have been recorded"):
        second.elapsed(first)
    first.record(cpu.stream)
    add(cpu, np.zeros((1000, 1000), np.float32), np.ones(1000, np.float32))
    second.record(cpu.stream)
    assert 0 < second.elapsed(first) < 60


def test_graph_replays_what_was_captured(cpu: Device) -> None:
    x, one, two = np.zeros((5, 3), np.float32), np.ones(3, np.float32), np.full(3, 2, np.float32)
    with cpu.stream.capture() as graph:
        add(cpu, x, one)
        add(cpu, x, two)
        with pytest.raises(RuntimeError, match="capturing a graph already"), cpu.stream.capture():
            pass
    assert len(graph) == 2
    assert not x.any(), "captured launches must not run"
    graph.launch(cpu.stream)
    graph.launch(cpu.stream)
    assert (x == 6).all()
    one[:] = 0
    graph.launch(cpu.stream)
    assert (x == 8).all(), "a graph reads its buffers when it runs"


def test_graph_runs_nodes_in_order(cpu: Device) -> None:
    """Each node needs the result of the one before on all threads: a missing barrier shows."""
    k, n = 512, 96
    rng = np.random.default_rng(0)
    from models import random_blocks

    w = hq.Tensor.from_numpy(random_blocks(rng, "Q8_0", k, k, k**-0.5), "Q8_0", (k, k))
    kernel = wiring.find("dequantize_mul_mat_vec", w.type)
    vectors = [np.zeros(k, np.float32) for _ in range(n + 1)]
    vectors[0][:] = rng.standard_normal(k)
    expected = vectors[0].astype(np.float64)
    matrix = ops.dequantize_f32(w).numpy().astype(np.float64)
    with cpu.stream.capture() as graph:
        for a, b in itertools.pairwise(vectors):
            ops.launch(kernel, w, None, kernel.grid(nrows=k), [w, a, b, k, k])
    for _ in range(20):
        graph.launch(cpu.stream)
    for i in range(8):
        expected = matrix @ expected
        np.testing.assert_allclose(vectors[i + 1], expected, rtol=1e-3, atol=1e-4)
    again = vectors[n].copy()
    graph.launch(cpu.stream)
    np.testing.assert_array_equal(vectors[n], again)


def test_threads_are_settable_and_do_not_change_results(cpu: Device) -> None:
    before = cpu.threads
    try:
        results = []
        for threads in (1, 2, 5, 1, 3):
            cpu.threads = threads
            assert cpu.threads == threads
            x = np.random.default_rng(0).standard_normal((40, 1024)).astype(np.float32)
            results.append(ops.quantize_q8_1(x).numpy().copy())
        assert all((r == results[0]).all() for r in results)
        for bad in (0, -1, 257):
            with pytest.raises(ValueError, match="from 1 to 256"):
                cpu.threads = bad
    finally:
        cpu.threads = before


def test_two_python_threads_share_the_pool(cpu: Device) -> None:
    wrong: list[int] = []

    def work(seed: int) -> None:
        x = np.random.default_rng(seed).standard_normal((64, 512)).astype(np.float32)
        expected = ops.quantize_q8_1(x).numpy().copy()
        for _ in range(200):
            if (ops.quantize_q8_1(x).numpy() != expected).any():
                wrong.append(seed)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_forked_child_has_a_pool_of_its_own(cpu: Device) -> None:
    x = np.zeros((100, 8), np.float32)
    add(cpu, x, np.ones(8, np.float32))
    child = os.fork()
    if child == 0:
        add(cpu, x, np.ones(8, np.float32))
        os._exit(0 if (x == 2).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    add(cpu, x, np.ones(8, np.float32))
    assert (x == 2).all()


def test_fork_while_another_thread_launches(cpu: Device) -> None:
    stop = threading.Event()

    def work() -> None:
        x = np.zeros((64, 256), np.float32)
        while not stop.is_set():
            add(cpu, x, np.ones(256, np.float32))

    worker = threading.Thread(target=work)
    worker.start()
    try:
        for _ in range(10):
            child = os.fork()
            if child == 0:
                x = np.zeros((100, 8), np.float32)
                add(cpu, x, np.ones(8, np.float32))
                os._exit(0 if (x == 1).all() else 1)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        stop.set()
        worker.join()


def test_buffers(cpu: Device) -> None:
    before = cpu.allocated
    buffer = cpu.allocate(1000)
    assert buffer.address % driver.ALIGNMENT == 0
    assert cpu.allocated == before + 1000
    buffer.write(np.arange(10, dtype=np.float32), offset=8)
    assert buffer.view(8, 40).read(np.float32, (10,)).tolist() == list(range(10))
    with pytest.raises(ValueError, match="not within a buffer of 1000"):
        buffer.view(900, 101)
    with pytest.raises(ValueError, match="not within"):
        buffer.write(np.zeros(251, np.float32))
    with pytest.raises(ValueError, match="asked for from a buffer of 1000"):
        buffer.read(np.float32, (251,))
    buffer.free()
    assert cpu.allocated == before
    with pytest.raises(ValueError, match="has been freed"):
        buffer.bytes  # noqa: B018


def test_large_and_impossible_allocations(cpu: Device) -> None:
    large = cpu.allocate(driver.HUGE + 1)
    assert large.address % 4096 == 0
    large.bytes[-1] = 1
    with pytest.raises(OutOfDeviceMemoryError, match=r"a test needs 1,125,899,906,842,624 MiB, [\d,]+ MiB are free"):
        cpu.allocate(1 << 70, "a test")
    with pytest.raises(ValueError, match="-1 bytes"):
        cpu.allocate(-1)


def test_code_object_from_bytes(cpu: Device) -> None:
    path = QUANTIZED.path(cpu.target.filename)
    assert path is not None
    function = cpu.get_or_load_func("add_bias_f32", path.read_bytes())
    x = np.zeros((3, 4), np.float32)
    function.launch((3, 1, 1), (1, 1, 1), 0, cpu.stream, [x, np.ones(4, np.float32), 4])
    assert (x == 1).all()


@pytest.mark.parametrize(
    "bad", [b"", b"\x7fELF", b"hello, world, this is not an object", b"\x7fELF\x02\x01\x01" + bytes(40)]
)
def test_bytes_that_are_no_code_object(cpu: Device, bad: bytes) -> None:
    with pytest.raises(InvalidCodeObjectError, match="not a code object|needs a shared object"):
        cpu.get_or_load_func("add_bias_f32", bad)


def test_objects_of_other_machines_are_refused(cpu: Device) -> None:
    path = QUANTIZED.path(cpu.target.filename)
    assert path is not None
    blob = bytearray(path.read_bytes())
    blob[18:20] = (8).to_bytes(2, "little")  # MIPS
    with pytest.raises(InvalidCodeObjectError, match=f"shared object for machine 8; .* needs .* for {host_machine()}"):
        cpu.get_or_load_func("add_bias_f32", bytes(blob))
    whole = path.read_bytes()
    offset, count = struct.unpack_from("<Q", whole, 32)[0], struct.unpack_from("<H", whole, 56)[0]
    headers = [struct.unpack_from("<4Q", whole, offset + 56 * i + 8) for i in range(count)]
    last_byte = max(start + length for start, _, _, length in headers)
    for size in (64, 100, 3000, len(whole) // 2, last_byte - 1):
        with pytest.raises(InvalidCodeObjectError, match="truncated|damaged"):
            cpu.get_or_load_func("add_bias_f32", whole[:size])


def test_the_choice_of_a_code_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: Device) -> None:
    targets = cpu_targets(host_machine())
    chosen, _, rejected = driver.choose_target()
    assert chosen in targets
    assert {chosen.name, *(r.target for r in rejected)} == {t.name for t in cpu_targets()}
    assert all(r.reason for r in rejected)
    with pytest.raises(InvalidCodeObjectError, match="not in this installation.*pip install"):
        driver.choose_target(CodeObjects(tmp_path))
    monkeypatch.setattr(driver, "processor_features", lambda: frozenset({"sse2"}))
    with pytest.raises(InvalidCodeObjectError, match="the processor lacks"):
        driver.choose_target()


def test_instructions_that_trap_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cpu: Device) -> None:
    """An object whose probe traps is rejected although the processor advertises everything: the test compiles one."""
    from hipquant.toolchain import cpu as toolchain

    source = tmp_path / "probe.cpp"
    source.write_text('extern "C" __attribute__((visibility("default"))) int hq_probe() { __builtin_trap(); }')
    target = cpu.target
    toolchain.prepare(tmp_path)
    toolchain.compile_source(source, target.triple, target.flags, tmp_path, tmp_path / "probe.o")
    toolchain.link([tmp_path / "probe.o"], target.machine, tmp_path / target.filename)
    with pytest.raises(InvalidCodeObjectError, match="advertises it, but it ended with signal [45]"):
        driver.choose_target(CodeObjects(tmp_path))


@pytest.mark.parametrize("target", cpu_targets(host_machine()), ids=lambda t: t.name)
def test_each_target_of_this_machine_computes_the_same(target: object, cpu: Device) -> None:
    """In a process of its own, as a process holds to one target."""
    name = target.name  # type: ignore[attr-defined]
    features = driver.processor_features() or frozenset()
    missing = [f for f in target.features if f not in features]  # type: ignore[attr-defined]
    if missing:
        pytest.skip(f"this processor lacks {' '.join(missing)}")
    arguments = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_ops.py"]
    quick = "bit_for_bit or on_the_grid or tile_edges or get_rows or quantize_q8_1"
    done = subprocess.run(
        [*arguments, "-k", quick],
        env={**os.environ, "HIPQUANT_CPU_TARGET": name},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_threads_that_cannot_start_are_an_error(cpu: Device) -> None:
    code = (
        "import resource, numpy as np, hipquant as hq\n"
        "resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))\n"
        "cpu = hq.device()\n"
        "cpu.threads = 4\n"
        "try: hq.ops.quantize_q8_1(np.zeros((9, 64), np.float32))\n"
        "except hq.DriverError as e: print(e)\n"
        "cpu.threads = 1\n"
        "print(hq.ops.quantize_q8_1(np.zeros((9, 64), np.float32)).shape)\n"
    )
    if os.geteuid() == 0:
        pytest.skip("the limit on processes does not bind root")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "hq_run failed with" in done.stdout
    assert done.stdout.endswith("(9, 64)\n")


def test_driver_error_says_what_failed() -> None:
    error = DriverError("pthread_create", 11, "Resource temporarily unavailable", "starting the threads")
    assert str(error) == "pthread_create failed with Resource temporarily unavailable (11): starting the threads"


def test_usable_cores_respects_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {0}); import hipquant as hq; print(hq.device().threads)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_the_runtime_is_there() -> None:
    assert QUANTIZED.path(runtime_filename(host_machine())) is not None
    assert QUANTIZED.path("nothing.so") is None
