"""What models are made of on any device: weights from a file, RoPE tables, and the blocks that a device runs."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from ..codeobjects import ENGINE, QUANTIZED
from ..driver import Buffer, Device, Stream
from ..driver.base import Function
from ..gguf_file import GGUFFile, TensorInfo, find_invalid_scales
from ..quants import FLOAT_TYPES, MATRIX_TYPES
from ..wiring import Dim3, Kernel

MAX_CAPTURED = 8  # tokens of a pass that is captured once and replayed
PART = 16 << 20  # bytes of a tensor that are mapped while they are checked and copied
INPUT_BYTES = 12  # of a token of a pass: id, position, sequence
EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"  # a model without an output matrix uses the embedding
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]


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


class Matrix(NamedTuple):
    """A weight matrix in the file: its name, its rows, and the name of a bias, which need not be there."""

    name: str
    rows: int
    bias: str | None = None


L = TypeVar("L")


@dataclass
class Layer(Generic[L]):
    """The weights of one block; each `L` multiplies the same activations with one or more matrices, side by side."""

    attn_norm: Buffer
    qkv: L
    attn_output: L
    ffn_norm: Buffer
    gate_up: L
    down: L


class Blocks(ABC, Generic[L]):
    """The pass of a model over tokens on a device: embedding, blocks, logits.

    `put` gives the tokens; the steps of a pass over n of them are then launched in the order of the methods, once for
    each of the `stages`. The residual stream lies in the blocks' own memory.
    """

    batch = MAX_CAPTURED  # tokens of different sequences that a pass takes at most; so short a pass is captured
    takes_drawn = True  # whether the next pass may be launched on a token that the host does not know yet
    logits: Buffer  # of the last step: n_vocab floats for each of at most `MAX_CAPTURED` tokens
    device_sampling = False  # whether tokens are drawn where the logits are, by `sample`
    samples: npt.NDArray[np.int32]  # [sequences, 4]: where a token drawn for position p arrives, at p % 4

    def __init__(
        self, weights: Weights[L], sizes: Sizes, embedding: str | None, chunk: int, sequences: int, context: int
    ) -> None:
        """`chunk` is how many tokens a pass takes at most."""
        self.sizes, self.weights, self.kernels, self.chunk = sizes, weights, weights.kernels, chunk
        if embedding is not None:
            self.embedding_type = weights.info(embedding, (sizes.n_vocab, sizes.n_embd)).type
        self.n_context = -(-context // 16) * 16
        self.rope_table = sizes.rope.table(self.n_context)
        self.nbytes_per_position = 2 * 2 * sizes.n_layer * sizes.n_head_kv * sizes.head_dim  # keys and values: halves
        nbytes, device = INPUT_BYTES * chunk, weights.device
        self._inputs = inputs = device.allocate(nbytes, "tokens")
        self._staged = device.allocate_host(nbytes).view(np.int32).reshape(3, chunk)
        self.tokens, self.positions, self.slots = (inputs.view(4 * chunk * i, 4 * chunk) for i in range(3))

    @property
    def parts(self) -> Sequence[Blocks[Any]]:
        """The blocks of each device that layers run on."""
        return (self,)

    def stages(self, n: int) -> Iterator[Stream]:
        """Where the steps of a pass over n tokens are launched: each device runs those that are its own."""
        yield self.kernels.stream

    def put(self, *inputs: npt.NDArray[np.integer]) -> None:
        """Token ids, positions and sequences of a pass. Waits until those of the pass before are copied."""
        self.kernels.stream.synchronize()
        for row, values in zip(self._staged, inputs, strict=True):
            row[: len(values)] = values
        self._inputs.write_async(self._staged, self.kernels.stream)

    def read_logits(self, n: int) -> Floats:
        """What `output` gave for n tokens: float32 [n, n_vocab]."""
        logits = np.empty((n, self.sizes.n_vocab), np.float32)
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
        """Norm and the SiLU-gated unit."""

    @abstractmethod
    def finish(self, norm: Buffer, n: int) -> None:
        """The last norm."""

    @abstractmethod
    def output(self, first: int, n: int) -> None:
        """Logits of n tokens (at most `MAX_CAPTURED`) from `first` on, to `logits`."""

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
    def blocks(
        self, sizes: Sizes, embedding: str | None, output: str | None, sequences: int, context: int
    ) -> Blocks[L]:
        """The blocks of a model, with a KV cache for `sequences` of `context` positions; before other weights.

        `embedding` or `output` is None where the first or the last layers are another device's.
        """

    def finish(self) -> None:
        """Everything is there: what was needed for loading alone is given back."""

    @abstractmethod
    def embedding(self, name: str, rows: int, k: int) -> Buffer:
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

    def floats(self, name: str, n: int) -> Floats:
        """A float vector (norm, bias, frequency factors), as float32, on the host."""
        info = self.info(name, (n,))
        if info.type not in FLOAT_TYPES:
            self.file.fail(f"tensor {name!r} is {info.type}, expected F32, F16 or BF16")
        self.file.check_scales(name)
        raw = self.file.data(name)
        values = {"F32": np.float32, "F16": np.float16}.get(info.type.name)
        floats = raw.view(values) if values else (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        self._count(info.nbytes, 4 * n)
        return floats.astype(np.float32)

    def vector(self, name: str, n: int) -> Buffer:
        """A float vector on the device."""
        values, buffer = self.floats(name, n), self.device.allocate(4 * n, name)
        buffer.write(values)
        return buffer

    def optional_vector(self, name: str, n: int) -> Buffer | None:
        return self.vector(name, n) if name in self.file.tensors else None

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
