"""The README's Python runs as it stands, and what it names is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import hipquant as hq
from hipquant.quants import WEIGHT_TYPES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_blocks_run(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block.replace('load("model.gguf")', "load()"), "README.md", "exec"), {})
    assert "Traceback" not in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))):
        text = (ROOT / name).read_text()
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name}: {target}"


def test_figures_are_those_of_the_results() -> None:
    """Each row of the table of speeds is what the kept result says."""
    result = json.loads((ROOT / "benchmarks" / "results" / "cpu-models-2-cores.json").read_text())
    assert f"read ceiling of {result['read_ceiling_GB/s']:.0f} GB/s" in " ".join(README.split())
    for row in result["models"]:
        prompt, generation = row["prompt 128"], row["generation 32"]
        cells = [
            f"{prompt['hipquant']['median']:.0f}",
            f"{prompt['llama.cpp']['median']:.0f}",
            f"{prompt['ratio']:.2f}",
            f"{generation['hipquant']['median']:.1f}",
            f"{generation['llama.cpp']['median']:.1f}",
            f"{generation['ratio']:.2f}",
            f"{generation['fraction_of_ceiling']:.0%}",
        ]
        assert " | ".join(cells) in README, row["model"]


def test_gpu_figures_are_those_of_the_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "gpu-kernels-h200.json").read_text())
    rows = {(r["kernel"], r["type"], r["shape"]): r for r in result["rows"]}
    assert f"read ceiling of {result['read_ceiling_GB/s']:.0f} GB/s of the same run" in " ".join(README.split())
    for t in (t.name for t in WEIGHT_TYPES):
        cells = [t]
        for shape in ("4096x14336", "32000x4096"):
            one = rows["mul_mat_vec 1", t, shape]
            cells += [f"{one['gbs']:.0f} ({one['fraction']:.0%})", f"{one['to_candle']:.2f}"]
        eight, matrix = rows["mul_mat_vec 8", t, "4096x14336"], rows["mul_mat", t, "4096x4096x512"]
        cells += [
            f"{eight['us']:.1f}",
            f"{eight['to_candle']:.2f}",
            f"{matrix['tops']:.0f}",
            f"{matrix['to_candle']:.2f}",
        ]
        assert f"| {' | '.join(cells)} |" in README, t


def test_figures_of_gpu_models_are_those_of_the_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "gpu-models-h200.json").read_text())
    assert f"read ceiling of {result['read_ceiling_GB/s']:.0f} GB/s of the same run" in " ".join(README.split())
    assert len(result["models"]) == 8
    for model in result["models"]:
        size, _, kind = model["model"].removesuffix(".gguf").rpartition("-")
        cells = [f"{size} {kind.replace('q', 'Q', 1)}"]
        for test in ("decode", "batch 8", "prompt 512", "prompt 2048"):
            share = f" ({model[test]['fraction_of_ceiling']:.0%})" if test == "decode" else ""
            cells += [f"{model[test]['hipquant']['median']:.0f}{share}", f"{model[test]['ratio']:.2f}"]
        assert f"| {' | '.join(cells)} |" in README


def test_figures_of_the_engines_products_are_those_of_the_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "gpu-engine-h200.json").read_text())
    assert f"read ceiling of {result['read_ceiling_GB/s']:.0f} GB/s of the same run" in " ".join(README.split())
    assert len(result["rows"]) == 4 * len(WEIGHT_TYPES)
    for t in WEIGHT_TYPES:
        found = {(r["kind"], r["nbytes"] > 50e6): r for r in result["rows"] if r["type"] == t.name}
        keys = [(kind, large) for kind in ("stored", "normed") for large in (False, True)]
        cells = [t.name, *(f"{found[key]['gbs']:.0f} ({found[key]['fraction']:.0%})" for key in keys)]
        assert f"| {' | '.join(cells)} |" in README


def test_figures_of_quantizing_are_those_of_the_result() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "quantize-2-cores.json").read_text())
    assert len(result["types"]) == 5
    for row in result["types"]:
        ours, theirs = row["hipquant"], row["llama.cpp"]
        cells = [row["type"]]
        for time in ("seconds", "processor_seconds"):
            cells += [f"{ours[time]['median']:.1f}", f"{theirs[time]['median']:.1f}"]
        cells += [f"{ours['peak_bytes'] / 2**20:.0f}", f"{ours['rms'] / theirs['rms']:.3f}"]
        assert f"| {' | '.join(cells)} |" in README


def test_the_framework_functions_are_all_named() -> None:
    for name in ("quantize_q8_1", "dequantize_f32", "dequantize_f16", "dequantize_mul_mat_vec"):
        assert callable(getattr(hq.ops, name))
        assert f"`{name}`" in README
