"""A mixture of experts on the CPU: which ones are chosen, and that their products are those of each one alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import hipquant as hq
from architectures import SHAPES, tokens, write
from hipquant import wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.driver import Device
from hipquant.models import cpu as cpu_models
from hipquant.models.cpu import TILE_BYTES
from hipquant.quants import MATRIX_TYPES, WEIGHT_TYPES, QuantType
from models import random_blocks

Floats = npt.NDArray[np.float32]


def launch(cpu: Device, kernel: wiring.Kernel, grid: wiring.Dim3, *params: object) -> None:
    cpu.get_or_load_func(kernel.name, QUANTIZED).launch(grid, kernel.block, 0, cpu.stream, params)
    cpu.stream.synchronize()


def choose(cpu: Device, logits: Floats, used: int) -> tuple[npt.NDArray[np.int32], Floats]:
    n, experts = logits.shape
    chosen, weights = np.full((n, used), -1, np.int32), np.full((n, used), np.nan, np.float32)
    kernel = wiring.kernel("choose_experts")
    launch(cpu, kernel, kernel.grid(ntokens=n), logits, chosen, weights, experts, used)
    return chosen, weights


@pytest.mark.parametrize(("experts", "used"), [(1, 1), (8, 2), (128, 8), (512, 32), (3, 3)])
def test_the_best_are_chosen(experts: int, used: int, cpu: Device) -> None:
    logits = (4 * np.random.default_rng(experts).standard_normal((21, experts))).astype(np.float32)
    chosen, weights = choose(cpu, logits, used)
    expected = np.argsort(-logits, axis=1, kind="stable")[:, :used]
    np.testing.assert_array_equal(chosen, expected)
    of_chosen = np.exp(np.take_along_axis(logits, expected, 1).astype(np.float64))
    np.testing.assert_allclose(weights, of_chosen / of_chosen.sum(1, keepdims=True), rtol=3e-6)


def test_of_equal_experts_the_first_are_chosen(cpu: Device) -> None:
    chosen, weights = choose(cpu, np.array([[1, 2, 2, 1, 2, 1]], np.float32), 4)
    assert chosen.tolist() == [[1, 2, 4, 0]]
    assert weights[0, 0] == weights[0, 1] == weights[0, 2] > weights[0, 3]


def test_logits_that_are_no_numbers_choose_experts_that_there_are(cpu: Device) -> None:
    """Each one once; what they give is not a number either."""
    nan, inf = np.nan, np.inf
    logits = np.array([[nan] * 4, [1, nan, 2, 0], [inf, inf, 0, 0], [-inf] * 4], np.float32)
    chosen, weights = choose(cpu, logits, 3)
    assert all(len(set(row)) == 3 and set(row) <= set(range(4)) for row in chosen.tolist())
    assert np.isnan(weights).any(axis=1).tolist() == [True, True, True, True]


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=str)
def test_products_are_those_of_each_expert(kind: QuantType, cpu: Device) -> None:
    """Bit for bit, for experts with no column up to 21 of them, and rows that are no multiple of 16."""
    quantized, rows, experts, used, n = kind in WEIGHT_TYPES, 37, 5, 2, 21
    k, rng = 3 * kind.block_size if quantized else 75, np.random.default_rng(kind.ggml_id)
    chosen = np.array([[3, (0, 1)[i < 3]] for i in range(n)], np.int32)
    groups, token, column = (np.full(m, -1, np.int32) for m in (4 * experts, used * n, used * n))
    group = wiring.kernel("group_experts")
    launch(cpu, group, group.grid(), chosen, groups, token, column, experts, used, n)
    assert groups.reshape(-1, 4).tolist() == [[0, 0, 18, 0], [1, 18, 3, 18], [3, 21, 21, 22], [0] * 4, [0] * 4]
    np.testing.assert_array_equal(token[column].reshape(n, used), np.arange(n)[:, None].repeat(used, 1))

    x = rng.standard_normal((n, k)).astype(np.float32)
    raw = [random_blocks(rng, kind, rows, k) for _ in range(experts)]
    found, y = np.full((used * n, rows), np.nan, np.float32), x
    weights = raw
    if quantized:
        weights = [np.zeros(48 * kind.row_bytes(k), np.uint8) for _ in raw]
        pack, quantize = wiring.find("pack", kind), wiring.kernel("quantize_q8_experts")
        for matrix, packed in zip(raw, weights, strict=True):
            launch(cpu, pack, pack.grid(nrows=rows), matrix, packed, k, rows)
        y = np.zeros(2 * used * n * k // 32 * TILE_BYTES, np.uint8)  # type: ignore[assignment]
        launch(cpu, quantize, quantize.grid(k=k, groups=experts), x, token, groups, y, k)
    product = wiring.find("mul_mat_experts", kind)
    grid = product.grid(nrows=rows, groups=experts)
    launch(cpu, product, grid, np.stack(weights), y, token, groups, found, k, rows)
    for expert, first, count, _ in groups.reshape(-1, 4)[:3]:
        expected = _alone(cpu, kind, weights[expert], x[token[first : first + count]], rows)
        np.testing.assert_allclose(found[first : first + count], expected, rtol=0 if quantized else 1e-5, atol=1e-5)

    weight, given = rng.random((n, used), np.float32), np.full((n, rows), np.nan, np.float32)
    add = wiring.kernel("add_experts_f32")
    launch(cpu, add, add.grid(ntokens=n), found, weight, column, given, rows, used)
    expected = (found[column].reshape(n, used, rows).astype(np.float64) * weight[:, :, None]).sum(1)
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


def _alone(cpu: Device, kind: QuantType, weights: npt.NDArray[np.uint8], x: Floats, rows: int) -> Floats:
    (n, k), y = x.shape, np.ascontiguousarray(x)
    dst, name = np.full((n, rows), np.nan, np.float32), "mul_mat_float"
    if kind in WEIGHT_TYPES:
        quantize, name = wiring.kernel("quantize_q8_tiles"), "mul_mat_packed"
        y = np.zeros(2 * n * k // 32 * TILE_BYTES, np.uint8)  # type: ignore[assignment]
        launch(cpu, quantize, quantize.grid(k=k, ncols=n), x, y, k, n)
    product = wiring.find(name, kind)
    launch(cpu, product, product.grid(nrows=rows), weights, y, dst, k, rows, n, rows)
    return dst


def test_rows_are_taken_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that end within an expert."""
    write(tmp_path / "m.gguf", SHAPES["mixtral"], "Q8_0")
    expected = hq.load(tmp_path / "m.gguf", device="cpu").forward(tokens(20), 0)
    monkeypatch.setattr(cpu_models, "PART", 1)
    found = hq.load(tmp_path / "m.gguf", device="cpu").forward(tokens(20), 0)
    np.testing.assert_array_equal(found, expected)


def test_bytes_of_a_pass_are_those_of_the_experts_chosen(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", SHAPES["qwen3moe"], "Q8_0")
    model = hq.load(tmp_path / "m.gguf", device="cpu")
    tensors = model.file.tensors
    experts = sum(t.nbytes for name, t in tensors.items() if "_exps" in name)
    assert model.weights_bytes == sum(t.nbytes for t in tensors.values()) - experts + experts * 5 // 40
