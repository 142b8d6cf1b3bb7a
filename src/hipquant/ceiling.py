"""The ceiling that everything is measured against: how fast a device reads its memory."""

from __future__ import annotations

import time

import numpy as np

from . import wiring
from .codeobjects import ENGINE, QUANTIZED
from .driver import Buffer, Device, Event

GPU_BYTES = 2 << 30  # more than any cache


def read_ceiling(device: Device, source: Buffer | None = None, repeats: int = 7) -> float:
    """Bytes per second that a device reads, the best of several passes over `source` (default: 1 GiB; GPUs 2 GiB).

    `source` is overwritten; it should be more than the caches hold, a multiple of 1 MiB. Raises RuntimeError if the
    sums of what the kernel reads are wrong.
    """
    on_cpu = device.kind == "cpu"
    if source is None:
        free = device.free_memory
        nbytes = 1 << 30 if on_cpu else min(GPU_BYTES, (free or GPU_BYTES) // 2 >> 20 << 20)
        source = device.allocate(nbytes, "measuring the read ceiling")
    if on_cpu:
        source.bytes[:] = 1
    else:
        source.fill(1)
    kernel = wiring.kernel("read_bytes" if on_cpu else "read_memory")
    grid = kernel.grid(nbytes=source.nbytes)
    sums = device.allocate(4 * grid[0])
    function = device.get_or_load_func(kernel.name, QUANTIZED if on_cpu else ENGINE)
    best = float("inf")
    for _ in range(repeats + 1):
        begun, ended, started = Event(), Event(), time.perf_counter()
        begun.record(device.stream)
        function.launch(grid, kernel.block, 0, device.stream, [source, sums, source.nbytes])
        ended.record(device.stream)
        best = min(best, time.perf_counter() - started if on_cpu else ended.elapsed(begun))
    if (sums.read(np.uint32, (grid[0],)) != (0x01010101 << 18) % (1 << 32)).any():
        raise RuntimeError("the kernel that reads memory gives wrong sums")
    return source.nbytes / best
