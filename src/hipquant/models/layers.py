"""What models are made of: weights on a device, activations, RoPE tables and the KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .. import wiring
from ..codeobjects import QUANTIZED
from ..driver import Buffer, Device
from ..errors import OutOfDeviceMemoryError
from ..gguf_file import GGUFFile, TensorInfo, find_invalid_scales
from ..quants import FLOAT_TYPES, MATRIX_TYPES, QuantType
from ..wiring import PACK_ROWS, Dim3, Kernel

ALIGNMENT = 64  # of a tensor's place
PACK_AT_ONCE = 16 << 20  # bytes of a tensor that are mapped while it is packed
TILE_BYTES = 44  # of 32 activations in a q8 tile: d, two sums, 32 bytes (kernels/cpu/tile.h)
TILE_COLUMNS = 16
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


class Kernels:
    """Launches kernels by name on a stream of their own, from the embedded code object."""

    def __init__(self, device: Device) -> None:
        self.device, self.stream = device, device.create_stream()

    def __call__(self, kernel: Kernel, grid: Dim3, *params: object) -> None:
        self.device.get_or_load_func(kernel.name, QUANTIZED).launch(grid, kernel.block, 0, self.stream, params)


class Activations:
    """Columns of activations, as floats and, for quantized weights, as q8 tiles: `n_max` columns of k values."""

    def __init__(self, kernels: Kernels, k: int, n_max: int) -> None:
        self.kernels, self.k = kernels, k
        self.floats = kernels.device.allocate(4 * k * n_max, "activations")
        columns = -(-n_max // TILE_COLUMNS) * TILE_COLUMNS
        self.tiles = kernels.device.allocate(columns * -(-k // 32) * TILE_BYTES, "activations")
        self._quantize = wiring.kernel("quantize_q8_tiles")

    def quantize(self, n: int, first: int = 0) -> None:
        """Makes the tiles of n columns from the floats, from column `first` on. k must be a multiple of 32."""
        source = self.floats.address + 4 * self.k * first
        self.kernels(self._quantize, self._quantize.grid(k=self.k, ncols=n), source, self.tiles, self.k, n)


@dataclass
class Linear:
    """A weight matrix (rows, k) on a device: packed 16 rows together, or as it lies in the file for float types."""

    kernels: Kernels
    type: QuantType
    rows: int
    k: int
    weights: Buffer
    bias: Buffer | None

    def __post_init__(self) -> None:
        self.quantized = self.type not in FLOAT_TYPES
        self._product = wiring.find("mul_mat_packed" if self.quantized else "mul_mat_float", self.type)
        self._grid = self._product.grid(nrows=self.rows)

    def __call__(self, x: Activations, dst: Buffer | Floats, n: int, first: int = 0) -> None:
        """dst[n][rows] = x[first : first + n] times the weights. The tiles of x must be made of the same columns."""
        source = x.tiles.address if self.quantized else x.floats.address + 4 * self.k * first
        self.kernels(self._product, self._grid, self.weights, source, dst, self.k, self.rows, n, self.rows)
        if self.bias is not None:
            self.kernels(wiring.kernel("add_bias_f32"), (n, 1, 1), dst, self.bias, self.rows)


class Weights:
    """Takes the tensors of a model file onto a device; `memory` counts the bytes of weights there."""

    def __init__(self, file: GGUFFile, device: Device, progress: Callable[[int, int], None] | None = None) -> None:
        self.file, self.device, self.kernels = file, device, Kernels(device)
        self.memory, self._done, self._progress = 0, 0, progress
        self._total = sum(t.nbytes for t in file.tensors.values())
        free = device.free_memory
        if free is not None and self._total > free:
            raise OutOfDeviceMemoryError(self._total, free, f"the weights of {file.path.name}")
        # One place for all, so that it comes in huge pages throughout; what is not used is never touched.
        padding = sum(PACK_ROWS * t.type.row_bytes(t.shape[-1]) + ALIGNMENT for t in file.tensors.values())
        self._place, self._used = device.allocate(self._total + padding, f"the weights of {file.path.name}"), 0

    def info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        """A tensor that must be there with this shape."""
        info = self.file.tensors.get(name)
        if info is None:
            self.file.fail(f"tensor {name!r} is missing; the file is not a whole model: download or convert it again")
        if info.shape != shape:
            self.file.fail(
                f"tensor {name!r} has shape {info.shape}, the metadata says {shape}; convert the model again"
            )
        return info

    def vector(self, name: str, n: int) -> Buffer:
        """A float vector (norm, bias, frequency factors), as float32."""
        info = self.info(name, (n,))
        if info.type not in FLOAT_TYPES:
            self.file.fail(f"tensor {name!r} is {info.type}, expected F32, F16 or BF16")
        self.file.check_scales(name)
        raw = self.file.data(name)
        values = {"F32": np.float32, "F16": np.float16}.get(info.type.name)
        floats = raw.view(values) if values else (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        buffer = self.device.allocate(4 * n, name)
        buffer.write(floats.astype(np.float32))
        self._count(info.nbytes, 4 * n)
        return buffer

    def optional_vector(self, name: str, n: int) -> Buffer | None:
        return self.vector(name, n) if name in self.file.tensors else None

    def matrix(self, name: str, rows: int, k: int) -> Buffer:
        """A matrix as it lies in the file, for `get_rows`: mapped, not copied."""
        info = self.info(name, (rows, k))
        self._check_type(info)
        for _, _, part in self._checked_parts(info, max(1, PACK_AT_ONCE // info.type.row_bytes(k)), k):
            self._count(part.nbytes, 0)
        return self.device.upload(self.file.data(name))

    def linear(self, name: str, rows: int, k: int, bias: str | None = None) -> Linear:
        """A weight matrix for products. Quantized types are packed, part by part, and their mapping is let go."""
        info = self.info(name, (rows, k))
        self._check_type(info)
        if info.type in FLOAT_TYPES:
            self.file.check_scales(name)
            weights = self.device.upload(self.file.data(name))
            self._count(info.nbytes, info.nbytes)
        else:
            weights = self._pack(info, rows, k)
        return Linear(self.kernels, info.type, rows, k, weights, self.optional_vector(bias, rows) if bias else None)

    def _check_type(self, info: TensorInfo) -> None:
        if info.type not in MATRIX_TYPES:
            self.file.fail(f"tensor {info.name!r} is {info.type}, which is not a type of weights")

    def _checked_parts(self, info: TensorInfo, step: int, k: int) -> Iterator[tuple[int, int, Bytes]]:
        """(first row, rows, bytes) of `step` rows at a time, their scales checked; each part's mapping is let go."""
        data, row_bytes, rows = self.file.data(info.name), info.type.row_bytes(k), info.shape[0]
        for first in range(0, rows, step):
            n = min(step, rows - first)
            part = data[first * row_bytes : (first + n) * row_bytes]
            if find_invalid_scales(info.type, part) is not None:
                self.file.check_scales(info.name)  # raises, and says where
            yield first, n, part
            self.file.release(info.name, first * row_bytes, part.nbytes)

    def _pack(self, info: TensorInfo, rows: int, k: int) -> Buffer:
        kernel, row_bytes = wiring.find("pack", info.type), info.type.row_bytes(k)
        packed = self._take(-(-rows // PACK_ROWS) * PACK_ROWS * row_bytes)
        step = max(PACK_ROWS, PACK_AT_ONCE // row_bytes // PACK_ROWS * PACK_ROWS)
        for first, n, part in self._checked_parts(info, step, k):
            self.kernels(kernel, kernel.grid(nrows=n), part, packed.address + first * row_bytes, k, n)
            self._count(part.nbytes, part.nbytes)
        return packed

    def _take(self, nbytes: int) -> Buffer:
        """The next part of the place for weights: each tensor is packed at most once."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        self._used = start + nbytes
        return self._place.view(start, nbytes)

    def _count(self, done: int, held: int) -> None:
        self._done += done
        self.memory += held
        if self._progress:
            self._progress(min(self._done, self._total), self._total)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: which angles each pair of values turns by at each position.

    `scaling` is none, linear or yarn. YaRN: Peng et al., arXiv 2309.00071, with ggml's correction range and
    magnitude; `factors` divide the frequencies (Llama 3's scaling).
    """

    n_rot: int
    base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    factors: Floats | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    extrapolation: float = 1.0

    def table(self, n_context: int) -> Floats:
        """Cosine and sine for each position and pair: float32 [n_context, n_rot / 2, 2]."""
        pair = np.arange(self.n_rot // 2, dtype=np.float64)
        frequency = self.base ** (-2 * pair / self.n_rot)
        if self.factors is not None:
            frequency = frequency / self.factors.astype(np.float64)
        scale = 1.0
        if self.scaling == "linear":
            frequency = frequency / self.factor
        elif self.scaling == "yarn":
            keep = self._extrapolated(pair) * self.extrapolation
            frequency = frequency / self.factor * (1 - keep) + frequency * keep
            scale = self.attention_factor
            if self.extrapolation:
                scale *= 1 + 0.1 * math.log(max(self.factor, 1))
        angle = np.arange(n_context, dtype=np.float64)[:, None] * frequency
        return (np.stack([np.cos(angle), np.sin(angle)], axis=-1) * scale).astype(np.float32)

    def _extrapolated(self, pair: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """1 for pairs that turn often within the original context and keep their frequency, 0 for those that do not."""

        def turns(n: float) -> float:
            return self.n_rot * math.log(self.original_context / (n * 2 * math.pi)) / (2 * math.log(self.base))

        low = max(0, math.floor(turns(self.beta_fast)))
        high = min(self.n_rot - 1, math.ceil(turns(self.beta_slow)))
        return 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)


class KVCache:
    """Keys and values of every layer for `slots` sequences of `n_context` positions, as halves.

    The layout is the kernels' own (kernels/cpu/kv_cache.h). Memory is used as positions are written.
    """

    def __init__(self, device: Device, layers: int, slots: int, n_head_kv: int, head_dim: int, n_context: int) -> None:
        self.n_context, self.slots = -(-n_context // 16) * 16, slots
        each = 2 * slots * n_head_kv * self.n_context * head_dim
        self.keys = [device.allocate(each, "the KV cache", sparse=True) for _ in range(layers)]
        self.values = [device.allocate(each, "the KV cache", sparse=True) for _ in range(layers)]
        self.nbytes_per_position = 2 * 2 * layers * n_head_kv * head_dim
