"""GPUs as devices: both columns of the table over a driver library that is made for it (fake_gpu_driver.c), AMD's real
library without a GPU where there is one, and a real device where HIPQUANT_TEST_DEVICE names it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_int, c_long, c_uint, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hipquant as hq
from hipquant import ops, quants, wiring
from hipquant.codeobjects import QUANTIZED, CodeObjects, bundle
from hipquant.driver import Event, gpu, gpu_symbols
from hipquant.driver.gpu_module import Module
from hipquant.driver.gpu_objects import GENERIC, GpuModel, check_whole, choose, image_for, ptx_target, unfit
from hipquant.driver.gpu_stream import Stream
from hipquant.errors import (
    DeviceNotFoundError,
    DriverError,
    InvalidCodeObjectError,
    KernelNotFoundError,
    OutOfDeviceMemoryError,
)
from hipquant.targets import AMD_TARGETS, GPU_TARGETS, host_machine
from models import random_blocks

COLUMNS = {"hip": "-DHIP -DR0600", "hip before 6": "-DHIP", "cuda": "-DCUDA"}
LIVE = ("", "memory", "pinned", "streams", "events", "modules", "graphs", "instances")
HEADER = ".version 6.4\n.target sm_75\n.address_size 64\n"
ADD = (
    HEADER
    + """
.visible .entry add_i32(.param .u64 a, .param .u64 b, .param .u64 c, .param .u32 n)
{
    .reg .pred %p;
    .reg .b32 %r<8>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [a];
    ld.param.u64 %rd2, [b];
    ld.param.u64 %rd3, [c];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.u32 %r2, %r2, %r3, %r4;
    setp.ge.u32 %p, %r2, %r1;
    @%p bra DONE;
    mul.wide.u32 %rd4, %r2, 4;
    add.u64 %rd1, %rd1, %rd4;
    add.u64 %rd2, %rd2, %rd4;
    add.u64 %rd3, %rd3, %rd4;
    ld.global.u32 %r5, [%rd1];
    ld.global.u32 %r6, [%rd2];
    add.u32 %r7, %r5, %r6;
    st.global.u32 [%rd3], %r7;
DONE:
    ret;
}
"""
)


def amd_elf(target: str, tail: bytes = b"") -> bytes:
    """The header of an AMD code object without segments and sections."""
    (mach,) = (number for number, name in bundle._MACHINES.items() if name == target)
    return (
        struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01\x40\x03", 3, 224, 1, 0, 0, 0, mach, 64, 0, 0, 0, 0, 0)
        + tail
    )


# --- the fake driver ---


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fake driver, compiled for each column."""
    folder, machine = tmp_path_factory.mktemp("driver"), host_machine()
    if not sys.platform.startswith("linux"):
        pytest.skip("the fake driver is linked for Linux")
    zig, source = [sys.executable, "-m", "ziglang"], Path(__file__).with_name("fake_gpu_driver.c")
    flags = "-O1 -std=c17 -ffreestanding -fPIC -fno-stack-protector -Wall -Wextra -Werror -Wno-unused-parameter".split()
    found = {}
    for column, defines in COLUMNS.items():
        built = folder / f"lib{column.replace(' ', '_')}.so"
        compile = ["clang", "-target", f"{machine}-linux-gnu", *flags, *defines.split(), "-c", str(source)]
        subprocess.run([*zig, *compile, "-o", str(built.with_suffix(".o"))], check=True)
        emulation = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux"}[machine]
        link = ["ld.lld", "-shared", "-m", emulation, str(built.with_suffix(".o")), "-o", str(built)]
        subprocess.run([*zig, *link], check=True)
        found[column] = built
    return found


class Fake:
    """The fake driver's own state, and the devices opened through it."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column, self.kind = path, column, column.partition(" ")[0]
        self.lib = ctypes.CDLL(str(path))
        self.symbols = {row: getattr(symbol, self.kind) for row, symbol in gpu_symbols.SYMBOLS.items()}
        self.ran: list[tuple[str, tuple[int, ...]]] = []
        self._count = ctypes.CFUNCTYPE(c_int, c_char_p)(lambda name: self.count(name.decode()))
        run = ctypes.CFUNCTYPE(None, c_char_p, ctypes.POINTER(c_uint), ctypes.POINTER(c_void_p))
        self._run = run(lambda name, geometry, params: self.run(name.decode(), tuple(geometry[:7]), params))
        c_void_p.in_dll(self.lib, "fake_count").value = ctypes.cast(self._count, c_void_p).value
        c_void_p.in_dll(self.lib, "fake_run").value = ctypes.cast(self._run, c_void_p).value
        self.counts: dict[str, int] = {}
        self.action: Callable[[str, tuple[int, ...], Any], None] | None = None

    def count(self, name: str) -> int:
        return self.counts[name] if name in self.counts else len(wiring.KERNELS[name].args)

    def run(self, name: str, geometry: tuple[int, ...], params: Any) -> None:
        self.ran.append((name, geometry))
        if self.action:
            self.action(name, geometry, params)

    def integer(self, name: str) -> c_int:
        return c_int.in_dll(self.lib, name)

    def fail(self, symbol: str = "", code: int = 719, nth: int = -1) -> None:
        """The next calls of a symbol fail, or the nth call from now on; with no argument, none."""
        c_char = (ctypes.c_char * 64).in_dll(self.lib, "fake_fail_symbol")
        c_char.value = symbol.encode()
        self.integer("fake_fail_code").value = code
        self.integer("fake_fail_nth").value = nth
        self.integer("fake_calls").value = 0

    @property
    def failed(self) -> str:
        return (ctypes.c_char * 64).in_dll(self.lib, "fake_failed").value.decode()

    def live(self) -> dict[str, int]:
        gc.collect()
        counts = (c_int * len(LIVE)).in_dll(self.lib, "fake_live")
        return {name: n for name, n in zip(LIVE, counts, strict=True) if n}

    def open(self, index: int = 0) -> gpu.Device:
        library, count = gpu_symbols.load(self.kind)
        assert count == self.integer("fake_devices").value
        return gpu.Device(library, index)

    def image(self) -> bytes:
        """A code object that the first device takes."""
        return ADD.encode() if self.kind == "cuda" else amd_elf("gfx1100")


@pytest.fixture(params=COLUMNS)
def fake(
    request: pytest.FixtureRequest, libraries: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fake]:
    path = tmp_path / "driver.so"  # a copy is another library, with its own state
    shutil.copy(libraries[request.param], path)
    monkeypatch.setattr(gpu_symbols, "candidates", lambda kind: [str(path)])
    monkeypatch.setattr(gpu, "_libraries", {})
    monkeypatch.setattr(gpu, "_missing", {})
    monkeypatch.setattr(gpu, "_devices", {})
    fake = Fake(path, request.param)
    yield fake
    assert fake.integer("fake_wrong_context").value == 0, "a call was made while another device was current"


@pytest.fixture
def device(fake: Fake) -> gpu.Device:
    return fake.open()


def test_devices_and_what_they_are(fake: Fake) -> None:
    first, second = hq.device(fake.kind), hq.device(f"{fake.kind}:1")
    assert first is hq.device(f"{fake.kind}:0") is not second
    assert [repr(d) for d in hq.devices() if d.kind == fake.kind] == [f"{fake.kind}:0", f"{fake.kind}:1"]
    expected = {
        "hip": [("gfx1100", 32, 48), ("gfx90a", 64, 104)],
        "cuda": [("sm_90", 32, 132), ("sm_75", 32, 40)],
    }[fake.kind]
    assert isinstance(first, gpu.Device)
    assert isinstance(second, gpu.Device)
    assert [(d.target.name, d.wave_size, d.compute_units) for d in (first, second)] == expected
    assert (first.name, second.name) == ("Fake GPU one", "Fake GPU two")
    assert first.memory == 64 << 20
    assert first.driver_version == {"hip": (7, 0), "cuda": (13, 0)}[fake.kind]
    assert hq.device("auto").kind == "cpu"
    with pytest.raises(
        DeviceNotFoundError, match=f"no device '{fake.kind}:2'; there are: {fake.kind}:0, {fake.kind}:1"
    ):
        hq.device(f"{fake.kind}:2")
    with pytest.raises(DeviceNotFoundError, match="no device 'tpu'; there are: auto, cpu"):
        hq.device("tpu")
    with pytest.raises(ValueError, match="threads are the CPU's"):
        first.threads = 2


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


def everything(fake: Fake) -> None:
    """One call of every symbol at least."""
    device, one = fake.open(), (1, 1, 1)
    assert device.name
    assert device.memory
    buffer = device.allocate(64, "the test")
    buffer.fill(0)
    buffer.write(np.ones(4, np.int32))
    assert buffer.read(np.int32, (4,)).all()
    pinned = device.allocate_host(16)
    stream, first, second = device.create_stream(), Event(), Event()
    buffer.write_async(pinned, stream)
    first.record(stream)
    function = device.get_or_load_func("add_bias_f32", fake.image())
    graphs = []
    for _ in range(2):
        with stream.capture() as graph:
            function.launch(one, one, 0, stream, [buffer, buffer, 1])
        graphs.append(graph)
    assert len(graphs[0]) == 1
    graphs[0].launch(stream)
    graphs[0].update(graphs[1])
    second.record(stream)
    stream.wait(second)
    second.elapsed(first)
    second.synchronize()
    device.synchronize()
    stream.synchronize()
    assert device.free_memory
    device._modules.clear()


def test_every_symbol_is_called(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the sweep below leaves none out, but for the other generation's properties and the errors' names."""
    called = set()

    def counted(self: Any, kind: str, handle: Any, path: str, init: Any = gpu_symbols.Library.__init__) -> None:
        init(self, kind, handle, path)
        for row, function in list(self.functions.items()):
            self.functions[row] = lambda *a, row=row, function=function: called.add(row) or function(*a)

    monkeypatch.setattr(gpu_symbols.Library, "__init__", counted)
    everything(fake)
    gc.collect()
    rows = {row for row, symbol in fake.symbols.items() if symbol} - {"error_name", "error_name_out"}
    generations = {"properties", "properties_r0600"} & rows
    assert rows - called - generations == {"destroy_stream"} - called
    assert len(generations & called) == len(generations) / 2


def test_every_call_that_fails_is_an_error_and_leaves_nothing_behind(fake: Fake) -> None:
    fake.fail()
    everything(fake)
    calls = fake.integer("fake_calls").value
    assert calls > 60
    failed = set()
    # What is called when something is given back, and nothing may raise.
    quiet = {s for row, s in fake.symbols.items() if row.startswith(("destroy", "free", "unload", "get_", "set_"))}
    before = fake.live()
    for nth in range(calls):
        said = ""
        fake.fail(nth=nth)
        try:
            everything(fake)
        except DeviceNotFoundError as error:
            said = f"{fake.failed}: {error}"
        except DriverError as error:
            said = str(error) if error.code == 719 else ""
        fake.fail()
        if said:
            failed.add(fake.failed)
        assert said.startswith(fake.failed) or (fake.failed in quiet and not said), (nth, fake.failed, said)
        now = fake.live()
        kept = {name: n - before.get(name, 0) for name, n in now.items()}
        before = now
        # A device keeps its own stream and the module that it has loaded; what a quiet call was to give back is lost.
        if fake.failed not in quiet:
            lost = {name for name, n in kept.items() if n > (name in ("streams", "modules"))}
            assert not lost, (nth, fake.failed, kept)
    others = {fake.symbols[row] for row in ("properties", "properties_r0600", "error_name", "error_name_out")}
    assert {s for s in fake.symbols.values() if s} - failed - quiet - others == set()
    assert failed & {fake.symbols["set_context"], fake.symbols["set_device"]}, "elsewhere it is an error"


def test_a_library_that_is_too_old(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    old = gpu_symbols.SYMBOLS["init"]._replace(hip="hipFuture", cuda="cuFuture")
    monkeypatch.setitem(gpu_symbols.SYMBOLS, "init", old)
    with pytest.raises(DeviceNotFoundError, match=r"driver.so lacks (hip|cu)Future; hipquant needs .* or newer"):
        fake.open()


def test_no_device(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_symbols, "_why_no_device", lambda kind: "Because.")
    fake.integer("fake_devices").value = 0
    with pytest.raises(DeviceNotFoundError, match=r"driver.so finds no (AMD|NVIDIA) GPU \(no device\)\. Because\."):
        hq.device(fake.kind)
    assert hq.devices()[-1].kind != fake.kind
    fake.integer("fake_init_code").value = 100
    name = {"hip": "hipErrorNoDevice", "cuda": "CUDA_ERROR_NO_DEVICE"}[fake.kind]
    with pytest.raises(DeviceNotFoundError, match=rf"finds no .* GPU \({name}\)"):
        fake.open()


def test_a_driver_that_tells_nonsense(fake: Fake, device: gpu.Device) -> None:
    if fake.kind != "hip":
        pytest.skip("CUDA has no structure of properties to misread")
    row = next(row for row in gpu_symbols.PROPERTIES if row in device.library.functions)
    real = device.library.functions[row]
    device.library.functions[row] = lambda raw, ordinal: 0
    with pytest.raises(DeviceNotFoundError, match=r"architecture '' and waves of 0; expected gfx"):
        device._describe()
    device.library.functions[row] = real
    assert device._describe()[0] == "gfx1100"


def test_threads_share_a_device(fake: Fake, device: gpu.Device) -> None:
    """Each thread's parameters are its own, and each has to make the device current."""
    wrong: list[object] = []
    function = device.get_or_load_func("add_bias_f32", fake.image())

    def action(name: str, geometry: tuple[int, ...], params: Any) -> None:
        address, n = c_void_p.from_address(params[0]).value, c_int.from_address(params[2]).value
        if address != n:
            wrong.append((address, n))

    fake.action = action

    def work(seed: int) -> None:
        try:
            stream = device.create_stream()
            for i in range(300):
                number = 1 + seed * 1000 + i
                function.launch((1, 1, 1), (1, 1, 1), 0, stream, [number, None, number])
                if (device.upload(np.full(8, number)).read(np.int64, (8,)) != number).any():
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert len(fake.ran) == 1200
    assert device.allocated == 0


def test_two_devices_in_one_thread(fake: Fake, device: gpu.Device) -> None:
    other = fake.open(1)
    mine, theirs = device.upload(np.arange(4)), other.upload(np.arange(4) + 10)
    assert mine.read(np.int64, (4,))[0] == 0
    assert theirs.read(np.int64, (4,))[0] == 10
    get = fake.symbols["get_context"] or fake.symbols["get_device"]
    before, after = c_long(), c_long()
    getattr(fake.lib, get)(ctypes.byref(before))
    mine.free()  # gives back memory of the other device, and leaves this one current
    getattr(fake.lib, get)(ctypes.byref(after))
    assert before.value == after.value
    assert device.allocated == 0


def test_a_forked_child_is_told(fake: Fake, device: gpu.Device) -> None:
    buffer = device.allocate(64)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            device.allocate(8)
        except RuntimeError as error:
            code = 0 if "forked process" in str(error) else 2
        buffer.free()
        os._exit(code if device.allocated == 64 else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert buffer.read(np.uint8, (1,)) == 0xCD


# --- code objects ---


def test_choice_of_a_target() -> None:
    def best(targets: str, name: str, kind: str = "hip", version: tuple[int, int] = (7, 0)) -> str | None:
        return choose(targets.split(), GpuModel(name, kind, version))[0]

    assert best("gfx1100 gfx11-generic gfx1101", "gfx1100") == "gfx1100"
    assert best("gfx1100 gfx11-generic", "gfx1103") == "gfx11-generic"
    assert best("gfx1100 gfx11-generic", "gfx1103", version=(6, 2)) is None
    assert best("gfx9-generic gfx906", "gfx90a") is None
    assert best("gfx90a:xnack+", "gfx90a") == "gfx90a:xnack+"
    assert best("sm_75 sm_80 sm_90a gfx1100", "sm_90", "cuda") == "sm_90a"
    assert best("sm_75 sm_80 sm_90a", "sm_89", "cuda") == "sm_80"
    assert best("sm_75 sm_80 sm_90a", "sm_120", "cuda") == "sm_80"
    assert best("sm_90 sm_90a", "sm_90", "cuda") == "sm_90a"
    assert best("sm_100f", "sm_103", "cuda") == "sm_100f"
    assert best("sm_80", "sm_75", "cuda") is None
    gpu_model = GpuModel("gfx1103", "hip", (5, 2))
    rejected = dict(choose([t.name for t in GPU_TARGETS if t.name != "gfx1103"], gpu_model)[1])
    assert len(rejected) == len(GPU_TARGETS) - 1
    assert rejected["gfx1100"] == "this is gfx1103"
    assert rejected["gfx11-generic"] == "needs ROCm 6.3, this is 5.2"
    assert rejected["gfx9-generic"] == "does not cover gfx1103"
    assert rejected["sm_75"] == "for NVIDIA GPUs, this is gfx1103"
    hopper = GpuModel("sm_120", "cuda")
    assert unfit("sm_90a", hopper) == "runs on compute capability 9.0 only, this is sm_120"
    assert unfit("gfx900", hopper) == "for AMD GPUs, this is sm_120"
    # Every AMD target of hipquant runs on its own GPU, and those of a generic one have no other.
    for target in AMD_TARGETS:
        assert target.name in GENERIC or best(target.name, target.name) == target.name
    covered = [name for names in GENERIC.values() for name in names]
    assert len(covered) == len(set(covered))
    assert GENERIC.keys() == {t.name for t in AMD_TARGETS if t.name.endswith("generic")}


def test_the_embedded_objects(fake: Fake, device: gpu.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects = CodeObjects(tmp_path)
    with pytest.raises(
        InvalidCodeObjectError, match=r"this installation holds none for a GPU\. Build one: hipquant bu"
    ):
        device.get_or_load_func("quantize_q8_1", objects)
    others = {"gfx900.hsaco": amd_elf("gfx900"), "sm_80.ptx": HEADER.replace("75", "80").encode()}
    others |= {"gfx90c.hsaco": amd_elf("gfx90c")}
    for name, raw in others.items():
        (tmp_path / name).write_bytes(raw)
    if fake.kind == "hip":
        expected = r"gfx900 gfx90c: this is gfx1100; sm_80: for NVIDIA GPUs.*hipquant build --target gfx1100"
        with pytest.raises(InvalidCodeObjectError, match=expected):
            device.get_or_load_func("quantize_q8_1", objects)
    (tmp_path / "gfx11-generic.hsaco").write_bytes(amd_elf("gfx11-generic", b"generic"))
    (tmp_path / "sm_75.ptx").write_text(HEADER + "// 75")
    objects = CodeObjects(tmp_path)
    assert device.get_or_load_func("quantize_q8_1", objects).name == "quantize_q8_1"
    image = (ctypes.c_char * 64).in_dll(fake.lib, "fake_last_image").raw
    assert (b".target sm_80" in image) if fake.kind == "cuda" else (image[48] == bundle_number("gfx11-generic"))
    with pytest.raises(KernelNotFoundError, match=r"no kernel 'missing_q8_1' in the code object for (gfx|sm_)"):
        device.get_or_load_func("missing_q8_1", objects)

    def unreadable(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(
        InvalidCodeObjectError, match=r"the code object (gfx11-generic\.hsaco|sm_80\.ptx) could not be re"
    ):
        device.get_or_load_func("quantize_q8_1", CodeObjects(tmp_path))


def bundle_number(target: str) -> int:
    return next(number for number, name in bundle._MACHINES.items() if name == target)


def test_which_objects_are_rejected_and_which_are_missing(device: gpu.Device) -> None:
    there = QUANTIZED.targets()
    rejected = {r.target: r.reason for r in device.rejected}
    assert there.keys() - {device.object_target} <= rejected.keys()
    for target in rejected.keys() - there.keys():
        assert rejected[target] == f"not in this installation; hipquant build --target {target} adds it"
    assert rejected.keys() | {device.object_target} >= {device.target.name} & {t.name for t in GPU_TARGETS}


def test_bytes_of_every_kind(fake: Fake, device: gpu.Device) -> None:
    amd = bundle.pack({t: amd_elf(t) for t in ("gfx900", "gfx1100", "gfx90a")})
    host = struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 1, 62) + bytes(60)
    cubin = struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 2, 190) + bytes(44)
    good = {
        "hip": [amd, amd_elf("gfx1100")],
        "cuda": [ADD.encode(), b"// by a compiler\n\n" + ADD.encode() + b"\0", cubin],
    }
    for blob in good[fake.kind]:
        Module(device, blob)
    wrong: dict[str, list[tuple[bytes, str]]] = {
        "hip": [
            (host, r"this is a host object for x86-64; gfx1100 needs an AMD code object .*--genco"),
            (cubin, "this is an NVIDIA cubin; gfx1100 needs"),
            (ADD.encode(), "this is PTX for NVIDIA's sm_75; gfx1100 needs"),
            (amd_elf("gfx90a"), r"gfx90a: this is gfx1100\. Build one: hipquant build --target gfx1100"),
            (bundle.pack({"gfx900": amd_elf("gfx900"), "gfx90c": amd_elf("gfx90c")}), "gfx900 gfx90c: this is gfx1100"),
            (amd[:5000], "bundle|bytes"),
            (b"", "not an offload bundle"),
            (b"\x7fELF", "not AMD machine code"),
        ],
        "cuda": [
            (host, r"an ELF file, but not a cubin; sm_90 needs PTX"),
            (amd, r"the bytes begin with b'__CLANG.*; sm_90 needs PTX"),
            (ADD.replace("sm_75", "sm_100").encode(), r"this PTX holds none that it runs: sm_100: needs compute cap"),
            (ADD.replace("sm_75", "sm_80a").encode(), r"sm_80a: runs on compute capability 8.0 only, this is sm_90"),
            (ADD.encode().replace(b"ret;", b"r\0t;"), "the PTX is damaged: there is a zero byte at"),
            (cubin[:40], "cut off at 40"),
            (b"\x50\xed\x55\xba\1\0\x10\0" + struct.pack("<Q", 1 << 40), "the fat binary is truncated"),
            (b"", "the bytes begin with b''"),
        ],
    }
    for blob, message in wrong[fake.kind]:
        with pytest.raises(InvalidCodeObjectError, match=message):
            Module(device, blob)
    del blob
    assert fake.live() == {"streams": 1}


def test_what_the_driver_says_of_a_module(fake: Fake, device: gpu.Device) -> None:
    if fake.kind == "cuda":
        with pytest.raises(InvalidCodeObjectError, match=r"CUDA_ERROR_INVALID_PTX \(218\)\. ptxas .* line 4; fatal"):
            Module(device, ADD.replace("ret;", "BROKEN").encode())
    fake.fail(fake.symbols["load_module"], 200)
    with pytest.raises(
        InvalidCodeObjectError, match=r"the driver refuses it with (hipErrorI|CUDA_ERROR_INVALID_IMAGE)"
    ):
        Module(device, fake.image())
    fake.fail(fake.symbols["load_module"], 2)
    with pytest.raises(DriverError, match=r"OutOfMemory|OUT_OF_MEMORY"):
        Module(device, fake.image())


@given(st.integers(0, 200), st.binary(max_size=80), st.sampled_from(["hip", "cuda"]))
def test_hostile_bytes(at: int, junk: bytes, kind: str) -> None:
    """Whatever the bytes are, they end as an image or as InvalidCodeObjectError."""
    gpu_model = GpuModel({"hip": "gfx1100", "cuda": "sm_90"}[kind], kind)
    elf = (
        amd_elf("gfx1100", bytes(200))
        if kind == "hip"
        else struct.pack("<16sHH", b"\x7fELF\x02\x01\x01", 2, 190) + bytes(200)
    )
    for blob in (
        bundle.pack({"gfx1100": amd_elf("gfx1100")})[:600],
        elf,
        ADD.encode(),
        b"\x50\xed\x55\xba" + bytes(20),
    ):
        damaged = blob[:at] + junk + blob[at + len(junk) :]
        for bad in (damaged, damaged[:at]):
            try:
                image = image_for(bad, gpu_model)
            except InvalidCodeObjectError:
                continue
            assert len(image) <= len(bad) + 1


def test_whole_files_only() -> None:
    """Truncation of a real ELF shared object at any byte is seen."""
    path = next(iter(QUANTIZED.files()))
    if path.suffix not in (".so", ".hsaco"):
        pytest.skip("no ELF file is embedded")
    whole = path.read_bytes()
    check_whole(whole)
    for size in (0, 63, 64, 200, len(whole) // 2, len(whole) - 1):
        with pytest.raises(InvalidCodeObjectError, match="damaged|truncated"):
            check_whole(whole[:size])


def test_the_target_that_ptx_names() -> None:
    assert ptx_target(ADD.encode()) == "sm_75"
    assert ptx_target(b"\n//\n// Generated by LLVM\n//\n\n.version 8.0\n.target sm_90a\n.address_size 64\n") == "sm_90a"
    for other in (
        b"",
        b".version 8.0\n",
        b"// .version 8.0 .target sm_90",
        b"int main() { .version 8.0 .target sm_90 }",
    ):
        assert ptx_target(other) == ""


# --- the framework functions on a GPU: the fake runs the CPU's kernels ---


def test_ops_give_the_same_as_on_the_cpu(fake: Fake, device: gpu.Device, tmp_path: Path) -> None:
    cpu = hq.device("cpu")

    def action(name: str, geometry: tuple[int, ...], params: Any) -> None:
        kinds = {"pointer": ctypes.c_uint64, "int32": c_int, "int64": ctypes.c_int64, "size": ctypes.c_size_t}
        values = [kinds[a.kind.value].from_address(params[i]).value for i, a in enumerate(wiring.KERNELS[name].args)]
        function = cpu.get_or_load_func(name, QUANTIZED)
        function.launch(geometry[:3], geometry[3:6], 0, cpu.stream, values)  # type: ignore[arg-type]

    fake.action = action
    embedded = {"hip": "gfx1100.hsaco", "cuda": "sm_80.ptx"}[fake.kind]
    (tmp_path / embedded).write_bytes(fake.image())
    device._modules[QUANTIZED] = Module(device, fake.image())
    rng, k, rows = np.random.default_rng(0), 512, 7
    x = rng.standard_normal((3, k)).astype(np.float32)
    for type in quants.DEQUANTIZE_TYPES:
        blocks = random_blocks(rng, type.name, rows, k, 0.1)
        on_cpu, on_gpu = (hq.Tensor.from_numpy(blocks, type.name, (rows, k), device=d) for d in (cpu, device))
        np.testing.assert_array_equal(on_gpu.numpy(), on_cpu.numpy())
        functions: list[Callable[[hq.Tensor], hq.Tensor]] = [ops.dequantize_f32, ops.dequantize_f16]
        if type in quants.WEIGHT_TYPES:
            functions += [
                lambda w: ops.dequantize_mul_mat_vec(w, x[0]),
                lambda w: ops.mul_mat_vec_via_q8_1(w, x),
                lambda w: ops.mul_mat_vec_via_q8_1(w, hq.Tensor.from_numpy(x[0], device=w.device)),
                lambda w: ops.mul_mat_via_q8_1(w, x),
                lambda w: ops.mul_mat_via_q8_1(w, ops.quantize_q8_1(hq.Tensor.from_numpy(x, device=w.device))),
                lambda w: ops.get_rows(w, np.array([3, 0, 3])),
            ]
        for function in functions:
            result, expected = function(on_gpu), function(on_cpu)
            assert (result.device, result.shape, result.type) == (device, expected.shape, expected.type)
            np.testing.assert_array_equal(result.numpy(), expected.numpy())
    with pytest.raises(ValueError, match=f"activations are on <cpu.*, weights on {fake.kind}:0"):
        ops.mul_mat_vec_via_q8_1(hq.Tensor.from_numpy(blocks, "Q6_K", (rows, k), device=device), ops.quantize_q8_1(x))
    del result, on_gpu
    assert device.allocated == 0


def test_a_captured_op_keeps_its_memory(fake: Fake, device: gpu.Device) -> None:
    device._modules[QUANTIZED] = Module(device, fake.image())
    stream, x = device.create_stream(), hq.Tensor.from_numpy(np.ones((2, 64), np.float32), device=device)
    with stream.capture() as graph:
        ops.quantize_q8_1(x, stream=stream)
    held = device.allocated
    del x
    assert device.allocated == held
    graph.launch(stream)
    assert [name for name, _ in fake.ran] == ["quantize_q8_1"]


# --- finding the library ---


def test_where_libraries_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_symbols, "_loaded_already", lambda names: iter(()))
    monkeypatch.setattr(sys, "platform", "linux")
    files = "rocm/lib/libamdhip64.so.6 hip/bin/libamdhip64.so site/torch/lib/libamdhip64.so"
    for file in (*files.split(), "site/_rocm_sdk_core/lib/libamdhip64.so.7"):
        folder, _, name = file.rpartition("/")
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).touch()
    for package in ("torch", "_rocm_sdk_core"):
        (tmp_path / "site" / package / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("ROCM_PATH", str(tmp_path / "rocm"))
    monkeypatch.setenv("HIP_PATH", str(tmp_path / "hip"))
    found = [c.removeprefix(f"{tmp_path}/") for c in gpu_symbols.candidates("hip") if not c.startswith("/opt")]
    assert found == [
        *("rocm/lib/libamdhip64.so.6", "hip/bin/libamdhip64.so"),
        *("libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"),
        *("site/torch/lib/libamdhip64.so", "site/_rocm_sdk_core/lib/libamdhip64.so.7"),
    ]
    assert gpu_symbols.candidates("cuda")[:2] == ["libcuda.so.1", "libcuda.so"]
    monkeypatch.setattr(sys, "platform", "win32")
    assert gpu_symbols.library_names("hip") == ("amdhip64_7.dll", "amdhip64_6.dll", "amdhip64.dll")
    assert gpu_symbols.library_names("cuda") == ("nvcuda.dll",)


def test_a_library_that_is_loaded_already_comes_first(fake: Fake) -> None:
    assert next(gpu_symbols._loaded_already(("driver.so",))) == str(fake.path)


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "libamdhip64.so"
    broken.write_bytes(b"no ELF")
    monkeypatch.setattr(gpu_symbols, "candidates", lambda kind: ["libnothere.so.7", str(broken)])
    expected = r"no driver library for AMD GPUs: tried libnothere.so.7, .*libamdhip64.so \(.*\); install ROCm's"
    with pytest.raises(DeviceNotFoundError, match=expected):
        gpu_symbols.load("hip")


def test_why_there_is_no_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    node = tmp_path / "kfd"
    monkeypatch.setattr(gpu_symbols, "Path", lambda name: tmp_path / Path(name).name)
    assert gpu_symbols._why_no_device("hip").startswith(f"There is no {node}: no such GPU, the kernel's amdgpu driver")
    node.touch()
    assert "may be one that this version of the driver does not support" in gpu_symbols._why_no_device("hip")
    import grp

    group = grp.getgrgid(node.stat().st_gid).gr_name
    monkeypatch.setattr(gpu_symbols.os, "access", lambda path, mode: False)
    said = gpu_symbols._why_no_device("hip")
    assert said.startswith(f"No permission on {node}: group {group} gives it (sudo usermod -aG {group} $USER")
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "-1")
    assert gpu_symbols._why_no_device("hip") == "HIP_VISIBLE_DEVICES='-1' may hide it"


def test_importing_loads_no_driver() -> None:
    code = (
        "import hipquant, sys, hipquant.driver\nhipquant.device('cpu')\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('hipquant.driver.gpu' in sys.modules, 'amdhip' in maps, 'libcuda' in maps)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False False\n"


def test_the_command_shows_gpus(libraries: dict[str, Path], tmp_path: Path) -> None:
    """Found by the system's own search, as a real driver is."""
    shutil.copy(libraries["hip"], tmp_path / "libamdhip64.so.7")
    shutil.copy(libraries["cuda"], tmp_path / "libcuda.so.1")
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}
    for variable in ("ROCM_PATH", "HIP_PATH"):
        environment.pop(variable, None)

    def call(*args: str) -> str:
        command = [sys.executable, "-m", "hipquant", "devices", *args]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    report = json.loads(call("--json"))
    assert [d["name"] for d in report["devices"]] == ["cpu", "hip:0", "hip:1", "cuda:0", "cuda:1"]
    assert report["unavailable"] == {}
    one = report["devices"][1]
    assert (one["target"], one["wave_size"], one["compute_units"], one["memory"]) == ("gfx1100", 32, 48, 64 << 20)
    shown = call()
    for device in report["devices"][1:]:
        assert f"| {device['name']} " in shown
        assert f"| {device['target']} " in shown
        for rejected in device["rejected"]:
            assert rejected["reason"] in shown
    assert len(shown.splitlines()) < 60


# --- AMD's real library, without a GPU ---


def real_hip() -> ctypes.CDLL:
    for name in gpu_symbols.library_names("hip"):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    pytest.skip("no libamdhip64 is installed (Debian: libamdhip64-5)")


def test_the_real_library_exports_the_hip_column() -> None:
    library = real_hip()
    missing = {s.hip for s in gpu_symbols.SYMBOLS.values() if s.hip and not hasattr(library, s.hip)}
    version = c_int()
    library.hipDriverGetVersion(ctypes.byref(version))
    if version.value < 6 * 10**7:
        assert missing == {"hipGetDevicePropertiesR0600"}
    else:
        assert missing <= {"hipGetDeviceProperties"}


def test_the_real_library_without_a_gpu() -> None:
    real_hip()
    done = subprocess.run(
        [sys.executable, "-m", "hipquant", "devices", "--json"], capture_output=True, text=True, check=True
    )
    report = json.loads(done.stdout)
    if "hip" not in report["unavailable"]:
        pytest.skip("there is an AMD GPU")
    said = report["unavailable"]["hip"]
    assert "libamdhip64.so" in said
    assert "finds no AMD GPU (hipError" in said
    assert any(word in said for word in ("There is no /dev/kfd", "No permission on", "may hide it", "is there:"))


# --- a real device ---

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
    with pytest.raises(DriverError, match=r"cuLaunchKernel failed with CUDA_ERROR_INVALID_VALUE \(1\)"):
        function.launch((1, 1, 1), (2048, 1, 1), 0, real.stream, [*[ctypes.c_void_p(0)] * 3, ctypes.c_uint32(0)])
    done: list[object] = []

    def work() -> None:
        done.append(real.upload(np.arange(5)).read(np.int64, (5,)).tolist())

    worker = threading.Thread(target=work)  # a thread that has no context yet
    worker.start()
    worker.join()
    assert done == [[0, 1, 2, 3, 4]]
