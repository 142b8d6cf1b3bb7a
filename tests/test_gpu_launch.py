"""What a GPU does, over the fake driver (gpu_devices.py): memory, launches, streams, events and graphs."""

from __future__ import annotations

import ctypes
import struct
from ctypes import c_int, c_void_p
from typing import Any

import numpy as np
import pytest

import hipquant as hq
from gpu_devices import ADD, Fake, amd_elf, fake_device, fake_driver  # noqa: F401
from hipquant import wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.driver import Event, gpu, gpu_symbols
from hipquant.driver.gpu_stream import Stream
from hipquant.errors import DriverError, OutOfDeviceMemoryError

# --- memory ---


def test_memory(fake: Fake, device: gpu.Device) -> None:
    before = device.free_memory
    buffer = device.allocate(1000)
    assert (device.allocated, device.free_memory) == (1000, before - 1000)
    buffer.fill(7)
    assert (buffer.read(np.uint8, (1000,)) == 7).all()
    buffer.write(np.arange(10, dtype=np.float32), offset=8)
    part = buffer.view(8, 40)
    assert part.read(np.float32, (2, 5)).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    with pytest.raises(ValueError, match="not within a buffer of 1000"):
        buffer.view(900, 101)
    with pytest.raises(ValueError, match="not within a buffer of 1000"):
        buffer.write(np.zeros(251, np.float32))
    with pytest.raises(ValueError, match="1004 bytes asked for from a buffer of 1000"):
        buffer.read(np.float32, (251,))
    with pytest.raises(TypeError, match="is not in the host's memory"):
        buffer.bytes  # noqa: B018
    with pytest.raises(TypeError, match="is not in the host's memory"):
        buffer.array(np.uint8, (1,))
    with pytest.raises(ValueError, match="from 0 to 255"):
        buffer.fill(256)
    buffer.free()
    assert device.allocated == 1000, "the part keeps the whole alive"
    with pytest.raises(ValueError, match="has been freed"):
        buffer.view(0, 0)
    del part
    assert device.allocated == 0
    assert device.free_memory == before
    assert fake.live() == {"streams": 1}
    assert device.upload(np.arange(12, dtype=np.int16).reshape(3, 4).T).read(np.int16, (12,))[:3].tolist() == [0, 4, 8]
    assert device.allocate(0).nbytes == 0


def test_out_of_memory(fake: Fake, device: gpu.Device) -> None:
    kept = device.allocate(60 << 20)
    for nbytes in (5 << 20, 1 << 70):
        with pytest.raises(OutOfDeviceMemoryError, match=r"a test needs [\d,]+ MiB, 4 MiB are free") as caught:
            device.allocate(nbytes, "a test")
        assert (caught.value.asked, caught.value.free) == (nbytes, 4 << 20)
    with pytest.raises(ValueError, match="-1 bytes"):
        device.allocate(-1)
    kept.free()
    device.allocate(64 << 20)


def test_pinned_memory_and_asynchronous_copies(fake: Fake, device: gpu.Device) -> None:
    host, stream, buffer = device.allocate_host(64), device.create_stream(), device.allocate(64)
    host[:] = np.arange(64)
    buffer.write_async(host[8:16], stream, offset=4)
    host[:] = 0
    buffer.read_async(host, stream)
    stream.synchronize()
    assert host[4:12].tolist() == list(range(8, 16))
    part = host[:4].view(np.int32)
    del host
    assert fake.live()["pinned"] == 1
    del part
    assert "pinned" not in fake.live()
    with pytest.raises(ValueError, match="must be C-contiguous"):
        buffer.write_async(np.zeros((4, 4))[:, 0], stream)
    frozen = np.zeros(4)
    frozen.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        buffer.read_async(frozen, stream)


# --- launches ---


def test_launch_passes_what_the_table_says(fake: Fake, device: gpu.Device) -> None:
    """Each parameter arrives in its own 8 bytes, in the table's order and kind."""
    got: list[object] = []

    def action(name: str, geometry: tuple[int, ...], params: Any) -> None:
        kinds = {"pointer": c_void_p, "int32": c_int, "int64": ctypes.c_int64, "size": ctypes.c_size_t}
        kinds["float32"] = ctypes.c_float
        args = wiring.KERNELS[name].args
        got.append([kinds[a.kind.value].from_address(params[i]).value for i, a in enumerate(args)])

    fake.action = action
    x, y = device.allocate(64), hq.Tensor.empty((4,), device=device)
    function = device.get_or_load_func("get_rows_q4_0", fake.image())
    function.launch((3, 2, 1), (256, 1, 1), 99, device.stream, [x, y, None, -(1 << 40), 1 << 63])
    assert got == [[x.address, y.buffer.address, None, -(1 << 40), 1 << 63]]
    assert fake.ran == [("get_rows_q4_0", (3, 2, 1, 256, 1, 1, 99))]
    norm = device.get_or_load_func("add_rms_norm_f32", fake.image())
    norm.launch((1, 1, 1), (1, 1, 1), 0, device.stream, [x, x.view(8, 8), np.uint64(7), y, -5, 0.5])
    assert got[1] == [x.address, x.address + 8, 7, y.buffer.address, -5, 0.5]
    assert norm is device.get_or_load_func("add_rms_norm_f32", fake.image())


def test_launch_checks_its_parameters(fake: Fake, device: gpu.Device) -> None:
    function, x = device.get_or_load_func("add_bias_f32", fake.image()), device.allocate(64)

    def launch(*params: object, grid: tuple[int, int, int] = (1, 1, 1), stream: Any = device.stream) -> None:
        function.launch(grid, (1, 1, 1), 0, stream, params)

    with pytest.raises(TypeError, match=r"takes 3 parameters \(float\* x, const float\* bias, int n\), 2 were given"):
        launch(x, x)
    for wrong in (1 << 31, 1.5, x):
        with pytest.raises(TypeError, match="does not fit its type"):
            launch(x, x, wrong)
    with pytest.raises(TypeError, match="does not fit its type"):
        launch(x, x, 1, grid=(1 << 32, 1, 1))
    with pytest.raises(ValueError, match="at least 1 in each direction"):
        launch(x, x, 1, grid=(0, 1, 1))
    for host in (np.zeros(4, np.float32), hq.device("cpu").allocate(16)):
        with pytest.raises(
            TypeError, match=r"parameter bias \(const float\*\) must be a Buffer.*host's memory: use Dev"
        ):
            launch(x, host, 1)
    with pytest.raises(TypeError, match="must be a Buffer"):
        launch(x, "bias", 1)
    other = fake.open(1)
    with pytest.raises(
        ValueError, match=f"parameter bias: <64 bytes on {fake.kind}:1>, the kernel is on {fake.kind}:0"
    ):
        launch(x, other.allocate(64), 1)
    for stream in (other.stream, hq.device("cpu").stream):
        with pytest.raises(TypeError, match="needs a stream of its own"):
            launch(x, x, 1, stream=stream)
    freed = device.allocate(16)
    freed.free()
    with pytest.raises(ValueError, match="has been freed"):
        launch(freed, x, 1)
    assert fake.ran == []
    with pytest.raises(DriverError, match=r"failed with .*\(1\): launching add_bias_f32 on grid \(1, 70000, 1\)"):
        launch(x, x, 1, grid=(1, 70000, 1))
    cpu = hq.device("cpu")
    with pytest.raises(TypeError, match="a kernel of the CPU needs a stream of the CPU"):
        cpu.get_or_load_func("add_bias_f32", QUANTIZED).launch((1, 1, 1), (1, 1, 1), 0, device.stream, [0, 0, 0])


def test_a_kernel_of_ones_own(fake: Fake, device: gpu.Device) -> None:
    """Not in the table: the parameters are typed by the caller."""
    got = []
    fake.counts["mine"] = 4

    def action(name: str, geometry: tuple[int, ...], params: Any) -> None:
        got.append([ctypes.string_at(params[i], n) for i, n in enumerate((8, 4, 2, 8))])

    fake.action = action
    buffer, mine = device.allocate(8), device.get_or_load_func("mine", fake.image())
    grid = (1, 1, 1)
    mine.launch(grid, grid, 0, device.stream, [buffer, ctypes.c_float(1.5), np.int16(-2), ctypes.c_void_p(3)])
    assert got == [[struct.pack("<Q", buffer.address), struct.pack("<f", 1.5), b"\xfe\xff", struct.pack("<Q", 3)]]
    for vague in (1, 1.5, None, np.zeros(2)):
        with pytest.raises(TypeError, match="parameter 1 of mine, which is not in the wiring table, must be"):
            mine.launch(grid, grid, 0, device.stream, [buffer, vague])
    fake.counts["none"] = 0
    device.get_or_load_func("none", fake.image()).launch(grid, grid, 0, device.stream, [])
    # Candle's CUDA names are the table's under its other profile.
    assert device.get_or_load_func("mul_mat_vec_q4_0_q8_1_cuda1", fake.image()).row is not None


def test_launches_that_overlap(fake: Fake, device: gpu.Device) -> None:
    """As many as are asked to, on one kind of GPU; elsewhere, and where the code object cannot wait, none."""
    overlapping, ptx = fake.integer("fake_overlapping"), fake.kind == "cuda"

    def overlaps(device: gpu.Device, image: bytes) -> int:
        """How many of two launches overlapped, and of the two that are captured."""
        function, one = device.get_or_load_func("add_bias_f32", image), (1, 1, 1)
        stream, x = device.create_stream(), device.allocate(64)
        before = overlapping.value
        for overlap in (True, False):
            function.launch(one, one, 0, stream, [x, x, 1], overlap=overlap)
        now = overlapping.value
        with stream.capture() as graph:
            for overlap in (True, False):
                function.launch(one, one, 0, stream, [x, x, 1], overlap)
        assert overlapping.value == now
        graph.launch(stream)
        assert overlapping.value - now == now - before
        return now - before

    def image_for(device: gpu.Device) -> bytes:
        new = device.target.name == "sm_90"
        return ADD.replace("sm_75", "sm_90").encode() if new else ADD.encode() if ptx else amd_elf(device.target.name)

    assert overlaps(device, image_for(device)) == ptx
    assert overlaps(device, fake.image()) == 0, "PTX for sm_75 has no instruction to wait with"
    assert overlaps(fake.open(1), image_for(fake.open(1))) == 0
    assert len(fake.ran) == 12
    fake.integer("fake_version").value = 12020 if ptx else 60000000
    assert overlaps(fake.open(), image_for(device)) == 0, "a graph of CUDA 12.2 does not keep it"


def test_a_driver_without_launches_that_overlap(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    if fake.kind != "cuda":
        pytest.skip("HIP has none")
    row = gpu_symbols.SYMBOLS["launch_config"]
    monkeypatch.setitem(gpu_symbols.SYMBOLS, "launch_config", row._replace(cuda="cuFuture"))
    device = fake.open()
    assert not device.can_overlap
    function, x = device.get_or_load_func("add_bias_f32", fake.image()), device.allocate(64)
    function.launch((2, 1, 1), (3, 1, 1), 99, device.stream, [x, x, 1], overlap=True)
    assert fake.ran == [("add_bias_f32", (2, 1, 1, 3, 1, 1, 99))]
    assert fake.integer("fake_overlapping").value == 0
    fake.fail("cuLaunchKernel")
    with pytest.raises(DriverError, match=r"cuLaunchKernel failed with CUDA_ERROR_LAUNCH_FAILED \(719\): launching"):
        function.launch((2, 1, 1), (3, 1, 1), 99, device.stream, [x, x, 1], overlap=True)


# --- streams, events and graphs ---


def test_streams_and_events(fake: Fake, device: gpu.Device) -> None:
    function, x = device.get_or_load_func("add_bias_f32", fake.image()), device.allocate(64)
    stream, first, second = device.create_stream(), Event(), Event()
    with pytest.raises(ValueError, match="must have been recorded"):
        first.elapsed(second)
    first.record(stream)
    for _ in range(3):
        function.launch((1, 1, 1), (1, 1, 1), 0, stream, [x, x, 1])
    second.record(stream)
    assert second.elapsed(first) == pytest.approx(3e-3)
    second.record(stream)
    assert fake.live()["events"] == 2, "an event is made once"
    device.stream.wait(second)
    on_cpu = Event()
    on_cpu.record(hq.device("cpu").stream)
    device.stream.wait(on_cpu)
    hq.device("cpu").stream.wait(second)
    with pytest.raises(ValueError, match="on the same device"):
        second.elapsed(on_cpu)
    for handle in (stream.handle, 0):  # what PyTorch gives
        theirs = Stream.from_handle(device, handle)
        function.launch((1, 1, 1), (1, 1, 1), 0, theirs, [x, x, 1])
        theirs.synchronize()
        assert (c_void_p.in_dll(fake.lib, "fake_last_stream").value or 0) == handle
        del theirs
    assert fake.live()["streams"] == 2
    device.synchronize()


def test_graphs(fake: Fake, device: gpu.Device) -> None:
    def action(name: str, geometry: tuple[int, ...], params: Any) -> None:
        address, by = c_void_p.from_address(params[0]).value, c_int.from_address(params[2]).value
        c_int.from_address(address or 0).value += by

    fake.action = action
    function, x = device.get_or_load_func("add_bias_f32", fake.image()), device.upload(np.zeros(4, np.int32))
    stream, one = device.create_stream(), (1, 1, 1)

    def captured(*numbers: int) -> Any:
        with stream.capture() as graph:
            for n in numbers:
                function.launch(one, one, 0, stream, [x.view(0, 4), None, n])
        return graph

    graph = captured(1, 10)
    assert (len(graph), fake.ran) == (2, [])
    for _ in range(2):
        graph.launch(stream)
    assert x.read(np.int32, (1,)) == 22
    graph.update(captured(2, 20))  # the same nodes: the driver's instance is patched
    graph.launch(device.stream)
    assert x.read(np.int32, (1,)) == 44
    graph.update(captured(3))  # others: a new one
    graph.launch(stream)
    assert x.read(np.int32, (1,)) == 47
    assert fake.live()["instances"] == 1

    with stream.capture() as copies:
        x.fill(1, stream)
        x.write_async(np.full(1, 5, np.int32), stream, 4)
        with pytest.raises(RuntimeError, match="capturing a graph already"), stream.capture():
            pass
    copies.launch(stream)
    assert x.read(np.int32, (3,)).tolist() == [0x01010101, 5, 0x01010101]
    with device.stream.capture(), pytest.raises(RuntimeError, match="copy on a stream of your own"):
        x.read(np.int32, (1,))
    x.free()
    graph.launch(stream)
    assert device.allocated == 16, "a graph keeps the memory that it uses"
    del graph, copies
    assert device.allocated == 0
    assert fake.live().keys() == {"streams", "modules"}


def test_a_capture_that_does_not_begin(fake: Fake, device: gpu.Device) -> None:
    """It leaves alone what somebody else captures on the same stream."""
    function, x, stream = device.get_or_load_func("add_bias_f32", fake.image()), device.allocate(64), device.stream
    theirs = Stream.from_handle(device, stream.handle)
    with stream.capture() as graph:
        with pytest.raises(DriverError, match="beginning to capture a graph"), theirs.capture():
            pass
        function.launch((1, 1, 1), (1, 1, 1), 0, stream, [x, x, 1])
    assert (len(graph), fake.ran) == (1, [])


def test_a_capture_that_fails_ends(fake: Fake, device: gpu.Device) -> None:
    stream = device.create_stream()
    with pytest.raises(ZeroDivisionError), stream.capture() as graph:
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match="its capture failed"):
        graph.launch(stream)
    with stream.capture() as graph:
        pass
    graph.launch(stream)
    assert len(graph) == 0
    fake.fail(fake.symbols["end_capture"])
    with pytest.raises(ZeroDivisionError), stream.capture():
        1 / 0  # noqa: B018
