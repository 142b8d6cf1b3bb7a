"""The cases hold kernels against the oracle: the CPU passes all of them, and each known mistake is reported by name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from hipquant import wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.driver import Device
from hipquant.toolchain.cases import Backend, Case, cases, complaints
from hipquant.toolchain.judge import POISON

CASED = [k for k in wiring.TABLE if k in wiring.COMPATIBILITY or k.family == "get_rows"]
FAMILIES = sorted({k.family for k in CASED})


@pytest.fixture(scope="session")
def backend(cpu: Device) -> Backend:
    def run(case: Case) -> None:
        function = cpu.get_or_load_func(case.kernel.name, QUANTIZED)
        function.launch(case.grid, case.kernel.block, 0, cpu.stream, case.params)

    return run


def output(case: Case) -> np.ndarray:
    found = case.params[case.output]
    assert isinstance(found, np.ndarray)
    return found


def bits(case: Case) -> np.ndarray:
    """The output as whole numbers of its element size."""
    found = output(case)
    return found.view(POISON[found.dtype.itemsize].dtype)


def dst_shape(case: Case) -> tuple[int, int, int]:
    """Columns, rows and rows of dst."""
    numbers = dict(zip((a.name for a in case.kernel.args), case.params, strict=True))
    rows = int(numbers.get("nrows_x", numbers.get("nrows", 0)))
    return int(numbers.get("ncols_y", case.kernel.batch or 1)), rows, int(numbers.get("nrows_dst", rows))


def found_in(name: str, backend: Backend, damage: Callable[[Case], None]) -> list[str]:
    """The complaints about a kernel whose outputs are damaged after it ran."""

    def broken(case: Case) -> None:
        backend(case)
        damage(case)

    return [c for case in cases(wiring.kernel(name)) for c in complaints(case, broken)]


def test_there_are_cases_for_136_names() -> None:
    assert len(CASED) == 136
    with pytest.raises(ValueError, match="no cases for silu_mul_f32"):
        next(cases(wiring.kernel("silu_mul_f32")))


@pytest.mark.parametrize("kernel", CASED, ids=lambda k: k.name)
def test_the_cpu_passes(kernel: wiring.Kernel, backend: Backend) -> None:
    tried = list(cases(kernel))
    assert len(tried) >= 2
    for case in tried:
        assert case.check(), "a poisoned output must not pass"
        assert complaints(case, backend) == []


@pytest.mark.parametrize(
    "name",
    ["dequantize_block_q5_1_f16", "dequantize_mul_mat_vec_q3_k", "mul_mat_vec_q4_1_q8_1_hip5", "mul_mat_q6_K"],
)
def test_the_cpu_passes_thoroughly(name: str, backend: Backend) -> None:
    for case in cases(wiring.kernel(name), thorough=True):
        assert complaints(case, backend) == []


def test_the_cuda_profile_has_the_same_cases() -> None:
    kernel = next(k for k in wiring.profile("cuda") if k.name == "mul_mat_vec_q4_0_q8_1_cuda2")
    assert str(next(cases(kernel))).startswith("mul_mat_vec_q4_0_q8_1_cuda2, 5 x 160")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_kernel_that_does_nothing(family: str) -> None:
    kernel = next(k for k in CASED if k.family == family)
    for case in cases(kernel):
        assert any("not written" in c for c in complaints(case, lambda _: None))


def test_mistake_4_a_tile_that_differs(backend: Backend) -> None:
    """The device's tile has half of the rows that the host's grid counts with."""

    def damage(case: Case) -> None:
        columns, rows, stride = dst_shape(case)
        dst = bits(case)[: columns * stride].reshape(columns, stride)
        dst[:, -(-rows // 128) * 64 : rows] = POISON[4]

    found = found_in("mul_mat_q4_0", backend, damage)
    assert "rows 128 to 130 (3 of 131) not written" in found[0]
    assert "tile another than the table's 64 columns x 128 rows" in found[0]


@pytest.mark.parametrize("batch", range(2, 9))
def test_mistake_5_half_of_the_rows(batch: int, backend: Backend) -> None:
    def damage(case: Case) -> None:
        columns, rows, stride = dst_shape(case)
        bits(case)[: columns * stride].reshape(columns, stride)[:, -(-rows // 2) : rows] = POISON[4]

    found = found_in(f"mul_mat_vec_q4_K_q8_1_hip{batch}", backend, damage)
    assert len(found) == 2
    assert all("half of the rows: row" in c for c in found)


def test_mistake_6_past_the_last_row(backend: Backend) -> None:
    def damage(case: Case) -> None:
        columns, rows, stride = dst_shape(case)
        output(case)[np.arange(columns) * stride + rows] = 1

    found = found_in("mul_mat_vec_q8_0_q8_1_hip3", backend, damage)
    assert sum("wrote past the last row" in c for c in found) == 2


def test_mistake_7_lanes_that_do_not_exist(backend: Backend) -> None:
    """A sum over 64 lanes of which 32 are another's adds what is not its own."""

    def damage(case: Case) -> None:
        _, rows, _ = dst_shape(case)
        output(case)[:rows] *= 2

    found = found_in("dequantize_mul_mat_vec_q5_0_hip", backend, damage)
    assert len(found) == 2
    assert all("differs from the oracle: NMSE 1 " in c and "first in row 0, column 0" in c for c in found)


def test_a_single_wrong_result_among_many(backend: Backend) -> None:
    def damage(case: Case) -> None:
        columns, rows, stride = dst_shape(case)
        output(case)[(columns - 1) * stride + rows - 1] *= 1.5

    found = found_in("mul_mat_q5_K", backend, damage)
    assert [("1 of" in c, "differs from the oracle" in c) for c in found] == [(True, True)] * 2


def test_padding_that_is_read_gives_nan(backend: Backend) -> None:
    def damage(case: Case) -> None:
        output(case)[0] = np.nan

    assert all("padding or memory that was not written is read" in c for c in found_in("mul_mat_q2_K", backend, damage))


@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("dequantize_block_q4_0_f32", 40, "first in block 1, element 8: found"),
        ("dequantize_block_q6_K_f16", 600, "first in block 2, element 88: found"),
        ("get_rows_bf16", 334, "first in row 1, element 1: found"),
    ],
)
def test_one_bit(name: str, at: int, message: str, backend: Backend) -> None:
    def damage(case: Case) -> None:
        if output(case).size > 512 + at:
            bits(case)[at] ^= 1

    assert message in found_in(name, backend, damage)[0]


@pytest.mark.parametrize("name", ["dequantize_block_q5_0_f32", "get_rows_q3_K", "quantize_q8_1"])
def test_writing_behind_the_output(name: str, backend: Backend) -> None:
    def damage(case: Case) -> None:
        bits(case)[-512] = 0

    assert all("wrote past the last" in c and "the first is 0 beyond" in c for c in found_in(name, backend, damage))


@pytest.mark.parametrize(("at", "what"), [(0, "d is wrong"), (2, "s is wrong"), (7, "q is wrong")])
def test_a_wrong_q8_1_block(at: int, what: str, backend: Backend) -> None:
    def damage(case: Case) -> None:
        block = output(case)[36 * 2 : 36 * 3]
        block[at] ^= 0x04

    assert any(what in c and "block 2" in c for c in found_in("quantize_q8_1", backend, damage))


def test_padding_of_q8_1_must_be_zero(backend: Backend) -> None:
    def damage(case: Case) -> None:
        output(case)[-512 - 1] = 1

    assert any("beyond k are not zero" in c for c in found_in("quantize_q8_1", backend, damage))
