"""Weights on a GPU: in planes (kernels/gpu/planes.h), each tensor once, and what multiplies with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from .. import wiring
from ..codeobjects import ENGINE, QUANTIZED
from ..driver import Buffer, Device, gpu
from ..errors import OutOfDeviceMemoryError
from ..gguf_file import GGUFFile, TensorInfo
from ..quants import FLOAT_TYPES, UNIT, QuantType, activation_bytes, padded, plane_bytes, plane_units
from ..wiring import PLANE_BATCHES
from .layers import PART, Bytes, Kernels, Matrix, Sizes, Weights

if TYPE_CHECKING:
    from .gpu import GpuBlocks

ALIGNMENT = 256  # of a tensor, of a part of the blocks' memory
Part = tuple[Matrix, TensorInfo]  # a matrix, and the tensor that it lies in


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Activations:
    """Columns of k activations: in planes for quantized weights, as floats for float ones; padded with zeros.

    Where `squares` is set, they are yet to be divided by the root mean square, which comes out of these sums.
    """

    def __init__(self, k: int, planes: Buffer, floats: Buffer, eps: float) -> None:
        self.k, self.n_padded, self.planes, self.floats, self.eps = k, padded(k), planes, floats, eps
        self.squares: Buffer | None = None

    def of(self, quantized: bool, first: int) -> int:
        """The address of a column."""
        if quantized:
            return self.planes.address + first * activation_bytes(self.n_padded)
        return self.floats.address + 4 * self.n_padded * first

    def squares_of(self, first: int) -> int | None:
        return self.squares.address + 4 * -(-self.k // 32) * first if self.squares else None


class EpilogueKind(IntEnum):
    """What becomes of the products of a mat-vec, as kernels/gpu/engine/mat_vec_epilogue.h numbers it."""

    STORE = 0
    ADD_AND_NORM = 1
    GATE = 2
    ROPE_AND_STORE = 3
    GATE_GELU = 4


@dataclass
class Epilogue:
    """What becomes of the products of a mat-vec: its kind, and the kernel's parameters for it."""

    kind: EpilogueKind = EpilogueKind.STORE
    stride: int = 0  # of the columns of what is written; 0: as many as there are rows
    norm: tuple[object, ...] = ()  # of ADD_AND_NORM: weight, floats, planes, sums, n_padded
    gate: tuple[object, ...] = (None, 0)  # planes, n_padded
    rope: tuple[object, ...] = (None, None, None, None, None, 1, 1, 2, 0, 1)  # caches to n_context


@dataclass
class Run:
    """Rows of one type that lie side by side: one product. They are rows `at` and on of the result."""

    type: QuantType
    rows: int
    at: int
    weights: Buffer

    @property
    def quantized(self) -> bool:
        return self.type not in FLOAT_TYPES


@dataclass
class ExpertColumns:
    """Columns of a pass by expert: groups of at most `batch` of them."""

    groups: Buffer
    n_groups: int
    batch: int


@dataclass
class Products:
    """Matrices on the same k activations, as one with `rows` rows: launched as few times as their types allow."""

    kernels: Kernels
    k: int
    runs: list[Run]
    bias: Buffer | None
    experts: int = 0  # how many such matrices there are, one an expert, all in one; 0: it is a matrix
    rows: int = field(init=False)

    def __post_init__(self) -> None:
        assert isinstance(self.kernels.device, gpu.Device)
        self.processors = self.kernels.device.compute_units
        self.rows = sum(run.rows for run in self.runs)

    @property
    def can_gate(self) -> bool:
        """Whether short passes can gate as they multiply: gate and up are halves of one run, and 32 bits reach from a
        row of one to that of the other (BlockRows in mat_vec_epilogue.h)."""
        return len(self.runs) == 1 and self.runs[0].weights.nbytes < 8 << 30

    def wants(self, x: Activations, *beside: Products) -> tuple[Buffer | None, Buffer | None]:
        """Where their activations, and those of others, must be made: as floats, in planes, or both."""
        quantized = {run.quantized for products in (self, *beside) for run in products.runs}
        return x.floats if False in quantized else None, x.planes if True in quantized else None

    def few(self, x: Activations, dst: Buffer, n: int, first: int = 0, epilogue: Epilogue | None = None) -> None:
        """Columns `first` and on of x, at most 8, times the weights; `epilogue` says what becomes of it."""
        for run in self.runs:
            self._mat_vec(run, x, dst, n, first, epilogue or Epilogue())

    def many(self, x: Activations, dst: Buffer, n: int, first: int = 0) -> None:
        """dst[n][rows] = columns `first` and on of x times the weights, plus the biases."""
        for run in self.runs:
            if not run.quantized:
                self._mat_vec(run, x, dst, n, first, Epilogue(), bias=False)
                continue
            kernel, to = wiring.find("mul_mat_planes", run.type), dst.address + 4 * run.at
            y, grid = x.of(True, first), kernel.grid(nrows=run.rows, ncols=n)
            self.kernels(kernel, grid, run.weights, y, to, self.k, run.rows, n, x.n_padded, self.rows)
        if self.bias is not None:
            add = wiring.kernel("add_bias_rows_f32")
            self.kernels(add, add.grid(n=self.rows, rows=n), dst, self.bias, self.rows, self.rows)

    def of_experts(
        self, x: Activations, dst: Buffer, columns: ExpertColumns, token: Buffer | None, epilogue: Epilogue
    ) -> None:
        """Columns of x, those of `token` or all, times the weights of their experts. Of groups of several columns,
        those of quantized weights that are gated go to planes alone."""
        stride = epilogue.stride or self.rows
        for run in self.runs:
            if columns.batch > 1 and run.quantized:
                kernel, to_rows = wiring.find("mul_mat_planes_experts", run.type), dst.address + 4 * run.at
                grid = kernel.grid(nrows=run.rows, groups=columns.n_groups)
                self.kernels(kernel, grid, run.weights, x.planes, to_rows, self.k, run.rows, self.experts, x.n_padded,
                             columns.groups, token, stride, *epilogue.gate)  # fmt: skip
                continue
            product = wiring.find("mul_mat_vec_experts", run.type, batch=columns.batch)
            grid = product.grid(nrows=run.rows, groups=columns.n_groups)
            sizes = self.k, run.rows, self.experts, x.n_padded
            to = dst, run.at, stride, int(epilogue.kind), *epilogue.gate
            self.kernels(product, grid, run.weights, x.of(run.quantized, 0), x.squares_of(0), x.eps, *sizes,
                         columns.groups, token, *to)  # fmt: skip

    def mixed(
        self, x: Activations, dst: Buffer, n: int, used: int, experts: Buffer, weights: Buffer, epilogue: Epilogue
    ) -> None:
        """dst[n][rows] += the products of `used` columns of x for each token, weighted and added, and what
        `ADD_AND_NORM` makes of it. One run."""
        assert epilogue.kind == EpilogueKind.ADD_AND_NORM
        (run,) = self.runs
        product = wiring.find("mul_mat_vec_mixed", run.type)
        sizes = self.k, run.rows, self.experts, used, x.n_padded
        grid = product.grid(nrows=run.rows, ntokens=n)
        to = dst, epilogue.stride, *epilogue.norm
        self.kernels(product, grid, run.weights, x.of(run.quantized, 0), *sizes, experts, weights, *to)

    def _mat_vec(
        self, run: Run, x: Activations, dst: Buffer, n: int, first: int, epilogue: Epilogue, bias: bool = True
    ) -> None:
        batch = next((b for b in PLANE_BATCHES if b >= n), PLANE_BATCHES[-1])
        y, squares, stride = x.of(run.quantized, first), x.squares_of(first), epilogue.stride or self.rows
        product = (run.weights, y, squares, x.eps, self.k, run.rows, n, x.n_padded, self.bias if bias else None, dst)
        if epilogue.kind == EpilogueKind.ADD_AND_NORM:
            kernel = wiring.find("mul_mat_vec_norm", run.type, batch=batch)
            self.kernels(kernel, kernel.grid(nrows=run.rows), *product, stride, *epilogue.norm)
            return
        gated = epilogue.kind in (EpilogueKind.GATE, EpilogueKind.GATE_GELU)
        if gated and n == 1:
            kernel = wiring.find("mul_mat_vec_gate", run.type, batch=1)
            grid = kernel.grid(nrows=run.rows)
            if grid[0] <= wiring.GATE_BLOCKS * self.processors:
                self.kernels(kernel, grid, *product, stride, int(epilogue.kind), *epilogue.gate)
                return
        kernel = wiring.find("mul_mat_vec_planes", run.type, batch=batch)
        rows = wiring.rows_to_block(run.type, run.rows, plane_units(self.k), batch, gated, self.processors)
        grid = kernel.grid(nrows=run.rows, ncols=n, rows_to_block=rows)
        to = run.at, stride, int(epilogue.kind), rows, *epilogue.gate, *epilogue.rope
        self.kernels(kernel, grid, *product, *to)


class GpuWeights(Weights[Products]):
    """Weights in a GPU's memory, in one place, each tensor once, copied through pinned memory."""

    def __init__(
        self,
        file: GGUFFile,
        device: Device,
        progress: Callable[[int, int], None] | None = None,
        tensors: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        for code_object in (QUANTIZED, ENGINE):  # what is missing is said now, not at the first launch
            device.load(code_object)
        super().__init__(file, device, progress, tensors)
        self._place: Buffer | None = None
        self._used = 0
        self._there: dict[str, Buffer] = {}
        self._pinned: list[Bytes] = []
        self._staged: list[Buffer] = []

    @property
    def staging_bytes(self) -> int:
        """Bytes that loading takes beside them."""
        return 2 * PART

    def blocks(
        self, sizes: Sizes, embedding: Matrix | None, output: Matrix | None, sequences: int, context: int
    ) -> GpuBlocks:
        from .gpu import GpuBlocks

        return GpuBlocks(self, sizes, embedding, output, sequences, context)

    def embedding(self, embedding: Matrix, k: int) -> Buffer:
        return self._upload([(embedding, self.info_of(embedding, k))])

    def products(self, k: int, *matrices: Matrix) -> Products:
        runs: list[Run] = []
        parts, at = [(m, self.info_of(m, k)) for m in matrices], 0
        for alike in _alike(parts):
            type, rows = alike[0][1].type, sum(m.rows for m, _ in alike)
            runs.append(Run(type, rows, at, self._upload(alike)))
            self.memory += rows * type.row_bytes(k)
            at += rows
        return Products(self.kernels, k, runs, self._biases(matrices))

    def experts(self, k: int, used: int, *matrices: Matrix) -> Products:
        """Those of one expert lie side by side where their types agree."""
        runs: list[Run] = []
        n, at = matrices[0].experts, 0
        for alike in _alike([(m, self.info_of(m, k)) for m in matrices]):
            type, rows = alike[0][1].type, sum(m.rows for m, _ in alike)
            each = [(m._replace(first=e * m.rows), info) for e in range(n) for m, info in alike]
            runs.append(Run(type, rows, at, self._upload(each)))
            self.memory += used * rows * type.row_bytes(k)
            at += rows
        return Products(self.kernels, k, runs, None, n)

    def _biases(self, matrices: tuple[Matrix, ...]) -> Buffer | None:
        """One for all rows, 0 where a matrix has none; None if none has."""
        biases = [self.bias(m) for m in matrices]
        if all(bias is None for bias in biases):
            return None
        zeros = (np.zeros(m.rows, np.float32) for m in matrices)
        parts = [bias if bias is not None else zero for bias, zero in zip(biases, zeros, strict=True)]
        return self.device.upload(np.concatenate(parts))

    def finish(self) -> None:
        self._pinned.clear()
        self._staged.clear()

    def reserve(self) -> None:
        """Takes the place for all matrices."""
        nbytes = bytes_there(t for t in self.tensors.values() if len(t.shape) > 1)
        self._place = self.device.allocate(nbytes, f"the weights of {self.file.path.name}")

    def _upload(self, parts: list[Part]) -> Buffer:
        """Matrices of one type as one; once, where an embedding is also the output."""
        names = " ".join(f"{m.name}:{m.first}" for m, _ in parts)
        if names not in self._there:
            if self._place is None:
                self.reserve()
            assert self._place is not None
            rows, (type, k) = sum(m.rows for m, _ in parts), (parts[0][1].type, parts[0][1].shape[-1])
            nbytes = _matrix_bytes(type, rows, k)
            to = self._there[names] = self._place.view(self._used, nbytes)
            self._used += aligned(nbytes)
            first = 0
            for m, info in parts:
                self._check_type(info)
                self._copy(m, info, to, first, rows)
                first += m.rows
        return self._there[names]

    def _copy(self, m: Matrix, info: TensorInfo, to: Buffer, first: int, rows: int) -> None:
        """Rows `first` and on of a matrix. Through two pieces of pinned memory in turn: one is filled while the other
        is on its way, and is moved into planes there."""
        stream, k = self.kernels.stream, info.shape[-1]
        row_bytes = info.type.row_bytes(k)
        if not self._pinned:
            self._pinned = [self.device.allocate_host(PART) for _ in range(2)]
            self._staged = [self.device.allocate(PART, "weights on their way") for _ in range(2)]
        held = max(row_bytes, _float_row_bytes(info.type, k))
        if held > PART:
            raise OutOfDeviceMemoryError(held, PART, f"a row of tensor {info.name!r} in pinned memory")
        for i, (at, n, part) in enumerate(self._checked_parts(m, PART // held, k)):
            pinned, staged = self._pinned[i % 2], self._staged[i % 2]
            if info.type in FLOAT_TYPES:
                wide = _float_row_bytes(info.type, k)
                filled = pinned[: n * wide].reshape(n, wide)
                filled[:, :row_bytes] = part.reshape(n, row_bytes)
                filled[:, row_bytes:] = 0
                stream.synchronize()  # the piece before has arrived
                to.write_async(pinned[: n * wide], stream, (first + at) * wide)
            else:
                pinned[: part.nbytes] = part
                stream.synchronize()
                staged.write_async(pinned[: part.nbytes], stream)
                repack = wiring.find("repack", info.type)
                grid = repack.grid(nrows=n, units=plane_units(k))
                self.kernels(repack, grid, staged, to, k, n, first + at, rows)
            self._count(part.nbytes, 0)
        stream.synchronize()


def bytes_there(tensors: Iterable[TensorInfo]) -> int:
    """Bytes that tensors take on the device."""
    return sum(aligned(_bytes_there(t)) for t in tensors)


def _float_row_bytes(type: QuantType, k: int) -> int:
    """Bytes of a row of a float type, filled up to whole units; 0 for quantized types."""
    return plane_units(k) * UNIT * type.block_bytes if type in FLOAT_TYPES else 0


def _bytes_there(info: TensorInfo) -> int:
    """Bytes of a tensor on the device."""
    k = info.shape[-1]
    return _matrix_bytes(info.type, info.nbytes // info.type.row_bytes(k), k)


def _matrix_bytes(type: QuantType, rows: int, k: int) -> int:
    """Bytes of a matrix on the device: in planes, or floats in whole units."""
    return rows * _float_row_bytes(type, k) if type in FLOAT_TYPES else plane_bytes(type, rows, k)


def _alike(parts: list[Part]) -> Iterator[list[Part]]:
    """Neighbours of one type, which are multiplied in one launch."""
    group: list[Part] = []
    for part in parts:
        if group and group[0][1].type is not part[1].type:
            yield group
            group = []
        group.append(part)
    yield group
