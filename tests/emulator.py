"""Runs kernels of AMD code objects on a public emulator of AMD's machine code: tinygrad's, in a checkout of it.

The environment names the checkout in AMD_EMULATOR; the emulator itself calls `clang`. It executes the machine code of
RDNA3, RDNA4 and CDNA as it stands. It has no caches, no timing, and no check of bounds. It works in a child process, as
code that it does not understand may end it.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import multiprocessing
import os
import shutil
import struct
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from hipquant import wiring
from hipquant.codeobjects import ENGINE
from hipquant.toolchain.cases import Case
from hipquant.toolchain.verify import SIZES
from hipquant.wiring import Dim3, Kernel

# What the emulator calls each target's instruction set.
TARGETS = {"gfx1100": "rdna3", "gfx1201": "rdna4", "gfx90a": "cdna", "gfx942": "cdna"}
KERNELS = [k for k in wiring.TABLE if k in wiring.COMPATIBILITY or k.family == "get_rows"]

VARIABLE = "AMD_EMULATOR"
PART = "test/mockgpu/amd/emu.py"  # of the checkout
TIMEOUT = 600.0  # seconds that one launch may take
ALIGNMENT, GUARD = 256, 64  # bytes: what offsets of cases are relative to; what lies around an array
_DESCRIPTOR = struct.Struct("<III4xq20xIIIHH4x")  # of a kernel, 64 bytes
_KEPT_DENORMALS = 0xF  # rsrc1, bits 16 to 19
_USER_REGISTERS = ((1, 4), (2, 2), (4, 2), (8, 2), (16, 2), (32, 2))  # bit of the properties, scalar registers
_KERNEL_ARGUMENTS = 8
# The emulator's registers: how many scalar ones, where EXEC and the program counter are, and what operands stand for.
_SCALARS, _EXEC, _PC, _NULL, _ZERO, _DPP, _LITERAL, _VECTOR = 260, 126, 256, 124, 128, 250, 255, 256
# Instructions that write caches back or empty them: bits of the first word, where the operation is, which, and bytes.
_OF_CACHES = {
    "rdna3": (0xE0000000, 18, (0x2B, 0x2C), 8),  # buffer_gl0_inv, buffer_gl1_inv
    "rdna4": (0xEE000000, 14, (0x2B, 0x2C), 12),  # global_inv, global_wb
    "cdna": (0xE0000000, 18, (0x28, 0x29, 0x3E, 0x3F), 8),  # buffer_wbl2, buffer_inv, buffer_wbinvl1 and its _vol
}
_DPP_LANES = {0xB1: 1, 0x4E: 2, 0x141: 7, 0x140: 15}  # moves: quad_perm and mirrors of rows as a mask of the lane


class EmulationError(Exception):
    """The emulator gave up: its own words, or the signal that ended it."""


def missing() -> str:
    """Why nothing can be emulated here; empty if it can be."""
    checkout = os.environ.get(VARIABLE)
    if not checkout:
        return f"{VARIABLE} does not name a checkout of tinygrad, whose emulator executes AMD's machine code"
    if not (Path(checkout) / PART).is_file():
        return f"{VARIABLE} is {checkout}, which has no {PART}: name a checkout of tinygrad"
    return "" if shutil.which("clang") else "the emulator calls clang, which is not on the PATH"


class Emulator:
    """A backend for cases: one target's code object, in a child process that is started again when it has ended."""

    def __init__(self, code_object: bytes, target: str) -> None:
        self.code_object, self.target = code_object, target
        self._child: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection[Any, Any] | None = None

    def launch(
        self, kernel: Kernel, grid: Dim3, params: Sequence[npt.NDArray[Any] | float], offsets: Sequence[int] = ()
    ) -> None:
        """As `Simulator.launch`: what the kernel writes arrives in the arrays."""
        values = [
            struct.unpack("<I", struct.pack("<f", value))[0] if arg.ctype == "float" else value
            for arg, value in zip(kernel.args, params, strict=True)
        ]
        places = tuple(offsets) or (0,) * len(values)
        self(cast("Case", SimpleNamespace(kernel=kernel, grid=grid, params=values, offsets=places)))

    def __call__(self, case: Case) -> None:
        """Runs a case; its output arrives in its parameters. Raises `EmulationError`."""
        pipe = self._pipe or self._start()
        pipe.send((case.kernel.name, case.grid, case.params, case.offsets))
        try:
            answer = pipe.recv() if pipe.poll(TIMEOUT) else f"it did not end within {TIMEOUT:.0f} s"
        except (EOFError, ConnectionError):
            assert self._child is not None
            self._child.join()
            answer = f"it ended with code {self._child.exitcode}"
        if isinstance(answer, str):
            self.close()
            raise EmulationError(f"{case}, emulated as {self.target}: {answer}")
        for value, result in zip(case.params, answer, strict=True):
            if isinstance(value, np.ndarray):
                value[...] = result

    def _start(self) -> Connection[Any, Any]:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_serve, args=(theirs, self.code_object, TARGETS[self.target]), daemon=True)
        self._child.start()
        theirs.close()
        return self._pipe

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None and self._pipe is not None:
            self._child.kill()
            self._child.join()
            self._pipe.close()
        self._child = self._pipe = None


def engine_targets() -> list[str]:
    """Where the engine's kernels can be emulated."""
    return [] if missing() else list(TARGETS)


def engine(target: str) -> Emulator:
    """The engine's kernels of a target; skips the test where they are not built."""
    path = ENGINE.targets().get(target)
    if path is None:
        pytest.skip(f"{target} is not built: HIPQUANT_TARGETS")
    return Emulator(path.read_bytes(), target)


# In the child


def _serve(pipe: Connection[Any, Any], code_object: bytes, instruction_set: str) -> None:
    sys.path.insert(0, os.environ[VARIABLE])
    from test.mockgpu.amd import emu  # type: ignore[import-not-found]

    _correct(emu)
    image = _Image(code_object)
    while True:
        name, grid, params, offsets = pipe.recv()
        try:
            pipe.send(_launch(emu, image, instruction_set, wiring.kernel(name), grid, params, offsets))
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            pipe.send(f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})")


def _correct(emu: Any) -> None:
    """Mends what the emulator does otherwise than the hardware."""
    emu._get_ftz_lib = lambda: (None, 0)  # it would flush subnormal numbers, which our kernels tell the GPU to keep
    for form in (emu.irc.VOP1, emu.irc.VOP2):
        # Operands of 16 bits are the low half of any register; from 128 on the emulator takes the high half of another.
        form.canonical_op_bits = property(partial(_whole_registers, form.canonical_op_bits.func))
    emu._decode_at = partial(_decode, emu, emu._decode_at)


def _decode(emu: Any, decode: Callable[[int, str], Any], at: int, instruction_set: str) -> Any:
    """The runner of an instruction, or one that does what the hardware does, and the instruction."""
    if size := _bytes_of_caches(at, instruction_set):
        return _in_python(partial(_skip, size)), SimpleNamespace(op=None, size=lambda: size)
    (program, runtime), instruction = decode(at, instruction_set)
    wave, name = 64 if instruction_set == "cdna" else 32, emu._op_name(instruction)
    if "WMMA_F32" in name and instruction.src2.offset == _ZERO:
        (program, runtime), code = _decode_in_place(decode, at, instruction_set, instruction)
        return (program, SimpleNamespace(fxn=partial(_wmma_of_zeros, runtime.fxn, code, instruction))), instruction
    if replaced := _replaced(name, instruction, at, wave):
        return _in_python(replaced), instruction
    if around := _guarded(instruction, wave):
        return (program, SimpleNamespace(fxn=partial(around, runtime.fxn))), instruction
    return (program, runtime), instruction


def _replaced(name: str, instruction: Any, at: int, wave: int) -> Callable[..., None] | None:
    """What runs an instruction of which the emulator misunderstands too much to be helped."""
    if "PERMLANEX16" in name:
        return partial(_permlanex16, instruction)
    if name == "V_ADD_CO_U32" and instruction.src0.offset == _DPP:
        return partial(_add_with_dpp, instruction, ctypes.c_uint32.from_address(at + 8).value)
    if name in ("GLOBAL_ATOMIC_ADD", "GLOBAL_ATOMIC_ADD_U32"):
        return partial(_atomic_add, instruction, wave)
    return None


def _guarded(instruction: Any, wave: int) -> Callable[..., None] | None:
    """What runs the emulator's own code of an instruction between preparation and correction."""
    if getattr(instruction, "src0_neg", 0) and hasattr(instruction, "src0_sel"):
        if instruction.op.name != "V_CVT_F32_F16_E32":
            raise NotImplementedError(f"{instruction!r} changes the sign of an operand, which is not emulated")
        return partial(_negated, instruction.vdst.offset - _VECTOR, wave)
    if type(instruction).__name__ == "DS":
        return partial(_active_lanes_only, instruction.addr.offset - _VECTOR, wave)
    if hasattr(instruction, "dpp") and getattr(instruction, "vdst", None) == instruction.vsrc0:
        return partial(_lane_by_lane, instruction.vsrc0.offset - _VECTOR, wave)
    return None


def _in_python(run: Callable[..., None]) -> Any:
    """What the emulator takes for compiled code: a function of the scalar and of the vector registers."""
    return SimpleNamespace(arg=SimpleNamespace(globals=[0, 1])), SimpleNamespace(fxn=run)


def _bytes_of_caches(at: int, instruction_set: str) -> int:
    """Size of an instruction for caches, which the emulator has not and does not decode; 0 if it is none."""
    form, shift, operations, size = _OF_CACHES[instruction_set]
    word = ctypes.c_uint32.from_address(at).value
    return size if any(word >> shift == form >> shift | n for n in operations) else 0


def _skip(size: int, scalars: ctypes.c_uint64, _: ctypes.c_uint64) -> None:
    _registers(scalars, _SCALARS)[_PC] += size


def _decode_in_place(decode: Callable[[int, str], Any], at: int, instruction_set: str, instruction: Any) -> Any:
    """The runner and the code of a product of matrices that is added to its destination, not to its third operand."""
    field = type(instruction).src2.lo
    word = ctypes.c_uint64.from_address(at).value & ~(0x1FF << field) | instruction.vdst.offset << field
    code = ctypes.create_string_buffer(word.to_bytes(8, "little"), 16)
    return decode(ctypes.addressof(code), instruction_set)[0], code


def _wmma_of_zeros(run: Callable[..., None], code: Any, instruction: Any, *buffers: ctypes.c_uint64) -> None:
    """A product of matrices added to the constant 0, for which the emulator would take a register: the destination is
    cleared, and what is added to it runs from elsewhere, as the emulator reads operands from the code."""
    scalar, vector = _registers(buffers[0], _SCALARS), _registers(buffers[1], _VECTOR * 32).reshape(_VECTOR, 32)
    counter, first = scalar[_PC : _PC + 2].copy(), instruction.vdst.offset - _VECTOR
    vector[first : first + 8] = 0
    scalar[_PC : _PC + 2] = divmod(ctypes.addressof(code), 1 << 32)[::-1]
    run(*buffers)
    scalar[_PC : _PC + 2] = counter
    scalar[_PC] += instruction.size()


def _add_with_dpp(instruction: Any, control: int, scalars: ctypes.c_uint64, vectors: ctypes.c_uint64) -> None:
    """A sum with another lane's value, and its carry: the emulator has no DPP on forms with three operands."""
    scalar, vector = _registers(scalars, _SCALARS), _registers(vectors, _VECTOR * 32).reshape(_VECTOR, 32)
    move, masks = control >> 8 & 0x1FF, control >> 24
    if move not in _DPP_LANES or masks != 0xFF or instruction.sdst.offset >= _NULL:
        raise NotImplementedError(f"{instruction!r} with DPP {control:#010x} is not emulated")
    moved = vector[control & 0xFF][np.arange(32) ^ _DPP_LANES[move]].astype(np.uint64)
    sums, active = moved + vector[instruction.src1.offset - _VECTOR], _active(scalar, 32)
    vector[instruction.vdst.offset - _VECTOR][active] = sums[active].astype(np.uint32)
    carries = np.packbits((sums >> np.uint64(32) != 0) & active, bitorder="little")
    scalar[instruction.sdst.offset] = carries.view(np.uint32)[0]
    scalar[_PC] += 12


def _signed_offset(instruction: Any) -> int:
    """What an access to memory adds to its address."""
    name = "offset" if hasattr(instruction, "offset") else "ioffset"
    place = getattr(type(instruction), name)
    sign: int = 1 << place.hi - place.lo
    return (int(getattr(instruction, name)) ^ sign) - sign


def _atomic_add(instruction: Any, wave: int, scalars: ctypes.c_uint64, vectors: ctypes.c_uint64) -> None:
    """Active lanes add to memory, one after the other. The emulator would let all lanes do so, and returns what was
    there on RDNA3 alone."""

    def field(*names: str) -> Any:
        return next(getattr(instruction, name) for name in names if hasattr(instruction, name))

    scalar, vector = _registers(scalars, _SCALARS), _registers(vectors, _VECTOR * wave).reshape(_VECTOR, wave)
    address, data = (vector[field(*names).offset - _VECTOR :] for names in (("addr", "vaddr"), ("data", "vsrc")))
    returns, base, start = field("glc", "sc0", "th") & 1, instruction.saddr.offset, _signed_offset(instruction)
    if base < _NULL:
        start += int(scalar[base]) | int(scalar[base + 1]) << 32
    for lane in np.flatnonzero(_active(scalar, wave)):
        high = 0 if base < _NULL else int(address[1][lane]) << 32
        word = ctypes.c_uint32.from_address(start + int(address[0][lane]) + high)
        before = word.value
        word.value = before + int(data[0][lane]) & 0xFFFFFFFF
        if returns:
            vector[instruction.vdst.offset - _VECTOR][lane] = before
    scalar[_PC] += instruction.size()


def _whole_registers(bits: Callable[[Any], dict[str, int]], instruction: Any) -> dict[str, int]:
    return {operand: max(n, 32) for operand, n in bits(instruction).items()}


def _registers(address: ctypes.c_uint64, count: int) -> npt.NDArray[np.uint32]:
    assert address.value is not None
    return np.ctypeslib.as_array((ctypes.c_uint32 * count).from_address(address.value))


def _permlanex16(instruction: Any, scalars: ctypes.c_uint64, vectors: ctypes.c_uint64) -> None:
    """Each lane takes from the other row of 16; the emulator does not see a selector that is a literal."""
    scalar, vector = _registers(scalars, _SCALARS), _registers(vectors, _VECTOR * 32).reshape(_VECTOR, 32)

    def operand(field: Any) -> int:
        return int(instruction.literal if field.offset == _LITERAL else scalar[field.offset])

    selectors = operand(instruction.src1) | operand(instruction.src2) << 32
    lanes = np.array([16 * (lane < 16) + (selectors >> 4 * (lane % 16) & 15) for lane in range(32)])
    moved = vector[instruction.src0.offset - _VECTOR][lanes]
    active = _active(scalar, 32)
    vector[instruction.vdst.offset - _VECTOR][active] = moved[active]
    scalar[_PC] += instruction.size()


def _negated(register: int, wave: int, run: Callable[..., None], *buffers: ctypes.c_uint64) -> None:
    """Runs a conversion of a part of a register (SDWA) whose operand has a minus, which the emulator does not see."""
    run(*buffers)
    scalar, vector = _registers(buffers[0], _SCALARS), _registers(buffers[1], _VECTOR * wave).reshape(_VECTOR, wave)
    vector[register][_active(scalar, wave)] ^= 1 << 31


def _active(scalar: npt.NDArray[np.uint32], wave: int) -> npt.NDArray[np.bool_]:
    """Which lanes are on."""
    bits = scalar[_EXEC : _EXEC + wave // 32].view(np.uint8)
    return np.unpackbits(bits, bitorder="little").astype(bool)


def _active_lanes_only(register: int, wave: int, run: Callable[..., None], *buffers: ctypes.c_uint64) -> None:
    """Runs an access to shared memory; the emulator would also read at what lies in the address of inactive lanes."""
    scalar, vector = _registers(buffers[0], _SCALARS), _registers(buffers[1], _VECTOR * wave).reshape(_VECTOR, wave)
    active, before = _active(scalar, wave), vector[register].copy()
    vector[register][~active] = 0
    run(*buffers)
    vector[register][~active] = before[~active]


def _lane_by_lane(register: int, wave: int, run: Callable[..., None], *buffers: ctypes.c_uint64) -> None:
    """Runs a DPP instruction whose destination is its source: the emulator would read lanes that it has written."""
    scalar, vector = _registers(buffers[0], _SCALARS), _registers(buffers[1], _VECTOR * wave).reshape(_VECTOR, wave)
    place = slice(_EXEC, _EXEC + wave // 32)
    counter, active, before = scalar[_PC : _PC + 2].copy(), scalar[place].copy(), vector[register].copy()
    after = before.copy()
    for lane in np.flatnonzero(_active(scalar, wave)):
        vector[register], scalar[_PC : _PC + 2], scalar[place] = before, counter, 0
        scalar[_EXEC + lane // 32] = 1 << lane % 32
        run(*buffers)
        after[lane] = vector[register][lane]
    vector[register], scalar[place] = after, active


class _Image:
    """A code object in memory, as a loader lays it out."""

    def __init__(self, code_object: bytes) -> None:
        elf = ELFFile(io.BytesIO(code_object))
        segments = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        self.memory = mmap.mmap(-1, max(s["p_vaddr"] + s["p_memsz"] for s in segments) + mmap.PAGESIZE)
        for s in segments:
            self.memory[s["p_vaddr"] : s["p_vaddr"] + s["p_filesz"]] = s.data()
        self.base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        symbols = elf.get_section_by_name(".dynsym")
        assert isinstance(symbols, SymbolTableSection)
        self.symbols = {s.name: s["st_value"] for s in symbols.iter_symbols()}


def _launch(
    emu: Any,
    image: _Image,
    instruction_set: str,
    kernel: Kernel,
    grid: Dim3,
    params: Sequence[npt.NDArray[Any] | int],
    offsets: Sequence[int],
) -> list[npt.NDArray[Any] | None]:
    """Does what the command processor does with a dispatch; gives the arrays as they are afterwards."""
    at = image.symbols[f"{kernel.name}.kd"]
    lds, scratch, kernarg, entry, _, rsrc1, rsrc2, properties, _ = _DESCRIPTOR.unpack_from(image.memory, at)
    if rsrc1 >> 16 & _KEPT_DENORMALS != _KEPT_DENORMALS:
        raise ValueError(f"{kernel.name} flushes subnormal numbers")
    places = [_place(value, offset) for value, offset in zip(params, offsets or [0] * len(params), strict=True)]
    # Hidden arguments are not filled in: no kernel of ours has a use for them.
    block = bytearray(b"\xa5" * max(kernarg, 8))
    end = 0
    for arg, value, place in zip(kernel.args, params, places, strict=True):
        size = SIZES[arg.kind]
        end = -(-end // size) * size
        number = place.ctypes.data if place is not None else int(value)
        block[end : end + size] = (number & (1 << 8 * size) - 1).to_bytes(size, "little")
        end += size
    arguments = np.frombuffer(bytes(block), np.uint8).copy()
    user = [
        word
        for bit, count in _USER_REGISTERS
        if properties & bit
        for word in (divmod(arguments.ctypes.data, 1 << 32)[::-1] if bit == _KERNEL_ARGUMENTS else [0] * count)
    ]
    units = -(-lds // 512)  # of shared memory; the command processor adds them, not the compiler
    rsrc2 = rsrc2 & ~(0x1FF << 15) | units << 15
    start = image.base + at + entry
    emu.run_asm(start, 0, *grid, *kernel.block, arguments.ctypes.data, rsrc2, scratch, instruction_set, user)
    return [
        p.view(v.dtype).reshape(v.shape).copy() if p is not None and isinstance(v, np.ndarray) else None
        for v, p in zip(params, places, strict=True)
    ]


def _place(value: npt.NDArray[Any] | int, offset: int) -> npt.NDArray[np.uint8] | None:
    """The bytes of an array, `offset` beyond a multiple of `ALIGNMENT`, in memory of its own."""
    if not isinstance(value, np.ndarray):
        return None
    memory = np.full(value.nbytes + ALIGNMENT + offset + 2 * GUARD, 0xA5, np.uint8)
    first = -(-(memory.ctypes.data + GUARD) // ALIGNMENT) * ALIGNMENT + offset - memory.ctypes.data
    place = memory[first : first + value.nbytes]
    place[...] = np.frombuffer(value.tobytes(), np.uint8)
    return place
