"""export: what is written compiles where the compilers are and checks itself; what does not pass verify is refused."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from code_objects import compiled, only, right, right_amd, source
from hipquant.cli.app import cli
from hipquant.codeobjects import QUANTIZED, CodeObjects
from hipquant.codeobjects.bundle import pack, unpack
from hipquant.errors import InvalidCodeObjectError
from hipquant.targets import gpu_target
from hipquant.toolchain import export as module
from hipquant.toolchain import zig
from hipquant.toolchain.export import amd_bundle, export
from hipquant.toolchain.verify import required_names

needs_rustc = pytest.mark.skipif(not shutil.which("rustc"), reason="rustc is not installed")
C_COMPILERS = [
    pytest.param(c, marks=pytest.mark.skipif(not shutil.which(c), reason=f"{c} is not installed"))
    for c in ("gcc", "clang", "clang-22", "g++")
]
PROGRAM = """
#include "quantized.h"
#include <stdio.h>
#define NAME(name) puts(#name);
int main(void) {
    QUANTIZED_KERNELS(NAME)
    return fwrite(quantized, 1, QUANTIZED_SIZE, stderr) != QUANTIZED_SIZE;
}
"""


def call(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["export", *map(str, args)], prog_name="hipquant")


def rustc(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["rustc", "--edition", "2021", "-D", "warnings", *options, "quantized_stub.rs"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return pack(right_amd())


def test_files(bundle: bytes, tmp_path: Path) -> None:
    files = export("rocm-rs", tmp_path / "rs", bundle)
    assert [p.name for p in files] == ["quantized.hsaco", "quantized_stub.rs", "README.md"]
    assert files[0].read_bytes() == bundle
    assert 'pub const QUANTIZED: &[u8] = include_bytes!("quantized.hsaco");' in files[1].read_text()
    assert all(f'"{name}",' in files[1].read_text() for name in required_names())
    for kind, count in (("rocm-rs", 5), ("c", 5)):
        readme = export(kind, tmp_path / kind, bundle)[-1].read_text()
        assert len(readme.splitlines()) == count
        assert "gfx1100 gfx90a" in readme
    with pytest.raises(ValueError, match="unknown kind of export 'zig'; there are rocm-rs, c"):
        export("zig", tmp_path, bundle)


@needs_rustc
def test_rust(bundle: bytes, tmp_path: Path) -> None:
    export("rocm-rs", tmp_path, bundle)
    done = rustc(tmp_path, "--crate-type", "lib")
    assert done.returncode == 0, done.stderr
    done = rustc(tmp_path, "--test", "-o", "check")
    assert done.returncode == 0, done.stderr
    run = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "1 passed" in run.stdout


@needs_rustc
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "quantized.hsaco is empty"),
        (b"\x7fELF", "quantized.hsaco is truncated"),
        (b"\x7fELF" * 20, "quantized.hsaco is not an offload bundle"),
    ],
)
def test_rust_refuses_another_file(content: bytes, message: str, bundle: bytes, tmp_path: Path) -> None:
    (tmp_path / "quantized.hsaco").write_bytes(content)
    stub = export("rocm-rs", tmp_path / "right", bundle)[1]
    shutil.copy(stub, tmp_path)
    done = rustc(tmp_path, "--crate-type", "lib")
    assert done.returncode != 0
    assert message in done.stderr


@needs_rustc
def test_rust_misses_a_name(bundle: bytes, tmp_path: Path) -> None:
    hsaco = export("rocm-rs", tmp_path, bundle)[0]
    hsaco.write_bytes(bundle.replace(b"mul_mat_vec_q4_0_q8_1_hip2", b"mul_mat_vec_q4_0_q8_1_hipX"))
    assert rustc(tmp_path, "--test", "-o", "check").returncode == 0
    run = subprocess.run([tmp_path / "check"], capture_output=True, text=True)
    assert run.returncode != 0
    assert "mul_mat_vec_q4_0_q8_1_hip2 is not in every target" in run.stdout


@pytest.mark.parametrize("compiler", C_COMPILERS)
def test_c(compiler: str, bundle: bytes, tmp_path: Path) -> None:
    folder, program = tmp_path / "exported", tmp_path / "program"
    export("c", folder, bundle)
    (tmp_path / "main.c").write_text(PROGRAM)
    command = [compiler, "-Wall", "-Wextra", "-Werror", f"-I{folder}", "main.c", folder / "quantized.c", "-o", program]
    if compiler.endswith("++"):
        command[1:1] = ["-x", "c++"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = subprocess.run([program], capture_output=True)
    assert run.returncode == 0
    assert run.stdout.decode().split() == required_names()
    assert run.stderr == bundle


@pytest.mark.parametrize("compiler", C_COMPILERS[:3])
def test_c_refuses_an_empty_file(compiler: str, bundle: bytes, tmp_path: Path) -> None:
    export("c", tmp_path, bundle)[0].write_bytes(b"")
    done = subprocess.run([compiler, "-c", "quantized.c"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "quantized.hsaco is empty or truncated" in done.stderr


def test_c_compiles_with_the_packages_own_clang(bundle: bytes, tmp_path: Path) -> None:
    folder, to = tmp_path / "elsewhere", tmp_path / "o"
    files = export("c", folder, bundle)
    moved = tmp_path / "moved.hsaco"
    files[0].rename(moved)
    flags = ["-target", "aarch64-linux-gnu", "-Wall", "-Werror", "-fPIC", f'-DQUANTIZED_HSACO="{moved}"']
    zig.clang([*flags, "-c", folder / "quantized.c", "-o", to], "compiling")
    assert bundle in to.read_bytes()


def test_a_bundle_with_errors_is_not_exported(tmp_path: Path) -> None:
    text = source(only("mul_mat_q4_0", lambda t: t.replace(", int nrows_dst", "")))
    blob = pack(compiled(text, tmp_path / "mutant", "gfx1100"))
    with pytest.raises(InvalidCodeObjectError, match="does not pass verify: gfx1100 mul_mat_q4_0 takes 7 arguments"):
        export("c", tmp_path / "c", blob)
    with pytest.raises(InvalidCodeObjectError, match="name profile hip, not of cuda"):
        export("rocm-rs", tmp_path / "c", pack(right_amd()), profile="cuda")
    assert not (tmp_path / "c").exists()


def test_the_bundle_holds_the_targets_that_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the installation holds is taken, the rest is compiled."""
    (tmp_path / "gfx1100.hsaco").write_bytes(right()["gfx1100"])
    monkeypatch.setattr(module, "QUANTIZED", CodeObjects(tmp_path))
    built: list[tuple[list[str], str]] = []

    def build(targets: list[object], folder: Path, *, profile: str, progress: object) -> list[Path]:
        built.append(([str(t.name) for t in targets], profile))  # type: ignore[attr-defined]
        (folder / "gfx90a.hsaco").write_bytes(right()["gfx90a"])
        return [folder / "gfx90a.hsaco"]

    monkeypatch.setattr(module, "build", build)
    targets = [gpu_target("gfx1100"), gpu_target("gfx90a")]
    assert unpack(amd_bundle(targets)) == right_amd()
    assert unpack(amd_bundle(targets[:1])) == {"gfx1100": right()["gfx1100"]}
    assert built == [(["gfx90a"], "hip")]
    amd_bundle(targets[1:], "cuda")
    assert built[1:] == [(["gfx90a"], "cuda")]


def test_the_command(tmp_path: Path) -> None:
    held = [t for t in QUANTIZED.targets() if t.startswith("gfx")][:2]
    if not held:
        pytest.skip("this installation holds no AMD code objects")
    args = [word for t in held for word in ("--target", t)]
    for kind in ("rocm-rs", "c"):
        result = call(kind, tmp_path / kind, *args)
        assert result.exit_code == 0
        assert result.output.splitlines()[0] == str(tmp_path / kind / "quantized.hsaco")
        assert sorted(unpack((tmp_path / kind / "quantized.hsaco").read_bytes())) == sorted(held)
    assert "AMD targets only, not sm_80" in call("c", tmp_path, "--target", "sm_80").output
    assert "unknown target 'gfx110'" in call("c", tmp_path, "--target", "gfx110").output
