"""The framework functions: they validate, pick the kernel by name, and launch it.

Weights are tensors of GGUF blocks, shape (rows, k). Activations are float32 tensors or arrays, shape (k,) or
(columns, k). Results are float32 tensors, shape (rows,) or (columns, rows): `dst[column * rows + row]`.

They return when the launch is queued; `Tensor.numpy()` waits for the device's stream. After a launch on a stream of
one's own, synchronize that one first.

Source of the formats and of the names: ggml (llama.cpp) and Candle; see quants.py and wiring/.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from . import wiring
from .codeobjects import QUANTIZED
from .driver import Buffer, Stream
from .errors import UnsupportedQuantTypeError
from .quants import DEQUANTIZE_TYPES, F16, F32, MATRIX_TYPES, Q8_1, WEIGHT_TYPES, DequantizeArgs, QuantType, padded
from .tensor import Tensor

Activations = Tensor | npt.NDArray[np.float32]
MAX_ELEMENTS = 1 << 30  # of one launch: the table counts elements in 32 bits
MAX_ROWS = wiring.MAX_GRID_Y


def launch(kernel: wiring.Kernel, like: Tensor, stream: Stream | None, grid: wiring.Dim3, params: list[object]) -> None:
    """Loads a kernel by name from the embedded code object and launches it on the device of `like`."""
    function = like.device.get_or_load_func(kernel.name, QUANTIZED)
    function.launch(grid, kernel.block, 0, stream or like.device.stream, params)


def _weights(w: object, what: str, types: tuple[QuantType, ...] = WEIGHT_TYPES) -> Tensor:
    if not isinstance(w, Tensor):
        raise TypeError(
            f"{what}: weights must be a hipquant.Tensor, not {type(w).__name__}; "
            "make one with Tensor.from_numpy(raw_bytes, type, shape)"
        )
    if w.type not in types:
        raise UnsupportedQuantTypeError(w.type, what, (t.name for t in types))
    return w


def _matrix(w: object, what: str) -> tuple[Tensor, int, int]:
    """Weights of a product, with rows and k."""
    found = _weights(w, what)
    if len(found.shape) != 2 or min(found.shape) < 1:
        raise ValueError(f"{what}: weights must have shape (rows, k), not {found.shape}")
    rows, k = found.shape
    if max(rows, k) >= 1 << 31:
        raise ValueError(f"{what}: weights of shape {found.shape} exceed 2**31 - 1 rows or columns")
    return found, rows, k


def _floats(x: object, what: str, like: Tensor | None) -> Tensor:
    """Activations as a float32 tensor on the device of the weights."""
    if isinstance(x, Tensor):
        if x.type is not F32:
            raise UnsupportedQuantTypeError(x.type, f"{what}: activations", ("F32",))
        if like is not None:
            _check_device(x, what, like)
        return x
    if not isinstance(x, np.ndarray) or x.dtype != np.float32:
        found = f"an array of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"{what}: activations must be a float32 array or tensor, not {found}")
    return Tensor.from_numpy(x, device=like.device if like is not None else "auto")


def _check_device(x: Tensor, what: str, like: Tensor) -> None:
    if x.device is not like.device:
        raise ValueError(f"{what}: activations are on {x.device}, weights on {like.device}")


def _columns(x: Tensor, what: str, k: int) -> int:
    """Columns of activations whose length must be k."""
    if len(x.shape) not in (1, 2) or x.shape[-1] != k:
        raise ValueError(f"{what}: activations must have shape ({k},) or (columns, {k}), not {x.shape}")
    return x.rows


def _from(t: Tensor, offset: int) -> Buffer:
    """A tensor's memory from a byte on. Unlike an address, it keeps the whole alive in a captured graph."""
    return t.buffer.view(offset, t.buffer.nbytes - offset)


def _result(w: Tensor, y: Tensor, rows: int) -> Tensor:
    return Tensor.empty((*y.shape[:-1], rows), F32, w.device)


def quantize_q8_1(x: Activations, *, stream: Stream | None = None) -> Tensor:
    """Rows of float32 as q8_1: blocks of 32 with d = max|x| / 127, q = round(x / d), s = sum of x.

    Shape (k,) or (rows, k), any k; a row of the result holds `padded(k)` elements, zero beyond k. NaN and infinity
    give blocks without meaning. Raises TypeError or ValueError for other dtypes and shapes.
    """
    what = "quantize_q8_1"
    source = _floats(x, what, None)
    if len(source.shape) not in (1, 2) or min(source.shape) < 1:
        raise ValueError(f"{what}: expected shape (k,) or (rows, k), not {source.shape}")
    k, rows = source.shape[-1], source.rows
    if k >= 1 << 30:
        raise ValueError(f"{what}: rows of {k} elements exceed 2**30")
    result, kernel = Tensor.empty(source.shape, Q8_1, source.device), wiring.kernel(what)
    for at in range(0, rows, MAX_ROWS):
        n = min(MAX_ROWS, rows - at)
        params: list[object] = [_from(source, 4 * at * k), _from(result, at * result.row_bytes)]
        launch(kernel, source, stream, kernel.grid(k=k, rows=n), [*params, k, padded(k)])
    return result


def _dequantize(w: object, out: QuantType, stream: Stream | None) -> Tensor:
    what = f"dequantize_{out.suffix}"
    source = _weights(w, what, DEQUANTIZE_TYPES)
    result = Tensor.empty(source.shape, out, source.device)
    kernel, elements = wiring.find("dequantize", source.type, output=out.suffix), source.rows * source.shape[-1]
    assert source.type.dequantize is not None
    for at in range(0, elements, MAX_ELEMENTS):
        n = min(MAX_ELEMENTS, elements - at)
        count = {DequantizeArgs.NB32: [n // 32], DequantizeArgs.K: [n], DequantizeArgs.GRID: []}
        x = _from(source, at // source.type.block_size * source.type.block_bytes)
        y = _from(result, at * out.block_bytes)
        params: list[object] = [x, y, *count[source.type.dequantize.args]]
        launch(kernel, source, stream, kernel.grid(elements=n), params)
    return result


def dequantize_f32(w: Tensor, *, stream: Stream | None = None) -> Tensor:
    """Quantized weights of any shape as float32: bit for bit what the `gguf` package's dequantize gives."""
    return _dequantize(w, F32, stream)


def dequantize_f16(w: Tensor, *, stream: Stream | None = None) -> Tensor:
    """Quantized weights of any shape as float16, rounded to nearest from float32."""
    return _dequantize(w, F16, stream)


def dequantize_mul_mat_vec(w: Tensor, y: Activations, *, stream: Stream | None = None) -> Tensor:
    """Weights (rows, k) times one float32 column (k,) or (1, k), in float32 throughout: (rows,) or (1, rows)."""
    what = "dequantize_mul_mat_vec"
    weights, rows, k = _matrix(w, what)
    column = _floats(y, what, weights)
    if _columns(column, what, k) != 1:
        raise ValueError(f"{what}: takes one column of activations, not {column.rows}; use mul_mat_via_q8_1")
    result, kernel = _result(weights, column, rows), wiring.find(what, weights.type)
    launch(kernel, weights, stream, kernel.grid(nrows=rows), [weights, column, result, k, rows])
    return result


def _as_q8_1(y: object, what: str, weights: Tensor, most: int, stream: Stream | None) -> Tensor:
    """Activations of 1 to `most` columns in q8_1: as they are, or quantized now."""
    given = y if isinstance(y, Tensor) and y.type is Q8_1 else _floats(y, what, weights)
    _check_device(given, what, weights)
    n = _columns(given, what, weights.shape[1])
    if not 1 <= n <= most:
        allowed = f"1 to {most} columns, not {n}; use mul_mat_via_q8_1" if n else "at least one column of activations"
        raise ValueError(f"{what}: takes {allowed}")
    return given if given.type is Q8_1 else quantize_q8_1(given, stream=stream)


def mul_mat_vec_via_q8_1(w: Tensor, y: Activations, *, stream: Stream | None = None) -> Tensor:
    """Weights (rows, k) times 1 to 8 columns (k,) or (columns, k), quantized to q8_1 first unless they are already."""
    what = "mul_mat_vec_via_q8_1"
    weights, rows, k = _matrix(w, what)
    columns = _as_q8_1(y, what, weights, wiring.MAX_BATCH, stream)
    result = _result(weights, columns, rows)
    kernel = wiring.find("mul_mat_vec", weights.type, batch=columns.rows)
    launch(kernel, weights, stream, kernel.grid(nrows=rows), [weights, columns, result, k, rows, padded(k), rows])
    return result


def mul_mat_via_q8_1(w: Tensor, y: Activations, *, stream: Stream | None = None) -> Tensor:
    """Weights (rows, k) times any number of columns (columns, k), quantized to q8_1 first unless they are already."""
    what = "mul_mat_via_q8_1"
    weights, rows, k = _matrix(w, what)
    columns = _as_q8_1(y, what, weights, 1 << 31, stream)
    result, kernel = _result(weights, columns, rows), wiring.find("mul_mat", weights.type)
    assert weights.type.tile is not None
    step = MAX_ROWS * weights.type.tile[0]  # columns of one launch
    for at in range(0, columns.rows, step):
        n = min(step, columns.rows - at)
        params: list[object] = [weights, _from(columns, at * columns.row_bytes), _from(result, 4 * at * rows)]
        launch(kernel, weights, stream, kernel.grid(nrows=rows, ncols=n), [*params, k, rows, n, padded(k), rows])
    return result


def get_rows(w: Tensor, ids: npt.NDArray[Any], *, stream: Stream | None = None) -> Tensor:
    """Rows of a matrix of any weight or float type by id, as float32 (len(ids), k). IndexError for ids outside."""
    what = "get_rows"
    weights = _weights(w, what, MATRIX_TYPES)
    index = np.ascontiguousarray(ids)
    if len(weights.shape) != 2 or index.ndim != 1 or not np.issubdtype(index.dtype, np.integer):
        raise ValueError(f"{what}: expected a matrix and a list of ids, not {weights.shape} and {index.shape}")
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < weights.rows:
        raise IndexError(f"{what}: ids from {index.min()} to {index.max()} in a matrix of {weights.rows} rows")
    k = weights.shape[1]
    result, kernel = Tensor.empty((len(index), k), F32, weights.device), wiring.find(what, weights.type)
    if index.size and k:
        where = weights.device.upload(index.astype(np.uint32))
        params: list[object] = [weights, where, result, k, weights.row_bytes]
        launch(kernel, weights, stream, kernel.grid(nids=len(index), k=k), params)
    return result
