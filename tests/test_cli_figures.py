"""bench, devices and perplexity on the command line."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess

import numpy as np
import pytest

import hipquant
from command_line import COMMAND, call, error_of, json_of, needs_demo
from hipquant.cli.common import table
from hipquant.cli.perplexity import _Score
from vocabulary import TOKENS

# --- bench, devices ---


def test_bench(mute):
    report = json_of("bench", mute, "-p", "9", "-n", "4", "-r", "2", "--batch", "1,3,32")
    assert [r["test"] for r in report["results"]] == ["pp9", "tg4", "batch1 tg4", "batch3 tg4", "batch32 tg4"]
    for result in report["results"]:
        assert len(result["rates"]) == 2
        assert min(result["rates"]) <= result["median"] <= max(result["rates"])
        assert result["rates"][0] > 0
    assert {"model", "device", "threads", "versions"} <= report.keys()
    shown = call("bench", mute, "-p", "9", "-n", "0", "-r", "1").stdout
    assert shown.index("threads") < shown.index("pp9")
    assert "tg" not in shown


def test_a_report_to_send(mute, tmp_path):
    """The device, the sizes and the figures; no path."""
    report = tmp_path / "report.json"
    shown = call("bench", mute, "-p", "9", "-n", "2", "-r", "1", "--batch", "2", "--report", str(report)).stdout
    assert "pp9" in shown
    text = report.read_text()
    found = json.loads(text)
    assert [r["test"] for r in found["results"]] == ["pp9", "tg2", "batch2 tg2"]
    assert found["device"]["code_object"].startswith("x86-64" if platform.machine() == "x86_64" else "aarch64")
    assert sum(found["model"]["bytes_by_type"].values()) >= found["model"]["weights_bytes"] > 0
    assert found["read_ceiling_bytes_per_second"] > 0
    assert found["parts"] == [{"device": "cpu", "layers": 2, "weights_bytes": found["model"]["weights_bytes"]}]
    assert str(tmp_path) not in text
    assert str(mute) not in text
    nowhere = str(tmp_path / "none" / "report.json")
    assert "cannot be written" in error_of(call("bench", mute, "--report", nowhere))


def test_bench_times_no_nonsense(mute, monkeypatch):
    from hipquant.models import Model

    monkeypatch.setattr(Model, "forward", lambda self, *args, **more: np.full(self.n_vocab, np.nan, np.float32))
    assert "not finite" in error_of(call("bench", mute))


def test_devices():
    report = json_of("devices")
    (cpu,) = (d for d in report["devices"] if d["name"] == "cpu")
    device = hipquant.device("cpu")
    assert (cpu["threads"], cpu["target"]) == (device.threads, device.target.name)
    assert cpu["free_memory"] > 1 << 20
    shown = call("devices").stdout
    assert device.target.name in shown
    for reason in [*report["unavailable"].values(), *(r["reason"] for r in cpu["rejected"])]:
        assert reason in shown


def test_rejected_code_objects_are_listed():
    environment = os.environ | {"HIPQUANT_CPU_TARGET": "x86-64-v3"}
    if hipquant.device("cpu").target.name not in ("x86-64-v3", "x86-64-v4-vnni"):
        pytest.skip("this machine runs no x86-64-v3 code")
    done = subprocess.run([*COMMAND, "devices"], capture_output=True, text=True, env=environment)
    assert "does not use x86-64-v4-vnni: HIPQUANT_CPU_TARGET asks for x86-64-v3" in done.stdout


def test_tables_are_markdown():
    assert table(("a", "long"), [["word", "1"]]) == "| a    | long |\n| ---- | ---: |\n| word |    1 |\n"


# --- perplexity ---


def naive_perplexity(model, tokens, context):
    """Chunk by chunk, in float64, from the logits of all positions at once: (perplexity, standard error)."""
    surprise = []
    for start in range(0, len(tokens) - context + 1, context):
        chunk = [model.tokenizer.bos_id, *tokens[start + 1 : start + context]]
        logits = model.forward(chunk, 0, logits="all").astype(np.float64)
        for i in range(context // 2, context - 1):
            surprise.append(np.logaddexp.reduce(logits[i]) - logits[i][chunk[i + 1]])
    mean, deviation = np.mean(surprise), np.std(surprise, ddof=1)
    return math.exp(mean), math.exp(mean) * deviation / math.sqrt(len(surprise)), len(surprise)


def test_perplexity(plain, tmp_path):
    text = "in the beginning there was another on the other side\n" * 12
    (tmp_path / "text.txt").write_text(text)
    report = json_of("perplexity", plain, str(tmp_path / "text.txt"), "-c", "50")
    model = hipquant.load(plain, context=50)
    expected, error, count = naive_perplexity(model, model.tokenizer.encode(text[:-1]), 50)
    assert report["tokens"] == count == 24 * report["chunks"]
    assert report["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert report["standard_error"] == pytest.approx(error, rel=1e-4)
    bits = math.log2(report["perplexity"]) * report["tokens"]
    assert report["bits_per_byte"] == pytest.approx(bits / report["bytes"])
    assert json_of("perplexity", plain, "-", "-c", "50", "--chunks", "2", stdin=text)["chunks"] == 2
    assert "one chunk takes 512" in error_of(call("perplexity", plain, "-", stdin="too short"))


def test_the_standard_error_is_that_of_the_mean(plain):
    score = _Score(hipquant.load(plain).tokenizer)
    random = np.random.default_rng(0)
    logits, targets = random.standard_normal((40, len(TOKENS))).astype(np.float32), random.integers(0, 99, 40).tolist()
    score.add(logits, targets)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[range(40), targets]
    assert score.error == pytest.approx(np.exp(nats.mean()) * nats.std(ddof=1) / np.sqrt(40), rel=1e-4)


@needs_demo
def test_perplexity_of_the_demo_model(data):
    report = json_of("perplexity", "demo", str(data / "heldout.txt"), "--chunks", "4")
    assert report["perplexity"] < 40
    assert report["bits_per_byte"] < 1.4
    assert report["tokens"] == 4 * 255
