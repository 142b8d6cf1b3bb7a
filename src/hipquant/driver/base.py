"""What every kind of device has: the interface of Device, Function, Stream, Event, Graph and Buffer."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..codeobjects import CodeObjects
from ..wiring import KERNELS, Arg, Dim3, Kernel, Kind

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]
SLOTS = {Kind.POINTER: "Q", Kind.INT32: "i4x", Kind.INT64: "q", Kind.SIZE: "Q", Kind.FLOAT32: "f4x"}  # 8 bytes each


class Rejection(NamedTuple):
    """A code object that a device does not use, and why."""

    target: str
    reason: str


class Target(Protocol):
    """What code objects are chosen by."""

    @property
    def name(self) -> str: ...


class Buffer:
    """A range of a device's memory: `address` and `nbytes`; it keeps the memory alive.

    No ABC, as every parameter of a launch is asked whether it is one, which takes ten times as long with an ABC.
    """

    __slots__ = ("address", "nbytes")
    address: int
    nbytes: int

    def view(self, offset: int, nbytes: int) -> Buffer:
        """A part of the buffer; it keeps the whole alive."""
        raise NotImplementedError

    def write(self, data: Array, offset: int = 0) -> None:
        """Copies a host array into the buffer, `offset` bytes from its begin, after what its device has been given."""
        self.write_async(np.ascontiguousarray(data), None, offset)

    def read(self, dtype: npt.DTypeLike, shape: Sequence[int]) -> Array:
        """A copy of the buffer's begin as a host array, after what its device's stream has been given."""
        result = np.empty(tuple(shape), dtype)
        if result.nbytes > self.nbytes:
            raise ValueError(f"{result.nbytes} bytes asked for from a buffer of {self.nbytes}")
        self.read_async(result, None)
        return result

    def write_async(self, data: Array, stream: Stream | None, offset: int = 0) -> None:
        """Copies a contiguous host array in the order of a stream (None: the device's, waiting for it).

        The array must stay as it is until the stream is there. Only memory of `Device.allocate_host` is copied while
        the caller goes on.
        """
        raise NotImplementedError

    def read_async(self, into: Array, stream: Stream | None, offset: int = 0) -> None:
        """Copies to a contiguous host array, in the order of a stream as `write_async` does."""
        raise NotImplementedError

    def fill(self, byte: int, stream: Stream | None = None) -> None:
        """Sets every byte, in the order of a stream (None: the device's)."""
        raise NotImplementedError

    def free(self) -> None:
        """Gives the memory back as soon as nothing else uses it; the buffer is not usable any more."""
        raise NotImplementedError

    @property
    def bytes(self) -> Bytes:
        """The memory itself, where the host can address it: on the CPU."""
        raise TypeError(f"{self!r} is not in the host's memory; use read() and write()")

    def array(self, dtype: npt.DTypeLike, shape: Sequence[int]) -> Array:
        """The buffer's begin as an array on the same memory, where the host can address it: on the CPU."""
        raise TypeError(f"{self!r} is not in the host's memory; use read() and write()")

    def _check_range(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"bytes {offset} to {offset + nbytes} are not within a buffer of {self.nbytes}")


class Point(ABC):
    """What a device notes down when an event is recorded."""

    @abstractmethod
    def synchronize(self) -> None: ...

    @abstractmethod
    def seconds_since(self, earlier: Point) -> float: ...


class Event:
    """A point in a stream, for timing: `event.record(stream)`, then `later.elapsed(event)` in seconds."""

    def __init__(self) -> None:
        self._point: Point | None = None

    def record(self, stream: Stream) -> None:
        """Marks the end of what has been launched so far."""
        self._point = stream._mark(self._point)

    def synchronize(self) -> None:
        """Returns when the stream has passed this point."""
        if self._point is None:
            raise ValueError("the event must have been recorded")
        self._point.synchronize()

    def elapsed(self, since: Event) -> float:
        """Seconds from one recorded event to this one."""
        if self._point is None or since._point is None:
            raise ValueError("both events must have been recorded")
        return self._point.seconds_since(since._point)


class Graph(ABC):
    """A captured list of launches, run in one call. It keeps the memory that they use alive."""

    def __init__(self) -> None:
        self.keep: list[object] = []  # functions and parameters

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def launch(self, stream: Stream) -> None:
        """Runs the nodes in order."""

    @abstractmethod
    def update(self, other: Graph) -> None:
        """Takes over what another graph has captured, which is not instantiated for it where only parameters differ."""


class Stream(ABC):
    """An order of launches on a device."""

    device: Device

    @abstractmethod
    def synchronize(self) -> None:
        """Returns when everything launched is done."""

    @abstractmethod
    def wait(self, event: Event) -> None:
        """What is launched from here on waits until the event's stream has passed it."""

    @abstractmethod
    def capture(self) -> AbstractContextManager[Graph]:
        """`with stream.capture() as graph:` records the launches of the block instead of running them."""

    @abstractmethod
    def _mark(self, previous: Point | None) -> Point:
        """The point that the stream has reached; `previous`, of the same event, may be used again."""


class Function(ABC):
    """A kernel of a loaded module; it keeps the module."""

    def __init__(self, name: str, header: str, size: int | None = None) -> None:
        self.name = name
        self.row = row_of(name)
        self.args: tuple[Arg, ...] = self.row.args if self.row else ()
        self._pointers = tuple(a.kind is Kind.POINTER for a in self.args)
        slots = "".join(SLOTS[a.kind] for a in self.args)
        self._node = struct.Struct(f"{header}{slots}{8 * ((size or len(self.args)) - len(self.args))}x")

    @abstractmethod
    def launch(
        self,
        grid: Dim3,
        block: Dim3,
        shared_mem: int,
        stream: Stream,
        params: Sequence[object],
        overlap: bool = False,
    ) -> None:
        """Launches the kernel on `grid` blocks with the parameters of the wiring table, in its order.

        A parameter is a `Buffer`, a tensor, an address or None where the table has a pointer (on the CPU also a
        contiguous array), and a number elsewhere. Raises `TypeError` or `ValueError` for what does not fit the table.

        With `overlap` the kernel may begin before the one in front of it has ended: for kernels that wait by themselves
        (`Kernel.overlaps`). Only NVIDIA's GPUs of compute capability 9.0 and later do so, from CUDA 12.3 on; elsewhere
        this is a plain launch, with the same results.
        """

    @abstractmethod
    def _address(self, value: object, arg: Arg) -> int:
        """The address of a parameter that is a pointer."""

    def _values(self, params: Sequence[object]) -> list[object]:
        if len(params) != len(self.args):
            expected = ", ".join(f"{a.ctype} {a.name}" for a in self.args)
            raise TypeError(f"{self.name} takes {len(self.args)} parameters ({expected}), {len(params)} were given")
        address = self._address
        three = zip(params, self.args, self._pointers, strict=True)
        return [address(p, a) if pointer else p for p, a, pointer in three]

    def _misfit(self, grid: Dim3, block: Dim3, error: struct.error) -> TypeError:
        return TypeError(f"{self.name}: grid {grid}, block {block} or a parameter does not fit its type: {error}")

    def _check_geometry(self, grid: Dim3, block: Dim3) -> None:
        if 0 in grid or 0 in block:  # nothing that is negative has been packed
            raise ValueError(f"{self.name}: grid {grid} and block {block} must be at least 1 in each direction")


class Module(ABC):
    """A loaded code object."""

    @abstractmethod
    def get_function(self, name: str) -> Function:
        """The kernel of this name; `KernelNotFoundError` with the nearest names otherwise."""


def row_of(name: str) -> Kernel | None:
    """The row of a kernel's name under either name profile, or None for a kernel that is not in the table."""
    return KERNELS.get(name) or KERNELS.get(name.replace("_cuda", "_hip"))


class Device(ABC):
    """Something that runs kernels: `get_or_load_func(name, QUANTIZED)` gives one of the best code object for it."""

    kind: str
    stream: Stream  # the device's own, for whoever needs no other
    allocated: int  # bytes in buffers of `allocate`

    @property
    @abstractmethod
    def name(self) -> str:
        """The device's own name."""

    @property
    @abstractmethod
    def target(self) -> Target: ...

    @property
    @abstractmethod
    def rejected(self) -> list[Rejection]:
        """The embedded code objects that the device does not use, and why."""

    @property
    @abstractmethod
    def free_memory(self) -> int | None:
        """Bytes that can still be allocated, or None where the system does not say."""

    @property
    def threads(self) -> int:
        """Threads that a launch runs on, which the CPU alone lets one set; 0 on a GPU."""
        return 0

    @threads.setter
    def threads(self, count: int) -> None:
        raise ValueError(f"threads are the CPU's; {self!r} has none to set")

    @abstractmethod
    def load(self, code_object: CodeObjects | bytes) -> Module:
        """A code object, which is loaded once: the best one of `QUANTIZED`, or bytes.

        Raises `InvalidCodeObjectError` with what the bytes are instead.
        """

    def get_or_load_func(self, name: str, code_object: CodeObjects | bytes) -> Function:
        """The kernel `name` of a code object that is loaded once; `KernelNotFoundError` with the nearest names."""
        return self.load(code_object).get_function(name)

    @abstractmethod
    def allocate(self, nbytes: int, purpose: str = "a buffer", *, sparse: bool = False) -> Buffer:
        """Uninitialized memory, aligned to 64 bytes or more.

        `sparse` memory is touched here and there only, as a KV cache is. Raises `OutOfDeviceMemoryError` with what
        was asked for and what is free.
        """

    @abstractmethod
    def allocate_host(self, nbytes: int) -> Bytes:
        """Host memory that the device copies from and to while the caller goes on: pinned where there is a bus."""

    @abstractmethod
    def create_stream(self) -> Stream:
        """A stream of one's own: what is captured on it is not mixed with the launches of others."""

    @abstractmethod
    def upload(self, data: Array) -> Buffer:
        """A contiguous host array as device memory: on the CPU the array's own memory, without a copy."""

    @abstractmethod
    def synchronize(self) -> None:
        """Returns when everything launched on the device is done."""
