"""A GPU for tests, without one: the fake driver (gpu_devices.py) whose launches run the kernels' sources, simulated in
this process (toolchain/simulate.py) on the memory that it gave out.

    with simulated_gpu("hip", wave=64) as gpu:
        model = hipquant.load(path, device="hip:0")  # gpu.device
        gpu.fail_nth(10, 719)

What a launch writes beyond a buffer, and a call while another device is current, is told at the end. New memory is NaN
as float and as half. A kernel's own fault (toolchain/simulate.py) fails its launch as a GPU's does: `gpu.fault` says
more than the `DriverError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpu_devices import Fake, amd_elf, compiled
from hipquant import wiring
from hipquant.codeobjects import ENGINE, QUANTIZED
from hipquant.driver import gpu, gpu_symbols
from hipquant.errors import HipquantError
from hipquant.toolchain import gpu as sources
from hipquant.toolchain import simulate
from hipquant.wiring import Kind

KINDS = (("cuda", 32), ("cuda", 64), ("hip", 32), ("hip", 64))
TARGETS = {"cuda": ("sm_75", "sm_90a"), "hip": ("gfx1100", "gfx90a")}  # of the fake driver's two devices
LAUNCH_FAILED = 719
_CTYPES: dict[Kind, Any] = {
    Kind.POINTER: ctypes.c_uint64,
    Kind.INT32: ctypes.c_int32,
    Kind.INT64: ctypes.c_int64,
    Kind.SIZE: ctypes.c_size_t,
    Kind.FLOAT32: ctypes.c_float,
}
_scratch = tempfile.TemporaryDirectory(prefix="simulated_gpu")  # until the process ends


@functools.cache
def kernels(kind: str, wave: int) -> simulate.InProcess:
    """All GPU kernels as a library: with matrix units for CUDA, without for HIP."""
    every = [*sources.families(), *sources.engine_families()]
    return simulate.InProcess(simulate.build(wave, sources=every, matrix_units=kind == "cuda"))


class SimulatedGpu(Fake):
    """The driver's state, what it shall fail at, and the device."""

    def __init__(self, path: Path, kind: str, library: simulate.InProcess) -> None:
        super().__init__(path, kind)
        self.library, self.fault = library, ""
        self.integer("fake_wave").value = library.wave
        self.integer("fake_fill").value = 0xFF

    @property
    def device(self) -> gpu.Device:
        """The first device, which `hipquant.device("cuda")` gives too."""
        return gpu.open_device(self.kind, 0)

    def run(self, name: str, geometry: tuple[int, ...], params: Any) -> int:
        self.ran.append((name, geometry))
        try:
            kernel = wiring.KERNELS[name]
            values = [_CTYPES[a.kind].from_address(params[i]).value for i, a in enumerate(kernel.args)]
            grid, block = geometry[:3], geometry[3:6]
            self.library.launch(kernel, grid, block, values)  # type: ignore[arg-type]
        except Exception as error:  # it cannot pass through the driver, which is C
            self.fault = str(error)
            print(error, file=sys.stderr)
            return LAUNCH_FAILED
        return 0

    @property
    def memory(self) -> int:
        """Bytes of the device's memory; may be set at any time."""
        return ctypes.c_size_t.in_dll(self.lib, "fake_total").value

    @memory.setter
    def memory(self, nbytes: int) -> None:
        ctypes.c_size_t.in_dll(self.lib, "fake_total").value = nbytes

    @property
    def calls(self) -> int:
        """Calls of the driver since the last `fail_nth`."""
        return self.integer("fake_calls").value

    def fail_nth(self, n: int, code: int = LAUNCH_FAILED) -> None:
        """The nth call of the driver from now on (0 is the next) fails; a negative n: none."""
        self.fail(nth=n, code=code)

    def overruns(self) -> int:
        """Buffers given back so far that something was written behind; counts from 0 again."""
        gc.collect()
        found, self.integer("fake_overruns").value = self.integer("fake_overruns").value, 0
        return found


def _code_objects(kind: str, silicon: str, library: simulate.InProcess, folder: Path) -> dict[str, Path]:
    """A file a target, which says to the fake driver what kernels it holds."""
    names = " ".join(k.name for k in wiring.TABLE if k.silicon == silicon and k.name in library)
    found = {}
    for target in TARGETS[kind]:
        found[target] = folder / f"{target}.{silicon}"
        text = f"// kernels: {names} \n"
        ptx = f".version 6.4\n.target {target}\n.address_size 64\n{text}".encode()
        found[target].write_bytes(ptx if kind == "cuda" else amd_elf(target, text.encode()))
    return found


@contextlib.contextmanager
def simulated_gpu(kind: str = "cuda", wave: int = 32, *, memory: int = 1 << 30) -> Iterator[SimulatedGpu]:
    """A GPU of a kind, `cuda` or `hip`, as "cuda:0" or "hip:0"; there are no others meanwhile.

    Threads of a block run one after the other, up on waves of 32 and down on waves of 64. CUDA's warps are told to have
    32 lanes in both cases.
    """
    driver, library = compiled(Path(_scratch.name))[kind], kernels(kind, wave)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "driver.so"  # a copy is another library, with its own state
        shutil.copy(driver, path)
        patch.setattr(gpu_symbols, "candidates", lambda asked: [str(path)] if asked == kind else [])
        for name in ("_libraries", "_missing", "_devices"):
            patch.setattr(gpu, name, {})
        for container, silicon in ((QUANTIZED, "any"), (ENGINE, "gpu")):
            found = _code_objects(kind, silicon, library, Path(folder))
            patch.setattr(container, "targets", lambda found=found: found)
        simulated = SimulatedGpu(path, kind, library)
        simulated.memory = memory
        yield simulated
        if simulated.integer("fake_wrong_context").value:
            raise HipquantError("a call was made while another device was current")
        if n := simulated.overruns():
            raise HipquantError(f"something was written behind the end of {n} buffers")


@pytest.fixture(name="simulated", params=KINDS, ids=lambda p: f"{p[0]}-waves-of-{p[1]}")
def simulated_gpus(request: pytest.FixtureRequest) -> Iterator[SimulatedGpu]:
    """The GPU of each kind and wave size, one after the other."""
    with simulated_gpu(*request.param) as simulated:
        yield simulated
