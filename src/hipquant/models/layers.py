"""What models are made of on any device: weights from a file, RoPE tables, and the blocks that a device runs."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..codeobjects import ENGINE, QUANTIZED
from ..driver import Buffer, Device, Stream
from ..driver.base import Function
from ..gguf_file import GGUFFile, TensorInfo, find_invalid_scales
from ..quants import FLOAT_TYPES, MATRIX_TYPES
from ..wiring import Dim3, Kernel

MAX_CAPTURED = 8  # tokens of a short pass, which is captured once and replayed whatever sequences they are of
MAX_AT_ONCE = 64  # sequences that a pass takes a token of each
PART = 16 << 20  # bytes of a tensor that are mapped while they are checked and copied
INPUT_BYTES = 12  # of a token of a pass: id, position, sequence
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"  # a model without an output matrix uses the embedding
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Order = npt.NDArray[np.intp]


class Kernels:
    """Launches kernels by name on a stream of their own, from the embedded code objects."""

    def __init__(self, device: Device) -> None:
        self.device, self.stream = device, device.create_stream()
        self._functions: dict[str, Function] = {}

    def __call__(self, kernel: Kernel, grid: Dim3, *params: object) -> None:
        function = self._functions.get(kernel.name)
        if function is None:
            code_object = ENGINE if kernel.silicon == "gpu" else QUANTIZED
            function = self._functions[kernel.name] = self.device.get_or_load_func(kernel.name, code_object)
        function.launch(grid, kernel.block, 0, self.stream, params, overlap=kernel.overlaps)


@dataclass(frozen=True)
class Sizes:
    """What blocks must know of a model."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_ff: int
    n_vocab: int
    eps: float
    rope: Rope
    local_rope: Rope | None = None  # of layers with a window, where it is another one
    split_pairs: bool = False  # RoPE rotates the pairs (i, i + n_rot / 2), not (2 i, 2 i + 1)
    embedding_scale: float = 1.0
    layer_norm: bool = False  # norms take the mean away and add a bias; otherwise they divide by the RMS alone
    activation: Literal["silu", "gelu"] = "silu"  # of the feed-forward unit; GELU in its tanh form
    gated: bool = True  # whether the unit has a gate, which the activation is of
    attn_scale: float = 0.0  # of scores; 0: head_dim^-0.5
    attn_softcap: float = 0.0  # a score becomes cap tanh(score / cap); 0: as it is
    logit_softcap: float = 0.0  # the same of logits
    cache_type: str = "f16"  # of wiring.CACHE_TYPES
    n_expert: int = 0  # feed-forward units of a layer, n_ff wide each; 0: there is one, and no choice
    n_expert_used: int = 0  # that the router chooses for a token, with weights that add up to 1

    @property
    def score_scale(self) -> float:
        return self.attn_scale or self.head_dim**-0.5

    @property
    def cache_row_bytes(self) -> int:
        """Bytes of a key or a value of one head in the KV cache; as q8_0 each 32 have a scale."""
        return 2 * self.head_dim if self.cache_type == "f16" else self.head_dim + self.head_dim // 32 * 2


class Matrix(NamedTuple):
    """A weight matrix in the file: its name, its rows, and the name of a bias, which need not be there.

    Rows of a greater tensor are those from `first` on, of `of` rows. They are taken in the order of `order`, where it
    is given: its numbers are those of the matrix' rows.
    """

    name: str
    rows: int
    bias: str | None = None
    first: int = 0
    of: int = 0
    order: Order | None = None
    experts: int = 0  # how many such matrices the tensor holds, one an expert; 0: it is a matrix


def matrix(name: str, rows: int, first: int = 0, of: int = 0, order: Order | None = None) -> Matrix:
    """The matrix `name`.weight with the bias `name`.bias, or some rows of both."""
    return Matrix(f"{name}.weight", rows, f"{name}.bias", first, of, order)


def neighbouring_pairs(s: Sizes, heads: int) -> Order | None:
    """Rows of queries or keys in an order in which the pairs that RoPE rotates are neighbours, as the kernels take
    them; None where they are. Scores are the same, as queries and keys are in the same order."""
    if not s.split_pairs:
        return None
    half, head = s.rope.n_rot // 2, np.arange(s.head_dim)
    head[: 2 * half : 2], head[1 : 2 * half : 2] = np.arange(half), np.arange(half, 2 * half)
    return (np.arange(heads)[:, None] * s.head_dim + head).ravel()


L = TypeVar("L")


@dataclass
class Layer(Generic[L]):
    """The weights of one block; each `L` multiplies the same activations with one or more matrices, side by side.

    Without `ffn_norm` the feed-forward unit takes what attention took, which is layer-normed, and both are added to the
    residual stream. Post-norms are of what attention and the unit give, before it is added.
    """

    attn_norm: Buffer
    qkv: L
    attn_output: L
    ffn_norm: Buffer | None
    gate_up: L  # or up alone, where there is no gate
    down: L
    attn_norm_bias: Buffer | None = None
    attn_post_norm: Buffer | None = None
    ffn_post_norm: Buffer | None = None
    window: int = 0  # positions that a token sees, up to its own; 0: all
    q_norm: Buffer | None = None  # weights [head_dim] of the norm of each query, and of each key
    k_norm: Buffer | None = None
    sinks: Buffer | None = None  # [n_head]: scores without values, which take their share of the weights
    router: L | None = None  # gives a logit for each expert; gate, up and down are then matrices of all experts


class Blocks(ABC, Generic[L]):
    """The pass of a model over tokens on a device: embedding, blocks, logits.

    `put` gives the tokens; the steps of a pass over n of them are then launched in the order of the methods, once for
    each of the `stages`. The residual stream lies in the blocks' own memory.
    """

    batch = MAX_CAPTURED  # tokens of different sequences that a pass takes at most
    wide = 1  # of how many tokens on one pass is better than passes of `MAX_CAPTURED`
    rows = MAX_CAPTURED  # of logits: tokens that `output` takes at most
    apart = False  # whether each token of the pass is of a sequence of its own, although the pass is long
    takes_drawn = True  # whether the next pass may be launched on a token that the host does not know yet
    logits: Buffer  # of the last step: n_vocab floats for each of at most `rows` tokens
    device_sampling = False  # whether tokens are drawn where the logits are, by `sample`
    samples: npt.NDArray[np.int32]  # [sequences, 4]: where a token drawn for position p arrives, at p % 4

    def __init__(
        self, weights: Weights[L], sizes: Sizes, embedding: Matrix | None, chunk: int, sequences: int, context: int
    ) -> None:
        """`chunk` is how many tokens a pass takes at most."""
        self.sizes, self.weights, self.kernels, self.chunk = sizes, weights, weights.kernels, chunk
        if embedding is not None:
            self.embedding_type = weights.info_of(embedding, sizes.n_embd).type
        self.n_context = -(-context // 16) * 16
        self.rope_table = sizes.rope.table(self.n_context)
        self.local_rope_table = sizes.local_rope.table(self.n_context) if sizes.local_rope else None
        self.nbytes_per_position = 2 * sizes.n_layer * sizes.n_head_kv * sizes.cache_row_bytes  # keys and values
        nbytes, device = INPUT_BYTES * chunk, weights.device
        self._inputs = inputs = device.allocate(nbytes, "tokens")
        self._staged = device.allocate_host(nbytes).view(np.int32).reshape(3, chunk)
        self.tokens, self.positions, self.slots = (inputs.view(4 * chunk * i, 4 * chunk) for i in range(3))

    @property
    def parts(self) -> Sequence[Blocks[Any]]:
        """The blocks of each device that layers run on."""
        return (self,)

    def passes(self, n: int, most: int) -> Iterator[int]:
        """How many tokens each pass takes, where there are n, and one may take `most`."""
        while n:
            size = min(n, most)
            size = size if size >= self.wide else min(size, MAX_CAPTURED)
            yield size
            n -= size

    def stages(self, n: int, apart: bool) -> Iterator[Stream]:
        """Where the steps of a pass over n tokens are launched: each device runs those that are its own."""
        self.apart = apart
        yield self.kernels.stream

    def put(self, *inputs: npt.NDArray[np.integer]) -> None:
        """Token ids, positions and sequences of a pass. Waits until those of the pass before are copied."""
        self.kernels.stream.synchronize()
        for row, values in zip(self._staged, inputs, strict=True):
            row[: len(values)] = values
        self._inputs.write_async(self._staged, self.kernels.stream)

    def read_logits(self, n: int, to: Floats | None = None) -> Floats:
        """What `output` gave for n tokens: float32 [n, n_vocab], a new array or `to`."""
        logits = np.empty((n, self.sizes.n_vocab), np.float32) if to is None else to
        self.logits.read_async(logits, self.kernels.stream)
        self.kernels.stream.synchronize()
        return logits

    def set_sampling(self, slot: int, state: npt.NDArray[np.uint32], recent: npt.NDArray[np.int32], first: int) -> None:
        """How `sample` draws for a sequence from here on (`sampling.state`), and its tokens from `first` on."""
        raise NotImplementedError

    def sample(self, n: int) -> None:
        """Draws a token for each of the first n rows of `logits`: the inputs of the next pass, and `samples`."""
        raise NotImplementedError

    @abstractmethod
    def embed(self, n: int) -> None:
        """Rows of the embedding: the residual stream begins."""

    @abstractmethod
    def attention(self, layer: Layer[L], i: int, n: int) -> None:
        """Norm, queries, keys and values, RoPE, the KV cache of layer i, attention and its output matrix."""

    @abstractmethod
    def feed_forward(self, layer: Layer[L], n: int) -> None:
        """Norm and the feed-forward unit."""

    @abstractmethod
    def finish(self, norm: Buffer, n: int, bias: Buffer | None = None) -> None:
        """The last norm."""

    @abstractmethod
    def output(self, first: int, n: int) -> None:
        """Logits of n tokens (at most `rows`) from `first` on, to `logits`."""

    @abstractmethod
    def read_output(self, first: int, logits: Floats) -> None:
        """Logits of any number of tokens from `first` on, to the host."""


class Weights(ABC, Generic[L]):
    """Takes the tensors of a model file onto a device; `memory` counts the bytes of weights that a pass reads.

    An embedding of which rows are taken is not among them, unless it is the output as well.
    """

    def __init__(
        self,
        file: GGUFFile,
        device: Device,
        progress: Callable[[int, int], None] | None = None,
        tensors: Mapping[str, TensorInfo] | None = None,
    ) -> None:
        """`tensors` are those that will be asked for (default: all of the file)."""
        self.file, self.device, self.kernels = file, device, Kernels(device)
        self.tensors = file.tensors if tensors is None else tensors
        self.memory, self._done, self._progress = 0, 0, progress
        self._total = sum(t.nbytes for t in self.tensors.values())

    @abstractmethod
    def products(self, k: int, *matrices: Matrix) -> L:
        """Weight matrices (rows, k) that multiply the same activations."""

    @abstractmethod
    def experts(self, k: int, used: int, *matrices: Matrix) -> L:
        """As `products`, of matrices that each expert has one of: of them `used` are read for a token."""

    @abstractmethod
    def blocks(
        self, sizes: Sizes, embedding: Matrix | None, output: Matrix | None, sequences: int, context: int
    ) -> Blocks[L]:
        """The blocks of a model, with a KV cache for `sequences` of `context` positions; before other weights.

        `embedding` or `output` is None where the first or the last layers are another device's.
        """

    def finish(self) -> None:
        """Everything is there: what was needed for loading alone is given back."""

    def queries_keys_values(self, s: Sizes, prefix: str) -> L:
        """Those of a block: three matrices, or one that has them one below the other."""
        fused, heads = f"{prefix}attn_qkv", {"q": s.n_head, "k": s.n_head_kv, "v": s.n_head_kv}
        total, first, parts = sum(heads.values()) * s.head_dim, 0, []
        for name, n in heads.items():
            rows, order = n * s.head_dim, neighbouring_pairs(s, n) if name != "v" else None
            if f"{fused}.weight" in self.file.tensors:
                parts.append(matrix(fused, rows, first, total, order))
            else:
                parts.append(matrix(f"{prefix}attn_{name}", rows, order=order))
            first += rows
        return self.products(s.n_embd, *parts)

    def mixture_of_experts(self, s: Sizes, prefix: str) -> tuple[L, L, L]:
        """Of a block: the router, and of all experts gate and up, and down."""

        def of_each(name: str, rows: int) -> Matrix:
            return Matrix(f"{prefix}ffn_{name}_exps.weight", rows, experts=s.n_expert)

        gate, up, down = of_each("gate", s.n_ff), of_each("up", s.n_ff), of_each("down", s.n_embd)
        return (
            self.products(s.n_embd, Matrix(f"{prefix}ffn_gate_inp.weight", s.n_expert)),
            self.experts(s.n_embd, s.n_expert_used, gate, up),
            self.experts(s.n_ff, s.n_expert_used, down),
        )

    def head_norm(self, s: Sizes, name: str) -> Buffer:
        """The weight of the norm of queries or keys: values in the order of their matrix' rows."""
        return self.vector(name, s.head_dim, neighbouring_pairs(s, 1))

    @abstractmethod
    def embedding(self, embedding: Matrix, k: int) -> Buffer:
        """A matrix as it lies in the file, for `get_rows`."""

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

    def info_of(self, m: Matrix, k: int) -> TensorInfo:
        """The tensor of a matrix of rows of k values, or of one for each expert."""
        experts = (m.experts,) if m.experts else ()
        return self.info(m.name, (*experts, m.of or m.rows, k))

    def floats(self, name: str, n: int, first: int = 0, of: int = 0) -> Floats:
        """A float vector (norm, bias, frequency factors), as float32, on the host: all of a tensor, or n values of `of`
        from `first` on."""
        info = self.info(name, (of or n,))
        if info.type not in FLOAT_TYPES:
            self.file.fail(f"tensor {name!r} is {info.type}, expected F32, F16 or BF16")
        self.file.check_scales(name)
        raw = self.file.data(name)[first * info.type.block_bytes : (first + n) * info.type.block_bytes]
        values = {"F32": np.float32, "F16": np.float16}.get(info.type.name)
        floats = raw.view(values) if values else (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        self._count(raw.nbytes, 4 * n)
        return floats.astype(np.float32)

    def rope_factors(self, name: str, n_rot: int) -> Floats:
        """What the frequencies of the n_rot / 2 pairs are divided by."""
        factors = self.floats(name, n_rot // 2)
        if not (factors > 0).all():
            self.file.fail(f"tensor {name!r} must be above 0 everywhere; convert the model again")
        return factors

    def bias(self, m: Matrix) -> Floats | None:
        """The bias of a matrix, if the file has one: as float32, on the host."""
        if m.bias is None or m.bias not in self.file.tensors:
            return None
        values = self.floats(m.bias, m.rows, m.first, m.of)
        return values if m.order is None else values[m.order]

    def vector(self, name: str, n: int, order: Order | None = None) -> Buffer:
        """A float vector on the device."""
        values, buffer = self.floats(name, n), self.device.allocate(4 * n, name)
        buffer.write(values if order is None else values[order])
        return buffer

    def _check_type(self, info: TensorInfo) -> None:
        if info.type not in MATRIX_TYPES:
            self.file.fail(f"tensor {info.name!r} is {info.type}, which is not a type of weights")

    def _checked_parts(self, m: Matrix, step: int, k: int) -> Iterator[tuple[int, int, Bytes]]:
        """(first row, rows, bytes) of `step` rows at a time, their scales checked; each part's mapping is let go."""
        info = self.file.tensors[m.name]
        row_bytes = info.type.row_bytes(k)
        rows = self.file.data(m.name).reshape(-1, row_bytes)[m.first : m.first + m.rows]
        for first in range(0, m.rows, step):
            n = min(step, m.rows - first)
            part = (rows[first : first + n] if m.order is None else rows[m.order[first : first + n]]).reshape(-1)
            if find_invalid_scales(info.type, part) is not None:
                self.file.check_scales(info.name)  # raises, and says where
            yield first, n, part
            self.file.release(info.name, (m.first + first) * row_bytes, part.nbytes)

    def _count(self, done: int, held: int) -> None:
        self._done += done
        self.memory += held
        if self._progress:
            self._progress(min(self._done, self._total), self._total)


def layer_count(file: GGUFFile) -> int:
    """How many layers a model has, by its metadata."""
    return file.require(f"{file.require('general.architecture', str)}.block_count", int)


def layer_of(name: str) -> int | None:
    """The layer that a tensor belongs to; None for what comes before or behind all of them."""
    found = re.match(r"blk\.(\d{1,6})\.", name)
    return int(found[1]) if found else None


def last_layers(file: GGUFFile, n: int) -> dict[str, TensorInfo]:
    """The tensors of the last n layers and of what follows them: all that a device needs which does not embed."""
    first = layer_count(file) - n

    def needed(name: str) -> bool:
        layer = layer_of(name)
        return layer >= first if layer is not None else name != EMBEDDING or OUTPUT not in file.tensors

    return {name: info for name, info in file.tensors.items() if needed(name)}


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
        scale = self.attention_factor
        if self.scaling == "linear":
            frequency = frequency / self.factor
        elif self.scaling == "yarn":
            keep = self._extrapolated(pair) * self.extrapolation
            frequency = frequency / self.factor * (1 - keep) + frequency * keep
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
