"""Runs GPU kernels on this machine's processor: their sources compiled for the host, each GPU thread a fiber.

The sources are compiled with `kernels/gpu/simulate.h` as the device, and linked with `simulate.cpp` to a program that
runs launches one after the other. With `sanitize` it is an executable under AddressSanitizer and UBSan, which takes
gcc to link it, as `ziglang` has no sanitizer run time; without, a shared object that a child of this process loads, or
this process itself (`InProcess`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from ..errors import HipquantError
from ..targets import host_machine
from ..wiring import Dim3, Kernel, Kind
from . import gpu, zig
from .cases import Case
from .compile import CompileError, Object, Part, Progress, build_objects, fingerprint, run
from .elf import Elf
from .entry_points import gpu_header

RUNNER = gpu.SOURCES / "simulate.cpp"
TIMEOUT = 120.0  # seconds that one launch may take
NAME_BYTES, MAX_PARAMS, SAID_BYTES = 128, 32, 1024
# Quick to build: -O1, checks as calls, and no indvars, which takes most of the time of mat_vec.hip (clang 22).
SANITIZE = (
    "-O1 -gline-tables-only -fsanitize=address,undefined -fno-sanitize=function,vptr -fno-sanitize-recover=all"
    " -mllvm -asan-instrumentation-with-call-threshold=0 -mllvm -opt-disable=indvars"
).split()
_FLAGS = (
    "-DHQ_SIMULATE -ffreestanding -fno-exceptions -fno-rtti -fno-threadsafe-statics -fno-stack-protector"
    " -fno-omit-frame-pointer -fPIC -std=c++17 -ffp-contract=off -fno-math-errno"
).split()
_LINK = "-shared --gc-sections --build-id=none -z noexecstack".split()
_EMULATION = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux"}
_LOADER = "import ctypes, sys; sys.exit(ctypes.CDLL(sys.argv[1]).hq_simulate(0, 1, int(sys.argv[2])))"
_PARAM = struct.Struct("<QII")
_NUMBER, _READ, _WRITTEN, _FLOAT = 0, 1, 2, 3


class SimulationError(HipquantError, RuntimeError):
    """A simulated kernel did what a GPU does not forgive: which kernel, which thread, what and where."""


def cache_folder() -> Path:
    """Where simulators are kept: the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hipquant" / "simulate"


def can_sanitize() -> bool:
    """Whether there is a gcc, which has the sanitizers' run time."""
    return shutil.which("gcc") is not None


def build(
    wave: int = 32,
    sanitize: bool = False,
    sources: Path | Sequence[Path] | None = None,
    *,
    matrix_units: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Simulator:
    """A simulator of a GPU with waves of 32 or 64 lanes, of the package's kernels or of a user's.

    `sources` is a folder of .hip files, or files; `matrix_units` chooses the way through them where the sources have
    several: 1 is NVIDIA's, 16, 8 and 4 are those of RDNA3, RDNA4 and CDNA. What is up to date in `folder` (default: the
    user's cache) is not built again. Raises `CompileError`.
    """
    if wave not in (32, 64):
        raise ValueError(f"a wave has 32 or 64 lanes, not {wave}")
    plan = _Plan(_files(sources), sanitize, matrix_units)
    program = build_objects([plan.object()], folder or cache_folder(), progress=progress)[0]
    program.chmod(0o755)
    return Simulator(program, wave, sanitize)


def _files(sources: Path | Sequence[Path] | None) -> list[Path]:
    """The sources to compile: of a folder, all but one that includes the others."""
    if sources is None:
        return gpu.families()
    if not isinstance(sources, Path):
        return [Path(s).resolve() for s in sources]
    if sources.is_file():
        return [sources.resolve()]
    every = (p.resolve() for p in sources.glob("*.hip") if p.name != gpu.UMBRELLA.name)
    found = sorted(p for p in every if p != gpu.ENGINE_UMBRELLA.resolve())
    if not found:
        raise CompileError(f"there are no .hip files in {sources}")
    return found


class _Plan:
    """How one simulator is built: a part for each source and one that runs them."""

    def __init__(self, sources: Sequence[Path], sanitize: bool, matrix_units: int) -> None:
        self.sources, self.sanitize = sources, sanitize
        machine = host_machine()
        if machine not in _EMULATION:
            raise CompileError(f"kernels are simulated on {' and '.join(_EMULATION)}, not on {machine}")
        if sanitize and not can_sanitize():
            raise CompileError("the sanitizers' run time comes with gcc, which is not installed; build without them")
        self.machine = machine
        units = f"-DHQ_MATRIX_UNITS={int(matrix_units)}"
        self.flags = ["-target", f"{machine}-linux-gnu", *(SANITIZE if sanitize else ["-O2"]), *_FLAGS, units]
        headers = {*gpu.SOURCES.rglob("*.h"), *(h for s in sources for h in s.parent.rglob("*.h"))}
        self.made_from = fingerprint(zig.version(), self.flags, gpu_header(), files=sorted(headers))
        # Names tell apart what may be kept side by side: other flags, and sources of the same name.
        self.tag = fingerprint(self.flags, sources)[:12]

    def object(self) -> Object:
        parts = [self._part(source) for source in [*self.sources, RUNNER]]
        suffix = "exe" if self.sanitize else "so"
        return Object(f"{self.tag}.{suffix}", self.tag, tuple(parts), self._join, functools.partial(gpu.prepare, "hip"))

    def _part(self, source: Path) -> Part:
        tag = fingerprint(self.flags, source)[:12]
        make = functools.partial(self._compile, source)
        return Part(f"{tag}.{source.stem}.o", fingerprint(self.made_from, files=[source]), make)

    def _compile(self, source: Path, scratch: Path, to: Path) -> None:
        flags = [*self.flags, "-x", "c++", *gpu.include_flags(scratch), f"-I{source.parent}"]
        zig.clang([*flags, "-c", source, "-o", to], f"compiling {source.name} for the simulator")

    def _join(self, files: Sequence[Path], scratch: Path, to: Path) -> None:
        """Links: the runner first, whose shared memory begins the section, the table of kernels last, which ends it."""
        *kernels, runner = files
        table = scratch / "table.o"
        (scratch / "table.cpp").write_text(_table([n for k in kernels for n in _kernels(k)]))
        zig.clang([*self.flags, "-c", scratch / "table.cpp", "-o", table], "compiling the table of kernels")
        objects = [runner, *kernels, table]
        if not self.sanitize:
            zig.lld(["-m", _EMULATION[self.machine], *_LINK, "-o", to, *objects], "linking the simulator")
        else:
            run(["gcc", "-no-pie", "-fsanitize=address,undefined", "-o", to, *objects, "-lm"], "linking the simulator")


def _kernels(part: Path) -> list[str]:
    """The kernels of a part: its functions that have a plain name."""
    symbols = Elf(part.read_bytes()).symbols(dynamic=False)
    return [s.name for s in symbols if s.is_function and re.fullmatch(r"(?!_Z|asan\.|__)\w+", s.name)]


def _table(names: Sequence[str]) -> str:
    declared = "".join(f"void {n}();\n" for n in names)
    rows = "".join(f'{{"{n}", {n}}}, ' for n in names)
    return (
        'struct hq_kernel { const char* name; void (*run)(); };\nextern "C" {\n'
        f"{declared}extern const hq_kernel hq_kernels[] = {{{rows}{{nullptr, nullptr}}}};\n"
        '__attribute__((section(".hq_shared"))) char hq_shared_end[8] __attribute__((aligned(8))) = {1};\n}\n'
    )


class Simulator:
    """Runs launches in a child process, which is started when it is needed and again when a kernel has ended it."""

    def __init__(self, program: Path, wave: int, sanitize: bool) -> None:
        self.program, self.wave, self.sanitize = program, wave, sanitize
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None

    def __repr__(self) -> str:
        return f"<simulator of waves of {self.wave}{', sanitized' if self.sanitize else ''}>"

    def __call__(self, case: Case) -> None:
        """Runs a case; its output arrives in its parameters. Raises `SimulationError`."""
        self.launch(case.kernel, case.grid, case.params, case.offsets)

    def launch(
        self,
        kernel: Kernel,
        grid: Dim3,
        params: Sequence[np.ndarray[tuple[int, ...], np.dtype[np.generic]] | int | float],
        offsets: Sequence[int] = (),
    ) -> None:
        """Runs a kernel on arrays and numbers in the order of the table; arrays that are not const change in place.

        Each array has memory of its own of exactly its size, at `offsets` bytes beyond a multiple of 16.
        """
        if grid[2] != 1 or len(params) != len(kernel.args):
            raise ValueError(f"{kernel.name}: grid {grid} and {len(params)} parameters; expected {kernel.signature}")
        header = struct.pack(f"<{NAME_BYTES}s8I", kernel.name.encode(), *grid, *kernel.block, len(params), 0)
        rows, data, written = [], [], []
        for arg, value, offset in zip(kernel.args, params, offsets or [0] * len(params), strict=True):
            if isinstance(value, np.ndarray):
                const = arg.ctype.startswith("const")
                rows.append(_PARAM.pack(value.nbytes, _READ if const else _WRITTEN, offset))
                data.append(np.ascontiguousarray(value).tobytes())
                if not const:
                    written.append(value)
            else:
                rows.append(_PARAM.pack(_bits(value, arg.kind), _FLOAT if arg.kind is Kind.FLOAT32 else _NUMBER, 0))
        rows += [bytes(_PARAM.size)] * (MAX_PARAMS - len(rows))
        message = b"".join([header, *rows, *data])
        try:
            results = self._exchange(message, [a.nbytes for a in written])
        except SimulationError as error:
            story = re.sub(r"\bparameter (\d+)", lambda m: f"parameter {kernel.args[int(m[1])].name}", str(error))
            raise SimulationError(f"{kernel.name}, simulated on waves of {self.wave}: {story}") from None
        for array, result in zip(written, results, strict=True):
            array[...] = np.frombuffer(result, array.dtype).reshape(array.shape)

    def close(self) -> None:
        """Ends the child process."""
        if self._process is not None:
            _end(self._process)
            self._process = None

    def _exchange(self, message: bytes, sizes: Sequence[int]) -> list[bytes]:
        """Sends a launch and reads what it wrote; whatever goes wrong ends the process and is told."""
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        late = threading.Timer(TIMEOUT, process.kill)
        late.start()
        try:
            process.stdin.write(message)
            process.stdin.flush()
            done = len(process.stdout.read(8)) == 8
            results = [process.stdout.read(n) for n in sizes] if done else []
            if done and [len(r) for r in results] == list(sizes):
                return results
        except BrokenPipeError:
            pass
        finally:
            in_time = late.is_alive()
            late.cancel()
        code = process.wait()
        self._process = None
        raise SimulationError(self._story(code) if in_time else f"it did not end within {TIMEOUT:.0f} s")

    def _start(self) -> subprocess.Popen[bytes]:
        errors = self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        command = [str(self.program), str(self.wave)]
        if not self.sanitize:
            command = [sys.executable, "-I", "-S", "-c", _LOADER, *command]
        environment = {
            **os.environ,
            "ASAN_OPTIONS": "detect_leaks=0:handle_segv=1:abort_on_error=0:color=never",
            "UBSAN_OPTIONS": "print_stacktrace=1:color=never",
        }
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env=environment
        )
        self._process = process
        weakref.finalize(self, _end, process)
        return process

    def _story(self, code: int) -> str:
        """Why the process ended: its own sentence and the useful lines of a sanitizer's report."""
        assert self._errors is not None
        self._errors.seek(0)
        text = self._errors.read().decode(errors="replace")
        useful = [_shorten(line) for line in text.splitlines() if _USEFUL.search(line)]
        useful = [re.sub(r"\S+ @(0x\w+)", lambda m: self._source(m[1]) or m[0], line) for line in useful]
        ended = f"it ended with signal {-code}" if code < 0 else f"it ended with exit code {code}"
        return re.sub(r" @0x\w+", "", "\n".join(useful[:12])) or f"{ended} {text.strip()[-500:]}".strip()

    def _source(self, address: str) -> str:
        """The lines of .hip files that a call at an address was inlined into; empty where that is not known."""
        if not self.sanitize or shutil.which("addr2line") is None:
            return ""
        call = hex(int(address, 16) - 1)
        command = ["addr2line", "-i", "-e", str(self.program), call]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
        return ", ".join(dict.fromkeys(_shorten(line) for line in lines if re.search(r"\.hip:\d", line)))


def _bits(value: float, kind: Kind) -> int:
    """The 8 bytes that a number is passed in."""
    if kind is Kind.FLOAT32:
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value) & (1 << 64) - 1


class InProcess:
    """The kernels of a simulator that was built without sanitizers, in this process, on memory that addresses name.

    Launches run one at a time. A fault that the simulator sees ends the launch alone; what the kernels write outside of
    their arrays is not seen.
    """

    _lock = threading.Lock()  # of all: a library that is loaded twice is one

    def __init__(self, simulator: Simulator) -> None:
        if simulator.sanitize:
            raise ValueError(f"{simulator} is a program, not a library: build it without sanitizers")
        self.wave, self._library = simulator.wave, ctypes.CDLL(str(simulator.program))

    def __contains__(self, name: str) -> bool:
        with self._lock:
            return bool(self._library.hq_has(name.encode()))

    def launch(self, kernel: Kernel, grid: Dim3, block: Dim3, params: Sequence[float]) -> None:
        """Runs a kernel on addresses and numbers in the order of the table. Raises `SimulationError`."""
        kinds, count = [a.kind for a in kernel.args], len(params)
        values = (ctypes.c_uint64 * MAX_PARAMS)(*(_bits(v, kind) for v, kind in zip(params, kinds, strict=True)))
        floats = sum(1 << i for i, kind in enumerate(kinds) if kind is Kind.FLOAT32)
        said, sizes = ctypes.create_string_buffer(SAID_BYTES), ((ctypes.c_uint32 * 3)(*d) for d in (grid, block))
        with self._lock:
            failed = self._library.hq_launch(
                kernel.name.encode(), *sizes, self.wave, values, count, floats, said, ctypes.c_ulong(SAID_BYTES)
            )
        if failed:
            lines = re.sub(r" @0x\w+", "", said.value.decode(errors="replace")).splitlines()
            story = "\n".join(_shorten(line) for line in lines)
            raise SimulationError(f"{kernel.name}, simulated on waves of {self.wave}: {story}")


# What the simulator says itself (its second line and on begin with blanks), and of a report the error, what was
# accessed, the shared memory that it is near, and the frames in kernels' sources.
_USEFUL = re.compile(
    r"^hipquant: |^  thread \d|ERROR: \w+Sanitizer|runtime error:|^(READ|WRITE) of"
    r"|is located .* global variable '(?!hq_|shared_begin)|#\d+ .*\.hip:\d"
)


def _shorten(line: str) -> str:
    """A line without the addresses of a report, and without folders."""
    line = re.sub(
        r"^==\d+==|^0x\w+ (?=is located)|\b0x[0-9a-f]+ in |\s*\(BuildId.*\)$", "", line.removeprefix("hipquant: ")
    )
    line = re.sub(r" on (unknown )?address.*| at (pc|0x\w+) .*| defined in .*| \(discriminator.*", "", line)
    return re.sub(r"\S*/(?=[\w.]+:\d)", "", line).rstrip()


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


__all__ = ["CompileError", "InProcess", "SimulationError", "Simulator", "build", "cache_folder", "can_sanitize"]
