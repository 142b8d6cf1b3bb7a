"""Code objects for the tests of build, inspect, verify and export: small kernels, and broken ones; what they hold."""

from __future__ import annotations

import random
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from hipquant.targets import gpu_target
from hipquant.toolchain import zig
from hipquant.toolchain.build import plan
from hipquant.toolchain.compile import build_objects
from hipquant.toolchain.inspect import Inspection, KernelInfo, inspect
from hipquant.wiring import COMPATIBILITY, Kernel, profile

EM_CUDA = 190
COMPATIBLE = {"quantize", "dequantize", "dequantize_mul_mat_vec", "mul_mat_vec", "mul_mat", "get_rows"}
TWO_KERNELS = """#include "device.h"
HQ_SHARED float shared_floats[96];
HQ_KERNEL(64) scale(const float* x, float* y, int64_t n, float f, uint8_t c) {
    shared_floats[thread_x()] = x[thread_x()];
    barrier();
    y[thread_x()] = shared_floats[95 - thread_x()] * f + c;
}
typedef float float4 __attribute__((ext_vector_type(4)));
HQ_KERNEL(256) wide(const float4* x, float4* y, int a) {
    float4 v = x[thread_x()];
    v[0] += dot4(a, 2, 3);
    y[thread_x()] = v;
}
"""
Change = Callable[[Kernel, str], str]


def definition(kernel: Kernel) -> str:
    """A kernel that does next to nothing, with the arguments and the launch bounds of the table."""
    threads = kernel.block[0] * kernel.block[1]
    output = next(a for a in kernel.args if a.ctype.endswith("*") and not a.ctype.startswith("const"))
    value = "dot4(ncols_x, nrows_x, nrows_y)" if kernel.family in ("mul_mat_vec", "mul_mat") else "1"
    return f"HQ_KERNEL({threads}) {kernel.signature[5:]} {{ *(int*){output.name} = (int){value}; }}\n"


def source(change: Change | None = None, kernels: Iterable[Kernel] = COMPATIBILITY) -> str:
    """All kernels of a table as a source; `change` may give another text for one."""
    texts = ((k, definition(k)) for k in kernels)
    return '#include "device.h"\n' + "".join(change(k, text) if change else text for k, text in texts)


def only(name: str, new: Callable[[str], str]) -> Change:
    """Changes the text of one kernel."""

    def change(kernel: Kernel, text: str) -> str:
        if kernel.name != name:
            return text
        changed = new(text)
        assert changed != text
        return changed

    return change


def compiled(text: str, folder: Path, *targets: str) -> dict[str, bytes]:
    """A source compiled for GPU targets, by target."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "kernels.hip"
    path.write_text(text)
    objects = plan([gpu_target(t) for t in targets], sources=[path])
    return {p.stem: p.read_bytes() for p in build_objects(objects, folder)}


def assembled(text: str, folder: Path, link: bool = False) -> bytes:
    """x86-64 assembly as an object, or as a shared object."""
    folder.mkdir(parents=True, exist_ok=True)
    source, to, shared = folder / "x.s", folder / "x.o", folder / "x.so"
    source.write_text(text)
    zig.clang(["-target", "x86_64-linux-gnu", "-c", source, "-o", to], "assembling")
    if link:
        zig.lld(["-shared", "-o", shared, to], "linking")
    return (shared if link else to).read_bytes()


def host_object(bundles: Iterable[bytes], folder: Path, link: bool = False) -> bytes:
    """What `hipcc -c` makes: an x86-64 object whose section .hip_fatbin holds bundles, one for each source."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = ['.section .hip_fatbin,"a",@progbits']
    for i, bundle in enumerate(bundles):
        (folder / f"{i}.bundle").write_bytes(bundle)
        lines += [".balign 4096", f'.incbin "{folder / f"{i}.bundle"}"']
    lines += [".text", ".globl launch", ".type launch,@function", "launch: ret"]
    return assembled("\n".join(lines) + "\n", folder, link)


def cubin(folder: Path) -> bytes:
    """A cubin as ptxas 13 makes them, without machine code: `two` with 5 arguments, 14 registers, 400 bytes stack."""
    params = [(0, 0, 8), (1, 8, 8), (2, 16, 8), (3, 24, 1), (4, 28, 4)]
    rows = [struct.pack("<BBHIHHI", 4, 0x17, 12, 0, i, at, size << 18) for i, at, size in reversed(params)]
    rows += [struct.pack("<BBHIII", 4, 0x05, 12, 128, 2, 1), struct.pack("<BBH", 3, 0x1B, 255)]
    whole = struct.pack("<BBHII", 4, 0x2F, 8, 1, 14) + struct.pack("<BBHII", 4, 0x11, 8, 1, 400)
    text = "".join(
        f'.section {name},"",@progbits\n.byte {",".join(map(str, data))}\n'
        for name, data in ((".nv.info", whole), (".nv.info.two", b"".join(rows)), (".text.two", bytes(16)))
    )
    blob = bytearray(assembled(text + '.section .nv.shared.two,"wa",@nobits\n.zero 96\n', folder))
    struct.pack_into("<H", blob, 18, EM_CUDA)
    struct.pack_into("<I", blob, 48, 0x6004B04)  # sm_75
    blob[7:9] = b"\x41\x08"
    offset, (entry, count, names) = struct.unpack_from("<Q", blob, 40)[0], struct.unpack_from("<HHH", blob, 58)
    (strings,) = struct.unpack_from("<Q", blob, offset + names * entry + 24)
    for i in range(count):  # the section of the code tells its symbol in sh_info
        at = offset + i * entry
        start = strings + struct.unpack_from("<I", blob, at)[0]
        if blob[start : start + 10] == b".text.two\0":
            struct.pack_into("<I", blob, at + 44, 14 << 24 | 1)
    return bytes(blob)


@cache
def right() -> dict[str, bytes]:
    """All kernels as they should be, by target."""
    with tempfile.TemporaryDirectory() as folder:
        return compiled(source(), Path(folder), "gfx1100", "gfx90a", "sm_90a")


@cache
def two_kernels() -> dict[str, bytes]:
    """Two kernels of our own, by target."""
    with tempfile.TemporaryDirectory() as folder:
        return compiled(TWO_KERNELS, Path(folder), "gfx1100", "gfx90a", "gfx11-generic", "sm_90a")


def right_amd() -> dict[str, bytes]:
    return {target: image for target, image in right().items() if target.startswith("gfx")}


def compressed(bundle: bytes, version: int, method: int = 0) -> bytes:
    """A CCOB bundle as clang's --offload-compress makes it; method 0 is zlib, 1 zstd."""
    if method == 0:
        body = zlib.compress(bundle)
    else:
        import zstandard

        body = zstandard.ZstdCompressor().compress(bundle)
    layout = {1: "<4sHHIQ", 2: "<4sHHIIQ", 3: "<4sHHQQQ"}[version]
    total = [] if version == 1 else [struct.calcsize(layout) + len(body)]
    return struct.pack(layout, b"CCOB", version, method, *total, len(bundle), 0) + body


def damaged(blob: bytes, rng: random.Random) -> bytes:
    """A copy that is cut, or has some bits, bytes or numbers changed, more often near its begin and end."""
    if rng.random() < 0.2:
        return blob[: rng.randrange(len(blob))]
    changed = bytearray(blob)
    for _ in range(rng.randint(1, 6)):
        window = rng.choice((64, 0x900, len(blob)))
        at = rng.randrange(min(window, len(blob)))
        at = at if rng.random() < 0.7 else len(blob) - 1 - at
        new = rng.choice((bytes([changed[at] ^ 1 << rng.randrange(8)]), rng.randbytes(1), *_NUMBERS))
        changed[at : at + len(new)] = new[: len(changed) - at]
    return bytes(changed)


_NUMBERS = (b"\xff" * 4, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\0" * 8, b"\xff" * 7 + b"\x7f")


def one(found: Inspection, name: str) -> KernelInfo:
    """The kernel of this name, of the one target."""
    (kernels,) = found.targets.values()
    return next(k for k in kernels if k.name == name)


def names(which: str = "hip") -> set[str]:
    """The 123 names and get_rows, under a name profile."""
    found = {k.name for k in profile(which) if k.family in COMPATIBLE}
    assert len(found) == 123 + 13
    return found


def names_by_target(blob: bytes) -> dict[str, set[str]]:
    return {target: {k.name for k in found} for target, found in inspect(blob).targets.items()}
