"""GB/s of weights for each quant type and the fraction of the read ceiling, after a check of each result.

    python benchmarks/kernels.py [--types Q4_0 ...] [--shapes 4096x4096 4096x14336] [--keep NAME]

`engine` is what the models run (`mul_mat_packed_*`), `table` the kernels that frameworks load by name, on raw GGUF
blocks (`mul_mat_vec_*`). Weights rotate through copies that fill 1 GiB, the very
memory whose read ceiling was measured, so that no cache holds them.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

import hipquant as hq
from common import ceiling, header, keep, seconds
from hipquant import ops, wiring
from hipquant.driver import Buffer
from hipquant.models.cpu import Activations
from hipquant.models.layers import Kernels
from hipquant.quants import WEIGHT_TYPES, QuantType, padded, quant_type

ROTATE = 1 << 30  # bytes that the copies of a matrix fill
BATCHES = (1, 2, 4, 8, 128)


def random_weights(t: QuantType, rows: int, k: int) -> hq.Tensor:
    """Random blocks with small positive scales."""
    raw = (
        np.frombuffer(np.random.default_rng(0).bytes(rows * t.row_bytes(k)), np.uint8).reshape(-1, t.block_bytes).copy()
    )
    for at in t.scales:
        raw[:, at : at + 2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    return hq.Tensor.from_numpy(raw, t, (rows, k))


class Case:
    """One matrix: packed and raw, each in as many copies as fit into the place that all cases share."""

    def __init__(self, t: QuantType, rows: int, k: int, places: tuple[Buffer, Buffer]) -> None:
        self.t, self.rows, self.k, self.device = t, rows, k, hq.device()
        self.kernels, self.raw = Kernels(self.device), random_weights(t, rows, k)
        pack = wiring.find("pack", t)
        packed = self.device.allocate(self.raw.nbytes)
        self.kernels(pack, pack.grid(nrows=rows), self.raw, packed, k, rows)
        self.copies = ROTATE // self.raw.nbytes
        self.packed = [self._copy(packed.bytes, places[0], i) for i in range(self.copies)]
        self.blocks = [self._copy(self.raw.buffer.bytes, places[1], i) for i in range(self.copies)]

    def _copy(self, data: Any, place: Buffer, i: int) -> Buffer:
        buffer = place.view(i * self.raw.nbytes, self.raw.nbytes)
        buffer.bytes[:] = data
        return buffer

    def engine(self, n: int, y: Any) -> tuple[Callable[[int], None], Any]:
        x, product = Activations(self.kernels, self.k, n), wiring.find("mul_mat_packed", self.t)
        x.floats.write(y)
        x.quantize(n)
        dst, grid = np.zeros((n, self.rows), np.float32), product.grid(nrows=self.rows)

        def run(i: int) -> None:
            self.kernels(product, grid, self.packed[i % self.copies], x.tiles, dst, self.k, self.rows, n, self.rows)

        return run, dst

    def table(self, n: int, y: Any) -> tuple[Callable[[int], None], Any]:
        q = ops.quantize_q8_1(y)
        dst, sizes = np.zeros((n, self.rows), np.float32), [padded(self.k), self.rows]
        if n <= wiring.MAX_BATCH:
            product = wiring.find("mul_mat_vec", self.t, batch=n)
            grid, last = product.grid(nrows=self.rows), [self.k, self.rows, *sizes]
        else:
            product = wiring.find("mul_mat", self.t)
            grid, last = product.grid(nrows=self.rows, ncols=n), [self.k, self.rows, n, *sizes]

        def run(i: int) -> None:
            self.kernels(product, grid, self.blocks[i % self.copies], q, dst, *last)

        return run, dst

    def measure(self, which: str, n: int, exact: Any, y: Any, repeats: int) -> float:
        """Median seconds, after a check against the product in float64 of the dequantized operands."""
        run, dst = (self.engine if which == "engine" else self.table)(n, y)
        run(0)
        error = ((dst - exact) ** 2).sum() / (exact**2).sum()
        assert error <= 5e-4, f"{which} {self.t} x{n}: NMSE {error:.1e}"
        for i in range(self.copies if n == 1 else 1):  # what was written last must have left the caches
            run(i)
        return statistics.median(seconds(lambda i=i: run(i)) for i in range(1, repeats + 1))  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--types", nargs="+", default=[t.name for t in WEIGHT_TYPES])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x14336"], help="ROWSxCOLUMNS")
    parser.add_argument("--keep", metavar="NAME", help="keep the result in benchmarks/results/NAME.json")
    o = parser.parse_args()
    device = hq.device()
    result = header(device)
    places = device.allocate(ROTATE), device.allocate(ROTATE)
    result["read_ceiling_GB/s"] = limit = ceiling(device, *places)
    print("GB/s of weights (fraction of the ceiling) for 1 to 8 columns, billions of operations/s for 128")
    result["rows"] = rows = []
    for shape in o.shapes:
        m, k = (int(v) for v in shape.split("x"))
        for name in o.types:
            case = Case(quant_type(name), m, k, places)
            y = np.random.default_rng(1).standard_normal((max(BATCHES), k)).astype(np.float32)
            exact = y.astype(np.float64) @ ops.dequantize_f32(case.raw).numpy().T.astype(np.float64)
            for which in ("engine", "table"):
                cells = []
                for n in BATCHES:
                    t = case.measure(which, n, exact[:n], y[:n], 25 if n <= 8 else 5)
                    gbs, gops = case.raw.nbytes / t / 1e9, 2 * m * k * n / t / 1e9
                    rows.append({"shape": shape, "type": name, "kernel": which, "columns": n, "seconds": t,
                                 "GB/s": gbs, "fraction": gbs / limit, "Gop/s": gops})  # fmt: skip
                    cells.append(f"{gbs:5.1f} ({gbs / limit:4.0%})" if n <= 8 else f"{gops:6.0f}")
                print(f"{shape:>11} {name:<5} {which:<6} {'  '.join(cells)}", flush=True)
    if o.keep:
        keep(o.keep, result)


if __name__ == "__main__":
    main()
