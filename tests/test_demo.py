"""The demo model: its file, its stories, and its perplexity beside llama.cpp's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import hipquant as hq
from demo_requant import requantize
from hipquant.models import DEMO
from reference import LlamaReference, nmse

FIGURES = json.loads((Path(__file__).parent / "data" / "llamacpp_perplexity.json").read_text())


@pytest.fixture(scope="module")
def demo() -> hq.Model:
    return hq.load()


def test_the_file(demo: hq.Model) -> None:
    assert DEMO.stat().st_size <= 8_000_000
    assert demo.n_vocab == demo.tokenizer.n_vocab
    for info in demo.file.tensors.values():
        assert info.shape[-1] % 256 == 0, f"{info.name}: every quant type must apply"


def test_a_story_is_told_in_words(demo: hq.Model) -> None:
    story = " ".join(demo.generate("Once upon a time", max_tokens=200, seed=seed).text for seed in range(5))
    words = "".join(c if c.isalpha() else " " for c in story.lower()).split()
    assert len(words) > 300
    common = {"the", "and", "to", "he", "she", "of", "a", "was", "that", "his", "her", "it", "in", "said", "they"}
    assert sum(w in common for w in words) / len(words) > 0.25


def test_logits_of_a_text(demo: hq.Model, data: Path) -> None:
    tokens = demo.tokenizer.encode((data / "heldout.txt").read_text()[:2000])[:300]
    expected = LlamaReference(DEMO).forward(tokens)
    found = demo.forward(tokens, 0, logits="all")
    assert nmse(found, expected) <= 1e-3
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.97


@pytest.mark.parametrize("kind", FIGURES["types"])
def test_perplexity_is_llamacpps(kind: str, tmp_path: Path, data: Path) -> None:
    """Within 0.5 % of what llama-perplexity printed for the same file and the same text."""
    requantize(DEMO, tmp_path / "demo.gguf", gguf.GGMLQuantizationType[kind])
    arguments = ["perplexity", str(tmp_path / "demo.gguf"), str(data / "heldout.txt"), "-c", "512", "--json"]
    done = subprocess.run([sys.executable, "-m", "hipquant", *arguments], capture_output=True, text=True, check=True)
    found, expected = json.loads(done.stdout), FIGURES["types"][kind]
    assert found["chunks"] == expected["chunks"]
    assert found["tokens"] == expected["tokens_scored"]
    assert found["perplexity"] == pytest.approx(expected["ppl"], rel=0.005)
    assert found["standard_error"] == pytest.approx(expected["uncertainty"], rel=0.02)


@pytest.mark.parametrize("context", [256])
def test_perplexity_by_definition(demo: hq.Model, data: Path, context: int) -> None:
    """The command's figure is the exponential of the mean surprise of the tokens of the second halves."""
    tokens = demo.tokenizer.encode((data / "heldout.txt").read_text().rstrip("\n"))
    nats = []
    for i in range(3):
        chunk = [demo.tokenizer.bos_id, *tokens[i * context + 1 : (i + 1) * context]]
        logits = demo.forward([int(t) for t in chunk if t is not None], 0, logits="all").astype(np.float64)
        for at in range(context // 2, context - 1):
            nats.append(np.log(np.exp(logits[at]).sum()) - logits[at][chunk[at + 1]])
    arguments = ["perplexity", str(DEMO), str(data / "heldout.txt"), "-c", str(context), "--chunks", "3", "--json"]
    done = subprocess.run([sys.executable, "-m", "hipquant", *arguments], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
