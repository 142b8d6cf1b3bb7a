"""Models on a GPU: the file's own blocks in its memory, activations as q8_1, a captured graph for each short pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .. import wiring
from ..codeobjects import ENGINE, QUANTIZED
from ..driver import Buffer, Device, gpu
from ..errors import OutOfDeviceMemoryError
from ..gguf_file import GGUFFile, TensorInfo
from ..quants import FLOAT_TYPES, Q8_1, QuantType, padded
from ..wiring import MAX_BATCH
from .layers import MAX_CAPTURED, PART, Blocks, Bytes, Floats, Kernels, Layer, Matrix, Sizes, Weights

ALIGNMENT = 256  # of a tensor, of a part of the blocks' memory
CHUNK = 512  # tokens of one forward pass
MAX_HEAD_DIM = 256
MAX_SPLITS = 64  # of the positions of a sequence
BLOCKS_TO_UNIT = 2  # attention blocks that there shall be for a compute unit in a short pass


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Activations:
    """Columns of k activations: as q8_1 for quantized weights, as floats for float ones."""

    def __init__(self, k: int, q8_1: Buffer, floats: Buffer) -> None:
        self.k, self.n_padded, self.q8_1, self.floats = k, padded(k), q8_1, floats

    def of(self, quantized: bool, first: int) -> int:
        """The address of a column."""
        if quantized:
            return self.q8_1.address + first * Q8_1.row_bytes(self.n_padded)
        return self.floats.address + 4 * self.k * first


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


class Products:
    """Matrices on the same k activations, as one with `rows` rows: launched as few times as their types allow."""

    def __init__(self, kernels: Kernels, k: int, runs: list[Run], biases: list[tuple[int, int, Buffer]]) -> None:
        self.kernels, self.k, self.runs, self.biases = kernels, k, runs, biases
        self.rows = sum(run.rows for run in runs)

    def wants(self, x: Activations) -> tuple[Buffer | None, Buffer | None]:
        """Where their activations must be made: as floats, as q8_1, or both."""
        float_ones = any(not run.quantized for run in self.runs)
        return x.floats if float_ones else None, x.q8_1 if any(run.quantized for run in self.runs) else None

    def __call__(self, x: Activations, dst: Buffer, n: int, first: int = 0) -> None:
        """dst[n][rows] = columns `first` and on of x times the weights, plus the biases."""
        for run in self.runs:
            y, to = x.of(run.quantized, first), dst.address + 4 * run.at
            if not run.quantized:
                kernel = wiring.find("mul_mat_vec_float", run.type)
                grid = kernel.grid(nrows=run.rows, ncols=n)
                self.kernels(kernel, grid, run.weights, y, to, self.k, run.rows, n, self.rows)
            elif n <= MAX_BATCH:
                kernel = wiring.find("mul_mat_vec", run.type, batch=n)
                grid = kernel.grid(nrows=run.rows)
                self.kernels(kernel, grid, run.weights, y, to, self.k, run.rows, x.n_padded, self.rows)
            else:
                kernel = wiring.find("mul_mat", run.type)
                grid = kernel.grid(nrows=run.rows, ncols=n)
                self.kernels(kernel, grid, run.weights, y, to, self.k, run.rows, n, x.n_padded, self.rows)
        add = wiring.kernel("add_bias_rows_f32")
        for at, rows, bias in self.biases:
            self.kernels(add, add.grid(n=rows, rows=n), dst.address + 4 * at, bias, rows, self.rows)


class GpuWeights(Weights[Products]):
    """Weights in a GPU's memory, in one place, each tensor once, copied through pinned memory."""

    def __init__(self, file: GGUFFile, device: Device, progress: Callable[[int, int], None] | None = None) -> None:
        for code_object in (QUANTIZED, ENGINE):  # what is missing is said now, not at the first launch
            device.load(code_object)
        super().__init__(file, device, progress)
        self._place: Buffer | None = None
        self._used = 0
        self._there: dict[str, Buffer] = {}
        self._pinned: list[Bytes] = []

    @property
    def nbytes(self) -> int:
        """Bytes that all tensors of the file take on the device."""
        return sum(_aligned(t.nbytes) for t in self.file.tensors.values())

    def blocks(self, sizes: Sizes, embedding: str, output: str, sequences: int, context: int) -> GpuBlocks:
        return GpuBlocks(self, sizes, embedding, output, sequences, context)

    def embedding(self, name: str, rows: int, k: int) -> Buffer:
        return self._upload([self.info(name, (rows, k))])

    def products(self, k: int, *matrices: Matrix) -> Products:
        runs: list[Run] = []
        biases: list[tuple[int, int, Buffer]] = []
        infos, at = [self.info(m.name, (m.rows, k)) for m in matrices], 0
        for alike in _alike(infos):
            rows = sum(info.shape[0] for info in alike)
            runs.append(Run(alike[0].type, rows, at, self._upload(alike)))
            self.memory += runs[-1].weights.nbytes
            at += rows
        at = 0
        for matrix in matrices:
            bias = self.optional_vector(matrix.bias, matrix.rows) if matrix.bias else None
            if bias is not None:
                biases.append((at, matrix.rows, bias))
            at += matrix.rows
        return Products(self.kernels, k, runs, biases)

    def finish(self) -> None:
        self._pinned.clear()

    def reserve(self) -> None:
        """Takes the place for all weights."""
        self._place = self.device.allocate(self.nbytes, f"the weights of {self.file.path.name}")

    def _upload(self, infos: list[TensorInfo]) -> Buffer:
        """Tensors one behind the other; once, where an embedding is also the output."""
        names = " ".join(info.name for info in infos)
        if names not in self._there:
            if self._place is None:
                self.reserve()
            assert self._place is not None
            start, nbytes = self._used, sum(info.nbytes for info in infos)
            self._used += _aligned(nbytes)
            for info in infos:
                self._check_type(info)
                self._copy(info, self._place.view(start, info.nbytes))
                start += info.nbytes
            self._there[names] = self._place.view(start - nbytes, nbytes)
        return self._there[names]

    def _copy(self, info: TensorInfo, to: Buffer) -> None:
        """Through two pieces of pinned memory in turn: one is filled while the other is on its way."""
        stream, row_bytes = self.kernels.stream, info.type.row_bytes(info.shape[-1])
        if not self._pinned:
            self._pinned = [self.device.allocate_host(PART) for _ in range(2)]
        for i, (first, _, part) in enumerate(self._checked_parts(info, max(1, PART // row_bytes), info.shape[-1])):
            if part.nbytes > PART:
                raise OutOfDeviceMemoryError(part.nbytes, PART, f"a row of tensor {info.name!r} in pinned memory")
            pinned = self._pinned[i % 2][: part.nbytes]
            pinned[:] = part
            stream.synchronize()  # the piece before has arrived
            to.write_async(pinned, stream, first * row_bytes)
            self._count(part.nbytes, 0)
        stream.synchronize()


def _alike(infos: list[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Neighbours of one type, which are multiplied in one launch."""
    group: list[TensorInfo] = []
    for info in infos:
        if group and group[0].type is not info.type:
            yield group
            group = []
        group.append(info)
    yield group


class GpuBlocks(Blocks[Products]):
    """The blocks of a model on a GPU. The KV cache is halves [sequence][head][position][head_dim] for each layer.

    A layer takes ten launches where the types of its queries, keys and values, and of its gate and up matrices, agree:
    norm, QKV, RoPE and cache, attention (two), output, norm, gate and up, SiLU, down.
    """

    def __init__(
        self, weights: GpuWeights, sizes: Sizes, embedding: str, output: str, sequences: int, context: int
    ) -> None:
        s, device = sizes, weights.device
        if s.head_dim > MAX_HEAD_DIM or s.head_dim % 2:
            weights.file.fail(f"heads of {s.head_dim} values do not run on a GPU, only even ones up to {MAX_HEAD_DIM}")
        assert isinstance(device, gpu.Device)
        self.units = device.compute_units
        self._check_memory(weights, s, sequences, context)
        weights.reserve()
        super().__init__(weights, s, embedding, CHUNK, sequences, context)
        # Each on its own: what is written behind the end of one is seen by tools, and does not reach the next.
        parts = {
            name: device.allocate(nbytes, f"the KV cache and activations ({name})")
            for name, nbytes in self._parts(s, sequences, self.n_context).items()
        }
        self.keys, self.values, self.table, self.logits = (parts[k] for k in ("keys", "values", "rope", "logits"))
        self.x, self.branch, self.qkv, self.gate_up = (parts[k] for k in ("x", "branch", "qkv", "gate_up"))
        self.partial = parts["partial"]
        self.normed, self.attended, self.gated = (
            Activations(k, parts[f"{name}, q8_1"], parts[f"{name}, floats"]) for name, k in self._activations(s)
        )
        self.table.write(self.rope_table)
        self._read = device.allocate_host(self.logits.nbytes).view(np.float32)
        self.embedding = weights.embedding(embedding, s.n_vocab, s.n_embd)
        self.unembedding = weights.products(s.n_embd, Matrix(output, s.n_vocab))

    @staticmethod
    def _activations(s: Sizes) -> tuple[tuple[str, int], ...]:
        return ("normed", s.n_embd), ("attended", s.n_head * s.head_dim), ("gated", s.n_ff)

    def _parts(self, s: Sizes, sequences: int, n_context: int) -> dict[str, int]:
        """The blocks' own memory: bytes of each part."""
        cache = 2 * s.n_layer * sequences * s.n_head_kv * n_context * s.head_dim
        splits = max(n * self._splits(s, n) for n in range(1, MAX_CAPTURED + 1))
        parts = {
            "keys": cache,
            "values": cache,
            "rope": 4 * n_context * s.rope.n_rot,
            "x": 4 * CHUNK * s.n_embd,
            "branch": 4 * CHUNK * s.n_embd,
            "qkv": 4 * CHUNK * (s.n_head + 2 * s.n_head_kv) * s.head_dim,
            "gate_up": 8 * CHUNK * s.n_ff,
            "partial": 4 * splits * s.n_head * (s.head_dim + 2),
            "logits": 4 * MAX_CAPTURED * s.n_vocab,
        }
        for name, k in self._activations(s):
            parts[f"{name}, q8_1"], parts[f"{name}, floats"] = CHUNK * Q8_1.row_bytes(padded(k)), 4 * CHUNK * k
        return parts

    def _splits(self, s: Sizes, n: int) -> int:
        """Into how many parts the positions of a sequence are split in a short pass, to keep all units busy."""
        return max(1, min(MAX_SPLITS, BLOCKS_TO_UNIT * self.units // (s.n_head_kv * n)))

    def _check_memory(self, weights: GpuWeights, s: Sizes, sequences: int, context: int) -> None:
        """Before anything is allocated: does it fit?"""

        def asked(context: int) -> int:
            return weights.nbytes + sum(map(_aligned, self._parts(s, sequences, -(-context // 16) * 16).values()))

        free = weights.device.free_memory
        if free is None or asked(context) <= free:
            return
        each = (asked(1 << 20) - asked(0)) / (1 << 20)
        fits = int((free - asked(0)) / each) // 16 * 16
        hint = f"a context of {fits} would fit" if fits > 0 else f"{asked(0) / 2**20:,.1f} MiB even with none"
        name = weights.file.path.name
        raise OutOfDeviceMemoryError(asked(context), free, f"{name} with {sequences} x {context} positions ({hint})")

    def read_logits(self, n: int) -> Floats:
        """Through pinned memory: a copy to other memory goes in pieces, each of which is waited for."""
        held = self._read[: n * self.sizes.n_vocab]
        self.logits.read_async(held, self.kernels.stream)
        self.kernels.stream.synchronize()
        return held.reshape(n, -1).copy()

    def embed(self, n: int) -> None:
        super().embed(n)
        get_rows, k = wiring.find("get_rows", self.embedding_type), self.sizes.n_embd
        row_bytes = self.embedding_type.row_bytes(k)
        self.kernels(get_rows, get_rows.grid(nids=n, k=k), self.embedding, self.tokens, self.x, k, row_bytes)

    def _norm(self, weight: Buffer, n: int, into: tuple[Buffer | None, Buffer | None]) -> None:
        """What the last branch gave is added to the residual stream on the way."""
        kernel, s = wiring.kernel("add_rms_norm_q8_1"), self.sizes
        branch = self.branch if self.branched else None
        self.kernels(kernel, kernel.grid(rows=n), self.x, branch, weight, *into, s.n_embd, self.normed.n_padded, s.eps)
        self.branched = True

    def attention(self, layer: Layer[Products], i: int, n: int) -> None:
        s, rope = self.sizes, wiring.kernel("rope_store_kv_f16")
        self._norm(layer.attn_norm, n, layer.qkv.wants(self.normed))
        layer.qkv(self.normed, self.qkv, n)
        each = self.keys.nbytes // s.n_layer
        cache = self.keys.view(i * each, each), self.values.view(i * each, each)
        heads, tokens = (s.n_head, s.n_head_kv, s.head_dim), (self.positions, self.slots)
        grid = rope.grid(n_head=s.n_head, n_head_kv=s.n_head_kv, ntokens=n)
        self.kernels(rope, grid, self.qkv, *cache, self.table, *tokens, *heads, s.rope.n_rot, self.n_context)
        attend = self._attend_short if n <= MAX_CAPTURED else self._attend_long
        attend(cache, n, layer.attn_output.wants(self.attended))
        layer.attn_output(self.attended, self.branch, n)

    def _attend_short(self, cache: tuple[Buffer, Buffer], n: int, into: tuple[Buffer | None, Buffer | None]) -> None:
        """Few tokens, of any sequences."""
        s, split, combine = self.sizes, wiring.kernel("attention_split_f16"), wiring.kernel("attention_combine_q8_1")
        splits, n_padded, tokens = self._splits(s, n), self.attended.n_padded, (self.positions, self.slots)
        heads, scale = (s.n_head, s.n_head_kv, s.head_dim), s.head_dim**-0.5
        grid = split.grid(n_head_kv=s.n_head_kv, splits=splits, ntokens=n)
        self.kernels(split, grid, self.qkv, *cache, self.partial, *tokens, *heads, self.n_context, splits, scale)
        grid = combine.grid(n_padded=n_padded, ntokens=n)
        self.kernels(combine, grid, self.partial, *into, s.n_head, s.head_dim, splits, n_padded)

    def _attend_long(self, cache: tuple[Buffer, Buffer], n: int, into: tuple[Buffer | None, Buffer | None]) -> None:
        """Tokens that follow each other in one sequence."""
        s, kernel, quantize = self.sizes, wiring.kernel("attention_prefill_f16"), wiring.kernel("quantize_q8_1")
        y, (_, q8_1), tokens = self.attended.floats, into, (self.positions, self.slots)
        heads, scale = (s.n_head, s.n_head_kv, s.head_dim), s.head_dim**-0.5
        grid = kernel.grid(n_head=s.n_head, n_head_kv=s.n_head_kv, ntokens=n)
        self.kernels(kernel, grid, self.qkv, *cache, y, *tokens, *heads, self.n_context, n, scale)
        if q8_1 is not None:
            grid = quantize.grid(k=self.attended.k, rows=n)
            self.kernels(quantize, grid, y, q8_1, self.attended.k, self.attended.n_padded)

    def feed_forward(self, layer: Layer[Products], n: int) -> None:
        s, silu, n_padded = self.sizes, wiring.kernel("silu_mul_q8_1"), self.gated.n_padded
        self._norm(layer.ffn_norm, n, layer.gate_up.wants(self.normed))
        layer.gate_up(self.normed, self.gate_up, n)
        into = layer.down.wants(self.gated)
        self.kernels(silu, silu.grid(n_padded=n_padded, rows=n), self.gate_up, *into, s.n_ff, n_padded)
        layer.down(self.gated, self.branch, n)

    def finish(self, norm: Buffer, n: int) -> None:
        self._norm(norm, n, self.unembedding.wants(self.normed))

    def output(self, first: int, n: int) -> None:
        self.unembedding(self.normed, self.logits, n, first)

    def read_output(self, first: int, logits: Floats) -> None:
        for at in range(0, len(logits), MAX_CAPTURED):
            n = min(MAX_CAPTURED, len(logits) - at)
            self.output(first + at, n)
            logits[at : at + n] = self.read_logits(n)
