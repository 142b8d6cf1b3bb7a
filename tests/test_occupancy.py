"""Waves that a SIMD holds: as LLVM 22 says of kernels, and the document of the engine's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import occupancy as document
from hipquant.codeobjects import ENGINE
from hipquant.toolchain.kernel_info import KernelInfo
from hipquant.toolchain.occupancy import occupancy


def kernel(wave: int, vgprs: int | None, sgprs: int, lds: int, block: int) -> KernelInfo:
    return KernelInfo("k", wave=wave, vgprs=vgprs, sgprs=sgprs, lds=lds, max_workgroup=block)


@pytest.mark.parametrize(
    ("target", "about", "waves"),
    [
        ("gfx900", (64, 32, 48, 0, 128), 8),
        ("gfx900", (64, 20, 34, 1104, 256), 10),
        ("gfx90a", (64, 34, 44, 0, 128), 8),
        ("gfx90a", (64, 158, 93, 8452, 128), 3),
        ("gfx90a:xnack+", (64, 158, 93, 8452, 128), 3),
        ("gfx1010", (32, 16, 28, 1104, 256), 20),
        ("gfx1010", (32, 43, 66, 33872, 256), 6),
        ("gfx1030", (32, 37, 33, 256, 1024), 16),
        ("gfx1100", (32, 46, 30, 256, 1024), 16),
        ("gfx1100", (32, 44, 66, 33872, 256), 6),
        ("gfx1102", (32, 31, 32, 0, 128), 16),
    ],
)
def test_as_the_compiler_says(target: str, about: tuple[int, int, int, int, int], waves: int) -> None:
    """Of kernels of the engine, what LLVM notes behind their code."""
    assert occupancy(target, kernel(*about)) == waves


@pytest.mark.parametrize(
    ("target", "about", "waves"),
    [
        ("gfx1100", (32, 96, 30, 0, 32), 16),  # as many registers as 16 waves leave each
        ("gfx1100", (32, 97, 30, 0, 32), 12),
        ("gfx1102", (32, 97, 30, 0, 32), 9),  # a third less
        ("gfx1100", (64, 97, 30, 0, 64), 7),  # twice as wide
        ("gfx90a", (64, 100, 99, 8452, 128), 3.5),  # 7 blocks of 2 waves, by their shared memory
        ("gfx900", (64, 37, 50, 256, 1024), 4),  # registers for 6 waves, but blocks have 4 on a SIMD
        ("gfx900", (64, 24, 102, 0, 256), 7),  # by scalars
        ("gfx950", (64, 34, 44, 40 << 10, 256), 4),
        ("gfx90a", (64, 34, 44, 40 << 10, 256), 1),
        ("gfx1100", (32, None, 44, 0, 256), None),
    ],
)
def test_limits(target: str, about: tuple[int, int, int, int, int], waves: float | None) -> None:
    """Registers in pieces, shared memory, and whole blocks, which LLVM does not count."""
    assert occupancy(target, kernel(*about)) == waves


def test_the_document_is_of_these_code_objects() -> None:
    if not set(document.TARGETS) <= set(ENGINE.targets()):
        pytest.skip("not all of its targets are built: HIPQUANT_TARGETS")
    assert document.DOCUMENT.read_text() == document.document()
