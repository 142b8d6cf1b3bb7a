"""README's table of what is verified: that of the records and of the objects at hand; what is stale does not count."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest

from hipquant.codeobjects import QUANTIZED
from hipquant.targets import AMD_TARGETS, CPU_TARGETS, GPU_TARGETS, GpuTarget, gpu_target
from hipquant.toolchain.inspect import inspect
from hipquant.toolchain.verify import DOT4_FAMILIES, SIZES
from hipquant.wiring import COMPATIBILITY, KERNELS, kernel

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import verification
from verification import Record

EVERY = {k.name for k in verification.KERNELS}


def built(target: str) -> Path:
    path = QUANTIZED.targets().get(target)
    if path is None:
        pytest.skip(f"{target} is not built: HIPQUANT_TARGETS")
    return path


@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda t: t.name)
def test_static(target: GpuTarget) -> None:
    """Every name with the table's arguments and wave; no scratch, no spills; dot products wherever there are any."""
    path = built(target.name)
    found = {k.name: k for k in inspect(path.read_bytes(), path.name, instructions=True).targets[target.name]}
    assert set(found) == EVERY
    assert len(set(found) & {k.name for k in COMPATIBILITY}) == 123
    for name, info in found.items():
        row = KERNELS[name]
        assert info.args is not None
        assert [a.size for a in info.args] == [SIZES[a.kind] for a in row.args], name
        assert info.wave == target.wave, name
        if target.vendor == "amd":
            assert (info.scratch, info.vgpr_spills, info.sgpr_spills) == (0, 0, 0), name
        assert info.facts is not None, name
        if row.family in DOT4_FAMILIES:
            assert bool(info.facts.dot4 or info.facts.matrix) == target.dot4, name
    assert verification.static(target) == EVERY


def record(kind: str, target: str, sha256: str, names: str = "quantize_q8_1 get_rows_f32") -> Record:
    return Record(kind, target, sha256, names, "2026-11-22", "a tool", "a command")


def test_a_record_counts_for_the_bytes_that_it_names() -> None:
    path = built("gfx1100")
    own, target = hashlib.sha256(path.read_bytes()).hexdigest(), gpu_target("gfx1100")
    now = [record("emulated", "gfx1100", own), record("simulated", "waves of 32", "sources")]
    assert verification.row(target, now, "sources") == ("123 + 13", "1 + 1", "1 + 1", "-")
    assert verification.row(target, now, "changed") == ("123 + 13", "-", "1 + 1", "-")
    stale = [record("emulated", "gfx1100", "0" * 64), record("measured", "gfx1101", own)]
    assert verification.row(target, stale, "sources") == ("123 + 13", "-", "-", "-")
    assert "a tool" in verification.section(now)
    assert "a tool" not in verification.section(stale)


def test_sources_that_change_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hipquant.toolchain import gpu

    for name, text in (("a.hip", "1"), ("b.h", "2")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(gpu, "SOURCES", tmp_path)
    before = verification.sources_hash()
    (tmp_path / "b.h").write_text("3")
    assert verification.sources_hash() != before


def test_the_newest_record_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "records.json"
    old, other = record("measured", "sm_80", "old"), record("measured", "sm_75", "other")
    verification.add_records([old, other], file)
    new = record("measured", "sm_80", "new", "")
    verification.add_records([new], file)
    assert verification.read_records(file) == [other, new]


def test_what_is_wrong_is_no_pass(capsys: pytest.CaptureFixture[str]) -> None:
    """Of two backends, one that writes nothing."""
    rows = [kernel("get_rows_f32"), kernel("mul_mat_vec_q4_0_q8_1_hip2")]
    right = verification.on_device(verification.device("cpu"), QUANTIZED)
    assert verification.passed({"none": lambda case: None, "cpu": right}, rows) == {
        "none": [],
        "cpu": [r.name for r in rows],
    }
    assert "none: mul_mat_vec_q4_0_q8_1_hip2, 5 x 160, 2 columns: rows 0 to 4 (5 of 5) not written" in (
        capsys.readouterr().err
    )


def test_arrays_lie_where_the_case_wants_them() -> None:
    seen = []
    found = verification.device("cpu")

    class Recorder:
        stream = found.stream
        allocate = staticmethod(found.allocate)

        @staticmethod
        def get_or_load_func(name: str, code: object) -> Recorder:
            return Recorder()

        @staticmethod
        def launch(grid: object, block: object, shared: int, stream: object, params: list[object]) -> None:
            seen.append([p.address % 4 for p in params if hasattr(p, "address")])

    *_, case = verification.cases(kernel("mul_mat_vec_q4_0_q8_1_hip1"))
    verification.on_device(Recorder(), QUANTIZED)(case)  # type: ignore[arg-type]
    assert np.array_equal(
        seen, [[o % 4 for o, a in zip(case.offsets, case.params, strict=True) if isinstance(a, np.ndarray)]]
    )


def test_the_readme() -> None:
    """It is what the records and the objects at hand give."""
    for target in (*AMD_TARGETS, *GPU_TARGETS):
        built(target.name)
    if missing := [t.name for t in CPU_TARGETS if QUANTIZED.path(t.filename) is None]:
        pytest.skip(f"{' '.join(missing)} not built: HIPQUANT_TARGETS")
    text = verification.README.read_text()
    assert text == verification.with_section(text, verification.section(verification.read_records()))
