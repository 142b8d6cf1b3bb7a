"""Models on the CPU: weights packed 16 rows together, activations as q8 tiles, one launch a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from .. import wiring
from ..driver import Buffer, Device
from ..errors import OutOfDeviceMemoryError
from ..gguf_file import GGUFFile, TensorInfo
from ..quants import FLOAT_TYPES, QuantType
from ..wiring import PACK_ROWS
from .layers import MAX_CAPTURED, PART, Blocks, Floats, Kernels, Layer, Matrix, Sizes, Weights

ALIGNMENT = 64  # of a tensor's place
TILE_BYTES = 44  # of 32 activations in a q8 tile: d, two sums, 32 bytes (kernels/cpu/tile.h)
TILE_COLUMNS = 16
MAX_PARTS = 3  # matrices that a tensor holds: queries, keys and values
CHUNK = 128  # tokens of one forward pass


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
    experts: int = 0  # how many such matrices there are, one an expert; 0: it is a matrix

    def __post_init__(self) -> None:
        self.quantized = self.type not in FLOAT_TYPES
        if self.experts:
            self._product = wiring.find("mul_mat_experts", self.type)
            return
        self._product = wiring.find("mul_mat_packed" if self.quantized else "mul_mat_float", self.type)
        self._grid = self._product.grid(nrows=self.rows)

    def __call__(self, x: Activations, dst: Buffer | Floats, n: int, first: int = 0) -> None:
        """dst[n][rows] = x[first : first + n] times the weights. The tiles of x must be made of the same columns."""
        source = x.tiles.address if self.quantized else x.floats.address + 4 * self.k * first
        self.kernels(self._product, self._grid, self.weights, source, dst, self.k, self.rows, n, self.rows)
        if self.bias is not None:
            self.kernels(wiring.kernel("add_bias_f32"), (n, 1, 1), dst, self.bias, self.rows)

    def of_experts(self, x: Buffer, rows: Buffer | None, tiles: Buffer, groups: Buffer, n: int, dst: Buffer) -> None:
        """dst[column][rows] = the columns of n groups times the weights of their experts."""
        columns = tiles if self.quantized else x
        grid = self._product.grid(nrows=self.rows, groups=n)
        self.kernels(self._product, grid, self.weights, columns, rows, groups, dst, self.k, self.rows)


class Mixture:
    """The experts of each token of a pass, and what these compute for it, by columns that are sorted by expert."""

    def __init__(self, kernels: Kernels, s: Sizes) -> None:
        self.kernels, self.sizes = kernels, s
        pairs = CHUNK * s.n_expert_used  # of a token and an expert

        def words(n: int) -> Buffer:
            return kernels.device.allocate(4 * n, "experts")

        self.logits, self.weights = words(CHUNK * s.n_expert), words(pairs)
        self.experts, self.token, self.column = (words(pairs) for _ in range(3))
        self.groups = words(4 * min(pairs, s.n_expert))
        self.tiles = kernels.device.allocate(2 * pairs * -(-max(s.n_embd, s.n_ff) // 32) * TILE_BYTES, "experts")
        self.gate, self.up, self.gated = (words(pairs * s.n_ff) for _ in range(3))
        self.down = words(pairs * s.n_embd)

    def __call__(self, layer: Layer[tuple[Linear, ...]], x: Activations, n: int, dst: Buffer) -> None:
        """dst[n][n_embd] = what the experts of the tokens give, weighted."""
        s, count = self.sizes, n * self.sizes.n_expert_used * self.sizes.n_ff
        add, silu = wiring.kernel("add_experts_f32"), wiring.kernel("silu_mul_f32")
        self._choose(layer, x, n)
        self._multiply(layer.gate_up, x.floats, self.token, n, self.gate, self.up)
        self.kernels(silu, silu.grid(n=count), self.gate, self.up, self.gated, count)
        self._multiply(layer.down, self.gated, None, n, self.down)
        of_tokens = self.weights, self.column, dst, s.n_embd, s.n_expert_used
        self.kernels(add, add.grid(ntokens=n), self.down, *of_tokens)

    def _choose(self, layer: Layer[tuple[Linear, ...]], x: Activations, n: int) -> None:
        s, choose, group = self.sizes, wiring.kernel("choose_experts"), wiring.kernel("group_experts")
        assert layer.router is not None
        _multiply(layer.router, x, n, self.logits)
        numbers = s.n_expert, s.n_expert_used
        self.kernels(choose, choose.grid(ntokens=n), self.logits, self.experts, self.weights, *numbers)
        self.kernels(group, group.grid(), self.experts, self.groups, self.token, self.column, *numbers, n)

    def _multiply(self, matrices: tuple[Linear, ...], x: Buffer, rows: Buffer | None, n: int, *to: Buffer) -> None:
        """Row `rows[column]` of x for each column, or its own."""
        k, groups = matrices[0].k, min(n * self.sizes.n_expert_used, self.sizes.n_expert)
        if any(linear.quantized for linear in matrices):
            quantize = wiring.kernel("quantize_q8_experts")
            self.kernels(quantize, quantize.grid(k=k, groups=groups), x, rows, self.groups, self.tiles, k)
        for linear, dst in zip(matrices, to, strict=True):
            linear.of_experts(x, rows, self.tiles, self.groups, groups, dst)


class CpuWeights(Weights[tuple[Linear, ...]]):
    """Weights in the host's memory."""

    def __init__(
        self,
        file: GGUFFile,
        device: Device,
        progress: Callable[[int, int], None] | None = None,
        tensors: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        super().__init__(file, device, progress, tensors)
        free = device.free_memory
        if free is not None and self._total > free:
            raise OutOfDeviceMemoryError(self._total, free, f"the weights of {file.path.name}")
        # One place for all, so that it comes in huge pages throughout; what is not used is never touched.
        each = sum(
            math.prod(t.shape[:-2]) * PACK_ROWS * t.type.row_bytes(t.shape[-1]) + ALIGNMENT
            for t in self.tensors.values()
        )
        padding = MAX_PARTS * each
        self._place, self._used = device.allocate(self._total + padding, f"the weights of {file.path.name}"), 0

    def embedding(self, embedding: Matrix, k: int) -> Buffer:
        """Mapped, not copied."""
        info = self.info_of(embedding, k)
        self._check_type(info)
        for _, _, part in self._checked_parts(embedding, max(1, PART // info.type.row_bytes(k)), k):
            self._count(part.nbytes, 0)
        return self.device.upload(self.file.data(embedding.name))

    def blocks(
        self, sizes: Sizes, embedding: Matrix | None, output: Matrix | None, sequences: int, context: int
    ) -> CpuBlocks:
        return CpuBlocks(self, sizes, embedding, output, sequences, context)

    def products(self, k: int, *matrices: Matrix) -> tuple[Linear, ...]:
        """Quantized types are packed, part by part, and their mapping is let go."""
        return tuple(self._linear(m, k) for m in matrices)

    def experts(self, k: int, used: int, *matrices: Matrix) -> tuple[Linear, ...]:
        held = self.memory
        found = self.products(k, *matrices)
        self.memory = held + (self.memory - held) * used // matrices[0].experts
        return found

    def _linear(self, m: Matrix, k: int) -> Linear:
        info, bias = self.info_of(m, k), self.bias(m)
        self._check_type(info)
        weights = self._floats_of(m, info, k) if info.type in FLOAT_TYPES else self._pack(m, info, k)
        to_add = self.device.upload(bias) if bias is not None else None
        return Linear(self.kernels, info.type, m.rows, k, weights, to_add, m.experts)

    def _floats_of(self, m: Matrix, info: TensorInfo, k: int) -> Buffer:
        """Mapped, or copied where the order is another one."""
        self.file.check_scales(m.name)
        rows = self.file.data(m.name).reshape(-1, info.type.row_bytes(k))
        rows = rows[m.first : m.first + max(1, m.experts) * m.rows]
        self._count(rows.nbytes, rows.nbytes)
        return self.device.upload(rows if m.order is None else rows[m.order])

    def _pack(self, m: Matrix, info: TensorInfo, k: int) -> Buffer:
        kernel, row_bytes = wiring.find("pack", info.type), info.type.row_bytes(k)
        whole = -(-m.rows // PACK_ROWS) * PACK_ROWS * row_bytes
        packed = self._take(max(1, m.experts) * whole)
        step = max(PACK_ROWS, PART // row_bytes // PACK_ROWS * PACK_ROWS)
        for expert in range(max(1, m.experts)):
            to = packed.address + expert * whole
            for first, n, part in self._checked_parts(m._replace(first=m.first + expert * m.rows), step, k):
                self.kernels(kernel, kernel.grid(nrows=n), part, to + first * row_bytes, k, n)
                self._count(part.nbytes, part.nbytes)
        return packed

    def _take(self, nbytes: int) -> Buffer:
        """The next part of the place for weights: each tensor is packed at most once."""
        start = -(-self._used // ALIGNMENT) * ALIGNMENT
        self._used = start + nbytes
        return self._place.view(start, nbytes)


class CpuBlocks(Blocks[tuple[Linear, ...]]):
    """The blocks of a model on the CPU. The layout of the KV cache is the kernels' own (kernels/cpu/kv_cache.h)."""

    batch = 32

    def __init__(
        self,
        weights: CpuWeights,
        sizes: Sizes,
        embedding: Matrix | None,
        output: Matrix | None,
        sequences: int,
        context: int,
    ) -> None:
        s, device = sizes, weights.device
        if s.cache_type != "f16":
            raise ValueError(f"the KV cache of the CPU is f16, not {s.cache_type}: leave it so, or use a GPU")
        super().__init__(weights, s, embedding, CHUNK, sequences, context)
        assert embedding is not None
        self.embedding = weights.embedding(embedding, s.n_embd)
        if output is not None:
            (self.unembedding,) = weights.products(s.n_embd, output)
            self.logits = device.allocate(4 * s.n_vocab * MAX_CAPTURED, "logits")
        self.table = device.allocate(self.rope_table.nbytes, "the RoPE table")
        self.table.write(self.rope_table)
        self.local_table = self.table
        if self.local_rope_table is not None:
            self.local_table = device.allocate(self.local_rope_table.nbytes, "the RoPE table of layers with a window")
            self.local_table.write(self.local_rope_table)
        each = 2 * sequences * s.n_head_kv * self.n_context * s.head_dim
        self.keys, self.values = (
            [device.allocate(each, "the KV cache", sparse=True) for _ in range(s.n_layer)] for _ in range(2)
        )

        def floats(k: int) -> Buffer:
            return device.allocate(4 * CHUNK * k, "activations")

        self.x = floats(s.n_embd)
        self.normed = Activations(self.kernels, s.n_embd, CHUNK)
        self.attended = Activations(self.kernels, s.n_head * s.head_dim, CHUNK)
        self.gated = Activations(self.kernels, s.n_ff, CHUNK)
        self.q, self.k, self.v = (floats(heads * s.head_dim) for heads in (s.n_head, s.n_head_kv, s.n_head_kv))
        self.gate, self.up, self.branch = floats(s.n_ff), floats(s.n_ff), floats(s.n_embd)
        self.mixture = Mixture(self.kernels, s) if s.n_expert else None

    def embed(self, n: int) -> None:
        self.pending: Buffer | None = None  # a branch that the next norm adds to the residual stream
        get_rows, k = wiring.find("get_rows", self.embedding_type), self.sizes.n_embd
        row_bytes = self.embedding_type.row_bytes(k)
        self.kernels(get_rows, get_rows.grid(nids=n, k=k), self.embedding, self.tokens, self.x, k, row_bytes)
        if self.sizes.embedding_scale != 1:
            scale = wiring.kernel("scale_f32")
            self.kernels(scale, scale.grid(n=n * k), self.x, n * k, self.sizes.embedding_scale)

    def _norm(self, weight: Buffer, n: int, bias: Buffer | None = None) -> None:
        """What the last branch gave is added to the residual stream on the way."""
        s, weights = self.sizes, (weight, bias) if self.sizes.layer_norm else (weight,)
        kernel = wiring.kernel("add_layer_norm_f32" if s.layer_norm else "add_rms_norm_f32")
        to = self.normed.floats, s.n_embd, s.eps
        self.kernels(kernel, kernel.grid(rows=n), self.x, self.pending, *weights, *to)
        self.pending = None

    def _set_branch(self, matrices: tuple[Linear, ...], x: Activations, n: int, post_norm: Buffer | None) -> None:
        """The product becomes what the next norm adds; normed itself, where there is a post-norm."""
        s, kernel = self.sizes, wiring.kernel("add_rms_norm_f32")
        _multiply(matrices, x, n, self.branch)
        if post_norm is not None:
            self.kernels(kernel, kernel.grid(rows=n), self.branch, None, post_norm, self.branch, s.n_embd, s.eps)
        self.pending = self.branch

    def attention(self, layer: Layer[tuple[Linear, ...]], i: int, n: int) -> None:
        s, rope, attention = self.sizes, wiring.kernel("rope_store_kv"), wiring.kernel("attention_f16")
        self._norm(layer.attn_norm, n, layer.attn_norm_bias)
        table = self.local_table if layer.window else self.table
        _multiply(layer.qkv, self.normed, n, self.q, self.k, self.v)
        where = (self.keys[i], self.values[i])
        heads = (s.n_head, s.n_head_kv, s.head_dim)
        tokens = (self.positions, self.slots)
        self.kernels(rope, rope.grid(ntokens=n), self.q, self.k, self.v, *where, table, *tokens, *heads,
                     s.rope.n_rot, self.n_context, layer.q_norm, layer.k_norm, s.eps)  # fmt: skip
        self.kernels(attention, attention.grid(n_head_kv=s.n_head_kv, ntokens=n), self.q, *where,
                     self.attended.floats, *tokens, *heads, self.n_context, s.score_scale, s.attn_softcap,
                     layer.window, layer.sinks)  # fmt: skip
        self._set_branch(layer.attn_output, self.attended, n, layer.attn_post_norm)

    def feed_forward(self, layer: Layer[tuple[Linear, ...]], n: int) -> None:
        if self.mixture is not None and layer.ffn_norm is not None:
            self._norm(layer.ffn_norm, n)
            self.mixture(layer, self.normed, n, self.branch)
            self.pending = self.branch
            return
        s, count = self.sizes, n * self.sizes.n_ff
        kernel = wiring.kernel("silu_mul_f32" if s.activation == "silu" else "gelu_mul_f32")
        if layer.ffn_norm is not None:
            self._norm(layer.ffn_norm, n)
        else:
            self._add_pending(layer, n)
        _multiply(layer.gate_up, self.normed, n, *((self.gate, self.up) if s.gated else (self.up,)))
        gated = (self.gate, self.up) if s.gated else (self.up, None)
        self.kernels(kernel, kernel.grid(n=count), *gated, self.gated.floats, count)
        self._set_branch(layer.down, self.gated, n, layer.ffn_post_norm)

    def _add_pending(self, layer: Layer[tuple[Linear, ...]], n: int) -> None:
        """The branch is added to the residual stream, and what is normed stays."""
        kernel, s = wiring.kernel("add_layer_norm_f32"), self.sizes
        weights = layer.attn_norm, layer.attn_norm_bias
        self.kernels(kernel, kernel.grid(rows=n), self.x, self.pending, *weights, None, s.n_embd, s.eps)
        self.pending = None

    def finish(self, norm: Buffer, n: int, bias: Buffer | None = None) -> None:
        self._norm(norm, n, bias)

    def read_residual(self, x: Floats) -> None:
        """The residual stream behind a layer, for the layers of another device: float32 [n, n_embd]."""
        np.add(self.x.array(np.float32, x.shape), self.branch.array(np.float32, x.shape), out=x)

    def output(self, first: int, n: int) -> None:
        self._output(first, n, self.logits)

    def read_output(self, first: int, logits: Floats) -> None:
        self._output(first, len(logits), logits)

    def _output(self, first: int, n: int, to: Buffer | Floats) -> None:
        if self.unembedding.quantized:
            self.normed.quantize(n, first)
        self.unembedding(self.normed, to, n, first)
        if cap := self.sizes.logit_softcap:
            kernel, count = wiring.kernel("softcap_f32"), n * self.sizes.n_vocab
            self.kernels(kernel, kernel.grid(n=count), to, count, cap)


def _multiply(matrices: tuple[Linear, ...], x: Activations, n: int, *to: Buffer) -> None:
    if any(linear.quantized for linear in matrices):
        x.quantize(n)
    for linear, dst in zip(matrices, to, strict=True):
        linear(x, dst, n)
