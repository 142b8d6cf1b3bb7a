"""Code objects that a GPU has loaded, and the launches of their kernels."""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import InvalidCodeObjectError, KernelNotFoundError
from ..wiring import KERNELS, Arg, Dim3
from . import base
from . import gpu_symbols as symbols
from .gpu_memory import Buffer, Owned
from .gpu_objects import image_for, waits

if TYPE_CHECKING:
    from .gpu import Device

# CUlaunchConfig: grid, block, shared memory, stream, attributes and their number; then 8 bytes a parameter.
LAUNCH_HEADER = "<3I3II4xQQI4x"
JIT_LOG = 16 << 10  # bytes
# Codes, the same in both APIs, by which a driver says that a module's bytes are at fault: invalid image, no binary for
# this GPU, invalid PTX (or kernel file), PTX version not supported, invalid source, shared object not initialized.
REFUSED = frozenset((200, 209, 218, 222, 300, 303))
_OVERLAP = ctypes.create_string_buffer(struct.pack("<I4xI60x", symbols.OVERLAP, 1))  # a CUlaunchAttribute


class _Arguments(threading.local):
    """Memory that a launch is packed into, and the addresses of its parameters: one a thread."""

    def __init__(self, nbytes: int, count: int) -> None:
        self.memory = ctypes.create_string_buffer(nbytes)
        begin = ctypes.addressof(self.memory) + nbytes - 8 * count
        self.addresses = [begin + 8 * i for i in range(count)]
        self.pointers = (ctypes.c_void_p * max(count, 1))(*self.addresses)


class Function(base.Function):
    """A kernel of a loaded module.

    One that is not in the wiring table takes ctypes or numpy scalars, Buffers and tensors, whose sizes must be the
    kernel's own: nothing can check them.
    """

    def __init__(self, module: Module, name: str, handle: int) -> None:
        super().__init__(name, LAUNCH_HEADER)
        self.module, self.device, self.handle = module, module.device, handle
        self._arguments = _Arguments(self._node.size, len(self.args))
        functions = self.device.library.functions
        self._launch, self._launch_config = functions["launch"], functions.get("launch_config")
        self._attributes = ctypes.addressof(_OVERLAP)

    def launch(
        self,
        grid: Dim3,
        block: Dim3,
        shared_mem: int,
        stream: base.Stream,
        params: Sequence[object],
        overlap: bool = False,
    ) -> None:
        device, on = self.device, self.device._own(stream)
        arguments = self._arguments if self.row else self._explicit(params)
        values = self._values(params) if self.row else ()
        attributes = self._attributes, int(overlap and self.module.can_overlap)
        try:
            self._node.pack_into(arguments.memory, 0, *grid, *block, shared_mem, on.handle, *attributes, *values)
        except struct.error as e:
            raise self._misfit(grid, block, e) from None
        self._check_geometry(grid, block)
        device._make_current()
        if self._launch_config is not None:
            code = self._launch_config(arguments.memory, self.handle, arguments.pointers, None)
        else:
            code = self._launch(self.handle, *grid, *block, shared_mem, on.handle, arguments.pointers, None)
        if code:
            what = f"launching {self.name} on grid {grid}, block {block}, {shared_mem} bytes of shared memory"
            raise device.library.error("launch_config" if self._launch_config else "launch", code, what)
        if on._graph is not None:
            on._graph.keep.append((self, tuple(params)))

    def _address(self, value: object, arg: Arg) -> int:
        if type(value) is Buffer:
            return self._own_address(value, arg.name)
        if value is None:
            return 0
        if isinstance(value, (int, np.integer)):
            return int(value)
        buffer = value if isinstance(value, base.Buffer) else getattr(value, "buffer", None)
        if type(buffer) is Buffer:
            return self._own_address(buffer, arg.name)
        where = "; this is in the host's memory: use Device.upload or Tensor.from_numpy"
        hint = where if isinstance(value, np.ndarray) or isinstance(buffer, base.Buffer) else ""
        raise TypeError(
            f"parameter {arg.name} ({arg.ctype}) must be a Buffer, a tensor, an address or None, not {value!r}{hint}"
        )

    def _own_address(self, buffer: Buffer, name: object) -> int:
        if buffer._memory is None:
            raise ValueError(f"parameter {name}: this buffer has been freed")
        if buffer.device is not self.device:
            raise ValueError(f"parameter {name}: {buffer!r}, the kernel is on {self.device}")
        return buffer.address

    def _explicit(self, params: Sequence[object]) -> _Arguments:
        """The parameters of a kernel that the wiring table does not know, each as the caller typed it."""
        result = _Arguments(self._node.size + 8 * len(params), len(params))
        for i, value in enumerate(params):
            buffer = value if isinstance(value, Buffer) else getattr(value, "buffer", None)
            if isinstance(buffer, Buffer):
                raw = struct.pack("<Q", self._own_address(buffer, i))
            elif isinstance(value, ctypes._SimpleCData):
                raw = bytes(value)
            elif isinstance(value, np.generic) and value.nbytes <= 8:
                raw = value.tobytes()
            else:
                raise TypeError(
                    f"parameter {i} of {self.name}, which is not in the wiring table, must be a Buffer, a tensor, or a "
                    f"ctypes or numpy scalar of its exact type, not {value!r}"
                )
            ctypes.memmove(result.addresses[i], raw, len(raw))
        return result


class Module(base.Module):
    """A loaded code object: HSACO, offload bundle, PTX, cubin or fat binary.

    `InvalidCodeObjectError` says what the bytes are instead, or gives the driver's log. With `piecemeal`, PTX whose
    kernels share nothing is given to the driver kernel by kernel, as each is asked for: compiling all of ours takes
    it seconds, one a twentieth of one.
    """

    def __init__(self, device: Device, code_object: bytes, piecemeal: bool = False) -> None:
        self.device, image = device, image_for(code_object, device.target)
        self.can_overlap = device.can_overlap and waits(image)
        self._functions: dict[str, Function] = {}
        self._lock = threading.Lock()
        self._pieces = ptx_pieces(image) if piecemeal and device.kind == "cuda" else {}
        self._whole = None if self._pieces else self._load(image)
        self._loaded: list[Owned] = []

    def _load(self, image: bytes) -> Owned:
        log, device = ctypes.create_string_buffer(JIT_LOG), self.device
        options, values = (), ()  # type: tuple[int, ...], tuple[int, ...]
        if device.kind == "cuda":
            options = symbols.JIT_ERROR_LOG, symbols.JIT_ERROR_LOG_SIZE
            values = ctypes.addressof(log), JIT_LOG
        made, n = Owned(device, "unload_module"), len(options)
        arrays = (ctypes.c_int * max(n, 1))(*options), (ctypes.c_void_p * max(n, 1))(*values)
        device._make_current()
        code = device.library.functions["load_module"](ctypes.byref(made.out), image, n, *arrays)
        what = f"loading a code object of {len(image)} bytes for {device.target}"
        if code in REFUSED:
            said = log.value.decode(errors="replace").strip()
            name = device.library.error_name(code)
            raise InvalidCodeObjectError(f"{what}: the driver refuses it with {name} ({code}). {said}".rstrip())
        if code:
            raise device.library.error("load_module", code, what)
        return made

    def get_function(self, name: str) -> Function:
        with self._lock:
            found = self._functions.get(name)
            if found is None:
                found = self._functions[name] = Function(self, name, self._handle(name))
            return found

    def _handle(self, name: str) -> int:
        module, device, out = self._whole, self.device, ctypes.c_void_p()
        if module is None and name in self._pieces:
            module = self._load(self._pieces[name])
            self._loaded.append(module)
        if module is not None:
            device._make_current()
            code = device.library.functions["get_function"](ctypes.byref(out), module.value, name.encode())
            if code not in (0, symbols.NOT_FOUND):
                raise device.library.error("get_function", code, f"looking up kernel {name!r}")
        if not out.value:
            others = (k.name for k in KERNELS.values() if k.silicon != "cpu" and k.name != name)
            raise KernelNotFoundError(name, device.target.name, others)
        return out.value


_ENTRY = b"\n.visible .entry "
_NAME = re.compile(rb"\w+(?=\(\n)")
_DIRECTIVE = re.compile(rb"^\.(version|target|address_size) [^\n]*$", re.MULTILINE)
_COMMENT = re.compile(rb"//[^\n]*")


def ptx_pieces(image: bytes) -> dict[str, bytes]:
    """PTX as one text for each kernel; empty if there is anything that kernels share, or that is not PTX."""
    text, entries, between, at = image.rstrip(b"\0") + b"\n", dict[str, bytes](), list[bytes](), 0
    while (begin := text.find(_ENTRY, at)) >= 0:
        name, end = _NAME.match(text, begin + len(_ENTRY)), text.find(b"\n}\n", begin)
        if name is None or end < 0:
            return {}
        between.append(text[at : begin + 1])
        at = end + 2
        entries[name[0].decode()] = text[begin:at]
    shared = b"".join(between) + text[at:]
    if _COMMENT.sub(b"", _DIRECTIVE.sub(b"", shared)).strip():
        return {}
    head = b"\n".join(m[0] for m in _DIRECTIVE.finditer(shared))
    return {name: head + entry + b"\n\0" for name, entry in entries.items()}
