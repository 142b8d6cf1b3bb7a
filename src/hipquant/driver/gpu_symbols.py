"""HIP's module API and CUDA's driver API as one table of two columns, and where their libraries are found.

Sources: hip/hip_runtime_api.h (5.2 and later), cuda.h (11.4 and later). Both return 0 for success and number the errors
used here alike. The library is loaded when a device of its kind is asked for, never before.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DeviceNotFoundError, DriverError

KINDS = {"hip": "AMD", "cuda": "NVIDIA"}
OUT_OF_MEMORY, NO_DEVICE, NOT_FOUND, NOT_UPDATABLE = 2, 100, 500, 910
# Codes, the same in both APIs, behind which a process may have lost its GPU: uncorrectable memory error, illegal
# address, launch timeout, assertion, five faults of a kernel, launch failure, unknown.
LOST = frozenset((214, 700, 702, 710, 714, 715, 716, 717, 718, 719, 999))
NON_BLOCKING = 1  # stream flag: no implicit order with the NULL stream, whose use would break a capture
PORTABLE = 1  # flag of pinned memory: pinned for all devices
CAPTURE_RELAXED = 2  # while a graph is captured, memory may be allocated and modules loaded
JIT_INFO_LOG, JIT_INFO_LOG_SIZE, JIT_ERROR_LOG, JIT_ERROR_LOG_SIZE = 3, 4, 5, 6
WARP_SIZE, MULTIPROCESSORS, CAPABILITY_MAJOR, CAPABILITY_MINOR = 10, 16, 75, 76  # CUdevice_attribute
OVERLAP, OVERLAP_SINCE = 6, (12, 3)  # CUlaunchAttributeID of launches that overlap; CUDA whose graphs keep it
PROPERTIES_BYTES = 4096  # more than any version's hipDeviceProp_t (792 in 5.2, 1472 in 7.1)


class Symbol(NamedTuple):
    """One row: the symbol in either library (empty: that API has none), its argument types and its result."""

    hip: str
    cuda: str
    args: tuple[Any, ...]
    result: Any = c_int
    required: bool = True


_OUT = POINTER(c_void_p)  # a handle or an address that the call returns; CUdeviceptr has 64 bits as well

SYMBOLS: dict[str, Symbol] = {
    "init": Symbol("hipInit", "cuInit", (c_uint,)),
    "driver_version": Symbol("hipDriverGetVersion", "cuDriverGetVersion", (POINTER(c_int),)),
    "device_count": Symbol("hipGetDeviceCount", "cuDeviceGetCount", (POINTER(c_int),)),
    "device_get": Symbol("hipDeviceGet", "cuDeviceGet", (POINTER(c_int), c_int)),
    "device_name": Symbol("hipDeviceGetName", "cuDeviceGetName", (c_char_p, c_int, c_int)),
    "device_memory": Symbol("hipDeviceTotalMem", "cuDeviceTotalMem_v2", (POINTER(c_size_t), c_int)),
    "attribute": Symbol("", "cuDeviceGetAttribute", (POINTER(c_int), c_int, c_int)),
    "properties_r0600": Symbol("hipGetDevicePropertiesR0600", "", (c_void_p, c_int), required=False),  # from ROCm 6
    "properties": Symbol("hipGetDeviceProperties", "", (c_void_p, c_int), required=False),  # before ROCm 6
    "retain_context": Symbol("", "cuDevicePrimaryCtxRetain", (_OUT, c_int)),
    "set_context": Symbol("", "cuCtxSetCurrent", (c_void_p,)),
    "get_context": Symbol("", "cuCtxGetCurrent", (_OUT,)),
    "set_device": Symbol("hipSetDevice", "", (c_int,)),
    "get_device": Symbol("hipGetDevice", "", (POINTER(c_int),)),
    "synchronize": Symbol("hipDeviceSynchronize", "cuCtxSynchronize", ()),
    "memory_info": Symbol("hipMemGetInfo", "cuMemGetInfo_v2", (POINTER(c_size_t), POINTER(c_size_t))),
    "allocate": Symbol("hipMalloc", "cuMemAlloc_v2", (_OUT, c_size_t)),
    "free": Symbol("hipFree", "cuMemFree_v2", (c_void_p,)),
    "allocate_host": Symbol("hipHostMalloc", "cuMemHostAlloc", (_OUT, c_size_t, c_uint)),
    "free_host": Symbol("hipHostFree", "cuMemFreeHost", (c_void_p,)),
    "to_device": Symbol("hipMemcpyHtoDAsync", "cuMemcpyHtoDAsync_v2", (c_void_p, c_void_p, c_size_t, c_void_p)),
    "to_host": Symbol("hipMemcpyDtoHAsync", "cuMemcpyDtoHAsync_v2", (c_void_p, c_void_p, c_size_t, c_void_p)),
    "fill": Symbol("hipMemsetD8Async", "cuMemsetD8Async", (c_void_p, c_ubyte, c_size_t, c_void_p)),
    "load_module": Symbol(
        "hipModuleLoadDataEx", "cuModuleLoadDataEx", (_OUT, c_void_p, c_uint, POINTER(c_int), POINTER(c_void_p))
    ),
    "unload_module": Symbol("hipModuleUnload", "cuModuleUnload", (c_void_p,)),
    "get_function": Symbol("hipModuleGetFunction", "cuModuleGetFunction", (_OUT, c_void_p, c_char_p)),
    "launch": Symbol(
        "hipModuleLaunchKernel",
        "cuLaunchKernel",
        (c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    ),
    "launch_config": Symbol(  # from CUDA 11.8
        "", "cuLaunchKernelEx", (c_void_p, c_void_p, c_void_p, c_void_p), required=False
    ),
    "create_stream": Symbol("hipStreamCreateWithFlags", "cuStreamCreate", (_OUT, c_uint)),
    "destroy_stream": Symbol("hipStreamDestroy", "cuStreamDestroy_v2", (c_void_p,)),
    "synchronize_stream": Symbol("hipStreamSynchronize", "cuStreamSynchronize", (c_void_p,)),
    "wait_event": Symbol("hipStreamWaitEvent", "cuStreamWaitEvent", (c_void_p, c_void_p, c_uint)),
    "create_event": Symbol("hipEventCreateWithFlags", "cuEventCreate", (_OUT, c_uint)),
    "destroy_event": Symbol("hipEventDestroy", "cuEventDestroy_v2", (c_void_p,)),
    "record_event": Symbol("hipEventRecord", "cuEventRecord", (c_void_p, c_void_p)),
    "synchronize_event": Symbol("hipEventSynchronize", "cuEventSynchronize", (c_void_p,)),
    "elapsed": Symbol("hipEventElapsedTime", "cuEventElapsedTime", (POINTER(c_float), c_void_p, c_void_p)),
    "begin_capture": Symbol("hipStreamBeginCapture", "cuStreamBeginCapture_v2", (c_void_p, c_int)),
    "end_capture": Symbol("hipStreamEndCapture", "cuStreamEndCapture", (c_void_p, _OUT)),
    "graph_nodes": Symbol("hipGraphGetNodes", "cuGraphGetNodes", (c_void_p, c_void_p, POINTER(c_size_t))),
    "instantiate": Symbol("hipGraphInstantiateWithFlags", "cuGraphInstantiateWithFlags", (_OUT, c_void_p, c_ulonglong)),
    # CUDA's name without _v2 keeps the older argument list, which is HIP's.
    "update_graph": Symbol(
        "hipGraphExecUpdate", "cuGraphExecUpdate", (c_void_p, c_void_p, POINTER(c_void_p), POINTER(c_int))
    ),
    "launch_graph": Symbol("hipGraphLaunch", "cuGraphLaunch", (c_void_p, c_void_p)),
    "destroy_graph": Symbol("hipGraphDestroy", "cuGraphDestroy", (c_void_p,)),
    "destroy_instance": Symbol("hipGraphExecDestroy", "cuGraphExecDestroy", (c_void_p,)),
    "error_name": Symbol("hipGetErrorName", "", (c_int,), c_char_p),
    "error_name_out": Symbol("", "cuGetErrorName", (c_int, POINTER(c_char_p))),
}


class PropertiesLayout(NamedTuple):
    """Where hipDeviceProp_t holds what is needed, in bytes: the structure changed with ROCm 6."""

    warp_size: int
    multiprocessors: int
    gcn_arch_name: int


PROPERTIES = {"properties_r0600": PropertiesLayout(308, 388, 1160), "properties": PropertiesLayout(276, 336, 396)}


def library_names(kind: str) -> tuple[str, ...]:
    """File names of the driver's library, in the order in which they are tried."""
    if sys.platform == "win32":
        return ("amdhip64_7.dll", "amdhip64_6.dll", "amdhip64.dll") if kind == "hip" else ("nvcuda.dll",)
    if kind == "cuda":
        return "libcuda.so.1", "libcuda.so"
    return "libamdhip64.so.7", "libamdhip64.so.6", "libamdhip64.so.5", "libamdhip64.so"


def _loaded_already(names: tuple[str, ...]) -> Iterator[str]:
    """Libraries that this process has loaded, PyTorch's above all: a second copy would not share its memory."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return
    base = names[-1]
    paths = (line.split(maxsplit=5)[-1] for line in maps)
    yield from dict.fromkeys(path for path in paths if Path(path).name.startswith(base))


def _wheel_folders() -> Iterator[Path]:
    """The lib folders of PyTorch-ROCm's and TheRock's wheels, found without importing them."""
    for package, *inner in (("torch", "lib"), ("_rocm_sdk_core", "lib"), ("_rocm_sdk_core", "bin")):
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            continue
        for folder in (spec.submodule_search_locations or []) if spec else []:
            yield Path(folder, *inner)


def candidates(kind: str) -> list[str]:
    """What is tried, best first: what is loaded already, ROCM_PATH and HIP_PATH, the system, ROCm's folder, wheels."""
    names = library_names(kind)
    found = list(_loaded_already(names))
    if kind == "cuda":
        return [*found, *names, "/usr/lib/wsl/lib/libcuda.so.1"]

    def within(folders: Iterator[Path]) -> list[str]:
        return [str(path) for folder in folders for name in names if (path := folder / name).is_file()]

    roots = (Path(root) for variable in ("ROCM_PATH", "HIP_PATH") if (root := os.environ.get(variable)))
    named = within(root / part for root in roots for part in ("lib", "lib64", "bin"))
    return [*found, *named, *names, *within(iter((Path("/opt/rocm/lib"),))), *within(_wheel_folders())]


class Library:
    """A driver library with its argument types declared; `call` raises `DriverError` for whatever is not success."""

    def __init__(self, kind: str, handle: ctypes.CDLL, path: str) -> None:
        self.kind, self.path = kind, path
        self.symbols: dict[str, str] = {}  # row -> the symbol of this kind
        self.functions: dict[str, Any] = {}
        missing = []
        for row, symbol in SYMBOLS.items():
            name: str = getattr(symbol, kind)
            if not name:
                continue
            try:
                function = getattr(handle, name)
            except AttributeError:
                missing += [name] if symbol.required else []
                continue
            function.argtypes, function.restype = symbol.args, symbol.result
            self.symbols[row], self.functions[row] = name, function
        if kind == "hip" and not PROPERTIES.keys() & self.functions.keys():
            missing.append("hipGetDeviceProperties")
        if missing:
            least = {"hip": "ROCm 5.2", "cuda": "CUDA 11.4 (driver 470)"}[kind]
            raise DeviceNotFoundError(f"{path} lacks {', '.join(missing)}; hipquant needs {least} or newer: update it")

    def call(self, row: str, *args: object, what: str) -> None:
        code = self.functions[row](*args)
        if code:
            raise self.error(row, code, what)

    def error(self, row: str, code: int, what: str) -> DriverError:
        if code in LOST:
            what += ". The driver may refuse everything from here on: start a new process"
        return DriverError(self.symbols[row], code, self.error_name(code), what)

    def error_name(self, code: int) -> str:
        """The API's own name of an error."""
        if self.kind == "hip":
            name = self.functions["error_name"](code)
        else:
            out = c_char_p()
            self.functions["error_name_out"](code, ctypes.byref(out))
            name = out.value
        return name.decode(errors="replace") if name else "an error without a name"

    def integer(self, row: str, *args: object, what: str) -> int:
        """The int that a call returns through its first argument."""
        out = c_int()
        self.call(row, ctypes.byref(out), *args, what=what)
        return out.value

    def handle(self, row: str, *args: object, what: str) -> int:
        """The handle or address that a call returns through its first argument."""
        out = c_void_p()
        self.call(row, ctypes.byref(out), *args, what=what)
        return out.value or 0


def load(kind: str) -> tuple[Library, int]:
    """The driver library of a kind, and how many devices it finds: at least one.

    Raises `DeviceNotFoundError` with what is missing: the library, a device, or the permission to use it.
    """
    problems, tried, seen = [], candidates(kind), set()
    failure: DeviceNotFoundError | None = None
    for path in tried:
        try:
            handle = ctypes.CDLL(path)
        except OSError as e:
            if "No such file" not in str(e) and "Could not find module" not in str(e):
                problems.append(str(e))
            continue
        if handle._handle not in seen:  # the same library by another name tells nothing new
            seen.add(handle._handle)
            try:
                return _start(Library(kind, handle, path))
            except DeviceNotFoundError as e:
                failure = failure or e
    if failure:
        raise failure
    needed = {"hip": "install ROCm's run time, or name its folder in ROCM_PATH", "cuda": "install NVIDIA's driver"}
    because = f" ({'; '.join(problems)})" if problems else ""
    raise DeviceNotFoundError(
        f"no driver library for {KINDS[kind]} GPUs: tried {', '.join(tried)}{because}; {needed[kind]}"
    )


def _start(library: Library) -> tuple[Library, int]:
    code, count = library.functions["init"](0), c_int()
    code = code or library.functions["device_count"](ctypes.byref(count))
    if code or count.value < 1:
        name = library.error_name(code) if code else "no device"
        why = _why_no_device(library.kind)
        raise DeviceNotFoundError(f"{library.path} finds no {KINDS[library.kind]} GPU ({name}). {why}")
    return library, count.value


def _why_no_device(kind: str) -> str:
    """What the system tells about a driver that finds no device."""
    hidden = {"hip": ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), "cuda": ("CUDA_VISIBLE_DEVICES",)}[kind]
    for variable in hidden:
        if variable in os.environ:
            return f"{variable}={os.environ[variable]!r} may hide it"
    if sys.platform == "win32":
        return "See the device manager"
    nodes = {"hip": [Path("/dev/kfd"), *sorted(Path("/dev/dri").glob("renderD*"))], "cuda": [Path("/dev/nvidiactl")]}
    first, module = nodes[kind][0], {"hip": "amdgpu", "cuda": "nvidia"}[kind]
    if not first.exists():
        return f"There is no {first}: no such GPU, the kernel's {module} driver is not loaded, or a container hides it"
    for node in nodes[kind]:
        if not os.access(node, os.R_OK | os.W_OK):
            return f"No permission on {node}: {_who_may(node)}"
    return f"{first} is there: the GPU may be one that this version of the driver does not support"


def _who_may(node: Path) -> str:
    import grp

    try:
        group = grp.getgrgid(node.stat().st_gid).gr_name
    except KeyError:
        group = str(node.stat().st_gid)
    return f"group {group} gives it (sudo usermod -aG {group} $USER, then log in again)"
