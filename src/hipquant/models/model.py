"""The base of all models: sequences in the KV cache, forward passes in chunks, captured decode steps, generation."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ..driver import Device, Event
from ..errors import ContextLengthError, TokenizerError
from ..gguf_file import GGUFFile, StringArray
from .config import Config, Keys
from .layers import EMBEDDING, MAX_CAPTURED, OUTPUT, Blocks, Floats, Layer, Matrix, Rope, Weights, layer_count, matrix
from .passes import Drawing, Pass, Passes

if TYPE_CHECKING:
    from ..generate import Generation
    from ..sampling import Sampler, SamplingParams
    from ..tokenizer import Tokenizer

MAX_DEFAULT_CONTEXT = 8192
MAX_SEQUENCES = 1024


def open_weights(
    file: GGUFFile, device: Device, progress: Callable[[int, int], None] | None, gpu_layers: int | None = None
) -> Weights[Any]:
    """What takes the tensors of a file onto a device; on a GPU only those of the last `gpu_layers`, if not None."""
    if gpu_layers is not None and 0 < gpu_layers < layer_count(file):
        from .split import SplitWeights

        return SplitWeights(file, device, gpu_layers, progress)
    if device.kind == "cpu":
        from .cpu import CpuWeights

        return CpuWeights(file, device, progress)
    from .gpu_weights import GpuWeights

    return GpuWeights(file, device, progress)


class Part(NamedTuple):
    """Layers of a model that one device runs, and bytes of the weights that a pass reads there."""

    device: Device
    layers: int
    weights_bytes: int


class Model:
    """A model on a device. `forward` gives logits, `generate` text; both may be called from several threads.

    A *sequence* (0 to `sequences` - 1) is a slot of the KV cache with its own tokens; `cached(sequence)` lists them.

    An architecture says what its metadata mean (`read_config`, and `rope`), what a layer is made of (`layer`), and
    what is done in a pass (`_step`).
    """

    @classmethod
    def load(
        cls,
        file: GGUFFile,
        device: Device,
        context: int | None,
        sequences: int,
        progress: Callable[[int, int], None] | None,
        cache_type: str = "f16",
        gpu_layers: int | None = None,
    ) -> Self:
        """A model from an open file; see `hipquant.load`."""
        config = cls.read_config(Keys(file))
        most = config.n_context
        if context is not None and not 1 <= context <= most:
            raise ValueError(f"context must be from 1 to the {most} that the model was made for, not {context}")
        if not 1 <= sequences <= MAX_SEQUENCES:
            raise ValueError(f"sequences must be from 1 to {MAX_SEQUENCES}, not {sequences}")
        context = context or min(most, MAX_DEFAULT_CONTEXT)
        weights = open_weights(file, device, progress, gpu_layers)
        config = replace(config, rope=cls.rope(config, weights, context), cache_type=cache_type)
        embedding = Matrix(EMBEDDING, config.n_vocab)
        output = matrix("output", config.n_vocab) if OUTPUT in file.tensors else embedding
        blocks = weights.blocks(config, embedding, output, sequences, context)
        return cls(config, weights, blocks, context, sequences)

    @classmethod
    def read_config(cls, keys: Keys) -> Config:
        """Sizes, from the metadata."""
        raise NotImplementedError

    @classmethod
    def rope(cls, config: Config, weights: Weights[Any], context: int) -> Rope:
        """How positions are encoded in this context, where tensors say more of it than the metadata do."""
        return config.rope

    @classmethod
    def layer(cls, w: Weights[Any], c: Config, i: int) -> Layer[Any]:
        """Takes the weights of block i."""
        raise NotImplementedError

    def __init__(
        self, config: Config, weights: Weights[Any], blocks: Blocks[Any], context: int, sequences: int
    ) -> None:
        self.config, self.layers = config, [self.layer(weights, config, i) for i in range(config.n_layer)]
        self.norm = weights.vector("output_norm.weight", config.n_embd)
        self.norm_bias = weights.vector("output_norm.bias", config.n_embd) if config.layer_norm else None
        weights.finish()
        self.file, self.device, self.kernels = weights.file, weights.device, weights.kernels
        self.blocks = blocks
        self.n_vocab, self.context, self.sequences = blocks.sizes.n_vocab, context, sequences
        self._passes = Passes(blocks)
        self._last_drawings: list[Drawing] = []  # whose tokens lie in the input buffers
        self._newest: list[Drawing | None] = [None] * sequences  # while nothing else is done on the sequence
        self._unread: list[list[Drawing]] = [[] for _ in range(sequences)]
        self._cached: list[list[int]] = [[] for _ in range(sequences)]
        self._busy: set[int] = set()
        self._lock = threading.RLock()
        self._tokenizer: Tokenizer | None = None

    def _step(self, n: int) -> None:
        """Launches the pass over n tokens that lie in the input buffers, up to the last norm."""
        raise NotImplementedError

    @property
    def weights_bytes(self) -> int:
        """Bytes of weights that a pass reads: all but an embedding of which only rows are taken."""
        return sum(part.weights_bytes for part in self.parts)

    @property
    def parts(self) -> list[Part]:
        """The devices that the layers run on: `device` alone, or with the CPU, which runs the first ones."""
        return [Part(b.weights.device, b.sizes.n_layer, b.weights.memory) for b in self.blocks.parts]

    @property
    def device_sampling(self) -> bool:
        """Whether tokens are drawn where the logits are, by `draw`; on the CPU they are drawn by `Sampler`."""
        return self.blocks.device_sampling

    @property
    def name(self) -> str:
        """The model's own name, or its file's."""
        return self.file.get("general.name", str, "") or self.file.path.stem

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the model file; `TokenizerError` if there is none."""
        from ..tokenizer import Tokenizer, has_vocabulary

        if self._tokenizer is None:
            if not has_vocabulary(self.file.metadata):
                raise TokenizerError(f"{self.file.path.name} has no vocabulary: it takes tokens, not text")
            lists = {k: v.tolist() if isinstance(v, StringArray) else v for k, v in self.file.metadata.items()}
            self._tokenizer = Tokenizer.from_metadata(lists, self.n_vocab)
        return self._tokenizer

    def cached(self, sequence: int = 0) -> list[int]:
        """The tokens of a sequence whose keys and values are in the cache."""
        held = self._cached[self._checked_sequence(sequence)]
        return list(itertools.takewhile(lambda token: token >= 0, held))

    def _checked_sequence(self, sequence: int) -> int:
        if not 0 <= sequence < self.sequences:
            raise ValueError(f"sequence must be from 0 to {self.sequences - 1}, not {sequence}")
        return sequence

    def _check_room(self, sequence: int, position: int) -> None:
        if position >= self.context:
            raise ContextLengthError(f"sequence {sequence} has filled the context of {self.context}")

    def _checked_tokens(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        ids = np.asarray(tokens)
        if ids.ndim != 1 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"tokens must be a list of one or more ids, not {ids.dtype} of shape {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.n_vocab:
            raise ValueError(f"token ids must be from 0 to {self.n_vocab - 1}, found {ids.min()} to {ids.max()}")
        return ids.astype(np.int64)

    def forward(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        position: int,
        *,
        sequence: int = 0,
        logits: Literal["last", "all"] = "last",
        progress: Callable[[int, int], None] | None = None,
    ) -> Floats:
        """Logits of tokens that stand at `position` of a sequence: float32 [n_vocab], or [n_tokens, n_vocab] for "all".

        `position` is at most the number of tokens in the cache; what the cache held from there on is replaced.
        `progress(done, total)` is called with tokens, after each part of a long prompt.
        Raises ValueError for ids, positions and sequences out of range, `ContextLengthError` past the context.
        """
        ids, slot = self._checked_tokens(tokens), self._checked_sequence(sequence)
        if logits not in ("last", "all"):
            raise ValueError(f"logits must be 'last' or 'all', not {logits!r}")
        with self._lock:
            held = len(self._cached[slot])
            if not 0 <= position <= held:
                raise ValueError(
                    f"position must be from 0 to {held}, the tokens that sequence {slot} holds, not {position}"
                )
            every = np.empty((len(ids), self.n_vocab), np.float32) if logits == "all" else None
            self._compute(ids, position, slot, every, progress)
            return every if every is not None else self.blocks.read_logits(1)[0]

    def _compute(
        self,
        ids: npt.NDArray[np.int64],
        position: int,
        slot: int,
        every: Floats | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """Passes over tokens that stand at `position`: logits of all of them into `every`, or of the last one."""
        if position + len(ids) > self.context:
            raise ContextLengthError(
                f"{position + len(ids)} tokens do not fit into the context of {self.context}; "
                "load the model with a larger context or shorten the text"
            )
        self._newest[slot] = None
        del self._cached[slot][position:]
        at = 0
        for size in self.blocks.passes(len(ids), self.blocks.chunk):
            part = ids[at : at + size]
            last = at + len(part) == len(ids)
            self._put(part, np.arange(position + at, position + at + len(part)), np.full(len(part), slot))
            if every is None:
                self._run(Pass(len(part), int(last)))
            else:
                self._run_all(every[at : at + len(part)])
            self._cached[slot].extend(part.tolist())
            at += size
            if progress is not None:
                progress(at, len(ids))

    def _put(self, *inputs: npt.NDArray[np.integer]) -> None:
        self._last_drawings = []
        self.blocks.put(*inputs)

    def forward_batch(self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]) -> Floats:
        """One next token for each of several sequences: logits [n, n_vocab].

        Each position must be the number of tokens that its sequence holds. A pass takes 64 sequences on a GPU, where up
        to 40 go in passes of 8, and 32 on the CPU or where that has some of the layers; more take several passes.
        """
        ids, n = self._checked_tokens(tokens), len(tokens)
        if not n == len(positions) == len(sequences) == len(set(sequences)):
            raise ValueError("expected as many positions and different sequences as there are tokens")
        with self._lock:
            for position, sequence in zip(positions, sequences, strict=True):
                held = len(self._cached[self._checked_sequence(sequence)])
                if position != held:
                    raise ValueError(f"sequence {sequence} holds {held} tokens, its next position is not {position}")
                self._check_room(sequence, position)
            logits = np.empty((n, self.n_vocab), np.float32)
            at = 0
            for size in self.blocks.passes(n, self.blocks.batch):
                part = slice(at, at + size)
                self._put(ids[part], np.asarray(positions[part]), np.asarray(sequences[part]))
                for sequence in sequences[part]:
                    self._newest[sequence] = None
                self._run_all(logits[part], apart=size > MAX_CAPTURED)
                for token, sequence in zip(ids[part].tolist(), sequences[part], strict=True):
                    self._cached[sequence].append(token)
                at += size
            return logits

    def _run_all(self, logits: Floats, apart: bool = False) -> None:
        """A pass over as many tokens as there are rows of logits, all of which it gives."""
        n = len(logits)
        if n <= self.blocks.rows:
            self._run(Pass(n, n, apart=apart))
            self.blocks.read_logits(n, logits)
        else:
            self._run(Pass(n, apart=apart))
            self.blocks.read_output(0, logits)

    def _run(self, what: Pass) -> None:
        self._passes.run(what, self._step)

    def extend(
        self, tokens: Sequence[int], sequence: int = 0, progress: Callable[[int, int], None] | None = None
    ) -> tuple[Floats, int]:
        """Logits after `tokens`, the whole of a sequence, and how many of them had to be computed.

        What the cache already holds of their beginning is not computed again.
        """
        with self._lock:
            same = self._common_prefix(tokens, sequence)
            logits = self.forward(tokens[same:], same, sequence=sequence, progress=progress)
            return logits, len(tokens) - same

    def _common_prefix(self, tokens: Sequence[int], sequence: int) -> int:
        """How many of tokens need not be computed; the last one must be, for its logits."""
        return min(common_prefix(self._cached[self._checked_sequence(sequence)], tokens), len(tokens) - 1)

    def draw(
        self,
        tokens: Sequence[int],
        sampler: Sampler,
        sequence: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Drawing, int]:
        """As `extend`, but the token after `tokens` is drawn on the device, where `device_sampling` is true.

        Returns when it is launched.
        """
        from ..sampling import state

        with self._lock:
            for drawing in self._unread[self._checked_sequence(sequence)]:  # its place is taken by what comes
                drawing.wait()
            self._read(sequence)
            same, position = self._common_prefix(tokens, sequence), len(tokens)
            first = max(0, position - sampler.params.repetition_window)
            recent, self._newest[sequence] = np.asarray(tokens[first:], np.int32), None
            self.blocks.set_sampling(sequence, state(sampler, position, self.n_vocab), recent, first)
            self._compute(self._checked_tokens(tokens[same:]), same, sequence, None, progress)
            self.blocks.sample(1)
            return self._note([(sequence, position)], [sampler], None)[0], position - same

    def draw_ahead(self, last: Drawing, sampler: Sampler) -> Drawing | None:
        """The token after one that need not be known yet, in one launch.

        None where others have used the device since, or where the first layers are the CPU's: then the token is read,
        and `draw` begins anew.
        """
        with self._lock:
            if [last] != self._last_drawings or last.position >= self.context:
                return None
            return self._draw_pass([last], [sampler])[0]

    def draw_batch(self, last: Sequence[Drawing], samplers: Sequence[Sampler]) -> list[Drawing]:
        """The tokens after the last ones of several sequences, in as few passes as `forward_batch`.

        Where `last` is what the call before gave, its tokens need not be known yet; otherwise they are waited for.
        Raises ValueError for a drawing that is not the last thing done on its sequence (`draw` begins anew there), and
        for one whose logits were NaN or infinite, `ContextLengthError` where a context is full.
        """
        if not len(samplers) == len(last) == len({drawing.sequence for drawing in last}):
            raise ValueError("expected drawings of different sequences, and as many samplers")
        with self._lock:
            for drawing in last:
                if drawing is not self._newest[drawing.sequence]:
                    raise ValueError(
                        f"sequence {drawing.sequence} was used otherwise since this token of it was drawn: "
                        "begin anew with `draw` and all of its tokens"
                    )
                self._check_room(drawing.sequence, drawing.position)
            drawings: list[Drawing] = []
            for size in self.blocks.passes(len(last), self.blocks.batch):
                part = slice(len(drawings), len(drawings) + size)
                if list(last[part]) != self._last_drawings:
                    tokens = [self.drawn(drawing) for drawing in last[part]]
                    where = [(drawing.position, drawing.sequence) for drawing in last[part]]
                    self._put(np.asarray(tokens), *np.asarray(where).T)
                drawings += self._draw_pass(last[part], samplers[part])
            return drawings

    def _draw_pass(self, last: Sequence[Drawing], samplers: Sequence[Sampler]) -> list[Drawing]:
        """A pass over tokens that lie in the input buffers."""
        from ..sampling import SAMPLES

        self._last_drawings, n, begun = [], len(last), Event()
        for drawing in last:
            self._newest[drawing.sequence] = None
            if len(self._unread[drawing.sequence]) == SAMPLES:  # the place of the first one is taken
                first = self._unread[drawing.sequence][0]
                first.wait()
                self._read(drawing.sequence, first)
        begun.record(self.kernels.stream)
        self._run(Pass(n, n, draw=True, apart=n > MAX_CAPTURED))
        for drawing in last:
            self._cached[drawing.sequence].append(drawing.mark if drawing.token is None else drawing.token)
        return self._note([(drawing.sequence, drawing.position + 1) for drawing in last], samplers, begun)

    def _note(
        self, drawn: Sequence[tuple[int, int]], samplers: Sequence[Sampler], begun: Event | None
    ) -> list[Drawing]:
        """What is drawn in a pass: sequences and positions."""
        done = Event()
        done.record(self.kernels.stream)
        drawings = [Drawing(sequence, position, begun, done) for sequence, position in drawn]
        for drawing, sampler in zip(drawings, samplers, strict=True):
            sampler.draws += 1
            self._newest[drawing.sequence] = drawing
            self._unread[drawing.sequence].append(drawing)
        self._last_drawings = list(drawings) if self.blocks.takes_drawn else []
        return drawings

    def drawn(self, drawing: Drawing) -> int:
        """The token, as soon as it is there. Raises ValueError where logits were NaN or infinite."""
        from ..sampling import unusable_logits

        drawing.wait()
        with self._lock:
            self._read(drawing.sequence, drawing)
        assert drawing.token is not None
        if drawing.token < 0:
            raise unusable_logits(~drawing.token)
        return drawing.token

    def _read(self, sequence: int, last: Drawing | None = None) -> None:
        """Takes the tokens of a sequence that are there, up to that of `last`, out of the device's hands."""
        from ..sampling import SAMPLES

        unread, cached = self._unread[sequence], self._cached[sequence]
        while unread and (last is None or last.token is None):
            drawing = unread.pop(0)
            drawing.token = int(self.blocks.samples[sequence, drawing.position % SAMPLES])
            at = drawing.position
            if drawing.token >= 0 and at < len(cached) and cached[at] == drawing.mark:
                cached[at] = drawing.token

    def reserve(self, tokens: Sequence[int]) -> int | None:
        """A sequence that nobody generates on, whose cache begins most like `tokens`; None if all are used."""
        with self._lock:
            free = [s for s in range(self.sequences) if s not in self._busy]
            if not free:
                return None
            best = max(free, key=lambda s: (common_prefix(self._cached[s], tokens), -len(self._cached[s])))
            self._busy.add(best)
            return best

    def release(self, sequence: int) -> None:
        """Ends the use of a reserved sequence; its cache is kept for who comes with the same beginning."""
        with self._lock:
            self._busy.discard(sequence)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        params: SamplingParams | None = None,
        stop: Sequence[str] = (),
        sequence: int | None = None,
        parse_special: bool = False,
        progress: Callable[[int, int], None] | None = None,
        **sampling: object,
    ) -> Generation:
        """Text after a prompt, piece by piece: an iterator of strings that also counts tokens and takes the time.

        `prompt` is text or token ids; `sampling` are fields of `SamplingParams` (temperature, top_k, top_p, min_p,
        repetition_penalty, seed). Ends at an end token, a stop string, `max_tokens` or the end of the context.
        `progress(done, total)` is called with tokens of the prompt.
        """
        from ..generate import Generation
        from ..sampling import SamplingParams

        if params is None:
            params = SamplingParams(**sampling)  # type: ignore[arg-type]
        elif sampling:
            raise TypeError(f"give either params or {', '.join(sampling)}")
        return Generation(self, prompt, max_tokens, params, stop, sequence, parse_special, progress)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    if list(a[:n]) == list(b[:n]):
        return n
    return next(i for i in range(n) if a[i] != b[i])
