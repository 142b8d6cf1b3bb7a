"""How many waves of a kernel an AMD processor holds at a time: the more there are, the more latency is hidden.

Registers and shared memory are LLVM's (AMDGPUBaseInfo, 22): what a SIMD and a workgroup processor have, and in what
pieces they are given out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .kernel_info import KernelInfo

SIMDS = 4  # of a compute unit of GCN and CDNA, of a workgroup processor of RDNA
_FULL_REGISTERS = re.compile(r"gfx(1100|1101|1151|12\d\d|12-generic)$")  # RDNA 3 and 4 with half as many more


@dataclass(frozen=True)
class Simd:
    """Of a SIMD: vector registers of a lane and the pieces they come in, and the waves there may be; of the unit that
    has four of them: bytes of shared memory."""

    vgprs: int
    piece: int
    waves: int
    lds: int


def simd_of(target: str, wave: int) -> Simd:
    """Of an AMD target, for kernels of waves of 32 or 64 lanes."""
    name = target.partition(":")[0]
    if not name.startswith(("gfx10", "gfx11", "gfx12")):
        if name in ("gfx90a", "gfx942", "gfx950", "gfx9-4-generic"):
            return Simd(512, 8, 8, (160 if name == "gfx950" else 64) << 10)
        return Simd(256, 4, 10, 64 << 10)
    if _FULL_REGISTERS.match(name):
        vgprs, piece, waves = 1536, 24, 16
    elif name.startswith(("gfx103", "gfx10-3", "gfx11")):
        vgprs, piece, waves = 1024, 16, 16
    else:
        vgprs, piece, waves = 1024, 8, 20
    return Simd(vgprs, piece, waves, 128 << 10) if wave == 32 else Simd(vgprs // 2, piece // 2, waves, 128 << 10)


def occupancy(target: str, kernel: KernelInfo) -> float | None:
    """Waves of a kernel on each SIMD, where blocks have as many threads as they may; None if the object does not tell.

    Registers and shared memory count, and whole blocks: a block's waves are on the SIMDs of one unit.
    """
    if None in (kernel.vgprs, kernel.wave, kernel.max_workgroup, kernel.lds):
        return None
    assert kernel.vgprs is not None
    assert kernel.wave is not None
    assert kernel.max_workgroup is not None
    assert kernel.lds is not None
    simd = simd_of(target, kernel.wave)
    vgprs = -(-max(kernel.vgprs, 1) // simd.piece) * simd.piece
    waves = min(simd.vgprs // vgprs, simd.waves, _by_scalars(target, kernel.sgprs or 0))
    block = -(-kernel.max_workgroup // kernel.wave)
    blocks = waves * SIMDS // block
    if kernel.lds:
        blocks = min(blocks, simd.lds // kernel.lds)
    return blocks * block / SIMDS


def _by_scalars(target: str, sgprs: int) -> int:
    """Waves by scalar registers, of which GCN has 800 a SIMD; later ones have enough for all waves."""
    if target.startswith(("gfx10", "gfx11", "gfx12")):
        return 20
    return 10 if sgprs <= 80 else 9 if sgprs <= 88 else 8 if sgprs <= 100 else 7
