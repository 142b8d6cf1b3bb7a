"""The ceiling that everything is measured against: how fast a device reads its memory."""

from __future__ import annotations

import time

import numpy as np

from . import wiring
from .codeobjects import QUANTIZED
from .driver import Buffer, Device


def read_ceiling(device: Device, source: Buffer | None = None, repeats: int = 7) -> float:
    """Bytes per second that all threads together read, the best of several passes over `source` (default: 1 GiB).

    `source` is overwritten; it should be more than the caches hold, a multiple of 1 MiB. Raises RuntimeError if the
    sums of what the kernel reads are wrong.
    """
    if source is None:
        source = device.allocate(1 << 30, "measuring the read ceiling")
    source.bytes[:] = 1
    nbytes = source.nbytes
    kernel = wiring.kernel("read_bytes")
    grid = kernel.grid(nbytes=nbytes)
    sums = np.zeros(grid[0], np.uint32)
    function, best = device.get_or_load_func(kernel.name, QUANTIZED), float("inf")
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        function.launch(grid, kernel.block, 0, device.stream, [source, sums, nbytes])
        best = min(best, time.perf_counter() - begun)
    if (sums != (0x01010101 << 18) % (1 << 32)).any():
        raise RuntimeError("the kernel that reads memory gives wrong sums")
    return nbytes / best
