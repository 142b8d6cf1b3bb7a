"""The engine's products of one column on an NVIDIA GPU, every type, on matrices of 33 and 72 MB: GB/s of weights.

    python benchmarks/gpu_engine.py [--device cuda:0] [--types Q4_0 ...] [--keep NAME]

As in a step of a model: weights in planes, launches that overlap, replayed from a captured graph; copies of a matrix
larger than the L2 cache in turns. Each result is checked before it is timed, the read ceiling is of the same run.
"stored": products of 4096 activations as they are, as of an output matrix. "normed": 4096 rows that are added to the
residual stream and normed, as of the matrices behind attention and the feed-forward unit.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

import hipquant as hq
from common import header, keep  # first: it keeps numpy's threads quiet
from gpu_kernels import ROTATE, graph_seconds, read_ceiling
from hipquant import ops, wiring
from hipquant.driver import Buffer, gpu
from hipquant.models.gpu_weights import Activations, Epilogue, EpilogueKind, Products, Run
from hipquant.models.layers import Kernels
from hipquant.quants import WEIGHT_TYPES, QuantType, activation_bytes, padded, plane_bytes, plane_units, quant_type
from hipquant.toolchain.cases import random_blocks

SIZES = (33e6, 72e6)  # bytes of a matrix
N = 4096  # activations of "stored", rows of "normed"


class Benchmark:
    """Products of one column with copies of a random matrix."""

    def __init__(self, device: gpu.Device, t: QuantType, rows: int, k: int) -> None:
        self.kernels, self.t, self.rows, self.k = Kernels(device), t, rows, k
        some = random_blocks(t, min(rows, 512), k).reshape(min(rows, 512), -1)
        raw = np.tile(some, (-(-rows // len(some)), 1))[:rows]
        blocks = device.upload(raw)
        self.nbytes = raw.nbytes
        copies = [self._planes(device, blocks) for _ in range(min(24, int(ROTATE // raw.nbytes) + 4))]
        self.products = [Products(self.kernels, k, [Run(t, rows, 0, copy)], None) for copy in copies]
        y = np.random.default_rng(1).standard_normal((1, k)).astype(np.float32)
        self.x = self._activations(device, y)
        values = ops.dequantize_f32(hq.Tensor.from_numpy(some, t, (len(some), k), "cpu")).numpy()
        self.exact = (y.astype(np.float64) @ values.T.astype(np.float64))[0]
        self.dst = device.allocate(4 * rows)
        norm = device.upload(np.ones(rows, np.float32)), None, device.allocate(activation_bytes(padded(rows)))
        self.norm = *norm, device.allocate(4 * -(-rows // 32)), padded(rows)

    def _planes(self, device: gpu.Device, blocks: Buffer) -> Buffer:
        planes, repack = device.allocate(plane_bytes(self.t, self.rows, self.k)), wiring.find("repack", self.t)
        grid = repack.grid(nrows=self.rows, units=plane_units(self.k))
        self.kernels(repack, grid, blocks, planes, self.k, self.rows, 0, self.rows)
        return planes

    def _activations(self, device: gpu.Device, y: np.ndarray[Any, np.dtype[np.float32]]) -> Activations:
        n_padded = padded(self.k)
        floats = device.upload(np.pad(y, ((0, 0), (0, n_padded - self.k))))
        x = Activations(self.k, device.allocate(activation_bytes(n_padded)), floats, 1e-5)
        quantize = wiring.kernel("quantize_q8")
        self.kernels(quantize, quantize.grid(n_padded=n_padded, rows=1), x.floats, x.planes, n_padded)
        return x

    def seconds(self, normed: bool) -> float:
        """Of one product; its result is checked first."""
        epilogue = Epilogue(EpilogueKind.ADD_AND_NORM, self.rows, norm=self.norm) if normed else Epilogue()
        self.dst.fill(0 if normed else 0xFF, self.kernels.stream)
        self.products[0].few(self.x, self.dst, 1, epilogue=epilogue)
        self.kernels.stream.synchronize()
        found = self.dst.read(np.float32, (self.rows,))[: len(self.exact)].astype(np.float64)
        error = ((found - self.exact) ** 2).sum() / (self.exact**2).sum()
        assert error <= 5e-4, f"{self.t} at {self.rows}x{self.k}: NMSE {error:.1e}"

        def launch() -> None:
            for product in self.products:
                product.few(self.x, self.dst, 1, epilogue=epilogue)

        return graph_seconds(self.kernels.stream, launch) / len(self.products)


def measure(device: gpu.Device, types: list[QuantType], limit: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for t in types:
        for nbytes in SIZES:
            other = int(nbytes / t.row_bytes(N)) // 256 * 256
            for kind, shape in (("stored", (other, N)), ("normed", (N, other))):
                b = Benchmark(device, t, *shape)
                s = b.seconds(kind == "normed")
                gbs = b.nbytes / s / 1e9
                found = {"kind": kind, "type": t.name, "rows": shape[0], "k": shape[1], "nbytes": b.nbytes}
                rows.append(found | {"us": s * 1e6, "gbs": gbs, "fraction": gbs / limit})
                size = f"{b.nbytes / 1e6:.0f} MB"
                print(f"{kind} {shape[0]:>6}x{shape[1]:<6} {t.name:<5} {size} {s * 1e6:6.1f} us {gbs:5.0f} GB/s "
                      f"{gbs / limit:4.0%} of the ceiling", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--types", nargs="+", default=[t.name for t in WEIGHT_TYPES])
    parser.add_argument("--keep", metavar="NAME", help="write benchmarks/results/NAME.json")
    options = parser.parse_args()
    device = hq.device(options.device)
    assert isinstance(device, gpu.Device)
    result = header(device)
    limit = read_ceiling(device)
    result["read_ceiling_GB/s"] = limit / 1e9
    print(f"  ceiling: {limit / 1e9:.0f} GB/s read\n")
    result["rows"] = measure(device, [quant_type(name) for name in options.types], limit / 1e9)
    if options.keep:
        keep(options.keep, result)


if __name__ == "__main__":
    main()
