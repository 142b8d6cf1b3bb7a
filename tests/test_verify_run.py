"""verify --run: kernels are launched on a device, or simulated, and compared with what they must compute."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

import command_line
from code_objects import (
    assembled,
    right,
    right_amd,
)
from hipquant import wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.codeobjects.bundle import pack
from hipquant.driver import Device
from hipquant.errors import DeviceNotFoundError, DriverError
from hipquant.toolchain import gpu, launch_check
from hipquant.toolchain.cases import Case
from hipquant.toolchain.launch_check import Runner

call = partial(command_line.call, "verify")
VICTIM = "mul_mat_vec_q4_0_q8_1_hip2"
ROW = wiring.kernel(VICTIM)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Only some kernels are run."""
    names = ["quantize_q8_1", "dequantize_block_q4_0_f16", VICTIM, "get_rows_q6_K"]
    real = launch_check.kernels_to_run
    monkeypatch.setattr(launch_check, "kernels_to_run", lambda p, f="hip": [k for k in real(p, f) if k.name in names])
    return names


def cpu_object(cpu: Device) -> Path:
    """The file that this processor runs."""
    return next(p for p in QUANTIZED.files() if p.name == f"cpu-{cpu.target.name}.so")


def test_every_kernel_that_has_cases_is_run() -> None:
    names = [k.name for k in wiring.TABLE]
    kernels = launch_check.kernels_to_run(names)
    assert len(kernels) == 123 + 13
    assert launch_check.kernels_to_run([VICTIM, "theirs", "silu_mul_f32"]) == [ROW]
    assert [k.name for k in launch_check.kernels_to_run([VICTIM.replace("hip", "cuda")], "cuda")] == [
        VICTIM.replace("hip", "cuda")
    ]


def test_a_cpu_object_is_run(few: list[str], cpu: Device) -> None:
    result = call(cpu_object(cpu), "--run")
    assert result.exit_code == 0
    assert "running 4 kernels" in result.output
    assert "0 errors" in result.output


def test_a_mistake_that_shows_when_it_runs(cpu: Device) -> None:
    """The kernel at fault, the case and the complaint are told; the others pass."""
    right_one = launch_check.on_device(cpu, QUANTIZED)

    def half(case: Case) -> None:
        found = case.params[case.output]
        assert isinstance(found, np.ndarray)
        before = found.copy()
        right_one(case)
        if case.kernel.name == VICTIM:
            found[1::2] = before[1::2]

    kernels = launch_check.kernels_to_run(["quantize_q8_1", VICTIM, "get_rows_f32"])
    (finding,) = launch_check.run(kernels, Runner("half a device", half))
    assert (finding.severity, finding.stage, finding.target, finding.kernel) == (
        "error",
        "run",
        "half a device",
        VICTIM,
    )
    assert "not written" in finding.message


def test_a_code_object_that_is_not_loaded_ends_the_run(cpu: Device, tmp_path: Path) -> None:
    shared = assembled(
        f".globl hq_probe\n.type hq_probe,@function\nhq_probe: ret\n.globl {VICTIM}\n", tmp_path, link=True
    )
    kernels = launch_check.kernels_to_run(["quantize_q8_1", VICTIM])
    runner = Runner("this processor", launch_check.on_device(cpu, shared[:200]))
    first, rest = launch_check.run(kernels, runner)
    assert "damaged" in first.message
    assert "1 more kernels were not run" in rest.message


def test_a_driver_that_fails_ends_the_run() -> None:
    def refuse(case: Case) -> None:
        raise DriverError("hipModuleLaunchKernel", 700, "hipErrorIllegalAddress", case.kernel.name)

    kernels = launch_check.kernels_to_run(["quantize_q8_1", VICTIM, "get_rows_f32"])
    first, rest = launch_check.run(kernels, Runner("a device", refuse))
    assert "hipErrorIllegalAddress" in first.message
    assert "2 more kernels were not run" in rest.message


def test_a_gpu_is_used_where_there_is_one(
    few: list[str], cpu: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A driver that runs the CPU's kernels in place of the file's: the file's bytes reach it, and every launch."""
    asked: list[tuple[str, object]] = []

    def fake(kind: str, code_object: object) -> Runner:
        def run(case: Case) -> None:
            asked.append((kind, code_object))
            launch_check.on_device(cpu, QUANTIZED)(case)

        return Runner("a GPU", run)

    monkeypatch.setattr(launch_check, "gpu_runner", fake)
    (tmp_path / "right.hsaco").write_bytes(pack(right_amd()))
    result = call(tmp_path / "right.hsaco", "--run")
    assert result.exit_code == 0
    assert "running 3 kernels: a GPU" in result.output
    assert set(asked) == {("hip", pack(right_amd()))}
    (tmp_path / "right.ptx").write_bytes(right()["sm_90a"])
    assert call(tmp_path / "right.ptx", "--run").exit_code == 0
    assert asked[-1] == ("cuda", right()["sm_90a"])


def test_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stranger's machine code cannot be run without one: that is said, and is not a success."""
    import hipquant.driver

    def missing(name: object = "auto") -> Device:
        raise DeviceNotFoundError("no device")

    monkeypatch.setattr(hipquant.driver, "device", missing)
    (tmp_path / "right.hsaco").write_bytes(pack(right_amd()))
    result = call(tmp_path / "right.hsaco", "--run")
    assert result.exit_code == 1
    assert "there is no GPU for gfx1100 gfx90a here" in result.output
    assert "my_kernels.hip --run" in result.output


def test_a_source_is_simulated(tmp_path: Path) -> None:
    """On waves of 32 and of 64, with no GPU: a kernel that leaves out rows is told apart from one that does not."""
    name = "dequantize_mul_mat_vec_q8_0_hip"
    right_one = (gpu.SOURCES / "get_rows.hip").read_text()
    (tmp_path / "mine.hip").write_text(
        right_one + f"\n{wiring.kernel(name).signature.replace('void', 'HQ_KERNEL(32)', 1)} {{}}\n"
    )
    result = call(tmp_path / "mine.hip", "--run")
    assert result.exit_code == 1
    assert "running 14 kernels: simulated, waves of 64" in result.output
    lines = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert name in lines[-1]
    assert "not written" in lines[-1]
    assert "simulated, waves of 32, simulated, waves of 64" in lines[-1]
    assert "is a source" in call(tmp_path / "mine.hip").output
    (tmp_path / "none.hip").write_text('#include "device.h"\nHQ_KERNEL(32) mine(float* x) { *x = 1; }\n')
    assert "defines no kernel of the wiring table" in call(tmp_path / "none.hip", "--run").output
    (tmp_path / "bad.hip").write_text("this is not C++\n")
    assert "compiling bad.hip for the simulator failed" in call(tmp_path / "bad.hip", "--run").output
