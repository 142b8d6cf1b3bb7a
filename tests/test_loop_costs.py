"""What the mat-vecs' inner loops cost on AMD: bounds on the machine code, and that the document tells them."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

import pytest

from hipquant.codeobjects import ENGINE, QUANTIZED
from hipquant.targets import AMD_TARGETS, gpu_target

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import loop_costs
import machine_code

CODE = """
f:
	s_load_dwordx4 s[4:7], s[0:1], 0x0
	v_mov_b32_e32 v9, 0x1010101
	s_cbranch_scc1 .LBB0_3
.LBB0_1:                                ; the loop
	global_load_dwordx4 v[0:3], v8, s[4:5] offset:16
	v_add_co_u32 v4, vcc_lo, s6, v8     ; an address computed from the second argument
	v_add_co_ci_u32_e32 v5, vcc_lo, 0, v10, vcc_lo
	global_load_dword v6, v[4:5], off
	s_cbranch_execz .LBB0_2
	global_load_ushort v7, v8, s[4:5]
.LBB0_2:
	v_dot4c_i32_i8_e32 v11, v0, v6
	v_dot4c_i32_i8_e32 v11, v1, v6
	v_dot4c_i32_i8_e32 v12, v9, v6
	v_dual_add_f32 v13, v13, v14 :: v_dual_mul_f32 v15, v15, v16
	ds_read_b32 v20, v21
	s_cbranch_scc0 .LBB0_1
.LBB0_3:
	ds_read_b32 v22, v21                    ; not once per weight
	s_cbranch_scc0 .LBB0_3
	s_endpgm
.Lfunc_end0:
"""


def test_how_it_is_counted() -> None:
    """By hand: two dots of 8 weights and one of ones, three other instructions; four loads, one of shared memory."""
    body = dict(machine_code.functions(CODE))["f"]
    (loop,) = loop_costs.hot_loops(body)
    assert len(loop.instructions) == 12
    assert sorted(loop.loads) == [(0, 2), (0, 16), (1, 4)]
    assert loop_costs.cost(body) == loop_costs.Cost(32 * 6 / 8, 32 * 4 / 8, 32 * 6 / 12, weights=8)
    assert loop_costs.wide_share(body) == 16 / 18


def test_where_it_is_not_told_what_is_loaded_from() -> None:
    """Loads of any pointer count, and loops that only load are none of those that multiply."""
    body = dict(machine_code.functions(CODE))["f"]
    other = tuple(
        line.replace("v6, v[4:5], off", "v6, v[20:21], off").replace(
            "ds_read_b32 v22, v21", "flat_load_dword v22, v[30:31]"
        )
        for line in body
    )
    assert other != body
    assert loop_costs.cost(other, pointers=0) == loop_costs.cost(body)


def test_what_cannot_be_counted_is_told() -> None:
    body = dict(machine_code.functions(CODE))["f"]
    with pytest.raises(ValueError, match="which pointer does 'global_load_dword v6, v.20:21., off' go through"):
        loop_costs.hot_loops(tuple(line.replace("v6, v[4:5]", "v6, v[20:21]") for line in body))
    with pytest.raises(ValueError, match="2 loops run once per weight; expected one"):
        loop_costs.cost(
            tuple(line.replace("ds_read_b32 v22, v21", "global_load_dword v0, v8, s[4:5]") for line in body)
        )


def built(*names: str) -> None:
    if missing := [n for n in names if n not in QUANTIZED.targets() or n not in ENGINE.targets()]:
        pytest.skip(f"{' '.join(missing)} not built: HIPQUANT_TARGETS")


@pytest.mark.parametrize("of", [loop_costs.FRAMEWORKS, loop_costs.ENGINE], ids=lambda of: of.family)
@pytest.mark.parametrize("target", loop_costs.LLAMA_CPP)
def test_beside_llama_cpp(target: str, of: loop_costs.MatVecs) -> None:
    built(target)
    instructions, loads = loop_costs.ratios(of, target)
    assert max(*instructions, *loads) <= 1
    assert statistics.mean(instructions) <= of.most_instructions
    assert statistics.mean(loads) <= of.most_loads


@pytest.mark.parametrize("target", loop_costs.LLAMA_CPP)
def test_a_turn_of_the_engines_takes_64_weights_of_four_rows(target: str) -> None:
    """Counted from the dot products, so that none is of anything else, and the loop is not unrolled."""
    built(target)
    assert {c.weights for c in loop_costs.costs(loop_costs.ENGINE, target).values()} == {4 * 64}


@pytest.mark.parametrize("target", ["gfx900", "gfx1030", "gfx1100", "gfx942"])
def test_weights_come_by_wide_loads(target: str) -> None:
    built(target)
    found = loop_costs.shares(gpu_target(target))
    assert {t: share for t, share in found.items() if share < loop_costs.LEAST_WIDE} == {}


def test_the_document() -> None:
    built(*(t.name for t in AMD_TARGETS))
    assert loop_costs.DOCUMENT.read_text() == loop_costs.document()


def test_the_readme() -> None:
    built(*loop_costs.LLAMA_CPP)
    text = loop_costs.README.read_text()
    assert text == loop_costs.with_section(text)
