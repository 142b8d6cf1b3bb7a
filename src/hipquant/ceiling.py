"""The ceiling that everything is measured against: how fast a device reads its memory."""

from __future__ import annotations

import time

import numpy as np

from . import wiring
from .codeobjects import QUANTIZED
from .driver import Device


def read_ceiling(device: Device, nbytes: int = 1 << 30, repeats: int = 7) -> float:
    """Bytes per second that all threads together read, the best of several passes over `nbytes` of memory.

    `nbytes` should be more than the caches hold. Raises RuntimeError if the sums that the kernel reads are wrong.
    """
    source = device.allocate(nbytes, "measuring the read ceiling")
    source.bytes[:] = 1
    kernel = wiring.kernel("read_bytes")
    grid, words = kernel.grid(nbytes=nbytes), min(nbytes, 1 << 20) // 4
    sums = np.zeros(grid[0], np.uint32)
    function, best = device.get_or_load_func(kernel.name, QUANTIZED), float("inf")
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        function.launch(grid, kernel.block, 0, device.stream, [source, sums, nbytes])
        best = min(best, time.perf_counter() - begun)
    if (sums[:-1] != 0x01010101 * words % (1 << 32)).any():
        raise RuntimeError("the kernel that reads memory gives wrong sums")
    return nbytes / best
