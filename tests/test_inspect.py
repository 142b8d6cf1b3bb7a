"""inspect: what every kind of code object tells, agreement with other tools, and the command."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest

import command_line
from code_objects import (
    assembled,
    compressed,
    cubin,
    host_object,
    one,
    right,
    right_amd,
    two_kernels,
)
from hipquant.codeobjects import QUANTIZED, CodeObjects
from hipquant.codeobjects.bundle import pack
from hipquant.targets import AMD_TARGETS
from hipquant.toolchain import disassemble, zig
from hipquant.toolchain import inspect as module
from hipquant.toolchain.facts import amd_instruction
from hipquant.toolchain.inspect import inspect, inspect_installed
from hipquant.wiring import COMPATIBILITY, CPU_KERNELS

call = partial(command_line.call, "inspect")


NAMES = {k.name for k in COMPATIBILITY}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inspect")


@pytest.fixture
def small() -> dict[str, bytes]:
    return two_kernels()


@pytest.mark.parametrize("target", ["gfx1100", "gfx90a", "gfx11-generic"])
def test_amd(target: str, small: dict[str, bytes]) -> None:
    found = inspect(small[target])
    assert (found.kind, list(found.targets), found.problems) == ("AMD code object", [target], [])
    kernel = one(found, "scale")
    assert kernel.args is not None
    shapes = [(a.offset, a.size, a.kind) for a in kernel.args]
    assert shapes == [(0, 8, "pointer"), (8, 8, "pointer"), (16, 8, "value"), (24, 4, "value"), (28, 1, "value")]
    assert (kernel.lds, kernel.scratch, kernel.vgpr_spills, kernel.max_workgroup) == (384, 0, 0, 64)
    assert kernel.wave == (64 if target == "gfx90a" else 32)
    assert kernel.vgprs
    assert kernel.sgprs
    assert kernel.loadable
    assert kernel.facts is None


READELF = next((r for r in ("llvm-readelf", *(f"llvm-readelf-{n}" for n in range(23, 14, -1))) if shutil.which(r)), "")


@pytest.mark.skipif(not READELF, reason="llvm-readelf is not installed")
def test_numbers_are_those_of_llvms_tool(small: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "o").write_bytes(small["gfx90a"])
    told = subprocess.run([READELF, "--notes", tmp_path / "o"], capture_output=True, text=True, check=True).stdout
    kernels = inspect(small["gfx90a"]).targets["gfx90a"]
    for key, values in {
        "vgpr_count": [k.vgprs for k in kernels],
        "agpr_count": [k.agprs for k in kernels],
        "sgpr_count": [k.sgprs for k in kernels],
        "group_segment_fixed_size": [k.lds for k in kernels],
        "max_flat_workgroup_size": [k.max_workgroup for k in kernels],
    }.items():
        assert [int(n) for n in re.findall(rf"\.{key}:\s+(\d+)", told)] == values, key


def test_ptx(small: dict[str, bytes]) -> None:
    found = inspect(small["sm_90a"])
    assert (found.kind, list(found.targets)) == ("PTX", ["sm_90a"])
    scale, wide = one(found, "scale"), one(found, "wide")
    assert scale.args is not None
    assert [(a.offset, a.size) for a in scale.args] == [(0, 8), (8, 8), (16, 8), (24, 4), (28, 1)]
    assert [a.kind for a in scale.args] == ["pointer", "pointer", "", "value", "value"]
    assert (scale.lds, scale.max_workgroup, scale.wave, scale.vgprs) == (384, 64, 32, None)
    assert scale.facts is not None
    assert wide.facts is not None
    assert (scale.facts.dot4, scale.facts.loads, scale.facts.widest_load) == (0, 1, 4)
    assert (wide.facts.dot4, wide.facts.loads, wide.facts.widest_load, wide.lds) == (1, 1, 16, 0)


def test_ptx_as_nvcc_writes_it() -> None:
    """Parameters without .ptr, in arrays, in one line; functions beside kernels; a table; three numbers of threads."""
    text = """//
.version 9.0
.target sm_80, debug
.address_size 64
.global .align 4 .b8 table[4] = {1, 2, 3, 4};
.shared .align 16 .b8 both[64];
.visible .func  (.param .b32 r) helper(.param .b32 a)
{
	dp4a.s32.s32 %r1, %r2, %r3, %r4;
	ret;
}
	// .globl	k
.visible .entry k(.param .u64 a, .param .align 16 .b8 s[24], .param .f32 c)
.maxntid 16, 4, 2
.minnctapersm 1
{
	.shared .align 4 .b8 own[36];
	@%p1 bra 	$L__BB0_2;
	{ ld.global.nc.L1::no_allocate.v2.f64 {%fd1, %fd2}, [%rd1]; }
	ld.volatile.global.u8 	%rs1, [%rd2];
	mov.u32 %r8, both;
	@!%p2 dp4a.s32.u32 %r1, %r2, %r3, %r4;
	wmma.mma.sync.aligned.row.col.m16n16k16.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r4};
$L__BB0_2:
	ret;
}
.entry empty()
{
	ret;
}
"""
    found = inspect(text.encode() + b"\0")
    assert list(found.targets) == ["sm_80"]
    k, empty = found.targets["sm_80"]
    assert (k.name, k.max_workgroup, k.lds) == ("k", 128, 100)
    assert k.args is not None
    assert [(a.name, a.offset, a.size) for a in k.args] == [("a", 0, 8), ("s", 16, 24), ("c", 40, 4)]
    assert k.facts is not None
    assert (k.facts.dot4, k.facts.matrix, k.facts.loads, k.facts.widest_load) == (1, 1, 1, 1)
    assert (empty.name, empty.args, empty.lds) == ("empty", [], 0)


def test_cubin(tmp_path: Path) -> None:
    found = inspect(cubin(tmp_path))
    assert (found.kind, list(found.targets)) == ("cubin", ["sm_75"])
    kernel = one(found, "two")
    assert kernel.args is not None
    assert [(a.offset, a.size) for a in kernel.args] == [(0, 8), (8, 8), (16, 8), (24, 1), (28, 4)]
    assert (kernel.vgprs, kernel.lds, kernel.scratch, kernel.max_workgroup) == (14, 96, 400, 256)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize(("arch", "target"), [("sm_75", "sm_75"), ("sm_90a", "sm_90"), ("sm_120", "sm_120")])
def test_cubin_of_nvcc(arch: str, target: str, tmp_path: Path) -> None:
    source, to = tmp_path / "k.cu", tmp_path / "k.cubin"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(96) k(const float* x, float* y, long long n, char c) {\n'
        "  __shared__ float s[32]; s[threadIdx.x % 32] = x[threadIdx.x]; __syncthreads(); y[n] = s[c]; }\n"
    )
    subprocess.run(["nvcc", "-cubin", f"-arch={arch}", "-o", to, source], check=True, capture_output=True)
    found = inspect(to.read_bytes())
    assert list(found.targets) == [target]
    kernel = one(found, "k")
    assert kernel.args is not None
    assert [(a.offset, a.size) for a in kernel.args] == [(0, 8), (8, 8), (16, 8), (24, 1)]
    assert (kernel.lds, kernel.scratch, kernel.max_workgroup) == (128, 0, 96)
    assert kernel.vgprs


def test_bundles(tmp_path: Path) -> None:
    packed = pack(right_amd())
    for blob, kind in (
        (packed, "offload bundle"),
        (compressed(packed, 2), "compressed offload bundle"),
        (host_object([packed], tmp_path), "host object with an embedded bundle"),
        (host_object([compressed(packed, 3)], tmp_path, link=True), "host object with an embedded bundle"),
    ):
        found = inspect(blob)
        assert (found.kind, sorted(found.targets)) == (kind, ["gfx1100", "gfx90a"])
        assert all({k.name for k in kernels} == NAMES for kernels in found.targets.values())


def test_a_bundle_for_each_source_that_was_linked(small: dict[str, bytes], tmp_path: Path) -> None:
    blob = host_object([pack(right_amd()), pack({"gfx90a": small["gfx90a"]})], tmp_path, link=True)
    found = inspect(blob)
    assert {t: len(k) for t, k in found.targets.items()} == {"gfx1100": 123, "gfx90a": 125}


def test_host_object(tmp_path: Path) -> None:
    found = inspect(assembled(".globl f\n.type f,@function\nf: ret\n.globl data\ndata: .long 1\n", tmp_path))
    assert (found.kind, {t: [k.name for k in ks] for t, ks in found.targets.items()}) == (
        "host object",
        {"x86_64": ["f"]},
    )
    assert inspect(host_object([], tmp_path)).kind == "host object"


def test_cpu_object() -> None:
    path = next(p for p in QUANTIZED.files() if p.name.startswith("cpu-"))
    found = inspect(path.read_bytes(), path.name)
    assert (found.kind, list(found.targets)) == ("CPU code object", [path.stem.removeprefix("cpu-")])
    assert {k.name for k in found.targets[path.stem.removeprefix("cpu-")]} == {k.name for k in CPU_KERNELS}
    assert set(inspect(path.read_bytes()).targets) <= {"x86_64", "aarch64"}


def test_what_cannot_be_loaded_is_a_problem(tmp_path: Path) -> None:
    image = right()["gfx1100"]
    (wrong,) = inspect(pack({"gfx1101": image})).problems
    assert (wrong.target, wrong.message) == (
        "gfx1101",
        "the image does not agree with itself on its target (ELF header: gfx1100, entry: gfx1101)",
    )
    (bitcode,) = inspect(pack({"gfx1100": b"BC\xc0\xde" + bytes(60)})).problems
    assert "LLVM bitcode" in bitcode.message
    (tmp_path / "k.s").write_text(
        '.amdgcn_target "amdgcn-amd-amdhsa--gfx1100"\n.amdgpu_metadata\n---\namdhsa.kernels: []\n'
        "amdhsa.target: amdgcn-amd-amdhsa--gfx1100\namdhsa.version: [1, 2]\n...\n.end_amdgpu_metadata\n"
    )
    machine = "-target amdgcn-amd-amdhsa -mcpu=gfx1100".split()
    zig.clang([*machine, "-c", tmp_path / "k.s", "-o", tmp_path / "k.o"], "assembling")
    (unlinked,) = inspect((tmp_path / "k.o").read_bytes()).problems
    assert "not linked" in unlinked.message


def test_the_embedded_objects() -> None:
    """Facts are those of the build, found by the hash of the file."""
    found = inspect_installed()
    assert found.problems == []
    assert set(found.targets) >= set(QUANTIZED.targets())
    path = QUANTIZED.path("facts.json")
    built = json.loads(path.read_text()) if path else {}
    for target in QUANTIZED.targets():
        rows = built[target]["kernels"] | built.get(f"{target}.engine", {"kernels": {}})["kernels"]
        for kernel in found.targets[target]:
            assert kernel.facts is not None
            assert kernel.facts.instructions == rows[kernel.name]["instructions"]


def test_an_installation_lists_the_engines_kernels(
    small: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the frameworks' of the same target, each with the facts of its own file."""
    monkeypatch.setattr(disassemble, "objdump", lambda: None)
    monkeypatch.setattr(module, "QUANTIZED", CodeObjects(tmp_path))
    table = {}
    for target, suffix in (("gfx1100", "hsaco"), ("gfx90a", "hsaco"), ("sm_90a", "ptx")):
        for stem, blob, instructions in ((target, right()[target], 7), (f"{target}.engine", small[target], 9)):
            (tmp_path / f"{stem}.{suffix}").write_bytes(blob)
            row = {"dot4": 1, "matrix": 0, "widest_load": 4, "loads": 2, "instructions": instructions}
            names = [k.name for kernels in inspect(blob).targets.values() for k in kernels]
            table[stem] = {"sha256": hashlib.sha256(blob).hexdigest(), "kernels": dict.fromkeys(names, row)}
    (tmp_path / "facts.json").write_text(json.dumps(table))
    found = inspect_installed()
    assert set(found.targets) == {"gfx1100", "gfx90a", "sm_90a"}
    for kernels in found.targets.values():
        assert {k.name for k in kernels[:123]} == NAMES
        assert {k.name for k in kernels[123:]} == {"scale", "wide"}
        assert [k.facts.instructions for k in kernels if k.facts] == [7] * 123 + [9] * 2
    shown = call().output
    assert "installation, 125 kernels in 3 targets" in shown
    assert re.search(r"\| sm_90a +\| +125 \|", shown)


@pytest.mark.skipif(disassemble.objdump() is None, reason="llvm-objdump is not installed")
def test_facts_of_a_strangers_object(small: dict[str, bytes]) -> None:
    for target in ("gfx1100", "gfx90a"):
        found = inspect(small[target], instructions=True)
        scale, wide = one(found, "scale").facts, one(found, "wide").facts
        assert scale is not None
        assert wide is not None
        assert (scale.dot4, scale.widest_load, scale.loads) == (0, 4, 1)
        assert (wide.dot4, wide.matrix, wide.widest_load, wide.loads) == (1, 0, 16, 1)
        assert 5 < wide.instructions < 40


def test_facts_are_unknown_without_the_tool(
    small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(disassemble, "objdump", lambda: None)
    assert one(inspect(small["gfx1100"], instructions=True), "wide").facts is None
    (folder / "a.hsaco").write_bytes(small["gfx1100"])
    assert "unknown" in call(folder / "a.hsaco").output


def test_a_disassembler_that_does_not_end(
    small: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    slow = tmp_path / "llvm-objdump"
    slow.write_text("#!/bin/sh\nexec sleep 100\n")
    slow.chmod(0o755)
    monkeypatch.setattr(disassemble, "objdump", lambda: str(slow))
    monkeypatch.setattr(module, "DISASSEMBLY", 0.3)
    amd = {t: b for t, b in small.items() if t.startswith("gfx")}
    found = inspect(pack(amd), instructions=True)
    assert all(k.facts is None for kernels in found.targets.values() for k in kernels)


@pytest.mark.parametrize(
    ("instruction", "nbytes"),
    [
        ("global_load_b128", 16),
        ("global_load_dwordx4", 16),
        ("flat_load_b64", 8),
        ("buffer_load_dword", 4),
        ("global_load_ubyte", 1),
        ("global_load_u16", 2),
        ("global_load_d16_b16", 2),
        ("global_load_d16_hi_u8", 1),
        ("global_load_short_d16_hi", 2),
        ("global_load_lds_dwordx4", 16),
        ("global_store_b128", 0),
        ("s_load_b128", 0),
        ("ds_load_b128", 0),
    ],
)
def test_bytes_of_a_load(instruction: str, nbytes: int) -> None:
    assert amd_instruction(instruction)[1] == nbytes


# The command


def test_tables(small: dict[str, bytes], folder: Path) -> None:
    path = folder / "small.hsaco"
    path.write_bytes(pack({t: b for t, b in small.items() if t.startswith("gfx")}))
    whole = call(path).output
    assert "offload bundle, 2 kernels in 3 targets" in whole
    assert re.search(r"\| gfx90a +\| +2 \|.*\| +64 \| +256 \|", whole)
    assert len(whole.splitlines()) == 2 + 2 + 3
    listed = call(path, "--target", "gfx90a").output
    assert re.search(r"\| scale +\| +5 \|.*\| +384 \|", listed)
    assert "gfx1100" not in listed
    args = call(path, "--kernel", "sca*").output
    assert "scale in gfx11-generic gfx1100 gfx90a" in args
    assert re.search(r"\| value +\| +28 \| +1 \|", args)
    assert "wide" not in args.replace("widest", "")
    told = json.loads(call(path, "--json").output)
    assert told["targets"]["gfx90a"][0]["args"][2] | {"name": ""} == {
        "name": "",
        "offset": 16,
        "size": 8,
        "kind": "value",
    }
    assert json.loads(call(path, "--json", "--target", "gfx1100", "--kernel", "wide").output)["targets"].keys() == {
        "gfx1100"
    }


def test_the_table_of_many_targets_stays_readable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disassemble, "objdump", lambda: None)
    path = folder / "many.hsaco"
    path.write_bytes(pack(dict.fromkeys((t.name for t in AMD_TARGETS), right()["gfx1100"])))
    lines = call(path).output.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 2 + len(AMD_TARGETS)
    assert max(map(len, table)) < 150


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "gfx9999"], "no target 'gfx9999' in .*; it holds gfx1100"),
        (["--kernel", "nothing*"], "no kernel matches 'nothing\\*'"),
    ],
)
def test_questions_about_what_is_not_there(
    args: list[str], message: str, small: dict[str, bytes], folder: Path
) -> None:
    (folder / "a.hsaco").write_bytes(small["gfx1100"])
    result = call(folder / "a.hsaco", *args)
    assert result.exit_code == 1
    assert re.search(message, result.output)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"GGUF\3\0\0\0", "a GGUF model"),
        (b"!<arch>\n", "static library"),
        (b"BC\xc0\xde", "LLVM bitcode"),
        (b"\x50\xed\x55\xba", "cuobjdump"),
        (b"hello", "begin with b'hello'; expected an AMD code object"),
        (b"\x7fELF\x01\x01" + bytes(80), "32 bits"),
        (b"\x7fELF\x02\x01" + bytes(8), "14 bytes, the header takes 64"),
    ],
)
def test_other_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    result = call(tmp_path / "file")
    assert result.exit_code == 1
    assert message in result.output
    assert str(tmp_path / "file") in result.output


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "is not a file of at most" in call(tmp_path).output
    assert "is not a file of at most" in call("/dev/zero").output
    assert "No such file" in call(tmp_path / "missing").output
