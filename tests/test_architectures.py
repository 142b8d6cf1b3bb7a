"""Each architecture: logits of a small model against llama.cpp's for the same file, and files that are wrong."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hipquant as hq
from architectures import KINDS, PROMPTS, SHAPES, figures, tokens, write
from hipquant.errors import InvalidModelFileError
from hipquant.gguf_file import GGUFFile
from hipquant.models import ARCHITECTURES, cpu
from hipquant.models.config import Keys
from reference import nmse

LIMITS = {"F32": 1e-4, "Q8_0": 1e-3}


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


def test_each_architecture_has_figures() -> None:
    assert {shape.architecture for shape in SHAPES.values()} == set(ARCHITECTURES)
    for name in ARCHITECTURES:
        assert callable(import_module(f"hipquant.models.{name}").load), f"{name} belongs into SHARED"


@pytest.mark.parametrize("name", ["phi2_fused", "phi3"])
def test_rows_are_taken_part_by_part(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a tensor, in an order of their own, in pieces that end within a head."""
    write(tmp_path / "m.gguf", SHAPES[name], "Q8_0")
    expected = hq.load(tmp_path / "m.gguf", device="cpu").forward(tokens(20), 0)
    monkeypatch.setattr(cpu, "PART", 1)
    found = hq.load(tmp_path / "m.gguf", device="cpu").forward(tokens(20), 0)
    np.testing.assert_array_equal(found, expected)


def test_frequencies_are_chosen_for_the_context(tmp_path: Path) -> None:
    """LongRoPE: those of `rope_factors_short` up to the original context, those of `_long` behind."""
    shape = SHAPES["phi3_long"]
    write(tmp_path / "m.gguf", shape, "F32")
    for context, which in ((512, "long"), (257, "long"), (256, "short")):
        rope = hq.load(tmp_path / "m.gguf", device="cpu", context=context).blocks.sizes.rope
        np.testing.assert_array_equal(rope.factors, shape.vectors[f"rope_factors_{which}.weight"])
        assert rope.attention_factor == pytest.approx(1.19)


def _changed(path: Path, name: str, keys: dict[str, Any]) -> Path:
    """A model with other keys; those that are None are left out."""
    shape = SHAPES[name]
    merged = {key: value for key, value in (shape.keys | keys).items() if value is not None}
    write(path, dataclasses.replace(shape, keys=merged), "F32")
    return path


def _config(path: Path, name: str, keys: dict[str, Any]) -> Any:
    file = GGUFFile(_changed(path, name, keys))
    module = import_module(f"hipquant.models.{SHAPES[name].architecture}")
    return module.load.__self__.read_config(Keys(file))


@pytest.mark.parametrize(
    ("name", "keys", "windows"),
    [
        ("gemma2", {}, (40, 0, 40, 0)),
        ("gemma2", {"attention.sliding_window": None}, (4096, 0, 4096, 0)),
        ("gemma3", {}, (40, 40, 0, 40)),
        ("gemma3", {"attention.sliding_window_pattern": None}, (40, 40, 40, 40)),
        ("gemma3", {"attention.sliding_window_pattern": [False, True, True, False]}, (0, 40, 40, 0)),
        ("gemma3", {"attention.sliding_window": None}, (0, 0, 0, 0)),
    ],
)
def test_windows(tmp_path: Path, name: str, keys: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert _config(tmp_path / "m.gguf", name, keys).windows == windows


def test_what_gemma_reads(tmp_path: Path) -> None:
    """The 27B models scale scores by the embedding's share of a head; local layers have a base of their own."""
    path = tmp_path / "m.gguf"
    for name, layers in (("gemma2", 46), ("gemma3", 62)):
        assert _config(path, name, {}).attn_scale == pytest.approx(72**-0.5)
        assert _config(path, name, {"block_count": layers}).attn_scale == pytest.approx(32**-0.5)
    local = _config(path, "gemma3", {}).local_rope
    assert (local.base, local.scaling, local.factor) == (10000, "none", 1)
    assert _config(path, "gemma3", {"rope.freq_base_swa": 2e4}).local_rope.base == 2e4
    assert _config(path, "gemma2", {"rope.freq_base": 3e4}).local_rope.base == 3e4
    capped = _config(path, "gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 0.0})
    assert (capped.attn_softcap, capped.logit_softcap) == (50, 0)


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "gemma2",
            {"attn_logit_softcapping": -1.0},
            "attn_logit_softcapping' is -1.0, expected a number above 0",
        ),
        ("gemma2", {"final_logit_softcapping": float("nan")}, "expected a number above 0"),
        ("gemma3", {"attention.sliding_window_pattern": 0}, "is 0, expected 1 to 1024"),
        ("gemma3", {"attention.sliding_window_pattern": [True, False]}, "not a list of yes or no for 4 layers"),
        ("gemma3", {"attention.sliding_window_pattern": [0.5] * 4}, "not a list of yes or no for 4 layers"),
        ("gemma3", {"attention.sliding_window": "wide"}, "expected an integer"),
        ("gemma3", {"rope.freq_base_swa": 1.0}, "expected a number above 1"),
        ("phi3", {"rope.scaling.type": "dynamic"}, "'dynamic'; supported: none, linear, yarn, longrope"),
        ("phi3", {"attention.head_count_kv": 2}, "blk.0.attn_qkv.weight' has shape"),
        ("phi3", {"feed_forward_length": 96}, "blk.0.ffn_up.weight' has shape"),
        ("phi3_long", {"rope.dimension_count": 32}, "rope_factors_long.weight' has shape"),
        ("phi2", {"attention.layer_norm_epsilon": 0.0}, "expected a number above 0"),
        ("phi2", {"rope.dimension_count": 82}, "an even number of at most 80"),
        ("qwen3", {"attention.key_length": 40, "attention.value_length": 40}, "dimension_count|has shape"),
        ("qwen2", {"expert_count": 8}, "a mixture of experts is not supported for 'qwen2'"),
        ("mixtral", {"expert_count": 600}, "is 600, expected 0 to 512"),
        ("mixtral", {"expert_count": 4}, "blk.0.ffn_gate_inp.weight' has shape"),
        ("mixtral", {"expert_used_count": None}, "'llama.expert_used_count' is missing"),
        ("mixtral", {"expert_used_count": 0}, "is 0, expected 1 to 8"),
        ("mixtral", {"expert_used_count": 9}, "is 9, expected 1 to 8"),
        ("qwen3moe", {"expert_used_count": 33}, "is 33, expected 1 to 32"),
        ("qwen3moe", {"expert_count": 0}, "'qwen3moe.expert_count' is missing or 0"),
        ("qwen3moe", {"expert_feed_forward_length": 64}, "blk.0.ffn_gate_exps.weight' has shape"),
    ],
)
def test_metadata_that_does_not_fit(tmp_path: Path, name: str, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidModelFileError, match=message):
        hq.load(_changed(tmp_path / "m.gguf", name, keys), device="cpu")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen3", {"head_norms": ("attn_q_norm",)}, "'blk.0.attn_k_norm.weight' is missing"),
        ("gemma2", {"norms": ("attn_norm", "ffn_norm")}, "'blk.0.post_attention_norm.weight' is missing"),
        ("mixtral", {"experts": 0}, "'blk.0.ffn_gate_inp.weight' is missing"),
        ("phi2", {"biases": ()}, "'blk.0.attn_norm.bias' is missing"),
        ("phi3_long", {"vectors": {"rope_factors_long.weight": np.zeros(32, np.float32)}}, "above 0 everywhere"),
    ],
)
def test_tensors_that_are_missing_or_wrong(tmp_path: Path, name: str, change: dict[str, Any], message: str) -> None:
    write(tmp_path / "m.gguf", dataclasses.replace(SHAPES[name], **change), "F32")
    with pytest.raises(InvalidModelFileError, match=message):
        hq.load(tmp_path / "m.gguf", device="cpu")
