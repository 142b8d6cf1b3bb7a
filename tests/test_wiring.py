"""The two tables: what design and frameworks rely on, spelled out independently of how the tables are written."""

from __future__ import annotations

import re
import subprocess

import gguf
import numpy as np
import pytest

import hipquant as hq
from hipquant import quants, wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.errors import KernelNotFoundError, UnsupportedQuantTypeError

Q32, QK = "q4_0 q4_1 q5_0 q5_1 q8_0".split(), "q2_K q3_K q4_K q5_K q6_K".split()


def test_the_123_names() -> None:
    names = {"quantize_q8_1"}
    names |= {f"dequantize_block_{t}_{o}" for t in (*Q32, *QK, "q8_K") for o in ("f32", "f16")}
    names |= {f"dequantize_mul_mat_vec_{t}_hip" for t in Q32}
    names |= {f"dequantize_mul_mat_vec_{t.lower()}" for t in QK}
    names |= {f"mul_mat_vec_{t}_q8_1_hip{b}" for t in (*Q32, *QK) for b in range(1, 9)}
    names |= {f"mul_mat_{t}" for t in (*Q32, *QK)}
    assert len(names) == 123
    assert names <= {k.name for k in wiring.COMPATIBILITY}, "a new type may add names, none may go"


def test_get_rows_names() -> None:
    found = {k.name for k in wiring.TABLE if k.family == "get_rows"}
    assert found >= {f"get_rows_{t}" for t in (*Q32, *QK, "f32", "f16", "bf16")}


def test_cuda_profile_renames_the_vendor_only() -> None:
    names = {k.name for k in wiring.profile("cuda")}
    assert {"mul_mat_vec_q4_0_q8_1_cuda1", "mul_mat_vec_q6_K_q8_1_cuda8", "dequantize_mul_mat_vec_q8_0_cuda"} <= names
    assert {"dequantize_mul_mat_vec_q4_k", "mul_mat_q4_K", "quantize_q8_1"} <= names
    assert not any("hip" in n for n in names)
    assert len(names) == len(wiring.profile("hip"))
    with pytest.raises(ValueError, match="unknown name profile 'vulkan'"):
        wiring.profile("vulkan")


@pytest.mark.parametrize(
    ("name", "sizes", "grid", "block"),
    [
        ("quantize_q8_1", {"k": 100, "rows": 7}, (2, 7, 1), (256, 1, 1)),
        ("dequantize_block_q4_0_f32", {"elements": 257}, (2, 1, 1), (32, 1, 1)),
        ("dequantize_block_q5_1_f16", {"elements": 513}, (2, 1, 1), (256, 1, 1)),
        ("dequantize_block_q6_K_f32", {"elements": 512}, (2, 1, 1), (64, 1, 1)),
        ("dequantize_block_q4_K_f32", {"elements": 512}, (2, 1, 1), (32, 1, 1)),
        ("dequantize_mul_mat_vec_q3_k", {"nrows": 5}, (5, 1, 1), (32, 1, 1)),
        ("mul_mat_vec_q4_0_q8_1_hip1", {"nrows": 5}, (5, 1, 1), (32, 4, 1)),
        ("mul_mat_vec_q4_0_q8_1_hip4", {"nrows": 5}, (3, 1, 1), (32, 4, 1)),
        ("mul_mat_vec_q4_0_q8_1_hip5", {"nrows": 5}, (3, 1, 1), (32, 2, 1)),
        ("mul_mat_q4_0", {"nrows": 129, "ncols": 65}, (2, 2, 1), (32, 4, 1)),
        ("mul_mat_q5_0", {"nrows": 129, "ncols": 129}, (3, 2, 1), (32, 4, 1)),
        ("mul_mat_q3_K", {"nrows": 129, "ncols": 129}, (2, 2, 1), (32, 4, 1)),
        ("mul_mat_q6_K", {"nrows": 129, "ncols": 129}, (3, 3, 1), (32, 4, 1)),
        ("get_rows_f32", {"nids": 3, "k": 300}, (3, 2, 1), (256, 1, 1)),
        ("get_rows_q8_0", {"nids": 3, "k": 544}, (3, 2, 1), (256, 1, 1)),
        ("get_rows_q4_K", {"nids": 3, "k": 512}, (3, 2, 1), (32, 1, 1)),
        ("get_rows_q6_K", {"nids": 3, "k": 1 << 26}, (3, 65535, 1), (64, 1, 1)),
    ],
)
def test_geometry(name: str, sizes: dict[str, int], grid: wiring.Dim3, block: wiring.Dim3) -> None:
    kernel = wiring.kernel(name)
    assert kernel.grid(**sizes) == grid
    assert kernel.block == block


def test_signatures() -> None:
    assert wiring.kernel("mul_mat_vec_q2_K_q8_1_hip3").signature == (
        "void mul_mat_vec_q2_K_q8_1_hip3(const void* x, const void* y, float* dst, int ncols_x, int nrows_x, "
        "int nrows_y, int nrows_dst)"
    )
    assert wiring.kernel("dequantize_block_q4_1_f16").signature.endswith("(const void* x, uint16_t* y, int nb32)")
    assert wiring.kernel("dequantize_block_q5_0_f32").signature.endswith("(const void* x, float* y, int k)")
    assert wiring.kernel("dequantize_block_q8_K_f32").signature.endswith("(const void* x, float* y)")


@pytest.mark.parametrize("kind", quants.QUANT_TYPES, ids=str)
def test_layouts_are_ggmls(kind: quants.QuantType) -> None:
    theirs = gguf.GGMLQuantizationType(kind.ggml_id)
    assert theirs.name == kind.name
    if kind.name != "Q8_1":  # the gguf package counts ggml's former layout, with float scales
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block_size, kind.block_bytes)


def test_quant_type_by_name_and_id() -> None:
    assert quants.quant_type("q4_k") is quants.quant_type(12) is quants.BY_NAME["Q4_K"]
    with pytest.raises(UnsupportedQuantTypeError, match="'IQ2_XS'.*supported: Q4_0"):
        quants.quant_type("IQ2_XS")
    with pytest.raises(ValueError, match="multiple of 256"):
        quants.BY_NAME["Q6_K"].row_bytes(300)


@pytest.mark.parametrize("kernel", wiring.CPU_KERNELS, ids=lambda k: k.name)
def test_the_code_object_exports_every_name(kernel: wiring.Kernel, cpu: hq.driver.Device) -> None:
    function = cpu.get_or_load_func(kernel.name, QUANTIZED)
    assert function.address
    assert function.args == kernel.args
    assert cpu.get_or_load_func(kernel.name, QUANTIZED) is function


def test_every_target_exports_the_same_names() -> None:
    """Read from the files themselves, so that objects of other machines count too."""
    for path in QUANTIZED.files():
        if path.name.startswith("cpu-"):
            listed = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
            names = set(re.findall(r" T (\w+)", listed.stdout))
            assert names == {k.name for k in wiring.CPU_KERNELS} | {"hq_probe"}, path.name


def test_a_missing_kernel_names_the_nearest(cpu: hq.driver.Device) -> None:
    with pytest.raises(KernelNotFoundError, match="mul_mat_vec_q4_0_q8_1_hip9.*nearest.*mul_mat_vec_q4_0_q8_1_hip"):
        cpu.get_or_load_func("mul_mat_vec_q4_0_q8_1_hip9", QUANTIZED)
    with pytest.raises(KernelNotFoundError, match="nearest: mul_mat_q4_0"):
        wiring.kernel("mul_mat_q40")


def test_padding() -> None:
    assert [quants.padded(k) for k in (1, 512, 513)] == [512, 512, 1024]
    assert np.prod(quants.BY_NAME["Q8_1"].row_bytes(quants.padded(33))) == 512 // 32 * 36
