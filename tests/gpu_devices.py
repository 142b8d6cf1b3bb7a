"""What the tests of GPUs as devices share: a driver library that is made for them (fake_gpu_driver.c), compiled for
both columns of the table, the devices opened through it, and code objects that they take.

Test files import the fixtures, which they ask for as `fake` and `device`. This is imported on machines of real devices
too, which may lack gguf, and so tests/models.py.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from ctypes import c_char_p, c_int, c_uint, c_void_p
from pathlib import Path
from typing import Any

import pytest

from hipquant import wiring
from hipquant.codeobjects import bundle
from hipquant.driver import gpu, gpu_symbols
from hipquant.targets import host_machine

COLUMNS = {"hip": "-DHIP -DR0600", "hip before 6": "-DHIP", "cuda": "-DCUDA"}
LIVE = ("", "memory", "pinned", "streams", "events", "modules", "graphs", "instances")
HEADER = ".version 6.4\n.target sm_75\n.address_size 64\n"
ADD = (
    HEADER
    + """
.visible .entry add_i32(.param .u64 a, .param .u64 b, .param .u64 c, .param .u32 n)
{
    .reg .pred %p;
    .reg .b32 %r<8>;
    .reg .b64 %rd<8>;
    ld.param.u64 %rd1, [a];
    ld.param.u64 %rd2, [b];
    ld.param.u64 %rd3, [c];
    ld.param.u32 %r1, [n];
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mov.u32 %r4, %tid.x;
    mad.lo.u32 %r2, %r2, %r3, %r4;
    setp.ge.u32 %p, %r2, %r1;
    @%p bra DONE;
    mul.wide.u32 %rd4, %r2, 4;
    add.u64 %rd1, %rd1, %rd4;
    add.u64 %rd2, %rd2, %rd4;
    add.u64 %rd3, %rd3, %rd4;
    ld.global.u32 %r5, [%rd1];
    ld.global.u32 %r6, [%rd2];
    add.u32 %r7, %r5, %r6;
    st.global.u32 [%rd3], %r7;
DONE:
    ret;
}
"""
)


def amd_elf(target: str, tail: bytes = b"") -> bytes:
    """The header of an AMD code object without segments and sections."""
    (mach,) = (number for number, name in bundle._MACHINES.items() if name == target)
    return (
        struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01\x40\x03", 3, 224, 1, 0, 0, 0, mach, 64, 0, 0, 0, 0, 0)
        + tail
    )


# --- the fake driver ---


@functools.cache
def compiled(base: Path) -> dict[str, Path]:
    """The fake driver, compiled once for each column, in a folder of this one."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the fake driver is linked for Linux")
    folder, machine = base / "fake_gpu_driver", host_machine()
    folder.mkdir(exist_ok=True)
    zig, source = [sys.executable, "-m", "ziglang"], Path(__file__).with_name("fake_gpu_driver.c")
    flags = "-O1 -std=c17 -ffreestanding -fPIC -fno-stack-protector -Wall -Wextra -Werror -Wno-unused-parameter".split()
    found = {}
    for column, defines in COLUMNS.items():
        built = folder / f"lib{column.replace(' ', '_')}.so"
        compile = ["clang", "-target", f"{machine}-linux-gnu", *flags, *defines.split(), "-c", str(source)]
        subprocess.run([*zig, *compile, "-o", str(built.with_suffix(".o"))], check=True)
        emulation = {"x86_64": "elf_x86_64", "aarch64": "aarch64linux"}[machine]
        link = ["ld.lld", "-shared", "-m", emulation, str(built.with_suffix(".o")), "-o", str(built)]
        subprocess.run([*zig, *link], check=True)
        found[column] = built
    return found


class Fake:
    """The fake driver's own state, and the devices opened through it."""

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column, self.kind = path, column, column.partition(" ")[0]
        self.lib = ctypes.CDLL(str(path))
        self.symbols = {row: getattr(symbol, self.kind) for row, symbol in gpu_symbols.SYMBOLS.items()}
        self.ran: list[tuple[str, tuple[int, ...]]] = []
        self._count = ctypes.CFUNCTYPE(c_int, c_char_p)(lambda name: self.count(name.decode()))
        run = ctypes.CFUNCTYPE(c_int, c_char_p, ctypes.POINTER(c_uint), ctypes.POINTER(c_void_p))
        self._run = run(lambda name, geometry, params: self.run(name.decode(), tuple(geometry[:7]), params))
        c_void_p.in_dll(self.lib, "fake_count").value = ctypes.cast(self._count, c_void_p).value
        c_void_p.in_dll(self.lib, "fake_run").value = ctypes.cast(self._run, c_void_p).value
        self.counts: dict[str, int] = {}
        self.action: Callable[[str, tuple[int, ...], Any], None] | None = None

    def count(self, name: str) -> int:
        return self.counts[name] if name in self.counts else len(wiring.KERNELS[name].args)

    def run(self, name: str, geometry: tuple[int, ...], params: Any) -> int:
        """Runs a launch; the driver's error code."""
        self.ran.append((name, geometry))
        if self.action:
            self.action(name, geometry, params)
        return 0

    def integer(self, name: str) -> c_int:
        return c_int.in_dll(self.lib, name)

    def fail(self, symbol: str = "", code: int = 719, nth: int = -1, lost: bool = False) -> None:
        """The next calls of a symbol fail, or the nth call from now on and, if the device is lost, all behind it.

        With no argument, none fails.
        """
        c_char = (ctypes.c_char * 64).in_dll(self.lib, "fake_fail_symbol")
        c_char.value = symbol.encode()
        self.integer("fake_fail_code").value = code
        self.integer("fake_fail_nth").value = nth
        self.integer("fake_lost").value = lost
        self.integer("fake_calls").value = 0

    @property
    def failed(self) -> str:
        return (ctypes.c_char * 64).in_dll(self.lib, "fake_failed").value.decode()

    def live(self) -> dict[str, int]:
        gc.collect()
        counts = (c_int * len(LIVE)).in_dll(self.lib, "fake_live")
        return {name: n for name, n in zip(LIVE, counts, strict=True) if n}

    def open(self, index: int = 0) -> gpu.Device:
        library, count = gpu_symbols.load(self.kind)
        assert count == self.integer("fake_devices").value
        return gpu.Device(library, index)

    def image(self) -> bytes:
        """A code object that the first device takes."""
        return ADD.encode() if self.kind == "cuda" else amd_elf("gfx1100")


@pytest.fixture(name="fake", params=COLUMNS)
def fake_driver(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Fake]:
    path = tmp_path / "driver.so"  # a copy is another library, with its own state
    shutil.copy(compiled(tmp_path_factory.getbasetemp())[request.param], path)
    monkeypatch.setattr(gpu_symbols, "candidates", lambda kind: [str(path)])
    monkeypatch.setattr(gpu, "_libraries", {})
    monkeypatch.setattr(gpu, "_missing", {})
    monkeypatch.setattr(gpu, "_devices", {})
    fake = Fake(path, request.param)
    yield fake
    assert fake.integer("fake_wrong_context").value == 0, "a call was made while another device was current"


@pytest.fixture(name="device")
def fake_device(fake: Fake) -> gpu.Device:
    return fake.open()
