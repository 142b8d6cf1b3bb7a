"""Memory of a GPU, and whatever else of the driver's must be given back."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from typing import TYPE_CHECKING

from ..errors import DriverError
from . import base
from . import gpu_symbols as symbols
from .base import Array

if TYPE_CHECKING:
    from .gpu import Device


class Owned:
    """Something of the driver's that is given back when the last user lets go of it. Nothing raises then.

    The call that makes it puts its handle or address into `out`: not even Ctrl-C right behind that call loses it.
    """

    __slots__ = ("__weakref__", "out")

    def __init__(self, device: Device, row: str, nbytes: int = 0) -> None:
        self.out = ctypes.c_void_p()
        weakref.finalize(self, device._give_back, row, self.out, nbytes).atexit = False  # the process's end frees all

    @property
    def value(self) -> int:
        return self.out.value or 0


class PinnedMemory(Owned):
    """Pinned host memory, which numpy arrays are made on."""

    __slots__ = ("__array_interface__",)

    def __init__(self, device: Device, nbytes: int) -> None:
        super().__init__(device, "free_host")
        device._allocate("allocate_host", self, nbytes, "pinned memory", symbols.PORTABLE)
        self.__array_interface__ = {"data": (self.value, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}


class Buffer(base.Buffer):
    """A range of a GPU's memory."""

    __slots__ = ("_memory", "device")

    def __init__(self, device: Device, memory: Owned, address: int, nbytes: int) -> None:
        self.device, self.address, self.nbytes = device, address, nbytes
        self._memory: Owned | None = memory

    def __repr__(self) -> str:
        return f"<{self.nbytes} bytes on {self.device}>"

    def _held(self) -> Owned:
        if self._memory is None:
            raise ValueError("this buffer has been freed")
        return self._memory

    def view(self, offset: int, nbytes: int) -> Buffer:
        memory = self._held()
        self._check_range(offset, nbytes)
        return Buffer(self.device, memory, self.address + offset, nbytes)

    def write_async(self, data: Array, stream: base.Stream | None, offset: int = 0) -> None:
        self._copy("to_device", data, stream, offset)

    def read_async(self, into: Array, stream: base.Stream | None, offset: int = 0) -> None:
        if not into.flags.writeable:
            raise ValueError("the array that is copied to is read-only")
        self._copy("to_host", into, stream, offset)

    def _copy(self, row: str, host: Array, stream: base.Stream | None, offset: int) -> None:
        if not host.flags.c_contiguous:
            raise ValueError(f"the array must be C-contiguous, its strides are {host.strides}")
        memory, nbytes, on = self._held(), host.nbytes, self.device._own(stream)
        self._check_range(offset, nbytes)
        if stream is None and on._graph is not None:
            raise RuntimeError("the device's stream is capturing a graph; copy on a stream of your own")
        try:
            if nbytes:
                here, there = self.address + offset, host.__array_interface__["data"][0]
                ends = (here, there) if row == "to_device" else (there, here)
                self.device._call(row, *ends, nbytes, on.handle, what=f"copying {nbytes} bytes")
            if stream is None:
                on.synchronize()
        except BaseException:  # of Ctrl-C, too: the array must not go while it is being copied
            if on._graph is None:
                with contextlib.suppress(DriverError):
                    on.synchronize()
            raise
        if on._graph is not None:
            on._graph.keep.append((memory, host))

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
