"""GPUs as devices, over the fake driver (gpu_devices.py): finding the library, what its devices are, every symbol and
its errors.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from ctypes import c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hipquant as hq
from gpu_devices import Fake, compiled, fake_device, fake_driver  # noqa: F401
from hipquant.driver import Event, gpu, gpu_symbols
from hipquant.errors import DeviceNotFoundError, DriverError

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


def test_a_library_that_is_too_old(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    old = gpu_symbols.SYMBOLS["init"]._replace(hip="hipFuture", cuda="cuFuture")
    monkeypatch.setitem(gpu_symbols.SYMBOLS, "init", old)
    with pytest.raises(DeviceNotFoundError, match=r"driver.so lacks (hip|cu)Future; hipquant needs .* or newer"):
        fake.open()


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
    render = tmp_path / "dri" / "renderD128"
    render.parent.mkdir()
    render.touch()
    monkeypatch.setattr(gpu_symbols.os, "access", lambda path, mode: path != render)
    assert gpu_symbols._why_no_device("hip").startswith(f"No permission on {render}: group {group} gives it")
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


def test_the_command_shows_gpus(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """Found by the system's own search, as a real driver is."""
    libraries = compiled(tmp_path_factory.getbasetemp())
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


# --- devices ---


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


# --- every symbol, and its errors ---


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
    launches = {"launch", "launch_config"} & rows
    assert rows - called - generations - launches == {"destroy_stream"} - called
    assert len(generations & called) == len(generations) / 2
    assert len(launches & called) == 1


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
        gc.freeze()  # what stays, stays for good: collecting the next one's garbage takes no time
    gc.unfreeze()
    others = {fake.symbols[row] for row in ("properties", "properties_r0600", "error_name", "error_name_out")}
    others |= {"cuLaunchKernel"}  # for drivers that lack cuLaunchKernelEx
    assert {s for s in fake.symbols.values() if s} - failed - quiet - others == set()
    assert failed & {fake.symbols["set_context"], fake.symbols["set_device"]}, "elsewhere it is an error"
