"""verify: right code objects pass; each mistake is reported by name, with what to do about it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import command_line
from code_objects import (
    assembled,
    compiled,
    cubin,
    host_object,
    only,
    right,
    right_amd,
    source,
)
from hipquant import wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.codeobjects.bundle import pack
from hipquant.toolchain import gpu
from hipquant.toolchain.inspect import INSTALLED, Facts, Inspection, KernelInfo, inspect, inspect_installed
from hipquant.toolchain.verify import Finding, check, required_names, summary

call = partial(command_line.call, "verify")


LOCAL_ARRAY = "volatile float local[64]; local[n & 63] = 1; *x = local[(n + 1) & 63]"
VICTIM = "mul_mat_vec_q4_0_q8_1_hip2"
ROW = wiring.kernel(VICTIM)


def findings(blob: bytes, **how: Any) -> list[Finding]:
    return check(inspect(blob), **how)


def errors(found: list[Finding]) -> list[tuple[str, str, str]]:
    return [(f.target, f.kernel, f.message) for f in found if f.severity == "error"]


def changed(change: Callable[[KernelInfo], KernelInfo], target: str = "gfx1100") -> list[Finding]:
    """What is found if a kernel of a right code object is described otherwise."""
    found = inspect(right()[target])
    found.targets[target] = [change(k) if k.name == VICTIM else k for k in found.targets[target]]
    return check(found)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("verify")


# What is right


@pytest.mark.parametrize("target", ["gfx1100", "gfx90a", "sm_90a"])
def test_right(target: str) -> None:
    found = inspect(right()[target], instructions=True)
    assert check(found) == []
    assert summary(found) == "123 of 123 names in 1 target"


def test_a_right_bundle(folder: Path) -> None:
    (folder / "right.hsaco").write_bytes(pack(right_amd()))
    result = call(folder / "right.hsaco")
    assert (result.exit_code, result.output) == (0, "123 of 123 names in 2 targets; 0 errors, 0 warnings\n")
    assert json.loads(call(folder / "right.hsaco", "--json").output)["findings"] == []


def test_what_this_installation_embeds() -> None:
    found = inspect_installed()
    # Attention holds more scalars than some AMD targets have registers for: they go to lanes of vector registers.
    told = {(f.severity, f.kernel, f.message.partition(" ")[0]) for f in check(found)}
    names = {k.name for k in wiring.GPU_ENGINE if k.name.startswith("attention_")}
    assert told <= {("warning", name, "spills") for name in names}
    assert summary(found) == f"123 of 123 names in {len(found.targets)} targets"
    assert call().exit_code == 0


def test_required_names() -> None:
    assert len(required_names("hip")) == len(required_names("cuda")) == 123
    assert VICTIM in required_names("hip")
    assert VICTIM.replace("hip", "cuda") in required_names("cuda")


# The engine's code objects


def engine_source(change: Callable[[wiring.Kernel, str], str] | None = None) -> str:
    return source(change, wiring.GPU_ENGINE)


@pytest.fixture(scope="session")
def right_engine(folder: Path) -> dict[str, bytes]:
    return compiled(engine_source(), folder / "engine", "gfx1100", "gfx90a", "sm_90a")


def test_an_engine_that_is_right(right_engine: dict[str, bytes], folder: Path) -> None:
    n = len(wiring.GPU_ENGINE)
    for blob in right_engine.values():
        found = inspect(blob)
        assert check(found) == check(found, "cuda") == []
        assert summary(found) == f"{n} of {n} names in 1 target"
    (folder / "x.engine.hsaco").write_bytes(right_engine["gfx1100"])
    result = call(folder / "x.engine.hsaco", "--run")
    assert (result.exit_code, result.output) == (
        0,
        f"{n} kernels of the engine are read only, as there are no cases to run them on\n"
        f"{n} of {n} names in 1 target; 0 errors, 0 warnings\n",
    )


@pytest.mark.parametrize(
    ("change", "severity", "message"),
    [
        (lambda t: "", "error", "is missing"),
        (
            lambda t: t.replace(", int stride)", ", int stride, int more)"),
            "error",
            "takes 5 arguments, is launched with 4",
        ),
        (lambda t: t.replace("HQ_KERNEL(256)", "HQ_KERNEL(64)"), "error", "takes blocks of at most 64 threads, is"),
        (
            lambda t: t.replace("*(int*)x = (int)1", LOCAL_ARRAY),
            "warning",
            r"uses \d+ bytes of scratch memory a lane",
        ),
    ],
    ids=["missing", "arguments", "workgroup", "scratch"],
)
def test_an_engine_that_is_wrong(change: Callable[[str], str], severity: str, message: str, tmp_path: Path) -> None:
    blob = compiled(engine_source(only("add_bias_rows_f32", change)), tmp_path, "gfx1100")["gfx1100"]
    (finding,) = findings(blob)
    assert (finding.severity, finding.kernel) == (severity, "add_bias_rows_f32")
    assert re.match(message, finding.message)


def test_an_installation_without_an_engine(right_engine: dict[str, bytes]) -> None:
    """A target that lacks the file is one finding; one whose file lacks a kernel is told which."""

    def installed(**engines: list[KernelInfo]) -> list[tuple[str, str, str, str]]:
        targets = {t: inspect(right()[t]).targets[t] + engines.get(t, []) for t in right()}
        found = Inspection("the installation", INSTALLED, targets | {"x86-64-v3": cpu_kernels})
        assert summary(found) == "123 of 123 names in 4 targets"
        return [(f.target, f.kernel, f.message, f.fix) for f in check(found)]

    cpu_kernels = [KernelInfo(k.name) for k in wiring.CPU_KERNELS]
    engines = {t: inspect(blob).targets[t] for t, blob in right_engine.items()}
    assert installed(**engines) == []
    message = "has no code object of the engine: no model runs on it"
    fix = "hipquant build --target {}"
    assert installed(**engines | {"gfx90a": []}) == [("gfx90a", "", message, fix.format("gfx90a"))]
    assert installed() == [(t, "", message, fix.format(t)) for t in right()]
    some = {t: [k for k in kernels if k.name != "add_bias_rows_f32"] for t, kernels in engines.items()}
    assert [(t, name, said) for t, name, said, _ in installed(**some)] == [
        (t, "add_bias_rows_f32", "is missing") for t in right()
    ]


# Mistake 1: a name that one target has and another has not


def test_a_name_that_is_missing_in_one_target(folder: Path) -> None:
    mutant = compiled(
        source(only(VICTIM, lambda text: f"#ifndef __gfx90a__\n{text}#endif\n")), folder / "one", "gfx1100", "gfx90a"
    )
    (finding,) = findings(pack(mutant))
    assert (finding.severity, finding.stage) == ("error", "static")
    assert (finding.target, finding.kernel, finding.message) == ("gfx90a", VICTIM, "is missing, though gfx1100 has it")
    assert "every target" in finding.fix
    (folder / "one.hsaco").write_bytes(pack(mutant))
    result = call(folder / "one.hsaco")
    assert result.exit_code == 1
    assert re.search(rf"error +\| static +\| {VICTIM} +\| gfx90a +\| is missing", result.output)
    assert "122 to 123 of 123 names in 2 targets; 1 error, 0 warnings" in result.output
    assert call(folder / "one.hsaco", "--target", "gfx1100").exit_code == 0


def test_a_name_that_is_missing_everywhere_tells_the_nearest(folder: Path) -> None:
    text = source(only(VICTIM, lambda text: text.replace(VICTIM, "mul_mat_vec_q4_O_q8_1_hip2")))
    mutant = compiled(text, folder / "o", "gfx1100")
    (finding,) = findings(mutant["gfx1100"])
    assert (finding.kernel, finding.message) == (VICTIM, "is missing; nearest: mul_mat_vec_q4_O_q8_1_hip2")


def test_a_name_that_is_mangled(folder: Path) -> None:
    text = source(only(VICTIM, lambda text: text.replace("HQ_KERNEL(128)", "__attribute__((global)) void")))
    (finding,) = findings(compiled(text, folder / "cpp", "gfx1100")["gfx1100"])
    assert finding.message.startswith(f"is there as _Z{len(VICTIM)}{VICTIM}")
    assert finding.fix == 'declare it extern "C"'


def test_a_strangers_own_kernel_that_is_missing_in_one_target() -> None:
    found = inspect(pack(right_amd()))
    found.targets["gfx90a"] = [*found.targets["gfx90a"], KernelInfo("theirs")]
    (finding,) = check(found)
    assert (finding.target, finding.message) == ("gfx1100", "1 kernels of other targets are missing: theirs")


def test_a_name_twice(folder: Path) -> None:
    found = inspect(pack(right_amd()))
    found.targets["gfx90a"] *= 2
    (finding,) = check(found)
    assert finding.message.startswith("123 kernels are there more than once: dequantize_block_q2_K_f16, ")


def test_further_families_are_checked_where_they_are_found() -> None:
    found = inspect(pack(right_amd()))
    found.targets["gfx90a"] = [*found.targets["gfx90a"], KernelInfo("get_rows_q4_0", [])]
    missing, args = check(found)
    assert (missing.target, missing.kernel) == ("gfx1100", "get_rows_q4_0")
    assert (args.target, args.message) == ("gfx90a", "takes 0 arguments, is launched with 5")


# Mistake 2: an argument list that is longer or shorter than what it is launched with


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace(", int nrows_dst", ""), "takes 6 arguments, is launched with 7"),
        (lambda t: t.replace("int nrows_dst", "int nrows_dst, int more"), "takes 8 arguments, is launched with 7"),
        (
            lambda t: t.replace("int ncols_x", "int64_t ncols_x"),
            "argument 4 is a value of 8 bytes at byte 24, is launched with int ncols_x: a value of 4 bytes at byte 24",
        ),
        (
            lambda t: t.replace("const void* y, float* dst", "float* dst, uint16_t y"),
            "argument 3 is a value of 2 bytes at byte 16, is launched with float* dst: a pointer of 8 bytes at byte 16",
        ),
    ],
    ids=["one less", "one more", "another size", "another kind"],
)
@pytest.mark.parametrize("target", ["gfx1100", "sm_90a"])
def test_another_argument_list(
    change: Callable[[str], str], message: str, target: str, folder: Path, tmp_path: Path
) -> None:
    (finding,) = findings(compiled(source(only(VICTIM, change)), tmp_path, target)[target])
    assert (finding.severity, finding.target, finding.kernel, finding.message) == ("error", target, VICTIM, message)
    assert finding.fix == f"declare it as {ROW.signature}"


def test_an_address_of_unknown_kind_passes() -> None:
    """Neither a cubin nor nvcc's PTX tells a pointer from a number of 64 bits; a number of 32 bits is told."""

    def untold(k: KernelInfo) -> KernelInfo:
        assert k.args is not None
        return replace(k, args=[replace(a, kind="" if a.size == 8 else a.kind) for a in k.args])

    assert changed(untold) == []


# Mistake 3: a host object where a code object is expected


def test_a_host_object_with_a_bundle_inside(tmp_path: Path) -> None:
    path = tmp_path / "quantized.o"
    path.write_bytes(host_object([pack(right_amd())], tmp_path))
    (finding,) = findings(path.read_bytes())
    assert finding.severity == "error"
    assert finding.message.startswith("this is an x86 or ARM host object, with a bundle for gfx1100 gfx90a inside")
    assert "--genco" in finding.fix
    assert "--only-section=.hip_fatbin" in finding.fix
    result = call(path)
    assert result.exit_code == 1
    assert "--genco" in result.output


def test_a_host_object_without_device_code(tmp_path: Path) -> None:
    (finding,) = findings(assembled(f".globl {VICTIM}\n.type {VICTIM},@function\n{VICTIM}: ret\n", tmp_path))
    assert finding.message == "this is an x86 or ARM host object, which is not loaded as a code object"
    assert "--genco" in finding.fix


CLANG = next((c for c in ("clang++-22", "clang++-21", "clang++-20", "clang++-19", "clang++") if shutil.which(c)), "")


@pytest.mark.skipif(not CLANG, reason="no clang beside the package's own is installed")
def test_the_host_object_of_a_compiler(tmp_path: Path) -> None:
    """What the usual command without --genco makes of the right source."""
    (tmp_path / "k.hip").write_text(
        "typedef struct { unsigned x, y, z; } dim3;\n"
        'extern "C" int hipLaunchKernel(const void*, dim3, dim3, void**, unsigned long, void*);\n'
        'extern "C" int __hipPopCallConfiguration(dim3*, dim3*, unsigned long*, void**);\n'
        "#ifdef __HIP_DEVICE_COMPILE__\n" + source() + "#else\n"
        f'extern "C" __attribute__((global)) {ROW.signature} {{}}\n#endif\n'
    )
    command = [CLANG, "-x", "hip", "--offload-arch=gfx90a", "-O2", "-nogpuinc", "-nogpulib", f"-I{gpu.SOURCES}"]
    done = subprocess.run([*command, "-c", "k.hip", "-o", "k.o"], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{CLANG} cannot compile for gfx90a: {done.stderr.strip()[:200]}")
    first, *others = findings((tmp_path / "k.o").read_bytes())
    assert "host object, with a bundle for gfx90a inside" in first.message
    assert others == []


# What else is found


def test_launch_bounds(folder: Path) -> None:
    text = source(only(VICTIM, lambda text: text.replace("HQ_KERNEL(128)", "HQ_KERNEL(64)")))
    for target, blob in compiled(text, folder / "bounds", "gfx1100", "sm_90a").items():
        assert errors(findings(blob)) == [(target, VICTIM, "takes blocks of at most 64 threads, is launched with 128")]


def test_what_makes_a_kernel_slow(folder: Path) -> None:
    slow = "volatile float local[64]; local[nrows_x & 63] = 1; *dst += local[ncols_x & 63]; }"
    text = source(only(VICTIM, lambda text: text.replace("}", slow)))
    found = findings(compiled(text, folder / "slow", "gfx1100")["gfx1100"])
    assert [(f.severity, f.kernel) for f in found] == [("warning", VICTIM)]
    assert re.match(r"uses \d+ bytes of scratch memory a lane", found[0].message)
    (folder / "slow.hsaco").write_bytes(compiled(text, folder / "slow", "gfx1100")["gfx1100"])
    assert call(folder / "slow.hsaco").exit_code == 0, "slow is not wrong"
    assert "0 errors, 1 warning" in call(folder / "slow.hsaco").output


def test_spills() -> None:
    (finding,) = changed(lambda k: replace(k, vgpr_spills=3, sgpr_spills=4))
    assert (finding.severity, finding.message) == ("warning", "spills 7 registers: it is slow")


def test_no_dot_product() -> None:
    none = Facts(dot4=0, matrix=0, widest_load=16, loads=4, instructions=100)
    for target in ("gfx1100", "gfx90a", "sm_90a"):
        (finding,) = changed(lambda k: replace(k, facts=none), target)
        assert (finding.severity, finding.kernel) == ("warning", VICTIM)
        assert "no int8 dot product" in finding.message
        assert changed(lambda k: replace(k, facts=replace(none, matrix=8)), target) == []
    found = Inspection(
        "x",
        "AMD code object",
        {"gfx900": [replace(k, facts=none, wave=64) for k in inspect(right()["gfx90a"]).targets["gfx90a"]]},
    )
    assert check(found) == [], "gfx900 has no dot product"


def test_wave_size() -> None:
    for target, wave in (("gfx1100", 64), ("gfx90a", 32), ("sm_90a", 64)):
        (finding,) = changed(lambda k, wave=wave: replace(k, wave=wave), target)  # type: ignore[misc]
        assert (finding.severity, finding.target) == ("error", target)
        assert f"waves of {wave} lanes, expected {96 - wave}" in finding.message


def test_a_kernel_that_is_not_exported() -> None:
    found = changed(lambda k: replace(k, loadable=False))
    assert errors(found) == [("gfx1100", VICTIM, "is described but not exported")]


def test_problems_of_an_image_are_findings() -> None:
    assert any("does not agree" in m for _, _, m in errors(findings(pack({"gfx1101": right()["gfx1100"]}))))


def test_profiles(folder: Path) -> None:
    cuda = source(lambda k, text: text.replace("_hip", "_cuda") if "_hip" in k.name else text)
    blob = compiled(cuda, folder / "cuda", "gfx1100")["gfx1100"]
    assert findings(blob, profile="cuda") == []
    (finding,) = findings(blob)
    assert "those of the name profile cuda, not of hip" in finding.message
    assert "--profile cuda" in finding.fix
    (finding,) = findings(right()["gfx1100"], profile="cuda")
    assert "--profile hip" in finding.fix
    (folder / "cuda.hsaco").write_bytes(blob)
    assert call(folder / "cuda.hsaco").exit_code == 1
    assert call(folder / "cuda.hsaco", "--profile", "cuda").exit_code == 0


def test_targets_that_are_asked_for() -> None:
    found = inspect(pack({"gfx90a:xnack-": right()["gfx90a"], "gfx1100": right()["gfx1100"]}))
    assert check(found, targets=["gfx90a"]) == []
    (finding,) = check(found, targets=["gfx1201", "gfx1100"])
    assert (finding.target, finding.fix) == ("gfx1201", "hipquant build --target gfx1201")
    assert "it holds gfx1100 gfx90a:xnack-" in finding.message


def test_many_findings_stay_readable(folder: Path) -> None:
    """Somebody's own kernels, in two targets: 123 names are missing in each."""
    other = compiled(
        '#include "device.h"\nHQ_KERNEL(64) mine(float* x) { *x = 1; }\n', folder / "other", "gfx1100", "gfx90a"
    )
    (folder / "other.hsaco").write_bytes(pack(other))
    result = call(folder / "other.hsaco")
    assert result.exit_code == 1
    assert len(result.output.splitlines()) < 12
    assert "and 120 more" in result.output
    assert "0 of 123 names in 2 targets; 246 errors" in result.output


def test_cubin_and_cpu_objects_tell_what_they_can(tmp_path: Path) -> None:
    assert {m for _, _, m in errors(findings(cubin(tmp_path)))} == {"is missing"}
    for path in (p for p in QUANTIZED.files() if p.name.startswith("cpu-")):
        assert check(inspect(path.read_bytes(), path.name)) == []


def test_damaged_files_are_refused_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "cut.hsaco").write_bytes(pack(right_amd())[:50_000])
    result = call(tmp_path / "cut.hsaco")
    assert result.exit_code == 1
    assert "truncated" in result.output
    assert "Traceback" not in result.output
