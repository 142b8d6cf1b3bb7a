"""Memory of a GPU, and whatever else of the driver's must be given back."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from . import base
from .base import Array

if TYPE_CHECKING:
    from .gpu import Device


class Owned:
    """Something of the driver's that is given back when the last user lets go of it. Nothing raises then."""

    __slots__ = ("__weakref__", "value")

    def __init__(self, device: Device, row: str, value: int, nbytes: int = 0) -> None:
        self.value = value
        weakref.finalize(self, device._give_back, row, value, nbytes).atexit = False  # the process's end frees all


class PinnedMemory(Owned):
    """Pinned host memory, which numpy arrays are made on."""

    __slots__ = ("__array_interface__",)

    def __init__(self, device: Device, value: int, nbytes: int) -> None:
        super().__init__(device, "free_host", value)
        self.__array_interface__ = {"data": (value, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


class Buffer(base.Buffer):
    """A range of a GPU's memory."""

    __slots__ = ("_memory", "device")

    def __init__(self, device: Device, memory: Owned, address: int, nbytes: int) -> None:
        self.device, self.address, self.nbytes = device, address, nbytes
        self._memory: Owned | None = memory

    def __repr__(self) -> str:
        return f"<{self.nbytes} bytes on {self.device}>"

    def view(self, offset: int, nbytes: int) -> Buffer:
        if self._memory is None:
            raise ValueError("this buffer has been freed")
        self._check_range(offset, nbytes)
        return Buffer(self.device, self._memory, self.address + offset, nbytes)

    def write_async(self, data: Array, stream: base.Stream | None, offset: int = 0) -> None:
        self._copy("to_device", data, stream, offset)

    def read_async(self, into: Array, stream: base.Stream | None, offset: int = 0) -> None:
        if not into.flags.writeable:
            raise ValueError("the array that is copied to is read-only")
        self._copy("to_host", into, stream, offset)

    def _copy(self, row: str, host: Array, stream: base.Stream | None, offset: int) -> None:
        if not host.flags.c_contiguous:
            raise ValueError(f"the array must be C-contiguous, its strides are {host.strides}")
        here, on = self.view(offset, host.nbytes), self.device._own(stream)
        if stream is None and on._graph is not None:
            raise RuntimeError("the device's stream is capturing a graph; copy on a stream of your own")
        if host.nbytes:
            ends = (here.address, int(host.ctypes.data))
            ends = ends if row == "to_device" else ends[::-1]
            self.device._call(row, *ends, host.nbytes, on.handle, what=f"copying {host.nbytes} bytes")
        if on._graph is not None:
            on._graph.keep.append((here, host))
        if stream is None:
            on.synchronize()

    def fill(self, byte: int, stream: base.Stream | None = None) -> None:
        here, on = self.view(0, self.nbytes), self.device._own(stream)
        if not 0 <= byte <= 255:
            raise ValueError(f"a byte is from 0 to 255, not {byte}")
        if self.nbytes:
            self.device._call("fill", self.address, byte, self.nbytes, on.handle, what=f"filling {self.nbytes} bytes")
        if on._graph is not None:
            on._graph.keep.append(here)

    def free(self) -> None:
        self._memory, self.address, self.nbytes = None, 0, 0
