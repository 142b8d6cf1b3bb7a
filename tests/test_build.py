"""The build: the same bytes everywhere, nothing compiled twice, and a sentence for whatever goes wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hipquant import InvalidCodeObjectError, codeobjects, wiring
from hipquant.cli.app import cli
from hipquant.codeobjects import QUANTIZED, CodeObjects, bundle
from hipquant.targets import AMD_TARGETS, CPU_TARGETS, GPU_TARGETS, NVIDIA_TARGETS, GpuTarget, gpu_target, select
from hipquant.toolchain import compile as compiling
from hipquant.toolchain import compilers, cpu, gpu, machine, zig
from hipquant.toolchain.build import build, plan
from hipquant.toolchain.compile import FACTS, MANIFEST, OUTPUT, PARTS, CompileError
from hipquant.toolchain.facts import amd_facts, ptx_facts
from hipquant.toolchain.inspect import inspect

FAMILIES = ("quantize.hip", "get_rows.hip")  # two that compile quickly
ENGINE_KERNELS = ("ones", "quantize")  # the second as a family of the frameworks' is called
COMPATIBLE = {"quantize", "dequantize", "dequantize_mul_mat_vec", "mul_mat_vec", "mul_mat", "get_rows"}
OWN_SOURCE = """
#define __global__ __attribute__((global))
#if defined(__AMDGCN__)
#define THREAD __builtin_amdgcn_workitem_id_x()
#else
#define THREAD __nvvm_read_ptx_sreg_tid_x()
#endif
extern "C" __global__ void twice(const float* x, float* y) { y[THREAD] = 2 * x[THREAD]; }
"""
NO_DOT = (
    '#include "device.h"\nHQ_KERNEL(32) dots(const int* x, int* y) { *y = __builtin_amdgcn_sdot4(*x, *y, 0, false); }\n'
)


def names(which: str = "hip") -> set[str]:
    """The 123 names and get_rows, under a name profile."""
    found = {k.name for k in wiring.profile(which) if k.family in COMPATIBLE}
    assert len(found) == 123 + 13
    return found


def kernels(blob: bytes) -> dict[str, set[str]]:
    return {target: {k.name for k in found} for target, found in inspect(blob).targets.items()}


def call(*args: object) -> Result:
    return CliRunner().invoke(cli, ["build", *map(str, args)], prog_name="hipquant")


@pytest.fixture
def own_source(tmp_path: Path) -> Path:
    source = tmp_path / "own.hip"
    source.write_text(OWN_SOURCE)
    return source


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Makes a folder of two families, and lets the build take it for the package's kernels."""

    def use(folder: Path) -> Path:
        shutil.copytree(gpu_sources, folder, ignore=shutil.ignore_patterns("*.hip"))
        for name in FAMILIES:
            shutil.copy(gpu_sources / name, folder)
        (folder / "quantized.hip").write_text("".join(f'#include "{name}"\n' for name in FAMILIES))
        monkeypatch.setattr(gpu, "SOURCES", folder)
        monkeypatch.setattr(gpu, "UMBRELLA", folder / "quantized.hip")
        return folder

    gpu_sources = gpu.SOURCES
    return use


@pytest.fixture
def small_engine(small, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """The same with an engine of two kernels, one a family; gives the engine's folder."""

    def use(folder: Path) -> Path:
        engine = small(folder) / "engine"
        shutil.rmtree(engine, ignore_errors=True)
        engine.mkdir()
        (engine / "own.h").write_text("#define ONE 1\n")
        for name in ENGINE_KERNELS:
            text = f"HQ_KERNEL(32) {name}(int* x) {{ x[thread_x()] = ONE; }}\n"
            (engine / f"{name}.hip").write_text(f'#include "device.h"\n#include "own.h"\n{text}')
        (engine / "engine.hip").write_text("".join(f'#include "{name}.hip"\n' for name in ENGINE_KERNELS))
        monkeypatch.setattr(gpu, "ENGINE", engine)
        monkeypatch.setattr(gpu, "ENGINE_UMBRELLA", engine / "engine.hip")
        return engine

    return use


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the compiler was called for, in words."""
    said: list[str] = []
    clang = zig.clang

    def record(arguments, what):
        said.append(what)
        return clang(arguments, what)

    monkeypatch.setattr(zig, "clang", record)
    return said


def compiles(compiled: list[str]) -> list[str]:
    found = sorted(m[1] for what in compiled if (m := re.match(r"compiling (.*)", what)))
    compiled.clear()
    return found


def test_the_same_bytes_from_two_folders(tmp_path: Path, small, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = select(["gfx1100", "gfx90a", "gfx12-generic", "sm_80"])
    built = []
    for name in ("a", "a folder with a longer name"):
        small(tmp_path / name / "gpu")
        built.append([p.read_bytes() for p in build(targets, tmp_path / name / "out")])
    assert built[0] == built[1]
    assert all(built[0])
    assert not any(str(tmp_path).encode() in b for b in built[0])


def test_the_processors_objects_are_the_same_from_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, sources = [], cpu.SOURCES
    for name in ("a", "a folder with a longer name"):
        folder = tmp_path / name / "cpu"
        shutil.copytree(sources, folder, ignore=shutil.ignore_patterns("*mat*.cpp", "transformer.cpp", "attention.cpp"))
        monkeypatch.setattr(cpu, "SOURCES", folder)
        built.append([p.read_bytes() for p in build(CPU_TARGETS[-1:], tmp_path / name / "out")])
    assert built[0] == built[1]
    assert len(built[0]) == 2


def test_only_what_changed_is_compiled(tmp_path: Path, small, compiled: list[str]) -> None:
    sources, out = small(tmp_path / "gpu"), tmp_path / "out"
    targets = select(["gfx1100", "gfx1030", "gfx1031", "sm_80"])
    first = [p.read_bytes() for p in build(targets, out)]
    everything = [f"{family} for {target}" for family in FAMILIES for target in ("gfx1030", "gfx1100")]
    assert compiles(compiled) == sorted([*everything, "quantized.hip for sm_80"])  # gfx1031 is gfx1030's twin
    build(targets, out)
    assert compiled == []
    with (sources / "quantize.hip").open("a") as file:
        file.write("// a comment\n")
    assert [p.read_bytes() for p in build(targets, out)] == first
    assert compiles(compiled) == ["quantize.hip for gfx1030", "quantize.hip for gfx1100", "quantized.hip for sm_80"]
    with (sources / "device.h").open("a") as file:
        file.write("// a comment\n")
    build(targets[:1], out)
    assert compiles(compiled) == [f"{family} for gfx1100" for family in sorted(FAMILIES)]
    (out / "gfx1030.hsaco").unlink()
    with (sources / "simulate.h").open("a") as file:
        file.write("// no GPU's object includes it\n")
    build(targets[:1], out)
    assert compiled == []


def test_the_engines_objects_lie_beside(tmp_path: Path, small_engine, compiled: list[str]) -> None:
    engine, out = small_engine(tmp_path / "gpu"), tmp_path / "out"
    targets = select(["gfx1030", "gfx1031", "sm_80"])
    first = {p.name: p.read_bytes() for p in build(targets, out, engine=True)}
    names = {f"{t.name}{kind}.{'ptx' if t.name == 'sm_80' else 'hsaco'}" for t in targets for kind in ("", ".engine")}
    assert set(first) == names
    # gfx1031 is gfx1030's twin here too. quantize.hip is compiled twice: the engine's is another one.
    quantize = ["quantize.hip for gfx1030"] * 2
    ptx = ["engine.hip for sm_80", "quantized.hip for sm_80"]
    assert compiles(compiled) == sorted(["get_rows.hip for gfx1030", "ones.hip for gfx1030", *quantize, *ptx])
    for target in targets:
        assert kernels(first[target.engine_filename]) == {target.name: set(ENGINE_KERNELS)}
        assert "quantize_q8_1" in kernels(first[target.filename])[target.name]
    table = json.loads((out / FACTS).read_text())
    assert set(table) == {f"{t.name}{kind}" for t in targets for kind in ("", ".engine")}
    for target in targets:
        assert set(table[f"{target.name}.engine"]["kernels"]) == set(ENGINE_KERNELS)
        assert table[f"{target.name}.engine"]["sha256"] == hashlib.sha256(first[target.engine_filename]).hexdigest()
    build(targets, out, engine=True)
    assert compiled == []
    with (engine / "own.h").open("a") as file:
        file.write("// a comment\n")
    assert {p.name: p.read_bytes() for p in build(targets, out, engine=True)} == first
    assert compiles(compiled) == ["engine.hip for sm_80", "ones.hip for gfx1030", "quantize.hip for gfx1030"]
    small_engine(tmp_path / "a folder with a longer name" / "gpu")
    other = build(targets, tmp_path / "other", engine=True)
    assert {p.name: p.read_bytes() for p in other} == first


def test_containers_of_one_folder(tmp_path: Path, small_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    small_engine(tmp_path / "gpu")
    targets, folder = select(["gfx1030", "sm_80"]), tmp_path / "installed"
    build(targets, folder, engine=True)
    frameworks, engine = CodeObjects(folder), CodeObjects(folder, engine=True)
    assert [p.name for p in frameworks.files()] == ["gfx1030.hsaco", "sm_80.ptx"]
    assert [p.name for p in engine.files()] == ["gfx1030.engine.hsaco", "sm_80.engine.ptx"]
    for container in (frameworks, engine):
        assert list(container.targets()) == ["gfx1030", "sm_80"]
        assert list(container.targets().values()) == container.files()
    # bytes() compiles what is missing, of its own kernels only.
    monkeypatch.setattr(codeobjects, "AMD_TARGETS", select(["gfx1030", "gfx1031"]))
    assert kernels(bytes(engine)) == {t: set(ENGINE_KERNELS) for t in ("gfx1030", "gfx1031")}
    assert (folder / "gfx1031.engine.hsaco").exists()
    assert not (folder / "gfx1031.hsaco").exists()


def test_what_the_command_builds(tmp_path: Path, small_engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installation gets the engine's objects too; a file or a folder of one's own only what frameworks load."""
    small_engine(tmp_path / "gpu")
    installed, own = tmp_path / "installed", tmp_path / "own"
    installed.mkdir()
    monkeypatch.setattr(compiling, "OUTPUT", installed)
    result = call("--target", "gfx1100", "sm_80")
    assert result.exit_code == 0, result.output
    expected = ["gfx1100.engine.hsaco", "gfx1100.hsaco", "sm_80.engine.ptx", "sm_80.ptx"]
    assert sorted(p.name for p in installed.iterdir() if p.suffix in (".hsaco", ".ptx")) == expected
    assert all(name in result.output for name in expected)
    assert call("--target", "gfx1100", "sm_80", "-o", own).exit_code == 0
    assert sorted(p.name for p in own.iterdir()) == ["gfx1100.hsaco", "sm_80.ptx"]
    assert call("--target", "gfx1100", "-o", tmp_path / "x.hsaco").exit_code == 0
    assert not kernels((tmp_path / "x.hsaco").read_bytes())["gfx1100"] & {"ones"}


def test_an_interrupted_build_goes_on_where_it_was(tmp_path: Path, small, compiled: list[str]) -> None:
    small(tmp_path / "gpu")
    targets, out = select(["gfx1100", "gfx1030"]), tmp_path / "out"

    def interrupt(done: int, total: int) -> None:
        assert total == 4 + 2
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(targets, out, jobs=1, progress=interrupt)
    finished = json.loads((out / PARTS / MANIFEST).read_text())
    assert not list(out.rglob("*.*.[0-9]*"))  # no file that is half written
    compiled.clear()
    build(targets, out)
    assert len(compiles(compiled)) == 4 - sum(name.endswith(".s.gz") for name in finished)
    assert {o.filename for o in plan(targets)} == set(json.loads((out / MANIFEST).read_text()))


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_manifest_costs_time_only(damage: bytes, tmp_path: Path, small, compiled: list[str]) -> None:
    small(tmp_path / "gpu")
    build(select(["gfx1100"]), tmp_path)
    for path in (tmp_path / MANIFEST, tmp_path / PARTS / MANIFEST, tmp_path / FACTS):
        path.write_bytes(damage)
    compiled.clear()
    build(select(["gfx1100"]), tmp_path)
    assert len(compiles(compiled)) == len(FAMILIES)
    assert json.loads((tmp_path / FACTS).read_text())["gfx1100"]["kernels"]["quantize_q8_1"]["loads"]


def test_two_builds_of_one_folder_at_once(tmp_path: Path, small) -> None:
    small(tmp_path / "gpu")
    out = tmp_path / "out"
    builds = [threading.Thread(target=build, args=(select([n]), out)) for n in ("gfx1100", "gfx1030", "gfx1100")]
    for thread in builds:
        thread.start()
    for thread in builds:
        thread.join()
    assert set(json.loads((out / MANIFEST).read_text())) == {"gfx1100.hsaco", "gfx1030.hsaco"}
    assert set(json.loads((out / FACTS).read_text())) == {"gfx1100", "gfx1030"}


def test_targets_by_words() -> None:
    assert len(AMD_TARGETS) == 33
    assert [t.name for t in NVIDIA_TARGETS] == ["sm_75", "sm_80", "sm_90a"]
    assert {t.name for t in AMD_TARGETS if t.wave == 64} == {t.name for t in AMD_TARGETS if t.name.startswith("gfx9")}
    assert all(t.code_object == (6 if "generic" in t.name else 5) for t in AMD_TARGETS)
    assert select(["all"]) == (*GPU_TARGETS, *CPU_TARGETS)
    assert [t.name for t in select(["gfx1100", "nvidia", "sm_80"])] == ["gfx1100", "sm_75", "sm_80", "sm_90a"]
    assert all(not t.twin or not gpu_target(t.twin).twin for t in GPU_TARGETS)
    with pytest.raises(ValueError, match="unknown target 'gfx110'.*gfx1100"):
        gpu_target("gfx110")


def test_several_targets_after_one_option(tmp_path: Path, own_source: Path) -> None:
    result = call("--target", "gfx1100", "sm_80", own_source, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{own_source.stem}.{e}" for e in ("hsaco", "sm_80.ptx")
    ]
    assert "unknown target 'gfx1105'" in call("--target", "sm_80", "gfx1105", own_source).output


def test_what_cannot_be_asked_for(tmp_path: Path, own_source: Path) -> None:
    for arguments, code, message in (
        (["--target", "gfx110"], 1, "unknown target 'gfx110'; nearest: .*gfx1100"),
        (["--target", "gfx1100", "-o", tmp_path / "x.bin"], 2, "expected a folder or a file ending in .hsaco"),
        (["--target", "amd", "-o", tmp_path / "x.ptx"], 2, "one NVIDIA target, not gfx900.* and 30 more"),
        (["--target", "nvidia", "-o", tmp_path / "x.ptx"], 2, "one NVIDIA target, not sm_75, sm_80, sm_90a"),
        (["--target", "sm_80", "-o", tmp_path / "x.hsaco"], 2, "AMD targets, not sm_80"),
        (["--target", "gfx1100", "--profile", "cuda"], 2, "give -o for cuda"),
        (["--target", "sm_80", "-o", tmp_path / "x.cubin"], 1, "--compiler nvcc"),
        (["--target", "cpu", "--compiler", "clang"], 1, "leave out --compiler"),
        (["--target", "gfx1100", "--compiler", "nvcc"], 1, "nvcc makes nothing for gfx1100: take clang or hipcc"),
        (["--target", "sm_80", "--compiler", "hipcc"], 1, "hipcc makes nothing for sm_80: take clang or nvcc"),
        ([own_source, "--target", "x86-64-v3"], 1, "cannot be compiled for x86-64-v3"),
        ([own_source, own_source, "--target", "sm_80"], 1, "one source at a time"),
        ([tmp_path / "none.hip"], 2, "does not exist"),
    ):
        result = call(*arguments)
        assert result.exit_code == code, result.output
        assert re.search(message, " ".join(result.output.split())), result.output
    assert list(tmp_path.iterdir()) == [own_source]


@pytest.mark.parametrize(("compiler", "target"), [("clang", "gfx1100"), ("hipcc", "gfx1030"), ("nvcc", "sm_80")])
def test_a_compiler_that_is_missing(
    compiler: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_source: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HIPQUANT_CLANG", raising=False)
    result = call(own_source, "--target", target, "--compiler", compiler, "-o", tmp_path)
    assert result.exit_code == 1
    assert re.search(f"Error: (no )?{compiler} is (not )?on the PATH: install .*pip install ziglang", result.output)
    monkeypatch.setenv("HIPQUANT_CLANG", "no-such-clang")
    if compiler == "clang":
        assert (
            "'no-such-clang', which is no program"
            in call(own_source, "--target", target, "--compiler", compiler, "-o", tmp_path).output
        )


@pytest.fixture
def without_ziglang(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    find_spec = zig.importlib.util.find_spec
    monkeypatch.setattr(zig.importlib.util, "find_spec", lambda n, *a: None if n == "ziglang" else find_spec(n, *a))
    zig._home.cache_clear()
    yield
    zig._home.cache_clear()


def test_without_ziglang(without_ziglang: None, tmp_path: Path) -> None:
    result = call("--target", "gfx1100", "-o", tmp_path)
    assert (result.exit_code, "pip install ziglang==0.17.1" in result.output) == (1, True), result.output
    with pytest.raises(InvalidCodeObjectError, match="lacks the code objects of 33 of 33.*pip install ziglang==0.17.1"):
        bytes(CodeObjects(tmp_path))


def test_an_instruction_that_a_target_lacks(tmp_path: Path) -> None:
    """Mistake 8: the build fails, and says where."""
    source = tmp_path / "no_dot.hip"
    source.write_text(NO_DOT)
    assert call(source, "--target", "gfx1030", "-o", tmp_path / "x.hsaco").exit_code == 0
    result = call(source, "--target", "gfx1030,gfx1010", "-o", tmp_path / "y.hsaco")
    assert result.exit_code == 1
    assert re.search(r"compiling no_dot.hip for gfx1010 failed:\n.*needs target feature dot1-insts", result.output)
    assert not (tmp_path / "y.hsaco").exists()


def test_a_source_that_wants_hips_headers(tmp_path: Path) -> None:
    source = tmp_path / "hip.hip"
    source.write_text("#include <hip/hip_runtime.h>\n")
    result = call(source, "--target", "gfx1100", "-o", tmp_path / "x.hsaco")
    assert result.exit_code == 1
    assert "'hip/hip_runtime.h' file not found" in result.output
    assert "include device.h" in result.output


def test_a_users_own_kernels(tmp_path: Path, own_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(own_source, "--target", "gfx1100", "--target", "gfx90a", "--target", "sm_80")
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.iterdir()} == {"own.hip", "own.hsaco", "own.sm_80.ptx"}
    blob, ptx = (tmp_path / "own.hsaco").read_bytes(), (tmp_path / "own.sm_80.ptx").read_text()
    assert kernels(blob) == {"gfx1100": {"twice"}, "gfx90a": {"twice"}}
    assert bundle.amd_target(bundle.unpack(blob)["gfx90a"]) == "gfx90a"
    assert ".version 7.0\n.target sm_80" in ptx  # the oldest that has the instructions
    if shutil.which("ptxas"):
        subprocess.run(["ptxas", "-arch=sm_80", "-o", tmp_path / "own.cubin", tmp_path / "own.sm_80.ptx"], check=True)


def test_warnings_on_a_users_source_are_shown(tmp_path: Path) -> None:
    source = tmp_path / "warns.hip"
    source.write_text(OWN_SOURCE + '#warning "look here"\n')
    result = call(source, "--target", "gfx1100", "-o", tmp_path / "x.hsaco")
    assert result.exit_code == 0
    assert "look here" in result.output


def test_several_sources_are_linked(tmp_path: Path, own_source: Path) -> None:
    other = tmp_path / "other.hip"
    other.write_text(OWN_SOURCE.replace("twice", "thrice"))
    assert call(own_source, other, "--target", "gfx1201", "-o", tmp_path / "x.hsaco").exit_code == 0
    assert kernels((tmp_path / "x.hsaco").read_bytes()) == {"gfx1201": {"twice", "thrice"}}
    other.write_text(OWN_SOURCE)
    result = call(own_source, other, "--target", "gfx1201", "-o", tmp_path / "x.hsaco")
    assert "duplicate symbol: twice" in result.output


def test_the_names_of_the_cuda_profile(tmp_path: Path) -> None:
    result = call("--target", "sm_80", "--profile", "cuda", "-o", tmp_path / "x.ptx")
    assert result.exit_code == 0, result.output
    assert set(ptx_facts((tmp_path / "x.ptx").read_text())) == names("cuda")


@pytest.mark.parametrize("target", [t for t in AMD_TARGETS if t.twin], ids=lambda t: f"{t.name} of {t.twin}")
def test_twins_have_the_same_machine_code(target: GpuTarget, tmp_path: Path, small) -> None:
    """Compiled for itself, a target gives the same bytes as the assembly of its twin."""
    small(tmp_path / "gpu")
    alone = dataclasses.replace(target, twin="")
    (twin,) = build([target], tmp_path / "twin")
    (real,) = build([alone], tmp_path / "real")
    assert twin.read_bytes() == real.read_bytes()


def test_all_kernels_of_a_twin(tmp_path: Path) -> None:
    """The same for everything that is embedded, for one pair."""
    target = gpu_target("gfx12-generic")
    (real,) = build([dataclasses.replace(target, twin="")], tmp_path)
    assert real.read_bytes() == (OUTPUT / target.filename).read_bytes()


@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda t: t.name)
def test_what_is_embedded(target: GpuTarget) -> None:
    path = QUANTIZED.targets()[target.name]
    facts = json.loads((OUTPUT / FACTS).read_text())[target.name]
    assert facts["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(facts["kernels"]) == names()
    assert kernels(path.read_bytes()) == {target.name: names()}
    for kernel in wiring.TABLE:
        if kernel.family in ("mul_mat_vec", "mul_mat"):
            found = facts["kernels"][kernel.name]
            assert bool(found["dot4"] + found["matrix"]) == target.dot4, kernel.name


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


def test_the_bundle() -> None:
    """bytes(QUANTIZED) of a complete installation."""
    blob = bytes(QUANTIZED)
    assert blob == bundle.pack({t.name: (OUTPUT / t.filename).read_bytes() for t in AMD_TARGETS})
    assert kernels(blob) == {t.name: names() for t in AMD_TARGETS}
    assert len(blob) <= 40_000_000


@pytest.mark.parametrize("writable", [True, False])
def test_the_bundle_of_an_installation_that_lacks_objects(
    writable: bool, tmp_path: Path, small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small(tmp_path / "gpu")
    folder = tmp_path / "installed"
    folder.mkdir()
    for t in AMD_TARGETS[2:]:
        (folder / t.filename).write_bytes(t.name.encode())
    monkeypatch.setattr(codeobjects.os, "access", lambda path, mode: writable)
    objects = bundle.unpack(bytes(CodeObjects(folder)))
    assert "lacks the code objects of 2 of 33 AMD targets: compiling them" in capsys.readouterr().err
    assert objects["gfx950"] == b"gfx950"
    assert [bundle.amd_target(objects[n]) for n in ("gfx900", "gfx906")] == ["gfx900", "gfx906"]
    assert (folder / "gfx900.hsaco").exists() == writable


def _clang_of(version: str) -> str | None:
    return shutil.which(f"clang-{version}")


@pytest.mark.parametrize(
    ("compiler", "version", "target", "suffix"),
    [
        ("clang", "19", "gfx1030", "hsaco"),
        ("clang", "19", "sm_80", "ptx"),
        ("clang", "22", "gfx1201", "hsaco"),
        ("clang", "22", "gfx9-4-generic", "hsaco"),
        ("clang", "22", "sm_90a", "ptx"),
        ("hipcc", "", "gfx1030", "hsaco"),
        ("nvcc", "", "sm_80", "ptx"),
        ("nvcc", "", "sm_90a", "cubin"),
    ],
)
def test_other_compilers(
    compiler: str, version: str, target: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's kernels compile with each compiler that is installed."""
    executable = shutil.which(f"{compiler}-{version}" if version else compiler)
    if executable is None:
        pytest.skip(f"{compiler} {version} is not installed")
    if version:
        monkeypatch.setenv("HIPQUANT_CLANG", executable)
    result = call("--target", target, "--compiler", compiler, "-o", tmp_path / f"x.{suffix}")
    assert result.exit_code == 0, result.output
    assert list(kernels((tmp_path / f"x.{suffix}").read_bytes()).values()) == [names()]


def test_the_newest_clang_that_knows_a_target_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, known in (("clang-9", "gfx1030"), ("clang++-30", "gfx1030 gfx1100"), ("clang-cpp-31", "all")):
        words = "|".join(f"*={word}[\\ ]*" for word in known.split())
        (tmp_path / name).write_text(f'#!/bin/sh\ncase "$* " in {words}) exit 0;; esac\nexit 1\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HIPQUANT_CLANG", raising=False)
    assert compilers.clang_for(gpu_target("gfx1030")) == str(tmp_path / "clang++-30")
    with pytest.raises(CompileError, match="gfx1201 is not known to .*clang\\+\\+-30, .*clang-9: install clang"):
        compilers.clang_for(gpu_target("gfx1201"))


def test_what_this_machine_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def node(i: int, version: int) -> None:
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "properties").write_text(f"simd_count 64\ngfx_target_version {version}\nvendor_id 4098\n")

    monkeypatch.setattr(machine, "KFD", tmp_path)
    monkeypatch.setattr(machine, "NVIDIA", tmp_path / "nvidia")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("HIPQUANT_TARGETS", raising=False)
    assert machine.wanted() == select(["cpu"])
    for i, version in enumerate((0, 110000, 90010, 90402, 110000, 90009, 120005, 80003)):
        node(i, version)
    found = [t.name for t in machine.gpu_targets()]
    assert found == ["gfx1100", "gfx90a", "gfx942", "gfx9-generic", "gfx12-generic"]
    (tmp_path / "nvidia" / "0000:01:00.0").mkdir(parents=True)
    assert [t.name for t in machine.gpu_targets()][len(found) :] == ["sm_75", "sm_80", "sm_90a"]
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf '9.0\\n12.0\\n8.6\\n6.1\\n'\n")
    tool.chmod(0o755)
    assert [t.name for t in machine.gpu_targets()][len(found) :] == ["sm_90a", "sm_80"]
    monkeypatch.setenv("HIPQUANT_TARGETS", "gfx1100, x86-64-v3")
    assert [t.name for t in machine.wanted()] == ["gfx1100", "x86-64-v3"]
    monkeypatch.setenv("HIPQUANT_TARGETS", "gfx1101 everything")
    with pytest.raises(ValueError, match="HIPQUANT_TARGETS: unknown target 'everything'"):
        machine.wanted()


def test_the_installation_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    result = call("--target", "gfx1100")
    assert result.exit_code == 1
    assert "cannot be written: give -o FILE or -o FOLDER" in result.output
