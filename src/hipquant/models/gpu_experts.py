"""A mixture of experts on a GPU: they are chosen there, and kernels find the expert of a column by its number."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .. import wiring
from ..driver import Buffer
from ..wiring import EXPERT_TILE, FLOAT_EXPERT_BATCH
from .gpu_weights import Activations, Epilogue, EpilogueKind, ExpertColumns, Products
from .layers import MAX_CAPTURED, Kernels, Layer, Sizes


def mixture_parts(s: Sizes, chunk: int) -> dict[str, int]:
    """Bytes of what the experts of a pass over `chunk` tokens take, by name."""
    choices = chunk * s.n_expert_used
    parts = {"router": chunk * s.n_expert, "given": choices * s.n_embd, "groups": 4 * choices}
    parts["counts"] = max(s.n_expert, MAX_CAPTURED)
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

    def __call__(
        self, layer: Layer[Products], x: Activations, gated: Activations, n: int, residual: Buffer, branch: Buffer
    ) -> Callable[[Epilogue], None]:
        """What the experts of n tokens give, weighted: in a long pass it is in `branch` [n][n_embd]. In a short one,
        what is returned adds it to the residual stream and norms that. x is normed."""
        s, used = self.sizes, self.sizes.n_expert_used
        if n <= MAX_CAPTURED:
            columns = self._choose_few(layer, x, n)
            self._gate(layer, x, gated, columns, n * used)
            return lambda epilogue: layer.down.mixed(gated, residual, n, used, self.experts, self.weights, epilogue)
        columns = self._choose_many(layer, x, n)
        self._gate(layer, x, gated, columns, n * used)
        layer.down.of_experts(gated, self.given, columns, None, Epilogue())
        add = wiring.kernel("add_experts_q8")
        grid = add.grid(n=s.n_embd, ntokens=n)
        self.kernels(add, grid, self.given, self.weights, self.column, branch, s.n_embd, used)
        return lambda _: None

    def _choose_few(self, layer: Layer[Products], x: Activations, n: int) -> ExpertColumns:
        """By the kernel that multiplies with the router, which is of floats in files as tools make them."""
        s, router = self.sizes, layer.router
        assert router is not None
        (run,) = router.runs
        if run.quantized:
            router.few(x, self.logits, n)
            self._launch_choose(n, None)
        else:
            kernel = wiring.find("router", run.type)
            grid = kernel.grid(n_expert=s.n_expert, ntokens=n)
            product = run.weights, x.floats, x.squares_of(0), x.eps, s.n_embd, s.n_expert, x.n_padded
            chosen = self.experts, self.weights, self.groups, self.token, s.n_expert_used
            self.kernels(kernel, grid, *product, self.logits, self.counts, *chosen)
        return ExpertColumns(self.groups, n * s.n_expert_used, 1)

    def _launch_choose(self, n: int, counts: Buffer | None) -> None:
        s, choose = self.sizes, wiring.kernel("choose_experts_q8")
        chosen = self.experts, self.weights, self.groups, self.token, counts, self.column
        self.kernels(choose, choose.grid(ntokens=n), self.logits, *chosen, s.n_expert, s.n_expert_used)

    def _choose_many(self, layer: Layer[Products], x: Activations, n: int) -> ExpertColumns:
        """Columns are sorted by expert."""
        s, sort, choices = self.sizes, wiring.kernel("sort_experts_q8"), n * self.sizes.n_expert_used
        assert layer.router is not None
        layer.router.many(x, self.logits, n)
        self._launch_choose(n, self.counts)
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
        if not others and (columns.batch == 1 or not run.quantized or floats is None):
            epilogue = Epilogue(EpilogueKind.GATE, to.n_padded, gate=(planes, to.n_padded))
            layer.gate_up.of_experts(x, to.floats, columns, self.token, epilogue)
            return
        layer.gate_up.of_experts(x, self.gate_up, columns, self.token, Epilogue())
        kernel = wiring.kernel("silu_mul_q8")
        grid = kernel.grid(n_padded=to.n_padded, rows=n)
        self.kernels(kernel, grid, self.gate_up, floats, planes, s.n_ff, to.n_padded)
