"""hipquant build: what can be asked for, a user's own kernels, other compilers, and a sentence for what goes wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import command_line
from code_objects import names, names_by_target
from hipquant import InvalidCodeObjectError
from hipquant.codeobjects import CodeObjects, bundle
from hipquant.targets import AMD_TARGETS, CPU_TARGETS, GPU_TARGETS, NVIDIA_TARGETS, gpu_target, select
from hipquant.toolchain import compilers, machine, zig
from hipquant.toolchain.compile import CompileError
from hipquant.toolchain.facts import ptx_facts

call = partial(command_line.call, "build")


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


@pytest.fixture
def own_source(tmp_path: Path) -> Path:
    source = tmp_path / "own.hip"
    source.write_text(OWN_SOURCE)
    return source


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
    assert names_by_target(blob) == {"gfx1100": {"twice"}, "gfx90a": {"twice"}}
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
    assert names_by_target((tmp_path / "x.hsaco").read_bytes()) == {"gfx1201": {"twice", "thrice"}}
    other.write_text(OWN_SOURCE)
    result = call(own_source, other, "--target", "gfx1201", "-o", tmp_path / "x.hsaco")
    assert "duplicate symbol: twice" in result.output


def test_the_names_of_the_cuda_profile(tmp_path: Path) -> None:
    result = call("--target", "sm_80", "--profile", "cuda", "-o", tmp_path / "x.ptx")
    assert result.exit_code == 0, result.output
    assert set(ptx_facts((tmp_path / "x.ptx").read_text())) == names("cuda")


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
    assert list(names_by_target((tmp_path / f"x.{suffix}").read_bytes()).values()) == [names()]


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
