"""The CPU as a device: code objects are shared objects, memory is the process's own, streams run at once.

A launch is one *node* (entry point, grid, block, parameters) that the runtime's pool of threads runs
(`kernels/cpu/runtime.cpp`); a captured graph is a list of nodes that it runs in one call.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import struct
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..codeobjects import QUANTIZED, CodeObjects
from ..errors import DriverError, InvalidCodeObjectError, KernelNotFoundError, OutOfDeviceMemoryError
from ..targets import CpuTarget, cpu_targets, host_machine, runtime_filename
from ..wiring import CPU_KERNELS, Arg, Dim3
from . import base
from .base import Bytes, Event, Rejection

ALIGNMENT = 64
HUGE = 4 << 20  # allocations from here on are asked for in huge pages
MAX_PARAMS = 16
NODE_HEADER = "<Q3I3III"
_MACHINES = {62: "x86_64", 183: "aarch64"}  # ELF e_machine


def available_memory() -> int | None:
    """Bytes that the system can give, or None where it does not say."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the processor time that its control group grants."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, -(-int(quota) // int(period))))
    return cores


class Buffer(base.Buffer):
    """A range of the process's memory."""

    __slots__ = ("_bytes",)

    def __init__(self, data: Bytes) -> None:
        self._bytes: Bytes | None = data
        self.address, self.nbytes = int(data.ctypes.data), data.nbytes

    @property
    def bytes(self) -> Bytes:
        """The memory itself: on the CPU a view, without a copy."""
        if self._bytes is None:
            raise ValueError("this buffer has been freed")
        return self._bytes

    def view(self, offset: int, nbytes: int) -> Buffer:
        self._check_range(offset, nbytes)
        return Buffer(self.bytes[offset : offset + nbytes])

    def write_async(self, data: base.Array, stream: base.Stream | None, offset: int = 0) -> None:
        _refuse_capture(stream)
        raw = data.reshape(-1).view(np.uint8)
        self.view(offset, raw.nbytes).bytes[:] = raw

    def read_async(self, into: base.Array, stream: base.Stream | None, offset: int = 0) -> None:
        _refuse_capture(stream)
        raw = into.reshape(-1).view(np.uint8)
        raw[:] = self.view(offset, raw.nbytes).bytes

    def fill(self, byte: int, stream: base.Stream | None = None) -> None:
        _refuse_capture(stream)
        self.bytes[:] = byte

    def array(self, dtype: npt.DTypeLike, shape: Sequence[int]) -> base.Array:
        count = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if count > self.nbytes:
            raise ValueError(f"{count} bytes asked for from a buffer of {self.nbytes}")
        return self.bytes[:count].view(dtype).reshape(tuple(shape))

    def free(self) -> None:
        self._bytes, self.address, self.nbytes = None, 0, 0


def _refuse_capture(stream: base.Stream | None) -> None:
    if isinstance(stream, Stream) and stream._graph is not None:
        raise RuntimeError("the CPU's graphs hold launches only; copy and fill before the capture")


class _Runtime:
    """The pool of threads: `runtime-<machine>.so`, loaded once a process."""

    def __init__(self) -> None:
        path = QUANTIZED.path(runtime_filename(host_machine()))
        if path is None:
            raise InvalidCodeObjectError(
                f"this installation holds no runtime for {host_machine()} ({platform.system()}); it holds "
                f"{QUANTIZED!r}. Install on this machine from source (pip install .), on Linux x86-64 or aarch64"
            )
        self.lib = ctypes.CDLL(str(path))
        self.lib.hq_run.argtypes = [ctypes.c_char_p, ctypes.c_uint32]
        self.lib.hq_set_threads.argtypes = [ctypes.c_uint32]
        self.lib.hq_try_probe.argtypes = [ctypes.c_void_p]
        os.register_at_fork(after_in_child=self.lib.hq_after_fork)

    def run(self, nodes: bytes, count: int, what: str) -> None:
        error = self.lib.hq_run(nodes, count)
        if error:
            raise DriverError("hq_run", error, os.strerror(error), f"the threads that run {what} could not be started")


_runtime_lock = threading.Lock()
_runtime: _Runtime | None = None


def runtime() -> _Runtime:
    global _runtime
    with _runtime_lock:
        if _runtime is None:
            _runtime = _Runtime()
        return _runtime


class Instant(base.Point):
    """The time at which an event was recorded."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def seconds_since(self, earlier: base.Point) -> float:
        if not isinstance(earlier, Instant):
            raise ValueError("both events must have been recorded on the same device")
        return self.time - earlier.time


class Stream(base.Stream):
    """An order of launches. The CPU runs each one at once; while a graph is captured, they are only recorded."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._graph: Graph | None = None

    def synchronize(self) -> None:
        """Returns when everything launched is done: on the CPU, at once."""

    def wait(self, event: Event) -> None:
        event.synchronize()

    def _mark(self, previous: base.Point | None) -> Instant:
        return Instant()

    @contextlib.contextmanager
    def capture(self) -> Iterator[Graph]:
        if self._graph is not None:
            raise RuntimeError("this stream is capturing a graph already")
        self._graph = graph = Graph()
        try:
            yield graph
        finally:
            self._graph = None
            graph.packed = b"".join(graph.nodes)


class Graph(base.Graph):
    """A captured list of launches, run in one call of the runtime."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[bytes] = []
        self.packed = b""

    def __len__(self) -> int:
        return len(self.nodes)

    def launch(self, stream: base.Stream) -> None:
        runtime().run(self.packed, len(self.nodes), "a graph")

    def update(self, other: base.Graph) -> None:
        if not isinstance(other, Graph):
            raise TypeError(f"a graph of the CPU cannot take over {other!r}")
        self.nodes, self.packed, self.keep = other.nodes, other.packed, other.keep


class Function(base.Function):
    """A kernel of a loaded module; it keeps the module."""

    def __init__(self, module: Module, name: str, address: int) -> None:
        super().__init__(name, NODE_HEADER, MAX_PARAMS)
        self.module, self.address = module, address

    def launch(
        self,
        grid: Dim3,
        block: Dim3,
        shared_mem: int,
        stream: base.Stream,
        params: Sequence[object],
        overlap: bool = False,
    ) -> None:
        if not isinstance(stream, Stream):
            raise TypeError(f"{self.name}: a kernel of the CPU needs a stream of the CPU, not {stream!r}")
        values = self._values(params)
        try:
            node = self._node.pack(self.address, *grid, *block, shared_mem, len(values), *values)
        except struct.error as e:
            raise self._misfit(grid, block, e) from None
        self._check_geometry(grid, block)
        if stream._graph is not None:
            stream._graph.nodes.append(node)
            stream._graph.keep.append((self, params))
        else:
            runtime().run(node, 1, self.name)

    def _address(self, value: object, arg: Arg) -> int:
        if isinstance(value, Buffer):
            if not value.address and value._bytes is None:
                raise ValueError(f"parameter {arg.name}: this buffer has been freed")
            return value.address
        if value is None:
            return 0
        if isinstance(value, np.ndarray):
            if not value.flags.c_contiguous:
                strides = value.strides
                raise ValueError(f"parameter {arg.name}: the array must be C-contiguous, its strides are {strides}")
            return int(value.ctypes.data)
        if isinstance(value, (int, np.integer)):
            return int(value)
        buffer = getattr(value, "buffer", None)
        if isinstance(buffer, Buffer):
            return buffer.address
        raise TypeError(
            f"parameter {arg.name} ({arg.ctype}) must be a Buffer, an array, an address or None, not {value!r}"
        )


class Module(base.Module):
    """A loaded code object: `Module(path or bytes)`. `InvalidCodeObjectError` says what the bytes are instead."""

    def __init__(self, code_object: Path | bytes, target: str = "this CPU") -> None:
        self.target = target
        self._functions: dict[str, Function] = {}
        _check_elf(code_object, target)
        try:
            if isinstance(code_object, bytes):
                fd = os.memfd_create("hipquant")
                try:
                    with open(fd, "wb", closefd=False) as f:
                        f.write(code_object)
                    self._lib = ctypes.CDLL(f"/proc/self/fd/{fd}")
                finally:
                    os.close(fd)
            else:
                self._lib = ctypes.CDLL(str(code_object))
        except OSError as e:
            raise InvalidCodeObjectError(f"the code object for {target} could not be loaded: {e}") from e

    def get_function(self, name: str) -> Function:
        found = self._functions.get(name)
        if found is None:
            try:
                address = ctypes.cast(getattr(self._lib, name), ctypes.c_void_p).value
            except (AttributeError, ValueError):
                raise KernelNotFoundError(name, self.target, (k.name for k in CPU_KERNELS)) from None
            found = self._functions[name] = Function(self, name, address or 0)
        return found


def _read(code_object: Path | bytes, start: int, length: int) -> bytes:
    if isinstance(code_object, bytes):
        return code_object[start : start + length]
    try:
        with open(code_object, "rb") as f:
            f.seek(start)
            return f.read(length)
    except OSError as e:
        raise InvalidCodeObjectError(f"the code object {code_object.name} could not be read: {e.strerror}") from e


def _check_elf(code_object: Path | bytes, target: str) -> None:
    """A CPU code object is a whole 64-bit little-endian ELF shared object for this machine.

    The system's loader maps what a truncated file lacks, and the process would die when it is touched.
    """
    head = _read(code_object, 0, 64)
    if head[:4] != b"\x7fELF" or len(head) < 64:
        raise InvalidCodeObjectError(f"not a code object: the bytes begin with {head[:8]!r}, expected an ELF image")
    kind, machine = struct.unpack_from("<HH", head, 16)
    name = _MACHINES.get(machine, f"machine {machine}")
    if head[4:6] != b"\x02\x01" or kind != 3 or name != host_machine():
        what = {1: "relocatable object", 2: "program", 3: "shared object"}.get(kind, f"ELF file of type {kind}")
        raise InvalidCodeObjectError(
            f"this is a {what} for {name}; {target} needs a shared object for {host_machine()}"
        )
    size = len(code_object) if isinstance(code_object, bytes) else code_object.stat().st_size
    offset, (entry, count) = struct.unpack_from("<Q", head, 32)[0], struct.unpack_from("<HH", head, 54)
    segments = _read(code_object, offset, entry * count) if entry == 56 and offset < size else b""
    if len(segments) != 56 * count or not count:
        raise InvalidCodeObjectError(f"the code object is damaged: its {count} program headers are not in the file")
    for at in range(0, len(segments), 56):
        start, _, _, length = struct.unpack_from("<4Q", segments, at + 8)
        if start + length > size:
            raise InvalidCodeObjectError(
                f"the code object is truncated: a segment ends at byte {start + length}, the file at {size}; rebuild it"
            )


def processor_features() -> frozenset[str] | None:
    """The words of /proc/cpuinfo, or None where it does not tell (an emulator shows its host's)."""
    words = {"x86_64": "flags", "aarch64": "Features"}.get(host_machine())
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == words:
                return frozenset(value.split())
    return None


def choose_target(objects: CodeObjects = QUANTIZED) -> tuple[CpuTarget, Path, list[Rejection]]:
    """The best code object that this processor runs, and why each of the others was rejected.

    The features that the processor advertises are a first sieve; then the object's own probe must run in a child
    process, as hypervisors advertise instructions that trap. HIPQUANT_CPU_TARGET names a target to take instead.
    """
    wanted, features = os.environ.get("HIPQUANT_CPU_TARGET"), processor_features()
    chosen: tuple[CpuTarget, Path] | None = None
    rejected: list[Rejection] = []
    for target in cpu_targets():
        path = objects.path(target.filename)
        reason = _unfit(target, features, wanted) or ("" if path else "not in this installation")
        if not reason and chosen is not None:
            reason = f"{chosen[0].name} is better"
        if not reason and path is not None:
            reason = _probe(path)
            if not reason:
                chosen = target, path
        if reason:
            rejected.append(Rejection(target.name, reason))
    if chosen is None:
        listed = "; ".join(f"{r.target}: {r.reason}" for r in rejected)
        raise InvalidCodeObjectError(f"no code object for this processor. {listed}. Reinstall: pip install .")
    return *chosen, rejected


def _unfit(target: CpuTarget, features: frozenset[str] | None, wanted: str | None) -> str:
    """Why a target is not for this processor, as far as can be told without running anything; empty if it is."""
    if target.machine != host_machine():
        return f"for {target.machine}, this is {host_machine()}"
    if wanted and target.name != wanted:
        return f"HIPQUANT_CPU_TARGET asks for {wanted}"
    missing = [f for f in target.features if features is not None and f not in features]
    return f"the processor lacks {' '.join(missing)}" if missing else ""


def _probe(path: Path) -> str:
    """Why an object's probe did not run in a child process; empty if it did, or if there could be no child."""
    probe = ctypes.cast(ctypes.CDLL(str(path)).hq_probe, ctypes.c_void_p)
    result = int(runtime().lib.hq_try_probe(probe))
    if result < 0:
        return f"the processor advertises it, but it ended with signal {-result}"
    return "" if result in (1, 2) else "its probe gave wrong results"


def _threads_wanted() -> int:
    wanted = os.environ.get("HIPQUANT_THREADS", "")
    if wanted and not wanted.isdecimal():
        raise ValueError(f"HIPQUANT_THREADS must be a number from 1 to 256, not {wanted!r}")
    return int(wanted) if wanted else usable_cores()


class Device(base.Device):
    """The CPU. `get_or_load_func(name, QUANTIZED)` gives a kernel of the best code object for it."""

    kind = "cpu"

    def __init__(self) -> None:
        self._target, self._path, self._rejected = choose_target()
        self._modules: dict[object, Module] = {}
        self._lock = threading.Lock()
        self._threads = 0
        self.threads = _threads_wanted()
        self.stream = Stream(self)
        self.allocated = 0  # bytes in buffers of `allocate`

    def __repr__(self) -> str:
        return f"<cpu: {self.name}, {self.threads} threads, {self.target.name}>"

    @property
    def target(self) -> CpuTarget:
        """The target of the code object in use."""
        return self._target

    @property
    def rejected(self) -> list[Rejection]:
        return self._rejected

    @property
    def name(self) -> str:
        """The processor's own name."""
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text().splitlines():
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
        return platform.processor() or host_machine()

    @property
    def threads(self) -> int:
        """Threads that a launch runs on; settable, at least 1. One pool serves the whole process."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        if not 1 <= count <= 256:
            raise ValueError(f"the number of threads must be from 1 to 256, not {count}")
        runtime().lib.hq_set_threads(count)
        self._threads = count

    @property
    def free_memory(self) -> int | None:
        return available_memory()

    def load(self, code_object: CodeObjects | bytes) -> Module:
        with self._lock:
            module = self._modules.get(code_object)
            if module is None:
                if isinstance(code_object, CodeObjects):
                    path = self._path if code_object is QUANTIZED else choose_target(code_object)[1]
                    module = Module(path, self.target.name)
                else:
                    module = Module(bytes(code_object))
                self._modules[code_object] = module
            return module

    def allocate(self, nbytes: int, purpose: str = "a buffer", *, sparse: bool = False) -> Buffer:
        """Uninitialized memory, aligned to 64 bytes; pages that are never touched cost nothing.

        `sparse` memory must not come in huge pages.
        """
        if nbytes < 0:
            raise ValueError(f"{purpose}: {nbytes} bytes cannot be allocated")
        try:
            if nbytes < HUGE:
                raw = np.empty(nbytes + ALIGNMENT, np.uint8)
                at = -int(raw.ctypes.data) % ALIGNMENT
                data: Bytes = raw[at : at + nbytes]
            else:
                memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                advice = getattr(mmap, "MADV_NOHUGEPAGE" if sparse else "MADV_HUGEPAGE", None)
                if advice is not None:
                    with contextlib.suppress(OSError):  # a kernel without huge pages
                        memory.madvise(advice)
                data = np.frombuffer(memory, np.uint8)
        except (MemoryError, OSError, ValueError, OverflowError):
            raise OutOfDeviceMemoryError(nbytes, available_memory(), purpose) from None
        self.allocated += nbytes
        weakref.finalize(data, self._freed, nbytes)
        return Buffer(data)

    def _freed(self, nbytes: int) -> None:
        self.allocated -= nbytes

    def allocate_host(self, nbytes: int) -> Bytes:
        return np.empty(nbytes, np.uint8)

    def create_stream(self) -> Stream:
        return Stream(self)

    def upload(self, data: npt.NDArray[Any]) -> Buffer:
        return Buffer(np.ascontiguousarray(data).reshape(-1).view(np.uint8))

    def synchronize(self) -> None:
        """Returns when everything launched on the device is done: on the CPU, at once."""
