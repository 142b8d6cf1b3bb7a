"""benchmarks/make_models.py: the sizes of the shapes, and each of them written small and run on the CPU."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import pytest

import hipquant as hq
from hipquant.errors import OutputFileError
from hipquant.gguf_file import GGUFFile
from hipquant.quantize import file_type
from hipquant.quants import quant_type
from reference import dequantize

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))  # behind tests/, which has a models.py too
import make_models
from make_models import SHAPES, Shape, random_matrix, write

PARAMETERS = {  # of the models as they were published, with an output of its own where the shape has one
    "1b": 1_235_814_400 + 128256 * 2048,
    "7b": 6_738_415_616,
    "8b": 8_030_261_248,
    "70b": 70_553_706_496,
    "gemma2-2b": 2_614_341_888,
    "qwen3-4b": 4_022_468_096 + 151936 * 2560,
}
EXPERTS = {  # parameters, layers and vocabulary of Qwen3-30B-A3B and Mixtral-8x7B
    "qwen3moe-16l": (30_532_122_624, 48, 151936),
    "mixtral-8l": (46_702_792_704, 32, 32000),
}


def small(shape: Shape) -> Shape:
    """A shape with what is its own, but few and short rows."""
    scale = math.sqrt(256) if shape.embedding_scale != 1 else 1.0
    sizes = {"n_layer": 2, "n_embd": 256, "n_ff": 512, "n_vocab": 96, "head_dim": 64, "embedding_scale": scale}
    heads = {"n_head": 4, "n_kv": 4 * shape.n_kv // shape.n_head or 1, "experts": min(shape.experts, 16)}
    return replace(shape, **sizes, **heads)


def n_parameters(shape: Shape) -> int:
    return sum(map(prod, shape.tensors().values()))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_models(name: str) -> None:
    assert n_parameters(SHAPES[name]) == PARAMETERS[name]


@pytest.mark.parametrize("name", EXPERTS)
def test_layers_with_experts_are_those_of_the_models(name: str) -> None:
    shape, (total, layers, n_vocab) = SHAPES[name], EXPERTS[name]

    def outside(n: int) -> int:
        return 2 * n * shape.n_embd + shape.n_embd

    assert (n_parameters(shape) - outside(shape.n_vocab)) * layers == (total - outside(n_vocab)) * shape.n_layer


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q4_0"])
@pytest.mark.parametrize("name", SHAPES)
def test_each_shape_runs(name: str, kind: str, tmp_path: Path) -> None:
    """Logits are near 1, and depend on the token, on those before it and on their order."""
    shape = small(SHAPES[name])
    write(tmp_path / "m.gguf", shape, file_type(kind))
    with GGUFFile(tmp_path / "m.gguf") as file:
        assert file.metadata["general.architecture"] == SHAPES[name].architecture
        last = file.tensors.get("output.weight", file.tensors["token_embd.weight"])
        assert (last.type.name, file.tensors["blk.0.attn_q.weight"].type.name) == ("Q6_K", kind.removesuffix("_M"))
        assert len(file.tensors) == len(shape.tensors())
    model = hq.load(tmp_path / "m.gguf", "cpu", context=8)
    ids = [5, 17, 60, 8]
    logits = model.forward(ids, 0, logits="all")
    assert 0.5 < logits.std() < 2
    assert abs(np.corrcoef(logits) - np.eye(4)).max() < 0.5, "one token's logits are not another's"
    for other in ([6, 17, 60, 8], [17, 5, 60, 8]):
        change = model.forward(other, 0) - logits[-1]
        assert 1e-3 < change.std() < 0.7, other


def test_an_experts_router_tells_them_apart(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", small(SHAPES["qwen3moe-16l"]), file_type("Q4_0"))
    with GGUFFile(tmp_path / "m.gguf") as file:
        router = file.data("blk.0.ffn_gate_inp.weight").view(np.float32).reshape(16, 256)
    assert (router @ np.random.default_rng(0).standard_normal(256)).std() > 2


def test_no_layer_is_another_ones_copy(tmp_path: Path) -> None:
    """But each has the rows of the same matrix."""
    write(tmp_path / "m.gguf", small(SHAPES["7b"]), file_type("Q4_0"))
    with GGUFFile(tmp_path / "m.gguf") as file:
        gates = [file.data(f"blk.{i}.ffn_{name}.weight") for i in range(2) for name in ("gate", "up")]
        rows = [raw.reshape(512, -1) for raw in gates]
        assert all((a != b).any(axis=1).all() for i, a in enumerate(rows) for b in rows[:i])
        assert all(sorted(map(bytes, r)) == sorted(map(bytes, rows[0])) for r in rows)


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "F16", "BF16", "F32"])
def test_random_matrices(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Normal numbers, also where only some blocks are drawn: no row is like another one."""
    monkeypatch.setattr(make_models, "DISTINCT", 128 * 1024)
    t = quant_type(kind)
    raw = random_matrix(t, 320, 1024, 0.25)
    values = dequantize(t, raw, (320, 1024)) / 0.25
    assert raw.tobytes() == random_matrix(t, 320, 1024, 0.25).tobytes()
    assert abs(values.mean()) < 0.01
    assert values.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(values) - np.eye(320)).max() < 0.6
    assert np.linalg.svd(values, compute_uv=False)[0] < 1.2 * (320**0.5 + 1024**0.5), "no direction stands out"


def test_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_models.py", str(tmp_path / "new"), "tiny:q8_0", "tiny:q4_k_m"])
    make_models.main()
    assert capsys.readouterr().out.startswith("tiny-q8_0.gguf: 5 MiB written in ")
    monkeypatch.setattr(sys, "argv", ["make_models.py", str(tmp_path / "new"), "tiny:q8_0", "--layers", "1"])
    make_models.main()
    files = {path.name: GGUFFile(path).metadata["llama.block_count"] for path in (tmp_path / "new").iterdir()}
    assert files == {"tiny-q8_0.gguf": 4, "tiny-q4_K_M.gguf": 4, "tiny-of-1-layers-q8_0.gguf": 1}
    with pytest.raises(SystemExit, match="the file exists"):
        make_models.main()
    sys.argv[-1] = "0"
    with pytest.raises(SystemExit, match="2"):
        make_models.main()
    assert "--layers is 0, expected 1 or more" in capsys.readouterr().err


def test_half_a_file_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutputFileError("the disk is full")

    monkeypatch.setattr(make_models, "random_matrix", full)
    with pytest.raises(OutputFileError, match="the disk is full"):
        write(tmp_path / "m.gguf", SHAPES["tiny"], file_type("Q4_0"))
    assert not list(tmp_path.iterdir())
