"""Quantizing with importance matrices: llama-imatrix's two formats, what they change, and what is refused."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

import command_line
from hipquant import quantize
from hipquant.gguf_file import GGUFFile
from hipquant.quantize import file_type, plan, quantize_file, quantize_rows
from hipquant.quantize.imatrix import load_importance
from hipquant.quants import BY_NAME, WEIGHT_TYPES
from quantize_cases import importance, weights, write_float_model, write_model
from reference import dequantize

F32Array = npt.NDArray[np.float32]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_float_model(tmp_path / "model.gguf")


def error_of(*args: object) -> str:
    """The one sentence of a call that fails."""
    return command_line.error_of(command_line.call("quantize", *args))


def write_importance(path: Path, entries: dict[str, F32Array], counts: float = 2.0) -> Path:
    """As llama-imatrix writes them: sums and counts of each expert [experts, columns]."""
    writer = gguf.GGUFWriter(path, "none")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a text"])
    writer.add_uint32("imatrix.chunk_count", 3)
    for name, values in entries.items():
        writer.add_tensor(f"{name}.in_sum2", np.atleast_2d(values * counts).astype(np.float32))
        writer.add_tensor(f"{name}.counts", np.full((len(np.atleast_2d(values)), 1), counts, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_legacy(path: Path, entries: dict[str, F32Array], calls: int = 2) -> Path:
    raw = struct.pack("<i", len(entries))
    for name, values in entries.items():
        raw += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, values.size)
        raw += (values * calls).astype("<f4").tobytes()
    path.write_bytes(raw + struct.pack("<ii", 3, 6) + b"a text")
    return path


@pytest.mark.parametrize("write", [write_importance, write_legacy])
def test_importance(write: Any, model: Path, tmp_path: Path) -> None:
    name = "blk.0.ffn_down.weight"
    with GGUFFile(model) as file:
        w = importance(file.tensors[name].shape[1])
        x = file.data(name).view(np.float32).reshape(file.tensors[name].shape).copy()
        found = load_importance(write(tmp_path / "imatrix", {name: w}))
        made = plan(file, file_type("Q4_K_S"), importance=found)
        assert made.notes[0].startswith("the importance matrix has no entry for 7 tensors: blk.0.attn_q.weight, ")
        quantize_file(made, tmp_path / "out.gguf")
    with GGUFFile(tmp_path / "out.gguf") as out:
        kind = out.tensors[name].type
        assert (out.data(name) == quantize_rows(x, kind, w / w.mean(dtype=np.float64)).reshape(-1)).all()
        assert out.metadata["quantize.imatrix.file"] == "imatrix"
        assert out.metadata["quantize.imatrix.entries_count"] == 1
        assert out.metadata["quantize.imatrix.chunks_count"] == 3
        assert out.metadata["quantize.imatrix.dataset"] == "a text"


def test_importance_of_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model("4 experts", tmp_path / "m.gguf")
    monkeypatch.setattr(quantize, "PART", 1000)  # less than an expert has
    name = "blk.0.ffn_up_exps.weight"
    w = importance(4 * 256).reshape(4, 256)
    with GGUFFile(tmp_path / "m.gguf") as file:
        found = load_importance(write_importance(tmp_path / "imatrix", {name: w}))
        quantize_file(plan(file, file_type("Q2_K"), importance=found), tmp_path / "out.gguf")
        x = file.data(name).view(np.float32).reshape(4, 2, 256)
        expected = [quantize_rows(x[e], BY_NAME["Q2_K"], found.weights(file.tensors[name])[e]) for e in range(4)]
    with GGUFFile(tmp_path / "out.gguf") as out:
        assert (out.data(name) == np.concatenate(expected).reshape(-1)).all()
    assert not np.array_equal(expected[1], quantize_rows(x[1], BY_NAME["Q2_K"], found.weights(out.tensors[name])[0]))


def test_columns_that_no_text_reached(tmp_path: Path) -> None:
    """Zeros: an expert that was never chosen, or columns that were always zero."""
    x, w = weights("gaussian"), np.zeros(512, np.float32)
    w[:40] = 1
    write_model("4 experts", tmp_path / "m.gguf")
    with GGUFFile(tmp_path / "m.gguf") as file:
        info = file.tensors["blk.0.ffn_up_exps.weight"]
    found = load_importance(write_importance(tmp_path / "i", {info.name: np.zeros((4, 256), np.float32)}))
    assert (found.weights(info) == 1).all()
    for kind in WEIGHT_TYPES:
        error = dequantize(kind, quantize_rows(x, kind, np.maximum(w, 1e-4)), x.shape) - x
        assert np.sqrt(np.square(error).mean()) < (0.5 if kind.name == "Q2_K" else 0.3) * x.std(), kind
        assert np.square(error[:, :32]).mean() <= np.square(error[:, 64:]).mean() * 1.3, kind


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"blk.0.ffn_up.weight": np.full(256, np.nan)}, "'blk.0.ffn_up.weight' is nan at index 0, expected finite"),
        ({"blk.0.ffn_up.weight": np.full(256, -1.0)}, "is -1.0 at index 0"),
        ({"blk.0.ffn_up.weight": np.ones(99)}, "has 99 values, the tensor has 1 x 256 columns; .* another model"),
        ({"blk.7.ffn_up.weight": np.ones(256)}, "no entry has the name of a tensor of this model"),
    ],
)
@pytest.mark.parametrize("write", [write_importance, write_legacy])
def test_importance_that_is_refused(
    write: Any, entries: dict[str, F32Array], message: str, model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "imatrix", entries)
    assert re.search(message, error_of(model, tmp_path / "out", "Q4_0", "--imatrix", path))
    assert not (tmp_path / "out").exists()


def test_damaged_importance(model: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        return error_of(model, tmp_path / "out", "Q4_0", "--imatrix", path)

    whole = write_legacy(tmp_path / "i.dat", {"blk.0.ffn_up.weight": np.ones(256, np.float32)}).read_bytes()
    for cut in (0, 3, 6, 20, 40, 500, len(whole) - 3):
        (tmp_path / "cut.dat").write_bytes(whole[:cut])
        assert "cut off, or no importance matrix" in refused(tmp_path / "cut.dat")
    (tmp_path / "i.dat").write_bytes(b"\xff" * 99)
    assert "cut off, or no importance matrix" in refused(tmp_path / "i.dat")
    assert "absent: No such file" in refused(tmp_path / "absent")
    assert "without entries" in refused(model)
