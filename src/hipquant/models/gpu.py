"""Models on a GPU: weights and activations in planes, products with what follows them, a captured graph for each short
pass."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .. import wiring
from ..driver import Buffer, gpu
from ..errors import OutOfDeviceMemoryError
from ..quants import FLOAT_TYPES, UNIT, activation_bytes, padded, plane_units
from ..sampling import SAMPLES, STATE_WORDS, work_words
from .gpu_experts import Mixture, mixture_parts
from .gpu_weights import Activations, Epilogue, EpilogueKind, GpuWeights, Products, aligned, bytes_there
from .layers import INPUT_BYTES, MAX_AT_ONCE, MAX_CAPTURED, Blocks, Floats, Layer, Matrix, Sizes, last_layers

CHUNK = 512  # tokens of one forward pass
MAX_HEAD_DIM = 256
MAX_SPLITS = 64  # of the positions of a sequence
ACTIVATIONS = {("silu", True): "silu_mul_q8", ("gelu", True): "gelu_mul_q8", ("gelu", False): "gelu_q8"}
BLOCKS_TO_UNIT = 2  # attention blocks that there shall be for a compute unit where tokens are of any sequences


class GpuBlocks(Blocks[Products]):
    """The blocks of a model on a GPU. The KV cache is [sequence][head][position][head_dim] for each layer: halves, or
    int8 and their scales, which are apart.

    In a short pass a layer takes five launches where the types of its queries, keys and values, and of its gate and up
    matrices, agree: QKV with RoPE and the cache, attention, output with residual and norm, gate and up with SiLU, down
    with residual and the next norm. RoPE and the cache take another one where queries or keys are normed, or the cache
    is not halves. A long pass takes ten, of one sequence or of a token of each of several. With experts a short pass
    takes six: the router is one more, and chooses them; where it is quantized, their choice is another one.
    """

    device_sampling = True
    wide = 41  # tokens; at 40 five passes of 8 are as fast on an H200 (7B of Q4_0, 2026-11-23)

    def __init__(
        self,
        weights: GpuWeights,
        sizes: Sizes,
        embedding: Matrix | None,
        output: Matrix | None,
        sequences: int,
        context: int,
    ) -> None:
        s, device = sizes, weights.device
        if s.head_dim > MAX_HEAD_DIM or s.head_dim % 2:
            weights.file.fail(f"heads of {s.head_dim} values do not run on a GPU, only even ones up to {MAX_HEAD_DIM}")
        if s.cache_type == "q8_0" and s.head_dim % 32:
            raise ValueError(f"heads of {s.head_dim} values are not whole blocks of 32: the KV cache can be f16 alone")
        assert isinstance(device, gpu.Device)
        self.units = device.compute_units
        self.batch = self.rows = self._rows(sequences)
        self._check_memory(weights, s, sequences, context)
        weights.reserve()
        super().__init__(weights, s, embedding, CHUNK, sequences, context)
        # Each on its own: what is written behind the end of one is seen by tools, and does not reach the next.
        parts = {
            name: device.allocate(nbytes, f"the KV cache and activations ({name})")
            for name, nbytes in self._parts(s, sequences, self.n_context).items()
        }
        self.cache = tuple(parts[name] for name in self._cache_parts(s, sequences, self.n_context))
        self.table, self.logits = parts["rope"], parts["logits"]
        self.x, self.branch, self.qkv, self.gate_up = (parts[k] for k in ("x", "branch", "qkv", "gate_up"))
        self.partial, self.squares, self.counters = (parts[k] for k in ("partial", "squares", "counters"))
        self.normed, self.attended, self.gated = (
            Activations(k, parts[f"{name}, planes"], parts[f"{name}, floats"], s.eps)
            for name, k in self._activations(s)
        )
        self._sampling = tuple(parts[f"sampling's {name}"] for name in ("states", "tokens", "work"))
        # What pads activations is never written; counters are 0 between launches.
        for name in ("counters", "sampling's work", *(n for n in parts if "," in n)):
            parts[name].fill(0, self.kernels.stream)
        self.table.write(self.rope_table)
        self.local_table = self.table
        if self.local_rope_table is not None:
            self.local_table = parts["local rope"]
            self.local_table.write(self.local_rope_table)
        self._read = device.allocate_host(self.logits.nbytes).view(np.float32)
        self.samples = device.allocate_host(4 * SAMPLES * sequences).view(np.int32).reshape(sequences, SAMPLES)
        self._staged_sampling = device.allocate_host(4 * (STATE_WORDS + self.n_context)).view(np.int32)
        if embedding is not None:
            self.embedding = weights.embedding(embedding, s.n_embd)
        assert output is not None
        self.unembedding = weights.products(s.n_embd, output)
        self._branch: Callable[[Epilogue], None] | None = None
        self._fused = False  # whether what makes the branch can add it and norm
        self.mixture = Mixture(self.kernels, s, parts) if s.n_expert else None
        self._post_norm: Buffer | None = None  # of the branch

    @staticmethod
    def _activations(s: Sizes) -> tuple[tuple[str, int], ...]:
        return ("normed", s.n_embd), ("attended", s.n_head * s.head_dim), ("gated", s.n_ff)

    @staticmethod
    def _cache_parts(s: Sizes, sequences: int, n_context: int) -> dict[str, int]:
        """Bytes of the parts of the KV cache, in the order of the kernels' arguments."""
        values = s.n_layer * sequences * s.n_head_kv * n_context * s.head_dim
        if s.cache_type == "f16":
            return {"keys": 2 * values, "values": 2 * values}
        return {"keys": values, "values": values, "scales of keys": values // 16, "scales of values": values // 16}

    @staticmethod
    def _rows(sequences: int) -> int:
        """How many tokens of different sequences, and rows of logits, there is memory for."""
        return max(MAX_CAPTURED, min(sequences, MAX_AT_ONCE))

    def _parts(self, s: Sizes, sequences: int, n_context: int) -> dict[str, int]:
        """The blocks' own memory: bytes of each part."""
        rows = self._rows(sequences)
        splits = max(n * self._splits(s, n) for n in range(1, rows + 1))
        parts = {
            **self._cache_parts(s, sequences, n_context),
            "rope": 4 * n_context * s.rope.n_rot,
            "x": 4 * CHUNK * s.n_embd,
            "branch": 4 * CHUNK * s.n_embd,
            "qkv": 4 * CHUNK * (s.n_head + 2 * s.n_head_kv) * s.head_dim,
            "gate_up": 8 * CHUNK * max(1, s.n_expert_used) * s.n_ff,
            "partial": 4 * splits * s.n_head * (s.head_dim + 2),
            "squares": 4 * MAX_CAPTURED * -(-s.n_embd // 32),
            "counters": 4 * rows * s.n_head_kv,
            "logits": 4 * rows * s.n_vocab,
            "sampling's states": 4 * STATE_WORDS * sequences,
            "sampling's tokens": 4 * n_context * sequences,
            "sampling's work": 4 * rows * work_words(s.n_vocab),
        }
        if s.local_rope is not None:
            parts["local rope"] = 4 * n_context * s.local_rope.n_rot
        for name, k in self._activations(s):
            columns = CHUNK * max(1, s.n_expert_used) if name == "gated" else CHUNK
            parts[f"{name}, planes"] = columns * activation_bytes(padded(k))
            parts[f"{name}, floats"] = 4 * columns * padded(k)
        return parts | (mixture_parts(s, CHUNK) if s.n_expert else {})

    def _splits(self, s: Sizes, n: int) -> int:
        """Into how many parts the positions of a sequence are split for n tokens, to keep all units busy."""
        return max(1, min(MAX_SPLITS, BLOCKS_TO_UNIT * self.units // (s.n_head_kv * n)))

    def _check_memory(self, weights: GpuWeights, s: Sizes, sequences: int, context: int) -> None:
        """Before anything is allocated: does it fit?"""

        def asked(context: int, layers: int = s.n_layer) -> int:
            parts = self._parts(replace(s, n_layer=layers), sequences, -(-context // 16) * 16)
            tensors = weights.tensors if layers == s.n_layer else last_layers(weights.file, layers)
            own = sum(map(aligned, parts.values())) + aligned(INPUT_BYTES * CHUNK)
            return bytes_there(tensors.values()) + weights.staging_bytes + own

        free = weights.device.free_memory
        if free is None or asked(context) <= free:
            return
        each = (asked(1 << 20) - asked(0)) / (1 << 20)
        fits = int((free - asked(0)) / each) // 16 * 16
        hint = f"a context of {fits} would fit" if fits > 0 else f"{asked(0) / 2**20:,.1f} MiB even with none"
        layers = bisect_right(range(s.n_layer), free, key=lambda n: asked(context, n)) - 1
        if layers > 0:
            hint += f"; --gpu-layers {layers} would fit"
        name = weights.file.path.name
        raise OutOfDeviceMemoryError(asked(context), free, f"{name} with {sequences} x {context} positions ({hint})")

    def read_logits(self, n: int, to: Floats | None = None) -> Floats:
        """Through pinned memory: a copy to other memory goes in pieces, each of which is waited for."""
        held = self._read[: n * self.sizes.n_vocab]
        self.logits.read_async(held, self.kernels.stream)
        self.kernels.stream.synchronize()
        logits = np.empty((n, self.sizes.n_vocab), np.float32) if to is None else to
        logits[:] = held.reshape(n, -1)
        return logits

    def embed(self, n: int) -> None:
        self._branch = None
        type, k = self.embedding_type, self.sizes.n_embd
        if type in FLOAT_TYPES:
            rows = wiring.find("get_rows", type)
            row_bytes = plane_units(k) * UNIT * type.block_bytes
            self.kernels(rows, rows.grid(nids=n, k=k), self.embedding, self.tokens, self.x, k, row_bytes)
        else:
            rows = wiring.find("get_rows_planes", type)
            grid = rows.grid(nids=n, units=plane_units(k))
            self.kernels(rows, grid, self.embedding, self.tokens, self.x, k, self.sizes.n_vocab)
        if self.sizes.embedding_scale != 1:
            scale = wiring.kernel("scale_rows_f32")
            self.kernels(scale, scale.grid(n=n * k), self.x, n * k, self.sizes.embedding_scale)

    def write_residual(self, x: Floats) -> None:
        """The residual stream begins with what the layers in front have made of it; x lies in pinned memory."""
        self._branch = None
        self.x.write_async(x, self.kernels.stream)

    def _norm(self, weight: Buffer, n: int, products: Products, *beside: Products, bias: Buffer | None = None) -> None:
        """The last branch is added to the residual stream, and normed for the products that come next."""
        s, x = self.sizes, self.normed
        floats, planes = products.wants(x, *beside)
        if self._branch is not None and self._fused:
            x.squares = self.squares
            norm = weight, floats, planes, self.squares, x.n_padded
            self._branch(Epilogue(EpilogueKind.ADD_AND_NORM, s.n_embd, norm=norm))
            return
        x.squares, to = None, (floats, planes, s.n_embd, x.n_padded, s.eps)
        if s.layer_norm:
            self._launch_norm("add_layer_norm_q8", n, self._added_branch(weight, n), weight, bias, *to)
        elif self._branch is not None and self._post_norm is not None:
            self._branch(Epilogue())
            self._launch_norm("add_normed_rms_norm_q8", n, self.branch, self._post_norm, weight, *to)
        else:
            if self._branch is not None:
                self._branch(Epilogue())
            self._launch_norm("add_rms_norm_q8", n, self.branch if self._branch else None, weight, *to)

    def _launch_norm(self, name: str, n: int, *params: object) -> None:
        kernel = wiring.kernel(name)
        self.kernels(kernel, kernel.grid(rows=n), self.x, *params)

    def _added_branch(self, weight: Buffer, n: int) -> Buffer | None:
        """The last branch, where it is not yet added to the residual stream, as it is in a short pass: by the product
        that also norms, for nobody."""
        if self._branch is None:
            return None
        if n > MAX_CAPTURED:
            self._branch(Epilogue())
            return self.branch
        norm = weight, None, None, self.squares, self.normed.n_padded
        self._branch(Epilogue(EpilogueKind.ADD_AND_NORM, self.sizes.n_embd, norm=norm))
        return None

    def _set_branch(self, products: Products, x: Activations, n: int, post_norm: Buffer | None) -> None:
        """What is added to the residual stream is multiplied when it is known what becomes of it."""

        def launch(epilogue: Epilogue) -> None:
            if n <= MAX_CAPTURED:
                to = self.x if epilogue.kind == EpilogueKind.ADD_AND_NORM else self.branch
                products.few(x, to, n, epilogue=epilogue)
            else:
                products.many(x, self.branch, n)

        self._branch, self._post_norm = launch, post_norm
        self._fused = n <= MAX_CAPTURED and not self.sizes.layer_norm and post_norm is None

    def attention(self, layer: Layer[Products], i: int, n: int) -> None:
        s = self.sizes
        beside = (layer.gate_up,) if layer.ffn_norm is None else ()
        self._norm(layer.attn_norm, n, layer.qkv, *beside, bias=layer.attn_norm_bias)
        table = self.local_table if layer.window else self.table
        each = [part.nbytes // s.n_layer for part in self.cache]
        cache = tuple(part.view(i * nbytes, nbytes) for part, nbytes in zip(self.cache, each, strict=True))
        heads, tokens = (s.n_head, s.n_head_kv, s.head_dim), self._tokens
        into = layer.attn_output.wants(self.attended)
        rope = *cache, table, *tokens, *heads, s.rope.n_rot, self.n_context
        fused = s.cache_type == "f16" and layer.q_norm is None and layer.k_norm is None
        if n <= MAX_CAPTURED and fused:
            layer.qkv.few(self.normed, self.qkv, n, epilogue=Epilogue(EpilogueKind.ROPE_AND_STORE, rope=rope))
        else:
            (layer.qkv.few if n <= MAX_CAPTURED else layer.qkv.many)(self.normed, self.qkv, n)
            kernel = wiring.kernel(f"rope_store_kv_{s.cache_type}")
            grid = kernel.grid(n_head=s.n_head, n_head_kv=s.n_head_kv, ntokens=n)
            self.kernels(kernel, grid, self.qkv, *rope, layer.q_norm, layer.k_norm, s.eps)
        (self._attend_any if n <= MAX_CAPTURED or self.apart else self._attend_one)(layer, cache, n, into)
        self._set_branch(layer.attn_output, self.attended, n, layer.attn_post_norm)

    def _attend_any(
        self, layer: Layer[Products], cache: tuple[Buffer, ...], n: int, into: tuple[Buffer | None, Buffer | None]
    ) -> None:
        """Tokens of any sequences."""
        s, y = self.sizes, self.attended
        kernel = wiring.kernel(wiring.attention("decode", s.cache_type, s.head_dim))
        (floats, planes), splits = into, self._splits(s, n)
        apart = s.n_head // s.n_head_kv * s.head_dim % 32 != 0  # blocks of activations straddle heads of keys
        to = (y.floats, None) if apart else (floats, planes)
        heads = (s.n_head, s.n_head_kv, s.head_dim)
        grid = kernel.grid(n_head_kv=s.n_head_kv, splits=splits, ntokens=n)
        self.kernels(kernel, grid, self.qkv, *cache, self.partial, *to, self.counters, *self._tokens, *heads,
                     self.n_context, splits, y.n_padded, *self._scores(layer))  # fmt: skip
        if apart and planes is not None:
            self._quantize(y, n)

    def _attend_one(
        self, layer: Layer[Products], cache: tuple[Buffer, ...], n: int, into: tuple[Buffer | None, Buffer | None]
    ) -> None:
        """Tokens that follow each other in one sequence."""
        s, y = self.sizes, self.attended
        kernel = wiring.kernel(wiring.attention("prefill", s.cache_type, s.head_dim))
        heads = (s.n_head, s.n_head_kv, s.head_dim)
        grid = kernel.grid(n_head=s.n_head, n_head_kv=s.n_head_kv, ntokens=n)
        self.kernels(kernel, grid, self.qkv, *cache, y.floats, *self._tokens, *heads, self.n_context, n,
                     y.n_padded, *self._scores(layer))  # fmt: skip
        if into[1] is not None:
            self._quantize(y, n)

    def _scores(self, layer: Layer[Products]) -> tuple[object, ...]:
        """What becomes of scores: the last arguments of attention."""
        return self.sizes.score_scale, self.sizes.attn_softcap, layer.window, layer.sinks

    @property
    def _tokens(self) -> tuple[Buffer, Buffer]:
        return self.positions, self.slots

    def _quantize(self, x: Activations, n: int) -> None:
        kernel = wiring.kernel("quantize_q8")
        self.kernels(kernel, kernel.grid(n_padded=x.n_padded, rows=n), x.floats, x.planes, x.n_padded)

    def feed_forward(self, layer: Layer[Products], n: int) -> None:
        s, x = self.sizes, self.gated
        if self.mixture is not None and layer.ffn_norm is not None and layer.router is not None:
            self._norm(layer.ffn_norm, n, layer.gate_up, layer.router)
            self._branch = self.mixture(layer, self.normed, x, n, self.x, self.branch)
            self._post_norm, self._fused = None, n <= MAX_CAPTURED and not s.layer_norm
            return
        if layer.ffn_norm is not None:
            self._norm(layer.ffn_norm, n, layer.gate_up)
        elif (branch := self._added_branch(layer.attn_norm, n)) is not None:
            nothing = layer.attn_norm, layer.attn_norm_bias, None, None, s.n_embd, self.normed.n_padded, s.eps
            self._launch_norm("add_layer_norm_q8", n, branch, *nothing)
        floats, planes = layer.down.wants(x)
        if n <= MAX_CAPTURED and layer.gate_up.can_gate and s.gated:
            kind = EpilogueKind.GATE if s.activation == "silu" else EpilogueKind.GATE_GELU
            gate = Epilogue(kind, x.n_padded, gate=(planes, x.n_padded))
            layer.gate_up.few(self.normed, x.floats, n, epilogue=gate)
        else:
            (layer.gate_up.few if n <= MAX_CAPTURED else layer.gate_up.many)(self.normed, self.gate_up, n)
            kernel = wiring.kernel(ACTIVATIONS[s.activation, s.gated])
            grid = kernel.grid(n_padded=x.n_padded, rows=n)
            self.kernels(kernel, grid, self.gate_up, floats, planes, s.n_ff, x.n_padded)
        self._set_branch(layer.down, x, n, layer.ffn_post_norm)

    def finish(self, norm: Buffer, n: int, bias: Buffer | None = None) -> None:
        self._norm(norm, n, self.unembedding, bias=bias)
        self._branch = None

    def output(self, first: int, n: int) -> None:
        (self.unembedding.few if n <= MAX_CAPTURED else self.unembedding.many)(self.normed, self.logits, n, first)
        if cap := self.sizes.logit_softcap:
            kernel, count = wiring.kernel("softcap_rows_f32"), n * self.sizes.n_vocab
            self.kernels(kernel, kernel.grid(n=count), self.logits, count, cap)

    def read_output(self, first: int, logits: Floats) -> None:
        for at in range(0, len(logits), self.rows):
            n = min(self.rows, len(logits) - at)
            self.output(first + at, n)
            self.read_logits(n, logits[at : at + n])

    def set_sampling(self, slot: int, state: npt.NDArray[np.uint32], recent: npt.NDArray[np.int32], first: int) -> None:
        (states, tokens, _), stream, n = self._sampling, self.kernels.stream, len(recent)
        stream.synchronize()
        staged = self._staged_sampling[: STATE_WORDS + n]
        staged[:STATE_WORDS], staged[STATE_WORDS:] = state.view(np.int32), recent
        states.write_async(staged[:STATE_WORDS], stream, 4 * STATE_WORDS * slot)
        tokens.write_async(staged[STATE_WORDS:], stream, 4 * (self.n_context * slot + first))

    def sample(self, n: int) -> None:
        # Pinned memory has one address for the host and the device.
        n_vocab, outputs = self.sizes.n_vocab, (self.tokens, self.positions, self.samples.ctypes.data)
        for name, to in (("sample_best_f32", ()), ("sample_bins_f32", ()), ("sample_draw_f32", outputs)):
            kernel = wiring.kernel(name)
            grid = kernel.grid(n=n_vocab, rows=n)
            self.kernels(kernel, grid, self.logits, self.slots, *self._sampling, *to, n_vocab, self.n_context)
