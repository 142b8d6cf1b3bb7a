"""The kernels that frameworks load by name, on an NVIDIA GPU, in the table's own geometry: GB/s, µs and TOPS.

    python benchmarks/gpu_kernels.py [--device cuda:0] [--types Q4_0 ...] [--keep NAME]

Weights rotate through copies larger than the L2 cache, launches are replayed from a captured graph, and each result is
checked before it is timed. The read ceiling is measured in the same run. Beside each figure: the ratio to Candle's
kernels of the same names and geometry, as measured on an H200 on 2026-11-22 (it says nothing about other GPUs).
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import hipquant as hq
from common import header, keep  # first: it keeps numpy's threads quiet
from hipquant import ops, wiring
from hipquant.driver import Device, Event, Stream
from hipquant.quants import WEIGHT_TYPES, QuantType, padded, quant_type
from hipquant.toolchain.cases import random_blocks

ROTATE = 200e6  # bytes that the copies of a matrix fill at least: several times the L2 cache
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (32000, 4096))
BATCHED, MATRIX = (4096, 14336), (4096, 4096, 512)
TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CANDLE_GBS = dict(
    zip(
        SHAPES,
        (
            (1701, 2045, 1866, 2065, 2232, 800, 659, 1324, 1551, 1402),
            (2273, 2987, 2349, 2760, 2820, 1129, 855, 1859, 2207, 1852),
            (2243, 2698, 2354, 2665, 2974, 1020, 778, 1745, 2143, 1745),
            (2525, 3025, 2599, 2933, 3295, 1098, 808, 1884, 2297, 1840),
        ),
        strict=True,
    )
)
CANDLE_US = {
    1: (14.1, 12.1, 17.1, 15.9, 22.2, 16.9, 29.3, 17.7, 18.1, 25.9),
    2: (14.9, 13.9, 21.1, 19.4, 24.7, 22.6, 33.9, 26.3, 25.8, 29.8),
    4: (23.5, 26.6, 34.5, 28.1, 36.5, 34.6, 40.2, 36.6, 39.4, 42.3),
    8: (41.8, 52.7, 51.2, 55.1, 68.4, 95.6, 59.7, 74.4, 93.7, 132.3),
}
CANDLE_TOPS = (72, 67, 70, 66, 79, 42, 38, 55, 52, 63)


def graph_seconds(stream: Stream, launches: Callable[[], None], repeats: int = 15) -> float:
    """Median seconds of a captured graph, after 30 ms of replays that bring the clocks up."""
    with stream.capture() as graph:
        launches()
    until = time.perf_counter() + 0.03
    while time.perf_counter() < until:
        graph.launch(stream)
        stream.synchronize()
    times = []
    for _ in range(repeats):
        begun, ended = Event(), Event()
        begun.record(stream)
        graph.launch(stream)
        ended.record(stream)
        times.append(ended.elapsed(begun))
    return statistics.median(times)


def read_ceiling(device: Device) -> float:
    """Bytes/s that a kernel reads which does nothing else, from 2 GB."""
    module = device.load((Path(__file__).parent / "read.ptx").read_bytes())
    function, source, to = module.get_function("read_bytes_once"), device.allocate(2 * 10**9), device.allocate(4)
    source.fill(1)
    params = [ctypes.c_uint64(source.address), ctypes.c_uint64(source.nbytes // 16), ctypes.c_uint64(to.address)]

    def launch(blocks: int) -> Callable[[], None]:
        return lambda: function.launch((blocks, 1, 1), (512, 1, 1), 0, device.stream, params)

    units = device.compute_units  # type: ignore[attr-defined]
    return source.nbytes / min(graph_seconds(device.stream, launch(units * n), 5) for n in (4, 8, 16, 32))


class Matrix:
    """Copies of a random matrix on the device, and its values on the host."""

    def __init__(self, device: Device, t: QuantType, rows: int, k: int) -> None:
        self.t, self.rows, self.k, self.device = t, rows, k, device
        some = random_blocks(t, min(rows, 512), k).reshape(min(rows, 512), -1)
        raw = np.tile(some, (-(-rows // len(some)), 1))[:rows]
        count = min(24, int(ROTATE // raw.nbytes) + 4)
        self.copies = [hq.Tensor.from_numpy(raw, t, (rows, k), device) for _ in range(count)]
        self.values = ops.dequantize_f32(hq.Tensor.from_numpy(some, t, (len(some), k), "cpu")).numpy()

    def product(self, n: int) -> tuple[Callable[[], None], int]:
        """What launches the product of each copy with n columns, once checked, and how many products that are."""
        y = np.random.default_rng(1).standard_normal((n, self.k)).astype(np.float32)
        q, dst = ops.quantize_q8_1(hq.Tensor.from_numpy(y, device=self.device)), self.device.allocate(4 * n * self.rows)
        sizes = [padded(self.k), self.rows]
        if n <= wiring.MAX_BATCH:
            kernel = wiring.find("mul_mat_vec", self.t, batch=n)
            grid, last = kernel.grid(nrows=self.rows), [self.k, self.rows, *sizes]
        else:
            kernel = wiring.find("mul_mat", self.t)
            grid, last = kernel.grid(nrows=self.rows, ncols=n), [self.k, self.rows, n, *sizes]
        function = self.device.get_or_load_func(kernel.name, hq.QUANTIZED)
        copies = self.copies if n <= wiring.MAX_BATCH else self.copies[:4]

        def launch() -> None:
            for w in copies:
                function.launch(grid, kernel.block, 0, self.device.stream, [w, q, dst, *last])

        dst.fill(0xFF)
        launch()
        found = dst.read(np.float32, (n, self.rows))[:, : len(self.values)].astype(np.float64)
        exact = y.astype(np.float64) @ self.values.T.astype(np.float64)
        error = ((found - exact) ** 2).sum() / (exact**2).sum()
        assert error <= 5e-4, f"{kernel.name} at {self.rows}x{self.k}: NMSE {error:.1e}"
        return launch, len(copies)

    def seconds(self, n: int) -> float:
        launch, count = self.product(n)
        return graph_seconds(self.device.stream, launch) / count

    @property
    def nbytes(self) -> int:
        return self.copies[0].nbytes


def measure(device: Device, types: list[QuantType], rows: list[dict[str, Any]], limit: float) -> None:
    """Prints a line for each measurement and appends it to rows."""

    def note(kind: str, t: QuantType, shape: tuple[int, ...], s: float, peer: float, text: str, **more: float) -> None:
        shown = "x".join(map(str, shape))
        rows.append({"kernel": kind, "type": t.name, "shape": shown, "us": s * 1e6, "to_candle": peer, **more})
        print(f"{kind:<13} {shown:>13} {t.name:<5} {s * 1e6:7.1f} us  {text}  {peer:.2f} x Candle's", flush=True)

    for shape in SHAPES:
        for t in types:
            m, i = Matrix(device, t, *shape), TYPES.index(t.name)
            s = m.seconds(1)
            gbs = m.nbytes / s / 1e9
            text = f"{gbs:5.0f} GB/s {gbs / limit:4.0%} of the ceiling"
            note("mul_mat_vec 1", t, shape, s, gbs / CANDLE_GBS[shape][i], text, fraction=gbs / limit, gbs=gbs)
    for t in types:
        m, i = Matrix(device, t, *BATCHED), TYPES.index(t.name)
        for n in range(2, wiring.MAX_BATCH + 1):
            s = m.seconds(n)
            if n in CANDLE_US:
                ratio = CANDLE_US[n][i] / (s * 1e6)
                note(f"mul_mat_vec {n}", t, BATCHED, s, ratio, f"{1 / ratio:.2f} of Candle's time,")
    for t in types:
        m, i = Matrix(device, t, *MATRIX[:2]), TYPES.index(t.name)
        s = m.seconds(MATRIX[2])
        tops = 2 * np.prod(MATRIX) / s / 1e12
        note("mul_mat", t, MATRIX, s, tops / CANDLE_TOPS[i], f"{tops:5.0f} TOPS", tops=tops)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--types", nargs="+", default=[t.name for t in WEIGHT_TYPES])
    parser.add_argument("--keep", metavar="NAME", help="keep the result in benchmarks/results/NAME.json")
    o = parser.parse_args()
    device = hq.device(o.device)
    result = header(device)
    result["read_ceiling_GB/s"] = limit = read_ceiling(device) / 1e9
    print(f"  ceiling: {limit:.0f} GB/s read\n")
    result["rows"] = []
    measure(device, [quant_type(n) for n in o.types], result["rows"], limit)
    batch8 = [1 / r["to_candle"] for r in result["rows"] if r["kernel"] == "mul_mat_vec 8"]
    if batch8:
        result["batch_8_geometric_mean_of_times"] = mean = statistics.geometric_mean(batch8)
        print(f"batch 8: geometric mean of the times {mean:.2f} of Candle's")
    if o.keep:
        keep(o.keep, result)


if __name__ == "__main__":
    main()
