"""AMD and NVIDIA GPUs as devices, through HIP's module API or CUDA's driver API: one class over `gpu_symbols.py`.

Only the primary context is used, so that memory and streams may be shared with PyTorch in the same process.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
from typing import Any

import numpy as np

from ..codeobjects import ENGINE, QUANTIZED, CodeObjects
from ..errors import DeviceNotFoundError, InvalidCodeObjectError, OutOfDeviceMemoryError
from . import base
from . import gpu_symbols as symbols
from .base import Array, Bytes, Rejection
from .gpu_memory import Buffer, Owned, PinnedMemory
from .gpu_module import Function, Module
from .gpu_objects import GpuModel, absent, choose, no_object
from .gpu_stream import Graph, Stream
from .gpu_symbols import Library

__all__ = ["Buffer", "Device", "Function", "Graph", "Module", "Stream", "device_count", "open_device"]


class Device(base.Device):
    """A GPU by kind (`hip` or `cuda`) and index."""

    def __init__(self, library: Library, index: int) -> None:
        self.library, self.kind, self.index = library, library.kind, index
        self._pid, self._lock = os.getpid(), threading.RLock()
        self._modules: dict[object, Module] = {}
        self._ordinal = library.integer("device_get", index, what=f"opening device {index}")
        self._set_row, self._get_row, self._current = "set_device", "get_device", self._ordinal
        if self.kind == "cuda":
            self._set_row, self._get_row = "set_context", "get_context"
            self._current = library.handle("retain_context", self._ordinal, what=f"the primary context of {self}")
        self._set_current = library.functions[self._set_row]
        self._make_current()
        version = library.integer("driver_version", what="asking for the driver's version")
        major, minor = (10**7, 10**5) if self.kind == "hip" else (1000, 10)
        self.driver_version = (version // major, version % major // minor)
        target, self.wave_size, self.compute_units = self._describe()
        self._target = GpuModel(target, self.kind, self.driver_version)
        new = self.driver_version >= symbols.OVERLAP_SINCE and "launch_config" in library.functions
        self.can_overlap = new and self.kind == "cuda" and int(target.removeprefix("sm_")) >= 90
        self.allocated = 0
        self.stream: Stream = self.create_stream()

    def __repr__(self) -> str:
        return f"{self.kind}:{self.index}"

    def _describe(self) -> tuple[str, int, int]:
        """Target, threads of a wave (warp), and compute units (as the driver counts them: on RDNA, pairs)."""
        what = f"asking for the properties of {self}"
        if self.kind == "cuda":
            numbers = (symbols.CAPABILITY_MAJOR, symbols.CAPABILITY_MINOR, symbols.WARP_SIZE, symbols.MULTIPROCESSORS)
            major, minor, wave, units = (
                self.library.integer("attribute", n, self._ordinal, what=what) for n in numbers
            )
            return f"sm_{major}{minor}", wave, units
        row = next(row for row in symbols.PROPERTIES if row in self.library.functions)
        layout, raw = symbols.PROPERTIES[row], ctypes.create_string_buffer(symbols.PROPERTIES_BYTES)
        self.library.call(row, raw, self._ordinal, what=what)
        wave, units = (struct.unpack_from("<i", raw, at)[0] for at in (layout.warp_size, layout.multiprocessors))
        arch = raw.raw[layout.gcn_arch_name :].partition(b"\0")[0].partition(b":")[0].decode(errors="replace")
        if not arch.startswith("gfx") or wave not in (32, 64):
            raise DeviceNotFoundError(
                f"{self}: {self.library.symbols[row]} tells of architecture {arch[:32]!r} and waves of {wave}; "
                "expected gfx... and 32 or 64: this version of the driver is not known to hipquant"
            )
        return arch, wave, units

    # --- the driver ---

    def _make_current(self) -> None:
        """Makes the device the one that this thread's calls are for: others in the process may have changed it."""
        if os.getpid() != self._pid:
            raise RuntimeError("a GPU cannot be used in a forked process; start processes with the 'spawn' method")
        code = self._set_current(self._current)
        if code:
            raise self.library.error(self._set_row, code, f"making {self} current")

    def _call(self, row: str, *args: object, what: str) -> None:
        self._make_current()
        self.library.call(row, *args, what=what)

    def _make(self, row: str, *args: object, destroy: str, what: str, out_at: int = 0) -> Owned:
        """A handle that a call returns through a pointer, and that `destroy` gives back."""
        made = Owned(self, destroy)
        self._call(row, *args[:out_at], ctypes.byref(made.out), *args[out_at:], what=what)
        return made

    def _give_back(self, row: str, made: ctypes.c_void_p, nbytes: int) -> None:
        """Frees or destroys something, whichever thread the garbage collector runs in; errors show at a later call."""
        if not made.value or os.getpid() != self._pid:
            return
        self.allocated -= nbytes
        before: Any = ctypes.c_void_p() if self.kind == "cuda" else ctypes.c_int()
        known = self.library.functions[self._get_row](ctypes.byref(before)) == 0
        ours = known and before.value == self._current
        if ours or self._set_current(self._current) == 0:
            self.library.functions[row](made)
        if known and not ours:
            self._set_current(before)

    def _own(self, stream: base.Stream | None) -> Stream:
        on = self.stream if stream is None else stream
        if not isinstance(on, Stream) or on.device is not self:
            raise TypeError(f"{self} needs a stream of its own, not {on!r} of {getattr(on, 'device', None)!r}")
        return on

    # --- the interface of every device ---

    @property
    def name(self) -> str:
        raw = ctypes.create_string_buffer(256)
        self.library.call("device_name", raw, len(raw), self._ordinal, what=f"asking for the name of {self}")
        return raw.value.decode(errors="replace")

    @property
    def target(self) -> GpuModel:
        """`target.name` is `gfx1100` or `sm_90`."""
        return self._target

    @property
    def memory(self) -> int:
        """Bytes of the device's memory."""
        out = ctypes.c_size_t()
        self.library.call("device_memory", ctypes.byref(out), self._ordinal, what=f"asking for the memory of {self}")
        return out.value

    @property
    def free_memory(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("memory_info", ctypes.byref(free), ctypes.byref(total), what=f"asking for the memory of {self}")
        return free.value

    @property
    def rejected(self) -> list[Rejection]:
        targets = QUANTIZED.targets()
        return choose(targets, self._target)[1] + absent(targets, self._target)

    @property
    def object_target(self) -> str | None:
        """The target of the embedded code object that is used, or None where none fits."""
        return choose(QUANTIZED.targets(), self._target)[0]

    @property
    def engine_missing(self) -> str:
        """Why the embedded engine has no code object for the device, so that no model runs on it; empty if it has."""
        best, rejected = choose(ENGINE.targets(), self._target)
        return "" if best else no_object(self._target, ENGINE.label, rejected)

    def load(self, code_object: CodeObjects | bytes) -> Module:
        with self._lock:
            module = self._modules.get(code_object)
            if module is None:
                module = self._modules[code_object] = Module(
                    self, self._bytes_of(code_object), isinstance(code_object, CodeObjects)
                )
            return module

    def _bytes_of(self, code_object: CodeObjects | bytes) -> bytes:
        if not isinstance(code_object, CodeObjects):
            return bytes(code_object)
        targets = code_object.targets()
        best, rejected = choose(targets, self._target)
        if best is None:
            raise InvalidCodeObjectError(no_object(self._target, code_object.label, rejected))
        try:
            return targets[best].read_bytes()
        except OSError as e:
            raise InvalidCodeObjectError(f"the code object {targets[best].name} could not be read: {e.strerror}") from e

    def allocate(self, nbytes: int, purpose: str = "a buffer", *, sparse: bool = False) -> Buffer:
        if nbytes < 0:
            raise ValueError(f"{purpose}: {nbytes} bytes cannot be allocated")
        memory = Owned(self, "free", nbytes)
        try:
            self._allocate("allocate", memory, nbytes, purpose)
        finally:
            self.allocated += nbytes if memory.value else 0
        return Buffer(self, memory, memory.value, nbytes)

    def _allocate(self, row: str, memory: Owned, nbytes: int, purpose: str, *flags: int) -> None:
        code = symbols.OUT_OF_MEMORY
        self._make_current()
        if nbytes < 1 << 62:  # ctypes would cut off what is above 64 bits
            code = self.library.functions[row](ctypes.byref(memory.out), max(nbytes, 1), *flags)
        if code == symbols.OUT_OF_MEMORY:
            raise OutOfDeviceMemoryError(nbytes, self.free_memory if row == "allocate" else None, purpose)
        if code:
            raise self.library.error(row, code, f"{purpose}: {nbytes} bytes")

    def allocate_host(self, nbytes: int) -> Bytes:
        if nbytes < 0:
            raise ValueError(f"{nbytes} bytes cannot be allocated")
        return np.asarray(PinnedMemory(self, nbytes))

    def create_stream(self) -> Stream:
        made = self._make("create_stream", symbols.NON_BLOCKING, destroy="destroy_stream", what="creating a stream")
        return Stream(self, made, made.value)

    def upload(self, data: Array) -> Buffer:
        buffer = self.allocate(data.nbytes, "an array")
        buffer.write(data)
        return buffer

    def synchronize(self) -> None:
        self._call("synchronize", what=f"waiting for {self}")


_lock = threading.Lock()
_libraries: dict[str, tuple[Library, int]] = {}
_missing: dict[str, str] = {}  # kind -> why there is none: asked once, as a library without a device takes its time
_devices: dict[tuple[str, int], Device] = {}


def device_count(kind: str) -> int:
    """How many GPUs of a kind there are; `DeviceNotFoundError` says what is missing where there is none."""
    with _lock:
        if kind not in _libraries:
            if kind in _missing:
                raise DeviceNotFoundError(_missing[kind])
            try:
                _libraries[kind] = symbols.load(kind)
            except DeviceNotFoundError as e:
                _missing[kind] = str(e)
                raise
        return _libraries[kind][1]


def open_device(kind: str, index: int) -> Device:
    """The GPU of a kind (`hip` or `cuda`) and index, opened once. Raises `DeviceNotFoundError`."""
    count = device_count(kind)
    if index >= count:
        there = ", ".join(f"{kind}:{i}" for i in range(count))
        raise DeviceNotFoundError(f"no device '{kind}:{index}'; there are: {there}")
    with _lock:
        found = _devices.get((kind, index))
        if found is None:
            found = _devices[kind, index] = Device(_libraries[kind][0], index)
        return found
