"""No kernel reads or writes outside its buffers: each one lies against a page that must not be touched.

A violation ends the process with a segmentation fault, so the checks run in a child of their own.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hipquant as hq
from hipquant import wiring
from hipquant.codeobjects import QUANTIZED
from hipquant.driver import Device
from hipquant.errors import InvalidModelFileError, UnsupportedQuantTypeError
from hipquant.models.cpu import TILE_BYTES
from hipquant.quants import FLOAT_TYPES, MATRIX_TYPES, WEIGHT_TYPES, QuantType, padded
from models import random_blocks, write_llama

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(data: Any, at_end: bool) -> Any:
    """A copy of an array that ends right before (or begins right after) a page without any rights."""
    raw = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    pages = -(-raw.nbytes // PAGE)
    memory = mmap.mmap(-1, (pages + 2) * PAGE)
    whole = np.frombuffer(memory, np.uint8)
    for page in (0, pages + 1):
        assert _libc.mprotect(ctypes.c_void_p(whole.ctypes.data + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    start = (pages + 1) * PAGE - raw.nbytes if at_end else PAGE
    place = whole[start : start + raw.nbytes]
    place[:] = raw
    return place


def in_child(run: Callable[[], None]) -> None:
    """Runs a check in a forked child; its signal is the failure."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        try:
            run()
        except BaseException as e:
            print(repr(e))
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"signal {status & 127}" if status & 127 else "the check failed"


def launch(cpu: Device, kernel: wiring.Kernel, grid: wiring.Dim3, *params: object) -> None:
    cpu.get_or_load_func(kernel.name, QUANTIZED).launch(grid, kernel.block, 0, cpu.stream, params)


ROWS, COLUMNS = 37, 5
sides = pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])


@sides
@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=str)
def test_products(kind: QuantType, at_end: bool, cpu: Device) -> None:
    k = kind.block_size * 3
    w = random_blocks(np.random.default_rng(0), kind, ROWS, k)

    def run() -> None:
        x = guarded(w, at_end)
        q = guarded(np.zeros(9 * padded(k) // 32 * 36, np.uint8), at_end)
        y = guarded(np.zeros(k, np.float32), at_end)
        one, dst = guarded(np.zeros(ROWS, np.float32), at_end), guarded(np.zeros(9 * ROWS, np.float32), at_end)
        vector, matrix = wiring.find("dequantize_mul_mat_vec", kind), wiring.find("mul_mat", kind)
        launch(cpu, vector, vector.grid(nrows=ROWS), x, y, one, k, ROWS)
        for n in range(1, 9):
            product = wiring.find("mul_mat_vec", kind, batch=n)
            result = guarded(np.zeros(n * ROWS, np.float32), at_end)
            launch(cpu, product, product.grid(nrows=ROWS), x, q, result, k, ROWS, padded(k), ROWS)
        launch(cpu, matrix, matrix.grid(nrows=ROWS, ncols=9), x, q, dst, k, ROWS, 9, padded(k), ROWS)

    in_child(run)


@sides
@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 16, 21])
def test_the_engines_products(kind: QuantType, n: int, at_end: bool, cpu: Device) -> None:
    k, rows = kind.block_size * 3, ROWS
    w = random_blocks(np.random.default_rng(0), kind, rows, k)

    def run() -> None:
        x, packed = guarded(w, at_end), guarded(np.zeros(48 * kind.row_bytes(k), np.uint8), at_end)
        y = guarded(np.ones((n, k), np.float32), at_end)
        columns = n - n % 16 + (1 << (n % 16 - 1).bit_length() if n % 16 else 0)
        tiles = guarded(np.zeros(columns * k // 32 * TILE_BYTES, np.uint8), at_end)
        dst = guarded(np.full(n * rows, np.nan, np.float32), at_end)
        pack, quantize = wiring.find("pack", kind), wiring.kernel("quantize_q8_tiles")
        product = wiring.find("mul_mat_packed", kind)
        launch(cpu, pack, pack.grid(nrows=rows), x, packed, k, rows)
        launch(cpu, quantize, quantize.grid(k=k, ncols=n), y, tiles, k, n)
        launch(cpu, product, product.grid(nrows=rows), packed, tiles, dst, k, rows, n, rows)
        assert np.isfinite(dst.view(np.float32)).all(), "every result must be written"

    in_child(run)


@sides
@pytest.mark.parametrize("kind", FLOAT_TYPES, ids=str)
def test_float_products(kind: QuantType, at_end: bool, cpu: Device) -> None:
    def run() -> None:
        for k, n in ((1, 1), (7, 5), (50, 4), (64, 9)):
            x = guarded(np.zeros(ROWS * k * kind.block_bytes, np.uint8), at_end)
            y, dst = (
                guarded(np.zeros(n * k, np.float32), at_end),
                guarded(np.full(n * ROWS, np.nan, np.float32), at_end),
            )
            product = wiring.find("mul_mat_float", kind)
            launch(cpu, product, product.grid(nrows=ROWS), x, y, dst, k, ROWS, n, ROWS)
            assert not dst.view(np.float32).any()

    in_child(run)


@sides
@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=str)
def test_experts(kind: QuantType, at_end: bool, cpu: Device) -> None:
    """Four of six experts are chosen by 19 tokens, of which 17 choose the last one."""
    k, tokens, experts, used = kind.block_size * 3 if kind in WEIGHT_TYPES else 33, 19, 6, 2
    logits = np.zeros((tokens, experts), np.float32)
    logits[:17, 4], logits[:, 5] = 2, -1
    logits[np.arange(tokens), np.arange(tokens) % 3] = 1
    w = [random_blocks(np.random.default_rng(0), kind, ROWS, k) for _ in range(experts)]

    def words(*shape: int) -> Any:
        return guarded(np.full(shape, np.nan, np.float32), at_end)

    def run() -> None:
        chosen, weights, token, column = (words(tokens * used) for _ in range(4))
        groups, numbers = words(4 * experts), (experts, used)
        choose, group, add = (wiring.kernel(n) for n in ("choose_experts", "group_experts", "add_experts_f32"))
        launch(cpu, choose, choose.grid(ntokens=tokens), guarded(logits, at_end), chosen, weights, *numbers)
        launch(cpu, group, group.grid(), chosen, groups, token, column, *numbers, tokens)
        x = guarded(np.ones((tokens, k), np.float32), at_end)
        matrices = w
        if kind in WEIGHT_TYPES:
            expert, _, n, tile = groups.view(np.int32).reshape(-1, 4)[3].tolist()
            assert (expert, n) == (4, 17)
            y = guarded(np.zeros((tile + n) * k // 32 * TILE_BYTES, np.uint8), at_end)
            quantize, pack = wiring.kernel("quantize_q8_experts"), wiring.find("pack", kind)
            launch(cpu, quantize, quantize.grid(k=k, groups=experts), x, token, groups, y, k)
            matrices = [np.zeros(48 * kind.row_bytes(k), np.uint8) for _ in range(experts)]
            for matrix, packed in zip(w, matrices, strict=True):
                launch(cpu, pack, pack.grid(nrows=ROWS), matrix, packed, k, ROWS)
        else:
            y = x
        dst, given = words(tokens * used, ROWS), words(tokens, ROWS)
        product, of_all = wiring.find("mul_mat_experts", kind), guarded(np.stack(matrices), at_end)
        launch(cpu, product, product.grid(nrows=ROWS, groups=experts), of_all, y, token, groups, dst, k, ROWS)
        launch(cpu, add, add.grid(ntokens=tokens), dst, weights, column, given, ROWS, used)
        assert np.isfinite(given.view(np.float32)).all(), "every result must be written"

    in_child(run)


@sides
def test_quantize_and_dequantize(at_end: bool, cpu: Device) -> None:
    def run() -> None:
        quantize = wiring.kernel("quantize_q8_1")
        for k in (1, 33, 512, 1000):
            x = guarded(np.zeros(3 * k, np.float32), at_end)
            y = guarded(np.zeros(3 * padded(k) // 32 * 36, np.uint8), at_end)
            launch(cpu, quantize, quantize.grid(k=k, rows=3), x, y, k, padded(k))
        for kernel in (k for k in wiring.TABLE if k.family == "dequantize" and k.type):
            n = 3 * kernel.type.block_size
            x = guarded(random_blocks(np.random.default_rng(0), kernel.type, 1, n), at_end)
            y = guarded(np.zeros(n, np.float32 if kernel.output == "f32" else np.float16), at_end)
            count = {"nb32": [n // 32], "k": [n]}.get(kernel.args[-1].name, [])
            launch(cpu, kernel, kernel.grid(elements=n), x, y, *count)

    in_child(run)


@sides
@pytest.mark.parametrize("kernel", [k for k in wiring.TABLE if k.family == "quantize_weights"], ids=lambda k: k.name)
def test_quantizing_weights(kernel: wiring.Kernel, at_end: bool, cpu: Device) -> None:
    kind = kernel.type
    assert kind is not None

    def run() -> None:
        for rows, k in ((1, kind.block_size), (3, 256 * 3), (1, 8192)):
            x = guarded(np.random.default_rng(0).standard_normal((rows, k)).astype(np.float32), at_end)
            y = guarded(np.zeros(rows * kind.row_bytes(k), np.uint8), at_end)
            grid = kernel.grid(n=rows * k)
            for importance in (None, guarded(np.ones(k, np.float32), at_end)):
                invalid = guarded(np.full(grid[0], 7, np.int64), at_end)
                launch(cpu, kernel, grid, x, importance, y, invalid, k, rows * k)
                assert (invalid.view(np.int64) == -1).all()

    in_child(run)


@sides
def test_what_a_transformer_needs_beside(at_end: bool, cpu: Device) -> None:
    def floats(n: int) -> Any:
        return guarded(np.ones(n, np.float32), at_end)

    def run() -> None:
        n_head, n_kv, dim, context, tokens = 6, 2, 24, 32, 3
        cache = [guarded(np.zeros(2 * n_kv * dim * context, np.uint16), at_end) for _ in range(2)]
        where = [guarded(np.array(v, np.int32), at_end) for v in ([0, 5, 31], [0, 1, 1])]
        q, k, v, out = (
            floats(tokens * n_head * dim),
            *(floats(tokens * n_kv * dim) for _ in range(2)),
            floats(tokens * n_head * dim),
        )
        rope, attention = wiring.kernel("rope_store_kv"), wiring.kernel("attention_f16")
        table = floats(context * dim)
        launch(cpu, rope, rope.grid(ntokens=tokens), q, k, v, *cache, table, *where, n_head, n_kv, dim, dim, context,
               floats(dim), floats(dim), 1e-5)  # fmt: skip
        grid = attention.grid(n_head_kv=n_kv, ntokens=tokens)
        launch(cpu, attention, grid, q, *cache, out, *where, n_head, n_kv, dim, context, 0.2, 5.0, 20, floats(n_head))
        norm, silu = wiring.kernel("add_rms_norm_f32"), wiring.kernel("silu_mul_f32")
        for n in (1, 7, 40, 300):
            launch(cpu, norm, norm.grid(rows=2), floats(2 * n), floats(2 * n), floats(n), floats(2 * n), n, 1e-5)
            launch(cpu, silu, silu.grid(n=n), floats(n), floats(n), floats(n), n)
            layer_norm, gelu = wiring.kernel("add_layer_norm_f32"), wiring.kernel("gelu_mul_f32")
            vectors = floats(n), floats(n)
            for y in (floats(2 * n), None):
                launch(cpu, layer_norm, layer_norm.grid(rows=2), floats(2 * n), floats(2 * n), *vectors, y, n, 1e-5)
            for up in (floats(n), None):
                launch(cpu, gelu, gelu.grid(n=n), floats(n), up, floats(n), n)
            for name in ("scale_f32", "softcap_f32"):
                each = wiring.kernel(name)
                launch(cpu, each, each.grid(n=n), floats(n), n, 2.0)
            bias = wiring.kernel("add_bias_f32")
            launch(cpu, bias, bias.grid(rows=2), floats(2 * n), floats(n), n)
            read = wiring.kernel("read_bytes")
            launch(cpu, read, read.grid(nbytes=4 * n), floats(n), guarded(np.zeros(1, np.int32), at_end), 4 * n)

    in_child(run)


@sides
@pytest.mark.parametrize("kernel", [k for k in wiring.TABLE if k.family == "get_rows"], ids=lambda k: k.name)
def test_get_rows(kernel: wiring.Kernel, at_end: bool, cpu: Device) -> None:
    kind = kernel.type
    assert kind is not None
    k = kind.block_size * 3

    def run() -> None:
        x = guarded(random_blocks(np.random.default_rng(0), kind, 5, k), at_end)
        ids = guarded(np.array([4, 0, 4], np.uint32), at_end)
        dst = guarded(np.full(3 * k, np.nan, np.float32), at_end)
        launch(cpu, kernel, kernel.grid(nids=3, k=k), x, ids, dst, k, kind.row_bytes(k))
        assert np.isfinite(dst.view(np.float32)).all(), "every result must be written"

    in_child(run)


def test_every_family_is_here() -> None:
    """A new family needs its case in this file."""
    source = Path(__file__).read_text()
    for kernel in wiring.CPU_KERNELS:
        assert f'"{kernel.family}"' in source or f'"{kernel.name}"' in source, kernel.name


def test_the_guard_works(cpu: Device) -> None:
    """The same check must fail where a kernel is told of more than there is."""
    bias = wiring.kernel("add_bias_f32")

    def run() -> None:
        launch(cpu, bias, (1, 1, 1), guarded(np.zeros(8, np.float32), True), np.zeros(16, np.float32), 9)

    with pytest.raises(AssertionError, match="signal 11"):
        in_child(run)


def test_loading_mutated_models(tmp_path: Path) -> None:
    """Thousands of damaged files: each loads and runs, or is refused with the one error there is for it."""
    path, bad = tmp_path / "model.gguf", tmp_path / "bad.gguf"
    write_llama(path, type="Q4_0", n_vocab=64, n_embd=64, n_layer=1, n_head=2, n_kv=1, n_ff=64, context=64)
    original, rng = path.read_bytes(), random.Random(0)
    from hipquant.gguf_file import GGUFFile

    header = min(t.offset for t in GGUFFile(path).tensors.values())
    messages = []
    for _ in range(2000):
        blob = bytearray(original)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(header if rng.random() < 0.9 else len(blob))
            blob[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        bad.write_bytes(blob)
        try:
            model = hq.load(bad, sequences=1)
            model.forward([0, 1, 2][: model.context], 0)
        except (InvalidModelFileError, UnsupportedQuantTypeError) as e:
            messages.append(str(e))
    assert 200 < len(messages) < 1900
    assert min(map(len, messages)) > 20
