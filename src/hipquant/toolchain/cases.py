"""What every kernel is run on, and what must come out: a `Case` is one launch, its parameters and its judge.

The oracle is the CPU's dequantization, which equals the `gguf` package's bit for bit, and float64 numpy. Outputs are
poisoned first and followed by a guard band, so that what was not written, or should not have been, is seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from .. import ops
from ..codeobjects import CodeObjects
from ..driver import Device
from ..quants import FLOAT_TYPES, QK8_1, DequantizeArgs, QuantType, padded
from ..tensor import Tensor
from ..wiring import MAX_GRID_Y, Dim3, Kernel
from . import judge

Array = npt.NDArray[Any]
Raw = npt.NDArray[np.uint8]
Exact = npt.NDArray[np.float64]

Q8_1_BYTES = 36
GUARD = 512  # elements behind an output
BOUNDARY = 256  # bytes: what `offsets` are relative to
TAIL = 512  # elements of poison that a weight buffer may carry
DISTINCT = 53  # rows of a matrix that differ; a prime, so that no tile boundary falls on a repetition
ON_GRID, OFF_GRID = 1e-5, 5e-4  # NMSE, for activations that q8_1 holds exactly and for others
FLOAT_PRODUCT = 1e-10  # NMSE of products in float32


@dataclass
class Case:
    """One launch: `params` in the order of the table, arrays for pointers; the output is written in place.

    `offsets` are the bytes that each array should lie beyond a multiple of BOUNDARY, the least that its alignment
    allows: a backend that copies to memory of its own heeds them.
    """

    kernel: Kernel
    description: str
    grid: Dim3
    params: list[Array | int]
    output: int  # index of the output in `params`
    judge: Callable[[Array], list[str]]
    offsets: tuple[int, ...] = ()

    def check(self) -> list[str]:
        """Complaints about the output, each with the mistake that it looks like; empty if it is right."""
        found = self.params[self.output]
        assert isinstance(found, np.ndarray)
        return self.judge(found)

    def __str__(self) -> str:
        return f"{self.kernel.name}, {self.description}"


Backend = Callable[[Case], None]


def complaints(case: Case, backend: Backend) -> list[str]:
    """Runs a case and returns what is wrong, each line with the kernel and the case; empty if nothing is."""
    backend(case)
    return [f"{case}: {complaint}" for complaint in case.check()]


def cases(kernel: Kernel, thorough: bool = False) -> Iterator[Case]:
    """The cases of a kernel of `COMPATIBILITY` or `get_rows_*`: a few tiny ones, or `thorough` for a real device.

    Raises `ValueError` for kernels that are not compiled for GPUs.
    """
    families = {
        "quantize": _quantize,
        "dequantize": _dequantize,
        "dequantize_mul_mat_vec": _dequantize_mul_mat_vec,
        "mul_mat_vec": _mul_mat_vec,
        "mul_mat": _mul_mat,
        "get_rows": _get_rows,
    }
    if kernel.family not in families:
        raise ValueError(f"there are no cases for {kernel.name}: its family is one of {', '.join(families)}")
    yield from families[kernel.family](kernel, thorough)


# Inputs


def random_blocks(kind: QuantType, rows: int, k: int, seed: int = 0) -> Raw:
    """Random valid rows, uint8 [rows, bytes]: all bits random but the scales, whose signs are."""
    rng = np.random.default_rng([seed, kind.ggml_id, k])
    if kind in FLOAT_TYPES:
        x = rng.standard_normal((rows, k)).astype(np.float32)
        if kind.name == "BF16":
            return (x.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
        return x.astype("<f4" if kind.name == "F32" else "<f2").view(np.uint8)
    raw = random_bytes(kind, rows, k, seed).reshape(-1, kind.block_bytes)
    for n, at in enumerate(kind.scales or (0,)):  # a minimum weighs about as much as the quants above it
        scale = rng.uniform(0.5, 1.5, len(raw)) * rng.choice([-1, 1], len(raw)) * (4 if n else 1) / 64
        stored = scale.astype("<f2" if kind.scales else "<f4").view(np.uint8).reshape(len(raw), -1)
        raw[:, at : at + stored.shape[1]] = stored
    return raw.reshape(rows, -1)


def random_bytes(kind: QuantType, rows: int, k: int, seed: int = 0) -> Raw:
    """Rows of any bits at all: subnormal, infinite and NaN scales too."""
    rng = np.random.default_rng([seed, kind.ggml_id, k])
    return np.frombuffer(rng.bytes(rows * kind.row_bytes(k)), np.uint8).reshape(rows, -1).copy()


def values(kind: QuantType, raw: Raw, k: int) -> npt.NDArray[np.float32]:
    """The oracle: rows of any type as float32 [rows, k]."""
    if kind.name == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if kind in FLOAT_TYPES:
        return raw.view("<f4" if kind.name == "F32" else "<f2").astype(np.float32)
    return np.asarray(ops.dequantize_f32(Tensor.from_numpy(raw, kind, (len(raw), k), "cpu")).numpy())


@lru_cache(maxsize=32)
def _matrix(kind: QuantType, rows: int, k: int) -> tuple[Raw, Exact]:
    """The distinct rows of a matrix and their values."""
    raw = random_blocks(kind, min(rows, DISTINCT), k)
    return raw, values(kind, raw, k).astype(np.float64)


def _repeat(distinct: Array, rows: int, axis: int = 0) -> Array:
    return np.asarray(np.take(distinct, np.arange(rows) % distinct.shape[axis], axis=axis))


def _weights(kind: QuantType, rows: int, k: int, tail: bool) -> Raw:
    """A matrix as bytes, with poison behind it where `tail` asks for it."""
    whole = _repeat(_matrix(kind, rows, k)[0], rows).reshape(-1)
    more = np.full(kind.row_bytes(TAIL) if tail else 0, 0xFF, np.uint8)
    return np.concatenate([whole, more])


def _activations(columns: int, k: int, on_grid: bool) -> npt.NDArray[np.float32]:
    """Columns of floats; `on_grid`: whole numbers of 1/64 with a biggest of 127/64, which q8_1 holds exactly."""
    rng = np.random.default_rng([columns, k])
    if not on_grid:
        return rng.standard_normal((columns, k)).astype(np.float32)
    q = rng.integers(-127, 128, (columns, k))
    q[:, ::QK8_1] = 127
    return (q / 64).astype(np.float32)


def _as_q8_1(y: npt.NDArray[np.float32]) -> tuple[Raw, Exact]:
    """Columns as q8_1 with NaN in what pads them, and the values that are left of them."""
    columns, k = y.shape
    blocks = y.reshape(-1, QK8_1)
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    q = np.rint(np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0)).astype(np.int8)
    scales = np.concatenate([d, blocks.sum(axis=1, keepdims=True)], axis=1).astype("<f2")
    raw = np.full((columns, padded(k) // QK8_1 * Q8_1_BYTES), 0x7F, np.uint8)
    stored = np.concatenate([scales.view(np.uint8), q.view(np.uint8)], axis=1)
    raw[:, : k // QK8_1 * Q8_1_BYTES] = stored.reshape(columns, -1)
    return raw.reshape(-1), (scales[:, :1].astype(np.float64) * q).reshape(columns, k)


def _poisoned(elements: int, dtype: npt.DTypeLike = np.float32) -> Array:
    """An output with its guard band."""
    poison = judge.POISON[np.dtype(dtype).itemsize]
    return np.full(elements + GUARD, poison, poison.dtype).view(dtype)


# Families


def _quantize(kernel: Kernel, thorough: bool) -> Iterator[Case]:
    sizes = [(3, 100), (1, 1000)]
    if thorough:
        sizes += [(1, 1), (5, 31), (2, 512), (17, 4096 + 32), (3, 14336), (MAX_GRID_Y, 32)]
    for n, (rows, k) in enumerate(sizes):
        x = _activations(rows, k, on_grid=False) * np.float32(3)
        x[0, : min(k, QK8_1)] = 0
        x[-1, -1] = 1e-9  # a scale that half precision has not
        y = _poisoned(rows * padded(k) // QK8_1 * Q8_1_BYTES, np.uint8)
        yield Case(
            kernel,
            f"{rows} rows of {k}",
            kernel.grid(k=k, rows=rows),
            [x.reshape(-1), y, k, padded(k)],
            1,
            partial(judge.quantized, x=x),
            (4 * (n % 2), 4 * (n % 2), 0, 0),
        )


def _dequantize(kernel: Kernel, thorough: bool) -> Iterator[Case]:
    kind = kernel.type
    assert kind is not None
    assert kind.dequantize is not None
    sizes = [(21 if kind.block_size == 32 else 3, random_blocks), (37 if kind.block_size == 32 else 5, random_bytes)]
    if thorough:
        sizes += [(1, random_blocks), (8192, random_blocks), (65537, random_blocks), (500, random_bytes)]
    for n, (blocks, make) in enumerate(sizes):
        elements = blocks * kind.block_size
        raw = make(kind, 1, elements)
        with np.errstate(all="ignore"):
            expected = values(kind, raw, elements).reshape(-1)
            if kernel.output == "f16":
                expected = expected.astype(np.float16)
        count = {DequantizeArgs.NB32: [elements // 32], DequantizeArgs.K: [elements], DequantizeArgs.GRID: []}
        dtype = np.uint16 if kernel.output == "f16" else np.float32
        yield Case(
            kernel,
            f"{elements} elements" + (", any bytes" if make is random_bytes else ""),
            kernel.grid(elements=elements),
            [raw.reshape(-1), _poisoned(elements, dtype), *count[kind.dequantize.args]],
            1,
            partial(judge.bit_for_bit, expected=expected.reshape(1, -1), what="block", size=kind.block_size),
            (2 * (n % 2), 4 * (n % 2), 0)[: len(kernel.args)],
        )


@dataclass(frozen=True)
class _Size:
    """A product: rows, row length, columns, whether q8_1 holds the activations, rows of `dst` beyond the last."""

    rows: int
    k: int
    columns: int = 1
    on_grid: bool = True
    gap: int = 0
    tail: bool = False


def _product(kernel: Kernel, size: _Size, number: int) -> Case:
    """Weights times columns of floats or of q8_1, whichever the kernel takes."""
    kind, rows, k, columns = kernel.type, size.rows, size.k, size.columns
    assert kind is not None
    floats = kernel.family == "dequantize_mul_mat_vec"
    y = _activations(columns, k, size.on_grid and not floats)
    stored, exact = (y.reshape(-1), y.astype(np.float64)) if floats else _as_q8_1(y)
    weights = _matrix(kind, rows, k)[1]
    # What a result that has nothing to do with the right one would differ by.
    typical = np.outer(np.linalg.norm(exact, axis=1), np.linalg.norm(weights, axis=1)) / np.sqrt(k)
    stride = rows + size.gap
    tolerance = FLOAT_PRODUCT if floats else ON_GRID if size.on_grid else OFF_GRID
    sizes = {"ncols": k, "ncols_x": k, "nrows": rows, "nrows_x": rows, "ncols_y": columns, "nrows_y": padded(k)}
    grid = {"ncols": columns} if kernel.family == "mul_mat" else {}
    judged = partial(
        judge.product,
        expected=_repeat(exact @ weights.T, rows, axis=1),
        typical=_repeat(typical, rows, axis=1),
        stride=stride,
        tolerance=tolerance,
        tile=kind.tile if kernel.family == "mul_mat" else None,
    )
    return Case(
        kernel,
        f"{rows} x {k}, {columns} column{'s' * (columns > 1)}" + (f", {stride} rows of dst" if size.gap else ""),
        kernel.grid(nrows=rows, **grid),
        [
            _weights(kind, rows, k, size.tail),
            stored,
            _poisoned(columns * stride),
            *({**sizes, "nrows_dst": stride}[a.name] for a in kernel.args[3:]),
        ],
        2,
        judged,
        (2, 4, 4, *[0] * (len(kernel.args) - 3)) if number % 2 else (0,) * len(kernel.args),
    )


def _rows_of(kind: QuantType) -> tuple[int, int]:
    """Row lengths: a few units a row, and one in which every lane of a block has work; 512 divides neither."""
    return (768, 4096 + 256) if kind.is_super_block else (160, 4096 + 32)


def _thorough_shapes(kind: QuantType) -> Iterator[tuple[int, int]]:
    block = kind.block_size
    yield from [(1, block), (7, 9216 + block), (2, 2048), (37, 21 * 32 if block == 32 else 768), (257, 2048)]
    yield from [(131, 512 + block), (509, 14336), (65537, 256), (70001, 256)]


def _dequantize_mul_mat_vec(kernel: Kernel, thorough: bool) -> Iterator[Case]:
    kind = kernel.type
    assert kind is not None
    few, many = _rows_of(kind)
    sizes = [_Size(5, few), _Size(3, many)]
    if thorough:
        sizes += [_Size(rows, k, tail=bool(n % 2)) for n, (rows, k) in enumerate(_thorough_shapes(kind))]
    yield from (_product(kernel, size, n) for n, size in enumerate(sizes))


def _mul_mat_vec(kernel: Kernel, thorough: bool) -> Iterator[Case]:
    kind, b = kernel.type, kernel.batch
    assert kind is not None
    few, many = _rows_of(kind)
    sizes = [_Size(5, few, b), _Size(3, many, b, on_grid=False, gap=3)]
    if thorough:
        for n, (rows, k) in enumerate(_thorough_shapes(kind)):
            sizes.append(_Size(rows, k, b, on_grid=n % 4 < 3, gap=n % 3, tail=bool(n % 2)))
    yield from (_product(kernel, size, n) for n, size in enumerate(sizes))


def _mul_mat(kernel: Kernel, thorough: bool) -> Iterator[Case]:
    kind = kernel.type
    assert kind is not None
    assert kind.tile is not None
    mmq_x, mmq_y = kind.tile
    block = kind.block_size
    sizes = [
        _Size(5, 32 * 21 if block == 32 else 768, 7, on_grid=False, gap=2),
        _Size(mmq_y + 3, 3 * 32 if block == 32 else 256, mmq_x + 1),  # a tile more in both directions
    ]
    if thorough:
        sizes += [_Size(37, 2048, n, gap=n % 2, tail=True) for n in (1, 7, 63, 65, 129, 300)]
        sizes += [_Size(rows, k, 65, tail=bool(n % 2)) for n, (rows, k) in enumerate(_thorough_shapes(kind))]
        sizes += [_Size(1, block), _Size(130, 14336, 17, on_grid=False)]
    yield from (_product(kernel, size, n) for n, size in enumerate(sizes))


def _get_rows(kernel: Kernel, thorough: bool) -> Iterator[Case]:
    kind = kernel.type
    assert kind is not None
    ids = np.array([18, 0, 7, 7, 3], np.uint32)
    sizes = [(ids, {1: 333, 32: 32 * 21, 256: 768}[kind.block_size]), (ids[:2], kind.block_size)]
    if thorough:
        many = np.random.default_rng(0).integers(0, 19, 70_001).astype(np.uint32)
        per_block = 512 if kind.block_size == 32 else 256
        wide = MAX_GRID_Y * per_block + kind.block_size  # more parts than the grid is high
        sizes += [(many, 256), (ids, 14336), (np.zeros(1, np.uint32), wide)]
    for n, (wanted, k) in enumerate(sizes):
        rows = int(wanted.max()) + 1
        raw = random_blocks(kind, rows, k)
        expected = values(kind, raw, k)[wanted]
        yield Case(
            kernel,
            f"{len(wanted)} of {rows} rows of {k}",
            kernel.grid(nids=len(wanted), k=k),
            [raw.reshape(-1), wanted.copy(), _poisoned(expected.size), k, kind.row_bytes(k)],
            2,
            partial(judge.bit_for_bit, expected=expected, what="row", size=k),
            (kind.block_bytes if kind in FLOAT_TYPES else 2, 4, 4, 0, 0) if n % 2 else (0,) * 5,
        )


def on_device(device: Device, code_object: bytes | CodeObjects) -> Backend:
    """Launches cases on a device, each array in memory of its own."""

    def run(case: Case) -> None:
        function = device.get_or_load_func(case.kernel.name, code_object)
        params: list[object] = list(case.params)
        for i, value in enumerate(case.params):
            if isinstance(value, np.ndarray):
                offset = case.offsets[i] if case.offsets else 0
                params[i] = buffer = device.allocate(value.nbytes + BOUNDARY).view(offset, value.nbytes)
                buffer.write(value)
                if i == case.output:
                    output, written = value, buffer
        function.launch(case.grid, case.kernel.block, 0, device.stream, params)
        device.stream.synchronize()
        output[...] = written.read(output.dtype, output.shape)

    return run
