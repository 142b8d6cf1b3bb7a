"""The embedded code objects of the GPU engine: every kernel of the table, as it is launched, on every target."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hipquant.codeobjects import ENGINE, QUANTIZED
from hipquant.driver import Device
from hipquant.errors import KernelNotFoundError
from hipquant.quants import WEIGHT_TYPES
from hipquant.targets import GPU_TARGETS, NVIDIA_TARGETS, GpuTarget, gpu_target
from hipquant.toolchain.compile import FACTS, build_objects
from hipquant.toolchain.disassemble import objdump
from hipquant.toolchain.facts import ptx_facts
from hipquant.toolchain.gpu import engine_objects
from hipquant.toolchain.inspect import inspect
from hipquant.toolchain.verify import SIZES, check, is_engine, summary
from hipquant.wiring import CACHE_TYPES, COMPATIBILITY, GPU_ENGINE, Kind, attention

LDS = 48 << 10  # bytes that every GPU gives a block
NAMES = {k.name for k in GPU_ENGINE}
PTXAS = shutil.which("ptxas")


def built(target: GpuTarget) -> Path:
    path = ENGINE.targets().get(target.name)
    if path is None:
        pytest.skip(f"{target.name} is not built: HIPQUANT_TARGETS")
    return path


def test_the_engine_has_names_of_its_own() -> None:
    assert {"add_rms_norm_q8", "rope_store_kv_f16", "mul_mat_vec_planes_bf16_8", "mul_mat_vec_norm_q4_0_1"} <= NAMES
    assert not NAMES & {k.name for k in COMPATIBILITY}
    assert not {p.name for p in ENGINE.files()} & {p.name for p in QUANTIZED.files()}


def test_the_cpu_has_one_object_for_both(cpu: Device) -> None:
    assert cpu.get_or_load_func("add_rms_norm_f32", ENGINE).name == "add_rms_norm_f32"
    with pytest.raises(KernelNotFoundError, match="no kernel 'add_rms_norm_q8' .*nearest: .*add_rms_norm_f32"):
        cpu.get_or_load_func("add_rms_norm_q8", ENGINE)


CDNA = ("gfx908", "gfx90a", "gfx942", "gfx950", "gfx9-4-generic")


def may_spill_sgprs(target: GpuTarget, name: str) -> bool:
    """Attention holds more scalars across its loop than CDNA has SGPRs for, where a mask of a wave takes two. The
    compiler keeps some in lanes of VGPRs, from which one instruction brings them back: that takes no memory."""
    return name.startswith(("attention_decode_", "attention_prefill_")) and target.name in CDNA


@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda t: t.name)
def test_every_kernel_on_every_target(target: GpuTarget) -> None:
    """Names, arguments, wave and limits are the table's; no spills to memory; facts of the very bytes."""
    path = built(target)
    found = inspect(path.read_bytes(), path.name, instructions=True)
    assert is_engine(found)
    told = [f for f in check(found) if not (f.message.startswith("spills ") and may_spill_sgprs(target, f.kernel))]
    assert told == []
    assert summary(found) == f"{len(NAMES)} of {len(NAMES)} names in 1 target"
    (kernels,) = found.targets.values()
    assert list(found.targets) == [target.name]
    assert sorted(k.name for k in kernels) == sorted(NAMES)
    by_name = {k.name: k for k in kernels}
    for row in GPU_ENGINE:
        kernel = by_name[row.name]
        assert kernel.args is not None
        assert [a.size for a in kernel.args] == [SIZES[a.kind] for a in row.args], row.name
        if target.vendor == "amd":
            assert [a.kind == "pointer" for a in kernel.args] == [a.kind is Kind.POINTER for a in row.args], row.name
            assert (kernel.scratch, kernel.vgpr_spills) == (0, 0), row.name
            assert kernel.sgpr_spills == 0 or may_spill_sgprs(target, row.name), row.name
        assert kernel.wave == target.wave, row.name
        assert kernel.max_workgroup == math.prod(row.block), row.name
        assert kernel.lds is not None
        assert kernel.lds <= LDS, row.name
        assert kernel.loadable
        assert kernel.facts is not None
        assert kernel.facts.instructions > 0
    facts = json.loads((ENGINE.folder / FACTS).read_text())[path.stem]
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(facts["kernels"]) == NAMES


def has_matrix_units(target: GpuTarget) -> bool:
    """Whether it multiplies matrices of halves."""
    return target.vendor == "nvidia" or target.name.startswith(("gfx11", "gfx12")) or target.name in CDNA


@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda t: t.name)
def test_instructions_that_a_target_has(target: GpuTarget) -> None:
    """Attention of long passes multiplies matrices, products of quantized weights take int8 dot products."""
    facts = json.loads((ENGINE.folder / FACTS).read_text())[built(target).stem]["kernels"]
    for cache_type, head_dim in itertools.product(CACHE_TYPES, (64, 96, 128)):
        name = attention("prefill", cache_type, head_dim)
        assert bool(facts[name]["matrix"]) == has_matrix_units(target), name
    for row in GPU_ENGINE:
        if row.family in ("mul_mat_vec_planes", "mul_mat_vec_norm", "mul_mat_vec_gate"):
            # On NVIDIA, matrix units multiply 4 columns and more.
            unused, used = ("dot4", "matrix") if target.vendor == "nvidia" and row.batch > 2 else ("matrix", "dot4")
            assert bool(facts[row.name][used]) == (target.dot4 and row.type in WEIGHT_TYPES), row.name
            assert facts[row.name][unused] == 0, row.name
        if row.family in ("mul_mat_planes", "mul_mat_planes_experts"):
            assert bool(facts[row.name]["dot4"] + facts[row.name]["matrix"]) == target.dot4, row.name


def test_wgmma_is_a_matrix_instruction() -> None:
    """Those of one piece of inline assembly are statements in braces, on one line; a predicate may have any name."""
    (facts,) = ptx_facts(
        ".visible .entry f(\n)\n{\n$L__BB0_1:\n\t// begin inline asm\n"
        "\t{ .reg .pred q; setp.ne.u32 q, %r1, 0; wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.m64n8k16"
        ".f32.f16.f16 {%r1, %r2}, {%r3}, %rd1, q, 1, 1, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16"
        " {%r1, %r2}, {%r3}, %rd2, q, 1, 1, 0; wgmma.commit_group.sync.aligned; @q ld.global.nc.u32 %r4, [%rd3]; }\n"
        "\t// end inline asm\n\twgmma.wait_group.sync.aligned 0;\n\t@%p1 bra \t$L__BB0_1;\n\tret;\n}\n"
    ).values()
    loop = {"instructions": 8, "dot4": 0, "matrix": 2, "lds": 0, "loads": {"4": 1}}
    assert facts == {"instructions": 9, "dot4": 0, "matrix": 2, "loads": 1, "widest_load": 4, "loop": loop}


@pytest.mark.skipif(objdump() is None, reason="llvm-objdump, which lists machine code, is not installed")
@pytest.mark.parametrize("name", ["gfx900", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1201"])
def test_memory_is_known_to_be_global(name: str) -> None:
    """Where the compiler does not know it, an access (flat_load) is counted with those of shared memory, and what
    needs the first of several loads waits for all of them."""
    command = [str(objdump()), "-d", "--no-show-raw-insn", str(built(gpu_target(name)))]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"\tglobal_load_", listing)
    found: dict[str, int] = {}
    for function in re.split(r"^[0-9a-f]{16} <", listing, flags=re.MULTILINE)[1:]:
        if flat := len(re.findall(r"^\tflat_", function, re.MULTILINE)):
            found[function.partition(">")[0]] = flat
    assert not found


@pytest.mark.parametrize("name", ["gfx90c", "gfx9-4-generic", "gfx12-generic"])
def test_twins_have_the_same_machine_code(name: str, tmp_path: Path) -> None:
    """Compiled for itself, a target gives the bytes that were made of its twin's assembly."""
    target = gpu_target(name)
    path = built(target)
    (real,) = build_objects(engine_objects([dataclasses.replace(target, twin="")]), tmp_path)
    assert real.read_bytes() == path.read_bytes()


# Products of many columns spill a few registers, so that two blocks fit on a multiprocessor: with one they are slower.
STACK = 160  # bytes of a thread


@pytest.mark.skipif(PTXAS is None, reason="ptxas, which tells the registers and spills of PTX, is not installed")
@pytest.mark.parametrize("target", NVIDIA_TARGETS, ids=lambda t: t.name)
def test_the_ptx_needs_little_stack(target: GpuTarget, tmp_path: Path) -> None:
    """A word at most but for products and sampling, and little on the GPU that they are tuned for."""
    path, cubin = built(target), tmp_path / "engine.cubin"
    command = [str(PTXAS), f"-arch={target.name}", "-v", str(path), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = re.findall(r"entry function '(\w+)'.*?(\d+) bytes stack frame", done.stderr, re.DOTALL)
    assert {name for name, _ in told} == NAMES
    stacks = {name: int(nbytes) for name, nbytes in told if int(nbytes)}
    assert all(name.startswith(("mul_mat_", "sample_")) or nbytes <= 8 for name, nbytes in stacks.items()), stacks
    if target.name == "sm_90a":
        assert max(stacks.values(), default=0) <= STACK, stacks
