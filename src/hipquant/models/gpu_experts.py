"""A mixture of experts on a GPU: they are chosen there, and kernels find the expert of a column by its number."""

from __future__ import annotations

from collections.abc import Mapping

from .. import wiring
from ..driver import Buffer
from ..wiring import EXPERT_TILE, FLOAT_EXPERT_BATCH
from .gpu_weights import Activations, Epilogue, EpilogueKind, ExpertColumns, Products
from .layers import MAX_CAPTURED, Kernels, Layer, Sizes


def mixture_parts(s: Sizes, chunk: int) -> dict[str, int]:
    """Bytes of what the experts of a pass over `chunk` tokens take, by name."""
    choices = chunk * s.n_expert_used
    parts = {"router": chunk * s.n_expert, "given": choices * s.n_embd, "groups": 4 * choices, "counts": s.n_expert}
    parts |= dict.fromkeys(("experts", "weights", "token", "column"), choices)
    return {f"experts' {name}": 4 * n for name, n in parts.items()}


class Mixture:
    """The experts of the tokens of a pass, and what these give.

    In a short pass each choice of a token is a column, and what the experts give is added as it is multiplied. In a
    long one columns are sorted by expert, whose weights are taken for up to 64 of them at a time, or 8 where some
    are floats.
    """

    def __init__(self, kernels: Kernels, s: Sizes, parts: Mapping[str, Buffer]) -> None:
        self.kernels, self.sizes = kernels, s
        self.logits, self.given, self.groups, self.counts = (
            parts[f"experts' {name}"] for name in ("router", "given", "groups", "counts")
        )
        self.experts, self.weights, self.token, self.column = (
            parts[f"experts' {name}"] for name in ("experts", "weights", "token", "column")
        )
        self.counts.fill(0, kernels.stream)
        self.gate_up = parts["gate_up"]

    def __call__(self, layer: Layer[Products], x: Activations, gated: Activations, n: int, dst: Buffer) -> None:
        """dst[n][n_embd] = what the experts of n tokens give, weighted. x is normed."""
        s = self.sizes
        columns = self._choose(layer, x, n)
        self._gate(layer, x, gated, columns, n * s.n_expert_used)
        if columns.batch == 1:
            layer.down.mixed(gated, dst, n, s.n_expert_used, self.experts, self.weights)
            return
        layer.down.of_experts(gated, self.given, columns, None, Epilogue())
        add = wiring.kernel("add_experts_q8")
        grid = add.grid(n=s.n_embd, ntokens=n)
        self.kernels(add, grid, self.given, self.weights, self.column, dst, s.n_embd, s.n_expert_used)

    def _choose(self, layer: Layer[Products], x: Activations, n: int) -> ExpertColumns:
        s, choose, sort = self.sizes, wiring.kernel("choose_experts_q8"), wiring.kernel("sort_experts_q8")
        assert layer.router is not None
        few, choices = n <= MAX_CAPTURED, n * s.n_expert_used
        (layer.router.few if few else layer.router.many)(x, self.logits, n)
        counts = None if few else self.counts
        chosen = self.experts, self.weights, self.groups, self.token, counts, self.column
        self.kernels(choose, choose.grid(ntokens=n), self.logits, *chosen, s.n_expert, s.n_expert_used)
        if few:
            return ExpertColumns(self.groups, choices, 1)
        runs = *layer.gate_up.runs, *layer.down.runs
        batch = EXPERT_TILE if all(run.quantized for run in runs) else FLOAT_EXPERT_BATCH
        most = min(choices, choices // batch + s.n_expert)  # groups: each expert may have one that is not full
        to = self.counts, self.groups, self.token, self.column
        self.kernels(sort, sort.grid(), self.experts, *to, s.n_expert, s.n_expert_used, n, batch, most)
        return ExpertColumns(self.groups, most, batch)

    def _gate(self, layer: Layer[Products], x: Activations, to: Activations, columns: ExpertColumns, n: int) -> None:
        """The n columns that `down` takes."""
        s = self.sizes
        floats, planes = layer.down.wants(to)
        run, *others = layer.gate_up.runs
        if not others and (columns.batch == 1 or not run.quantized):
            epilogue = Epilogue(EpilogueKind.GATE, to.n_padded, gate=(planes, to.n_padded))
            layer.gate_up.of_experts(x, to.floats, columns, self.token, epilogue)
            return
        layer.gate_up.of_experts(x, self.gate_up, columns, self.token, Epilogue())
        kernel = wiring.kernel("silu_mul_q8")
        grid = kernel.grid(n_padded=to.n_padded, rows=n)
        self.kernels(kernel, grid, self.gate_up, floats, planes, s.n_ff, to.n_padded)
