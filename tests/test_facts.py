"""Facts of kernels, counted in assembly."""

from __future__ import annotations

from hipquant.toolchain.facts import amd_facts, ptx_facts


def test_facts_of_amd_assembly() -> None:
    (facts,) = amd_facts(
        "f:                ; @f\n\tglobal_load_b32 v0, v1, s[0:1]\n.LBB0_1:\n\tglobal_load_dwordx4 v[0:3], v1, s[0:1]\n"
        "\tbuffer_load_d16_u8 v1, v2, s[0:3], 0\n\tds_load_b64 v[0:1], v2\n\tds_bpermute_b32 v1, v2, v3\n"
        "\tv_dot4_i32_iu8 v1, v2, v3, v1 neg_lo:[1,1,0]\n\tv_dual_dot4c_i32 v1, v2 :: v_dual_mov_b32 v3, v4\n"
        "\ts_cbranch_scc0 .LBB0_1\n\tv_wmma_i32_16x16x16_iu8 v[0:7], v[0:1], v[2:3], v[0:7]\n\ts_endpgm\n"
        ".Lfunc_end0:\n\t.amdhsa_kernel f\ng:\n\ts_endpgm\n.Lfunc_end1:\n"
    ).items()
    assert facts == (
        "f",
        {
            "instructions": 10,
            "dot4": 2,
            "matrix": 1,
            "loads": 3,
            "widest_load": 16,
            "loop": {"instructions": 7, "dot4": 2, "matrix": 0, "lds": 1, "loads": {"1": 1, "16": 1}},
        },
    )


def test_facts_of_ptx() -> None:
    (facts,) = ptx_facts(
        ".visible .entry f(\n\t.param .u64 f_param_0\n)\n.maxntid 32\n{\n\t.reg .b32 \t%r<9>;\n$L__BB0_1:\n"
        "\t// begin inline asm\n\tld.global.nc.v2.u32 {%r1, %r2}, [%rd1];\n\t// end inline asm\n"
        "\tld.global.L1::no_allocate.b16 \t%rs1, [%rd1];\n\tld.shared.u32 \t%r1, [%r2];\n\tld.param.u64 \t%rd1, [p];\n"
        "\tdp4a.s32.s32 %r1, %r2, %r3, %r1;\n\t@%p1 bra \t$L__BB0_1;\n"
        "\tmma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%r1, %r2}, {%r3}, {%r4}, {%r1, %r2};\n\tret;\n}\n"
    ).items()
    assert facts == (
        "f",
        {
            "instructions": 8,
            "dot4": 1,
            "matrix": 1,
            "loads": 2,
            "widest_load": 8,
            "loop": {"instructions": 6, "dot4": 1, "matrix": 0, "lds": 1, "loads": {"2": 1, "8": 1}},
        },
    )
