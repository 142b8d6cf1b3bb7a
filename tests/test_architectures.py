"""Each architecture: logits of a small model against what llama.cpp computes for the same file."""

from __future__ import annotations

from pathlib import Path

import pytest

import hipquant as hq
from architectures import KINDS, PROMPTS, SHAPES, figures, tokens, write
from reference import nmse

LIMITS = {"F32": 1e-4, "Q8_0": 1e-3}  # NMSE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_llama_cpps(name: str, kind: str, tmp_path: Path) -> None:
    """Prompts in one pass, and the same tokens one by one behind a prompt of 290."""
    shape, path = SHAPES[name], tmp_path / "m.gguf"
    checksum, expected = figures(name, kind)
    assert write(path, shape, kind) == checksum, "the model is not the one that the figures are of"
    model = hq.load(path, device="cpu", context=shape.context, sequences=1)
    for n, logits in zip(PROMPTS, expected, strict=True):
        assert nmse(model.forward(tokens(n), 0), logits) <= LIMITS[kind], n
    last = tokens(PROMPTS[-1])
    model.forward(last[:290], 0)
    for at in range(290, PROMPTS[-1]):
        found = model.forward(last[at : at + 1], at)
    assert nmse(found, expected[-1]) <= LIMITS[kind]
