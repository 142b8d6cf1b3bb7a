"""benchmarks/gpu_models.py without a GPU: its checks, the files, and llama.cpp played by a script."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hipquant as hq
from hipquant.models import Model
from hipquant.quantize import file_type
from models import write_llama
from simulated_gpu import simulated_gpu

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # behind tests/, which has a models.py too
import common
import gpu_models

SMALL = {"n_vocab": 96, "n_embd": 64, "n_head": 4, "n_kv": 2, "n_ff": 96, "n_layer": 2, "context": 4096}
CEILING = 50e9
ROW = {"build_number": 7, "build_commit": "abc", "backends": "CUDA", "gpu_info": "a GPU"}
LLAMA_BENCH = f"""#!{sys.executable}
import json, sys
from pathlib import Path
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with (Path(__file__).parent / "calls").open("a") as calls:
    print(json.dumps(given), file=calls)
sizes = [(int(p), 0) for p in given["-p"].split(",")] + [(0, int(given["-n"]))]
rows = [dict({ROW!r}, n_prompt=p, n_gen=n, samples_ts=[float(p + n)] * int(given["-r"])) for p, n in sizes if p or n]
print(json.dumps(rows))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a small model; commands that the benchmark starts may come from here."""
    (tmp_path / "models").mkdir()
    write_llama(tmp_path / "models" / "tiny-q4_0.gguf", type="Q4_0", **SMALL)
    return tmp_path


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark on the CPU; what it kept."""
    monkeypatch.setattr(common, "read_ceiling", lambda *_: CEILING)
    monkeypatch.setattr(common, "RESULTS", folder / "results")

    def main(*options: str) -> dict[str, Any]:
        sizes = ["--rounds", "2", "--repeat", "1", "--keep", "found"]
        given = ["--device", "cpu", "--models", str(folder / "models"), *sizes, *options]
        monkeypatch.setattr(sys, "argv", ["gpu_models.py", *given])
        try:
            gpu_models.main()
        finally:
            kept = folder / "results" / "found.json"
            found = json.loads(kept.read_text()) if kept.exists() else {}
        return dict(found)

    return main


def program(folder: Path, text: str) -> Path:
    (folder / "llama").mkdir()
    path = folder / "llama" / "llama-bench"
    path.write_text(text)
    path.chmod(0o755)
    return path.parent


def test_a_run_beside_llama_cpp(
    run: Callable[..., dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama, measured = program(folder, LLAMA_BENCH), gpu_models.speeds
    calls = llama / "calls"

    def ours(*given: Any) -> gpu_models.Speeds:
        found = measured(*given)
        with calls.open("a") as file:
            file.write("{}\n")
        return found

    monkeypatch.setattr(gpu_models, "speeds", ours)
    result = run("--model", "tiny:q4_0", "--llama-cpp", str(llama))
    asked = [json.loads(line) for line in calls.read_text().splitlines()]
    assert [(c["-p"], c["-n"], c.get("-b")) if c else "ours" for c in asked] == [
        ("512,2048", "128", None),
        ("256", "0", "8"),
        "ours",
    ] * 2
    assert all(c["-m"].endswith("tiny-q4_0.gguf") and c["-fa"] == "1" for c in asked if c)
    assert str(folder) not in json.dumps(result), "a result names no folder of the machine"
    assert result["demo model"]["against"] == "the CPU"
    assert result["llama.cpp"] == "build 7 (abc), CUDA"
    (row,) = result["models"]
    expected = {"prompt 512": 512, "prompt 2048": 2048, "decode": 128, "with logits": 128, "batch 8": 256}
    for test, speed in expected.items():
        found = row[test]
        assert found["llama.cpp"] == {"median": speed, "min": speed, "max": speed}
        assert found["ratio"] == pytest.approx(found["hipquant"]["median"] / speed)
    for test, tokens in (("decode", 1), ("with logits", 1), ("batch 8", 8)):
        passes = row[test]["hipquant"]["median"] / tokens
        assert row[test]["GB/s"] == pytest.approx(passes * row["weights_bytes"] / 1e9)
        assert row[test]["fraction_of_ceiling"] == pytest.approx(passes * row["weights_bytes"] / CEILING)
    assert 0 < row["first token"]["min"] <= row["first token"]["median"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("#!/bin/sh\necho no cuBLAS >&2\nexit 3\n", "exit code 3: no cuBLAS"),
        ("#!/bin/sh\necho warming up\n", "no JSON, but 'warming up"),
        ("", "did not run"),
        (LLAMA_BENCH.replace("'a GPU'", "''"), "what it measured is the CPU"),
    ],
)
def test_a_peer_that_fails(text: str, said: str, folder: Path) -> None:
    peer = gpu_models.find_llama_bench(program(folder, text), SimpleNamespace(kind="cuda", index=0))  # type: ignore[arg-type]
    assert peer is not None
    with pytest.raises(gpu_models.PeerError, match=said):
        peer.speeds(folder / "models" / "tiny-q4_0.gguf", gpu_models.Plan())


def test_measured_alone(run: Callable[..., dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where llama.cpp is not there, and where it fails in the middle."""
    result = run("--model", "tiny:q4_0", "--llama-cpp", str(folder))
    assert "no llama-bench in" in capsys.readouterr().out
    assert "ratio" not in result["models"][0]["decode"]
    result = run("--model", "tiny:q4_0", "--llama-cpp", str(program(folder, "#!/bin/sh\nexit 1\n")))
    assert "it says nothing; hipquant is measured alone" in capsys.readouterr().out
    (row,) = result["models"]
    assert row["llama.cpp"].startswith("llama-bench failed")
    assert row["decode"]["hipquant"]["median"] > 0
    assert "ratio" not in row["decode"]


@pytest.mark.parametrize("name", ["3b:q4_0", "7b:q9_0", "7b"])
def test_unknown_models(name: str, run: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("--model", name)
    assert f"'{name}' is not SHAPE:TYPE" in capsys.readouterr().err


def test_a_model_that_cannot_be_had(run: Callable[..., dict[str, Any]], folder: Path) -> None:
    """The others are measured all the same."""
    (folder / "models" / "1b-q4_0.gguf").write_bytes(b"half a model")
    with pytest.raises(SystemExit, match="1 of 2 models"):
        run("--model", "1b:q4_0", "tiny:q4_0")
    first, second = json.loads((folder / "results" / "found.json").read_text())["models"]
    assert first["model"] == "1b-q4_0.gguf"
    assert "1b-q4_0.gguf" in first["failed"]
    assert second["decode"]["hipquant"]["median"] > 0


def test_files_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gpu_models.model_file("tiny", file_type("q4_K_M"), tmp_path / "models")
    assert path.name == "tiny-q4_K_M.gguf"
    assert hq.load(path, "cpu", context=8).forward([1, 2], 0).shape == (4096,)
    monkeypatch.setattr(gpu_models, "write", None)
    assert gpu_models.model_file("tiny", file_type("q4_K_M"), tmp_path / "models") == path


def test_limits() -> None:
    """What is meant by each of the default models, and how far its logits may be from the CPU's."""
    models = [gpu_models.model_name(name) for name in gpu_models.MODELS]
    limits = {shape: gpu_models.limit_of(gpu_models.SHAPES[shape]) for shape, _ in models}
    assert limits == dict.fromkeys(("7b", "8b", "1b"), 1e-4) | dict.fromkeys(
        ("gemma2-2b", "qwen3-4b", "qwen3moe-16l", "mixtral-8l"), 1e-3
    )


class Wrong:
    """A model, some of whose results are changed."""

    def __init__(self, model: Model, **changed: Callable[..., Any]) -> None:
        self._model, self._changed = model, changed

    def __getattr__(self, name: str) -> Any:
        true = getattr(self._model, name)
        return (lambda *a, **k: self._changed[name](true(*a, **k))) if name in self._changed else true


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("forward", lambda x: np.where(x.ndim == 1, -x, x), "steps against the CPU: NMSE 4.0e"),
        ("forward", lambda x: np.where(x.ndim == 2, x * np.nan, x), "a long pass against the CPU: NMSE nan"),
        ("forward_batch", lambda x: x[::-1], "a batch against the CPU"),
    ],
)
def test_wrong_results_are_not_timed(name: str, change: Callable[..., Any], said: str, folder: Path) -> None:
    path = folder / "models" / "tiny-q4_0.gguf"
    model = hq.load(path, "cpu", sequences=gpu_models.BATCH)
    with pytest.raises(gpu_models.CheckError, match=said):
        gpu_models.check(Wrong(model, **{name: change}), path)  # type: ignore[arg-type]


def test_other_tokens_than_the_sampler_s_are_not_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = gpu_models.generate

    def other(*given: Any) -> list[int]:
        *tokens, last = true(*given)
        return [*tokens, last ^ 1]

    monkeypatch.setattr(gpu_models, "generate", other)
    path = folder / "models" / "tiny-q4_0.gguf"
    with pytest.raises(gpu_models.CheckError, match="temperature 0.0: token 31 that is generated is"):
        gpu_models.check(hq.load(path, "cpu", sequences=gpu_models.BATCH), path)


def test_another_first_token_is_not_timed(folder: Path) -> None:
    path = folder / "models" / "tiny-q4_0.gguf"
    with pytest.raises(gpu_models.CheckError, match=r"the first token of a new process is \d+, expected -1"):
        gpu_models.first_token(path, hq.device("cpu"), -1)


def test_large_models_are_checked_by_their_own_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not on the CPU, which takes long to load them."""
    path = folder / "models" / "tiny-q4_0.gguf"
    model = hq.load(path, "cpu", sequences=gpu_models.BATCH)
    monkeypatch.setattr(gpu_models, "ON_CPU", 0)
    monkeypatch.setattr(hq, "load", None)
    found = gpu_models.check(model, path)
    assert (found["against"], sorted(found["nmse"])) == ("steps", ["a batch", "a long pass"])
    with pytest.raises(gpu_models.CheckError, match="a long pass against steps"):
        gpu_models.check(Wrong(model, forward=lambda x: -x if x.ndim == 1 else x), path)  # type: ignore[arg-type]


def test_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens drawn on the device, captured steps and batches: all that is timed, on the stand-in GPU."""
    write_llama(tmp_path / "m.gguf", type="F16", **SMALL)  # activations are not rounded: the engines agree closely
    monkeypatch.setattr(gpu_models, "CHECKED", 10)
    monkeypatch.setattr(gpu_models, "DRAWN", 5)
    plan = gpu_models.Plan(prompts=(12,), tokens=4, passes=2, repeat=2)
    with simulated_gpu("cuda", 32) as gpu:
        model = hq.load(tmp_path / "m.gguf", gpu.device, context=plan.context, sequences=gpu_models.BATCH)
        assert model.device_sampling
        checked = gpu_models.check(model, tmp_path / "m.gguf")
        assert checked["against"] == "the CPU"
        assert max(checked["nmse"].values()) > 0, "two engines, not one"
        found = gpu_models.speeds(model, plan)
    assert sorted(found) == ["batch 8", "decode", "prompt 12", "with logits"]
    assert all(len(values) == 2 and min(values) > 0 for values in found.values())
