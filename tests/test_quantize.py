"""Quantizing: errors beside llama.cpp's, the types of its mixes, the file that is written, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

import command_line
import hipquant as hq
from hipquant import quantize
from hipquant.cli.app import cli
from hipquant.driver import Device
from hipquant.errors import QuantizationError
from hipquant.gguf_file import GGUFFile
from hipquant.models import DEMO
from hipquant.quantize import FILE_TYPES, file_type, plan, quantize_file, quantize_rows
from hipquant.quants import BY_NAME, F32, FLOAT_TYPES, WEIGHT_TYPES, QuantType, quant_type
from models import random_blocks, write_llama
from quantize_cases import KINDS, MODELS, importance, weights, write_float_model, write_model
from reference import dequantize

THEIRS = json.loads((Path(__file__).parent / "data" / "llamacpp_quantize.json").read_text())
COMMAND = [sys.executable, "-m", "hipquant", "quantize"]
call = partial(command_line.call, "quantize")
AT_MOST = 1.02  # of llama.cpp's error

F32Array = npt.NDArray[np.float32]


def rms(kind: QuantType, x: F32Array, raw: npt.NDArray[np.uint8], w: F32Array | None = None) -> float:
    """The root of the mean square of the error, weighed by column."""
    error = np.square(dequantize(kind, raw, x.shape).astype(np.float64) - x)
    return float(np.sqrt(np.average(error, weights=None if w is None else np.broadcast_to(w, x.shape))))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_float_model(tmp_path / "model.gguf")


def run(source: Path, out: Path, kind: str, **options: Any) -> GGUFFile:
    with GGUFFile(source) as file:
        quantize_file(plan(file, file_type(kind), **options), out)
    return GGUFFile(out)


def error_of(*args: object) -> str:
    """The one sentence of a call that fails."""
    return command_line.error_of(call(*args))


# --- errors ---


@pytest.mark.parametrize("data", KINDS)
@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=str)
def test_errors_are_llamacpps_or_less(kind: QuantType, data: str) -> None:
    x = weights(data)
    assert rms(kind, x, quantize_rows(x, kind)) <= AT_MOST * THEIRS["rms"][kind.name][data]


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=str)
def test_weighed_errors_are_llamacpps_or_less(kind: QuantType) -> None:
    x = weights("heavy")
    w = importance(x.shape[1])
    weighed = rms(kind, x, quantize_rows(x, kind, w), w)
    assert weighed <= AT_MOST * THEIRS["rms"][kind.name]["heavy, weighed"]
    if kind.name != "Q8_0":  # whose one scale holds the greatest value
        assert weighed < rms(kind, x, quantize_rows(x, kind), w)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
@pytest.mark.parametrize("data", KINDS)
def test_errors_beside_the_reference_quantizer(name: str, data: str) -> None:
    x, kind = weights(data), quant_type(name)
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(kind.ggml_id))
    assert rms(kind, x, quantize_rows(x, kind)) <= AT_MOST * rms(kind, x, theirs)


@pytest.mark.parametrize("kind", FLOAT_TYPES, ids=str)
def test_floats_are_rounded_to_the_nearest(kind: QuantType) -> None:
    x = np.concatenate([weights("heavy"), weights("heavy") * 1e-6, np.float32([[1 + 2**-9, 1 + 3 * 2**-9] * 256])])
    raw = quantize_rows(x, kind)
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType(kind.ggml_id)).view(np.uint8)
    assert (raw == theirs.reshape(raw.shape)).all()


SHAPES = {
    "zero": np.zeros(256),
    "one": np.eye(256)[3],
    "constant": np.full(256, 0.3),
    "negative": np.full(256, -0.3),
    "positive": np.linspace(1, 2, 256),
    "large and small": np.where(np.arange(256) < 128, 1.0, 1e-3) * np.cos(np.arange(256)),
    "tiny": 1e-30 * np.cos(np.arange(256)),
    "great": 6e4 * np.cos(np.arange(256)),
    "ramp": np.arange(256) - 128.0,
    "zero and one": np.arange(256) % 2,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=str)
def test_unusual_blocks(kind: QuantType, shape: str) -> None:
    """No error is greater than what the coarsest type can need: a step of its quants, of the greatest sub-block."""
    x = SHAPES[shape].astype(np.float32)[None]
    found = dequantize(kind, quantize_rows(x, kind), x.shape)
    levels = {"Q2_K": 3, "Q3_K": 7, "Q4_K": 15, "Q4_0": 15, "Q4_1": 15, "Q6_K": 63, "Q8_0": 255}.get(kind.name, 31)
    step = 2 * np.abs(x).max() / levels
    assert np.abs(found - x).max() <= max(step, 1e-7)
    if shape in ("zero", "tiny"):
        assert not found.any()
    if shape in ("constant", "negative", "one"):
        assert np.abs(found - x).max() <= 0.02 * np.abs(x).max()


def test_values_of_a_type_stay_what_they_are() -> None:
    """Blocks that a type can hold exactly, and that use all of its range."""
    for name in ("Q4_0", "Q5_0"):
        x = dequantize(name, random_blocks(np.random.default_rng(0), name, 64, 512), (64, 512))
        found = dequantize(name, quantize_rows(x, quant_type(name)), x.shape)
        same = (found == x).reshape(-1, 32).all(axis=1)
        assert same.mean() > 0.95


def test_every_processor_and_number_of_threads_writes_the_same(model: Path, tmp_path: Path) -> None:
    written = {}
    for target in sorted(t.name for t in hq.driver.cpu.cpu_targets(hq.driver.cpu.host_machine())):
        for threads in (1, 3):
            out = tmp_path / f"{target}-{threads}.gguf"
            environment = os.environ | {"HIPQUANT_CPU_TARGET": target}
            arguments = [*COMMAND, str(model), str(out), "Q4_K_M", "-t", str(threads)]
            done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
            if done.returncode and "the processor" in done.stderr:
                continue  # this one cannot run that target
            assert done.returncode == 0, done.stderr
            written[target, threads] = out.read_bytes()
    assert len(written) >= 2
    assert len(set(written.values())) == 1


def test_parts_do_not_show(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those that are in memory at once nor the experts of a matrix."""
    write_model("4 experts", tmp_path / "experts.gguf")
    for source in (model, tmp_path / "experts.gguf"):
        with run(source, tmp_path / "whole.gguf", "Q3_K_M") as whole, monkeypatch.context() as patch:
            patch.setattr(quantize, "PART", 700)
            with run(source, tmp_path / "parts.gguf", "Q3_K_M") as parts:
                assert {n: whole.data(n).tobytes() for n in whole.tensors} == {
                    n: parts.data(n).tobytes() for n in parts.tensors
                }
        os.remove(tmp_path / "whole.gguf")
        os.remove(tmp_path / "parts.gguf")


# --- types ---


@pytest.mark.parametrize("name", MODELS)
def test_types_are_llamacpps(name: str, tmp_path: Path) -> None:
    write_model(name, tmp_path / "m.gguf")
    with GGUFFile(tmp_path / "m.gguf") as file:
        for kind, expected in THEIRS["types"][name].items():
            by_name: dict[str, dict[int, str]] = {}
            for choice in plan(file, file_type(kind)).choices:
                layer = re.match(r"blk\.(\d+)\.", choice.info.name)
                rest = re.sub(r"^blk\.\d+\.", "", choice.info.name)
                by_name.setdefault(rest, {})[int(layer[1]) if layer else 0] = choice.type.name
            found = {n: " ".join(f"{len(list(g))}x{t}" for t, g in groupby(v[i] for i in sorted(v)))
                     for n, v in by_name.items() if set(v.values()) != {"F32"}}  # fmt: skip
            assert found == expected, kind


def test_what_falls_back_is_said(tmp_path: Path) -> None:
    write_model("rows of 240", tmp_path / "m.gguf")
    with GGUFFile(tmp_path / "m.gguf") as file:
        notes = plan(file, file_type("Q4_K_M")).notes
    assert "blk.0.attn_q.weight: rows of 240 are no multiple of 256, F16 for Q4_K" in notes


def test_types_of_output_and_embedding(model: Path) -> None:
    with GGUFFile(model) as file:
        made = plan(file, file_type("Q4_0"), output=BY_NAME["Q8_0"], embedding=BY_NAME["Q2_K"])
        types = {c.info.name: c.type.name for c in made.choices}
    names = ("output.weight", "token_embd.weight", "blk.0.attn_q.weight")
    assert [types[n] for n in names] == ["Q8_0", "Q2_K", "Q4_0"]


def test_an_output_type_that_does_not_fit(tmp_path: Path) -> None:
    write_model("rows of 240", tmp_path / "m.gguf")
    message = error_of(tmp_path / "m.gguf", tmp_path / "out", "Q8_0", "--output-tensor-type", "q4_k")
    assert "'output.weight' has rows of 240, which Q4_K cannot hold" in message


def test_names_of_types() -> None:
    assert file_type("q4_k").name == "Q4_K_M"
    assert file_type("q5-k-s").id == 16
    assert {t.id for t in FILE_TYPES.values()} == {gguf.LlamaFileType[_theirs(n)].value for n in FILE_TYPES}
    with pytest.raises(QuantizationError, match="no file type 'Q4_K_X'; nearest: Q4_K_S, Q4_K_M.*there are: F32"):
        file_type("Q4_K_X")


def _theirs(name: str) -> str:
    return "ALL_F32" if name == "F32" else f"MOSTLY_{name}"


# --- the file ---


def raw_metadata(path: Path) -> dict[str, tuple[Any, ...]]:
    reader = gguf.GGUFReader(path)
    return {n: (f.types, [p.tobytes() for p in f.parts]) for n, f in reader.fields.items() if not n.startswith("GGUF.")}


def test_metadata_and_order_are_kept(model: Path, tmp_path: Path) -> None:
    source = GGUFFile(model)
    with run(model, tmp_path / "out.gguf", "Q5_K_S") as out:
        assert list(out.tensors) == list(source.tensors)
        assert out.alignment == 64
        assert all(t.offset % 64 == 0 for t in out.tensors.values())
        assert list(out.metadata) == [*source.metadata, "general.quantization_version"]
        assert (out.metadata["general.file_type"], out.metadata["general.quantization_version"]) == (16, 2)
    before, after = raw_metadata(model), raw_metadata(tmp_path / "out.gguf")
    changed = {k for k in after if before.get(k) != after[k]}
    assert changed == {"general.file_type", "general.quantization_version"}
    for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors:
        assert t.data.tobytes() == GGUFFile(tmp_path / "out.gguf").data(t.name).tobytes()
    assert not list(tmp_path.glob("*.partial"))


def test_the_model_runs(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "out.gguf", "Q6_K").close()
    before, after = (hq.load(p).forward([1, 2, 3], 0) for p in (model, tmp_path / "out.gguf"))
    assert np.corrcoef(before, after)[0, 1] > 0.999


@pytest.mark.parametrize("name", THEIRS["perplexity"])
def test_perplexity_of_the_demo_model(name: str, tmp_path: Path, data: Path) -> None:
    """At most 0.2 % more than that of the file which llama-quantize makes of the same weights."""
    run(DEMO, tmp_path / "floats.gguf", "F32", allow_requantize=True).close()
    run(tmp_path / "floats.gguf", tmp_path / "out.gguf", name).close()
    arguments = ["perplexity", str(tmp_path / "out.gguf"), str(data / "heldout.txt"), "--chunks", "8", "--json"]
    found = json.loads(CliRunner().invoke(cli, arguments).stdout)["perplexity"]
    assert found <= 1.002 * THEIRS["perplexity"][name]


@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_half_floats_are_read(kind: str, model: Path, tmp_path: Path) -> None:
    with run(model, tmp_path / "half.gguf", kind) as half, run(tmp_path / "half.gguf", tmp_path / "out", "Q4_0") as out:
        name = "blk.0.ffn_down.weight"
        x = dequantize(kind, half.data(name), half.tensors[name].shape)
        assert (out.data(name) == quantize_rows(x, BY_NAME["Q4_0"]).reshape(-1)).all()


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=str)
def test_quantized_files_are_taken_if_asked(kind: QuantType, tmp_path: Path) -> None:
    write_llama(tmp_path / "m.gguf", type=kind.name, n_vocab=32, n_layer=1)
    other = "Q8_0" if kind.name != "Q8_0" else "Q5_0"
    with pytest.raises(QuantizationError, match=rf"'token_embd.weight' is {kind} already.*--allow-requantize"):
        run(tmp_path / "m.gguf", tmp_path / "out.gguf", other)
    with GGUFFile(tmp_path / "m.gguf") as file:
        made = plan(file, file_type(other), allow_requantize=True)
        assert "a second time" in made.notes[0]
        quantize_file(made, tmp_path / "out.gguf")
        name = "blk.0.attn_q.weight"
        x = dequantize(kind, file.data(name), file.tensors[name].shape)
    with GGUFFile(tmp_path / "out.gguf") as out:
        assert rms(BY_NAME[other], x, out.data(name)) < 0.05 * x.std()


# --- what is refused ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q6_K", "F16"])
def test_weights_that_no_block_holds(value: float, kind: str, tmp_path: Path) -> None:
    x = weights("gaussian")
    x[5, 77] = value
    with pytest.raises(QuantizationError, match=rf"index {5 * 512 + 77} \(row 5, column 77\), expected finite numbers"):
        quantize_rows(x, quant_type(kind))


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=str)
def test_scales_that_no_half_holds(kind: QuantType) -> None:
    x = np.zeros((2, 512), np.float32)
    x[1, 300] = -9e8
    with pytest.raises(QuantizationError, match=r"-9e\+08|-900000000.0 at index 812"):
        quantize_rows(x, kind)


def test_a_damaged_model(model: Path, tmp_path: Path) -> None:
    raw, other = bytearray(model.read_bytes()), bytearray(model.read_bytes())
    with GGUFFile(model) as file:
        matrix, norm = (file.tensors[n].offset for n in ("blk.0.ffn_down.weight", "blk.0.attn_norm.weight"))
    raw[matrix + 4 * 1000 : matrix + 4 * 1001] = struct.pack("<f", np.nan)
    (tmp_path / "nan.gguf").write_bytes(raw)
    message = error_of(tmp_path / "nan.gguf", tmp_path / "out.gguf", "Q4_K_M")
    assert "tensor 'blk.0.ffn_down.weight' is nan at index 1000 (row 1, column 488)" in message
    other[norm : norm + 4] = struct.pack("<f", np.inf)
    (tmp_path / "nan.gguf").write_bytes(other)
    assert "'blk.0.attn_norm.weight' (F32) has a NaN" in error_of(tmp_path / "nan.gguf", tmp_path / "out.gguf", "Q8_0")
    (tmp_path / "short.gguf").write_bytes(raw[:-100])
    assert "the file ends" in error_of(tmp_path / "short.gguf", tmp_path / "out.gguf", "Q8_0")
    (tmp_path / "no.gguf").write_bytes(b"something else")
    assert "not a GGUF file" in error_of(tmp_path / "no.gguf", tmp_path / "out.gguf", "Q8_0")
    assert {p.name for p in tmp_path.iterdir()} == {"model.gguf", "nan.gguf", "short.gguf", "no.gguf"}


def test_places_that_are_refused(model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    (tmp_path / "link").symlink_to(model)
    for same in (model, tmp_path / "link"):
        assert "this is the model itself" in error_of(model, same, "Q8_0", "--force")
    (tmp_path / "there").write_text("kept")
    assert "the file exists" in error_of(model, tmp_path / "there", "Q8_0")
    assert "a folder" in error_of(model, tmp_path, "Q8_0", "--force")
    assert "not a regular file" in error_of(model, "/dev/null", "Q8_0", "--force")
    assert "No such file or directory" in error_of(model, tmp_path / "absent" / "out", "Q8_0")
    assert (tmp_path / "there").read_text() == "kept"
    assert call(model, tmp_path / "there", "Q8_0", "--force").exit_code == 0
    assert GGUFFile(tmp_path / "there").metadata["general.file_type"] == 7
    assert model.read_bytes() == before


def test_a_full_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").write_text("kept")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1 << 20})())
        assert re.search("2 MiB are needed, 1 MiB are free", error_of(model, tmp_path / "out", "F32", "--force"))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20)); "
    program = f"{limit}from hipquant.cli import main; main()"
    arguments = [sys.executable, "-c", program, "quantize", str(model), str(tmp_path / "out"), "F32", "--force"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 1
    assert "it cannot be written: File too large" in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"model.gguf", "out"}
    assert (tmp_path / "out").read_text() == "kept"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_end_in_the_middle(number: int, model: Path, tmp_path: Path) -> None:
    """Neither a killed process nor Ctrl-C changes what is there; after Ctrl-C nothing else is left either."""
    (tmp_path / "out").write_text("kept")
    program = (
        "import os, sys, hipquant.quantize as q\n"
        "inner = q._tensor\n"
        "def slow(*a):\n"
        f"    yield from inner(*a)\n    os.kill(os.getpid(), {int(number)})\n"
        "q._tensor = slow\n"
        "from hipquant.cli import main; main()"
    )
    arguments = [sys.executable, "-c", program, "quantize", str(model), str(tmp_path / "out"), "Q8_0", "--force"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == (-number if number == signal.SIGKILL else 130), done.stderr
    assert (tmp_path / "out").read_text() == "kept"
    left = list(tmp_path.glob("*.partial"))
    assert len(left) == (number == signal.SIGKILL)


def test_the_writer_counts_its_bytes(tmp_path: Path) -> None:
    from hipquant.gguf_writer import GGUFWriter, TensorEntry

    entries = [TensorEntry("a", F32, (4,)), TensorEntry("b", F32, (2, 4))]
    for nbytes, message in ((20, "20 bytes, but the tensor lacks 16"), (16, "1 tensors are not complete")):
        with pytest.raises(ValueError, match=message), GGUFWriter(tmp_path / "f", [], entries) as writer:
            writer.write(bytes(nbytes))
    assert not list(tmp_path.iterdir())


# --- the command ---


def test_the_command(model: Path, tmp_path: Path) -> None:
    listed = call(model, tmp_path / "out", "Q4_K_M", "--dry-run")
    assert listed.exit_code == 0
    assert re.search(r"\| output.weight +\| F32 +\| Q6_K \| +0\.1 \| +0\.0 \|", listed.stdout)
    assert not (tmp_path / "out").exists()
    result = call(model, tmp_path / "out", "Q4_K_M", "--json", "-t", "2")
    report = json.loads(result.stdout)
    assert report["bytes_after"] == sum(t.nbytes for t in GGUFFile(tmp_path / "out").tensors.values())
    assert report["tensors"]["output.weight"] == "Q6_K"
    assert f"({report['bits_per_weight']:.2f})" in listed.stdout
    said = call(model, tmp_path / "out", "Q8_0", "--force").stdout
    assert re.search(r"out: Q8_0, tensors: 9 Q8_0, 3 F32\n.* MiB \(32.00 bits a weight\) -> .* in \d+\.\d s\n", said)


def test_unknown_types_name_the_nearest(model: Path, tmp_path: Path) -> None:
    assert "no file type 'Q4_K_L'; nearest: Q4_K" in error_of(model, tmp_path / "o", "Q4_K_L")
    assert "no type 'q9_0'" in error_of(model, tmp_path / "o", "Q8_0", "--output-tensor-type", "q9_0")


def test_rows_are_checked(cpu: Device) -> None:
    with pytest.raises(ValueError, match="float32 .rows, k."):
        quantize_rows(np.zeros((2, 32)), BY_NAME["Q4_0"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 256"):
        quantize_rows(np.zeros((2, 32), np.float32), BY_NAME["Q4_K"])
