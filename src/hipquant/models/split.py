"""Models whose last layers run on a GPU, and the first ones on the CPU: what does not fit on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..driver import Buffer, Device, Stream
from ..driver import device as get_device
from ..gguf_file import GGUFFile
from .cpu import CpuBlocks, CpuWeights
from .gpu import GpuBlocks
from .gpu_weights import GpuWeights
from .layers import (
    EMBEDDING,
    MAX_CAPTURED,
    Blocks,
    Floats,
    Layer,
    Matrix,
    Order,
    Sizes,
    Weights,
    last_layers,
    layer_count,
    layer_of,
)


class SplitWeights(Weights[Any]):
    """The embedding and the first layers on the CPU, the last `gpu_layers` and what follows them on a GPU."""

    def __init__(
        self, file: GGUFFile, device: Device, gpu_layers: int, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.file, self.device, self.tensors = file, device, file.tensors
        self.first = layer_count(file) - gpu_layers
        last = last_layers(file, gpu_layers)
        first = {name: info for name, info in file.tensors.items() if name not in last or name == EMBEDDING}
        total = sum(info.nbytes for part in (first, last) for info in part.values())
        done = [0, 0]

        def part(i: int) -> Callable[[int, int], None]:
            def report(part_done: int, _: int) -> None:
                done[i] = part_done
                if progress is not None:
                    progress(sum(done), total)

            return report

        self.gpu = GpuWeights(file, device, part(0), last)
        self.cpu = CpuWeights(file, get_device("cpu"), part(1), first)
        self.kernels = self.gpu.kernels

    def _of(self, name: str) -> Weights[Any]:
        """Whose a tensor is."""
        layer = layer_of(name)
        return self.gpu if layer is None or layer >= self.first else self.cpu

    def products(self, k: int, *matrices: Matrix) -> Any:
        return self._of(matrices[0].name).products(k, *matrices)

    def experts(self, k: int, used: int, *matrices: Matrix) -> Any:
        return self._of(matrices[0].name).experts(k, used, *matrices)

    def embedding(self, embedding: Matrix, k: int) -> Buffer:
        return self.cpu.embedding(embedding, k)

    def floats(self, name: str, n: int, first: int = 0, of: int = 0) -> Floats:
        return self._of(name).floats(name, n, first, of)

    def vector(self, name: str, n: int, order: Order | None = None) -> Buffer:
        return self._of(name).vector(name, n, order)

    def blocks(
        self, sizes: Sizes, embedding: Matrix | None, output: Matrix | None, sequences: int, context: int
    ) -> SplitBlocks:
        # The GPU's first, as its memory is what is short.
        last, first = replace(sizes, n_layer=sizes.n_layer - self.first), replace(sizes, n_layer=self.first)
        gpu = self.gpu.blocks(last, None, output, sequences, context)
        return SplitBlocks(sizes, self.cpu.blocks(first, embedding, None, sequences, context), gpu)

    def finish(self) -> None:
        self.cpu.finish()
        self.gpu.finish()


class SplitBlocks(Blocks[Any]):
    """The blocks of two devices in a row. The residual stream goes from one to the other through pinned memory.

    A pass has two stages, and in each one only the layers of its device are launched, so that both can be captured. In
    a long prompt the CPU is at the next part while the GPU is at the one before.
    """

    device_sampling = True
    takes_drawn = False  # the CPU's layers need the token on the host
    _active: Blocks[Any]  # whose stage it is

    def __init__(self, sizes: Sizes, cpu: CpuBlocks, gpu: GpuBlocks) -> None:  # its memory is that of its parts
        self.cpu, self.gpu, self._active = cpu, gpu, gpu
        self.sizes, self.kernels, self.n_context = sizes, gpu.kernels, gpu.n_context
        self.chunk, self.batch = min(cpu.chunk, gpu.chunk), min(cpu.batch, gpu.batch)
        self.wide, self.rows = MAX_CAPTURED + 1, gpu.rows  # as processors read their weights once a pass
        self.nbytes_per_position = cpu.nbytes_per_position + gpu.nbytes_per_position
        self.logits, self.samples = gpu.logits, gpu.samples
        staged = gpu.weights.device.allocate_host(4 * self.chunk * sizes.n_embd)
        self._residual = staged.view(np.float32).reshape(self.chunk, sizes.n_embd)

    @property
    def parts(self) -> tuple[Blocks[Any], ...]:
        return self.cpu, self.gpu

    def stages(self, n: int, apart: bool) -> Iterator[Stream]:
        self._active = self.cpu
        yield from self.cpu.stages(n, apart)
        self.gpu.put(*self._inputs_of_gpu)  # waits for the pass before, which has read the residual stream then
        self.cpu.read_residual(self._residual[:n])
        self.gpu.write_residual(self._residual[:n])
        self._active = self.gpu
        yield from self.gpu.stages(n, apart)

    def put(self, *inputs: npt.NDArray[np.integer]) -> None:
        self.cpu.put(*inputs)
        self._inputs_of_gpu = inputs

    def embed(self, n: int) -> None:
        if self._active is self.cpu:
            self.cpu.embed(n)

    def attention(self, layer: Layer[Any], i: int, n: int) -> None:
        first = self.cpu.sizes.n_layer
        part, at = (self.cpu, i) if i < first else (self.gpu, i - first)
        self._within = part is self._active
        if self._within:
            part.attention(layer, at, n)

    def feed_forward(self, layer: Layer[Any], n: int) -> None:
        if self._within:
            self._active.feed_forward(layer, n)

    def finish(self, norm: Buffer, n: int, bias: Buffer | None = None) -> None:
        if self._active is self.gpu:
            self.gpu.finish(norm, n, bias)

    def output(self, first: int, n: int) -> None:
        if self._active is self.gpu:
            self.gpu.output(first, n)

    def sample(self, n: int) -> None:
        if self._active is self.gpu:
            self.gpu.sample(n)

    def read_logits(self, n: int, to: Floats | None = None) -> Floats:
        return self.gpu.read_logits(n, to)

    def read_output(self, first: int, logits: Floats) -> None:
        self.gpu.read_output(first, logits)

    def set_sampling(self, slot: int, state: npt.NDArray[np.uint32], recent: npt.NDArray[np.int32], first: int) -> None:
        self.gpu.set_sampling(slot, state, recent, first)
