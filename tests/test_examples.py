"""The examples run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hipquant
from hub_server import serving
from vocabulary import CHATML, write_speaker

CHATML_TURN = "<|im_start|>user\n%s<|im_end|>\n<|im_start|>assistant\n"
EXAMPLES = Path(__file__).parent.parent / "examples"
DEMO = Path(hipquant.__file__).parent / "demo" / "demo.gguf"


def run(name: str, *args: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, str(EXAMPLES / name), *args]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    return subprocess.run(call, input=stdin, env=env, capture_output=True, text=True, timeout=120)


def test_every_example_has_a_test() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {"quantized.py", "quantized_phi.py", "wiring.py"}


def test_wiring() -> None:
    done = run("wiring.py", "cpu")
    assert done.returncode == 0, done.stderr
    assert "1024 rows of 4096 weights; the error of the result is 0." in done.stdout
    assert "no device 'toaster'" in run("wiring.py", "toaster").stderr


@pytest.mark.skipif(not DEMO.exists(), reason="this checkout has no demo model")
@pytest.mark.parametrize("name", ["quantized.py", "quantized_phi.py"])
def test_a_prompt(name: str) -> None:
    args = ("--model", str(DEMO), "--prompt", "Once upon a time", "-n", "12", "--top-k", "40", "--top-p", "0.9")
    shown = [run(name, *args, "--seed", "3", "--cpu", *more) for more in ((), ("--split-prompt",))]
    assert shown[0].returncode == 0, shown[0].stderr
    model = hipquant.load(DEMO)
    text = model.generate(
        "Once upon a time", max_tokens=12, top_k=40, top_p=0.9, min_p=0, repetition_penalty=1.1, seed=3
    ).text
    for done in shown:
        assert f"\nOnce upon a time{text}\n" in done.stdout
        assert "12 tokens generated: " in done.stdout
    asked = run(name, *args, "--verbose-prompt", "--temperature", "0", "--repeat-penalty", "1").stdout
    assert all(f"{token:7} -> " in asked for token in model.tokenizer.encode("Once upon a time"))
    greedy = model.generate("Once upon a time", max_tokens=12, temperature=0).text
    assert greedy in asked


@pytest.mark.parametrize(("mode", "remembers"), [("interactive", False), ("chat", True)])
def test_several_prompts(mode: str, remembers: bool, tmp_path: Path) -> None:
    path = write_speaker(tmp_path / "m.gguf", chat_template=CHATML, context=512).path
    args = ("--model", str(path), "--prompt", mode, "-n", "4", "--verbose-prompt", "--temperature", "0")
    done = run("quantized.py", *args, stdin="the man\nin the\n")
    assert done.returncode == 0, done.stderr
    first, second, _ = done.stdout.split("prompt tokens processed")
    tokens = [len(re.findall(r"^(?:> )? *\d+ -> ", turn, re.MULTILINE)) for turn in (first, second)]
    model = hipquant.load(path)
    lengths = [len(model.tokenizer.encode(CHATML_TURN % said, parse_special=True)) for said in ("the man", "in the")]
    assert tokens[0] == lengths[0]
    assert tokens[1] > sum(lengths) if remembers else tokens[1] == lengths[1]


def test_which(tmp_path: Path) -> None:
    speaker = write_speaker(tmp_path / "m.gguf").path.read_bytes()
    with serving() as hub:
        hub.repositories["TheBloke/Mistral-7B-v0.1-GGUF"] = {"mistral-7b-v0.1.Q4_K_S.gguf": speaker}
        hub.repositories["TheBloke/phi-2-GGUF"] = {"phi-2.Q4_K_M.gguf": speaker}
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path), "HF_TOKEN": ""}
        for name, which, file in (
            ("quantized.py", "7b-mistral", "mistral-7b-v0.1.Q4_K_S.gguf"),
            ("quantized_phi.py", "phi-2", "phi-2.Q4_K_M.gguf"),
        ):
            done = run(name, "--which", which, "--prompt", "the", "-n", "3", **environment)
            assert done.returncode == 0, done.stderr
            assert f"downloading {file} " in done.stdout
        refused = run("quantized.py", "--which", "7b-zephyr-b", **environment)
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: there is no file or folder 'TheBloke/zephyr-7B-beta-GGUF'")
    assert "invalid choice: 'phi-9'" in run("quantized_phi.py", "--which", "phi-9").stderr
