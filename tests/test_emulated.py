"""The machine code itself, executed: every kernel of four AMD targets on a public emulator, against the oracle.

Optional: it takes a checkout of tinygrad, named by AMD_EMULATOR, and clang. `tools/verification.py emulate` runs the
same, and leaves a record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

import emulator
from emulator import EmulationError, Emulator
from hipquant.codeobjects import QUANTIZED
from hipquant.toolchain.cases import cases, complaints
from hipquant.wiring import Kernel, kernel

if why := emulator.missing():
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(scope="session")
def emulators() -> Iterator[Callable[[str], Emulator]]:
    """One for each target, as what it has translated serves later kernels."""
    started: dict[str, Emulator] = {}

    def get(target: str) -> Emulator:
        path = QUANTIZED.targets().get(target)
        if path is None:
            pytest.skip(f"{target} is not built: HIPQUANT_TARGETS")
        return started.setdefault(target, Emulator(path.read_bytes(), target))

    yield get
    for one in started.values():
        one.close()


@pytest.mark.parametrize("target", emulator.TARGETS)
@pytest.mark.parametrize("row", emulator.KERNELS, ids=lambda k: k.name)
def test_every_kernel(row: Kernel, target: str, emulators: Callable[[str], Emulator]) -> None:
    for case in cases(row):
        assert complaints(case, emulators(target)) == []


def test_what_is_wrong_is_seen(emulators: Callable[[str], Emulator]) -> None:
    """A weight that is another, and a read of memory that is not there, which ends the child: the next case has a new
    one."""
    one = emulators("gfx1100")
    x, ncols = 0, 3
    case = next(cases(kernel("mul_mat_vec_q4_0_q8_1_hip1")))
    weights = case.params[x]
    assert isinstance(weights, np.ndarray)
    weights[5] ^= 0xFF
    assert "1 of 5 results wrong, first in row 0" in complaints(case, one)[0]
    case.params[ncols] = 2**31 - 32
    with pytest.raises(EmulationError, match="mul_mat_vec_q4_0_q8_1_hip1, .*, emulated as gfx1100: it ended with code"):
        one(case)
    assert complaints(next(cases(kernel("get_rows_f32"))), one) == []
