"""The GPU engine's KV cache of each type, made of halves and taken apart by numpy, for tests of its kernels."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Halves = npt.NDArray[np.uint16]
Wide = npt.NDArray[np.float64]
BLOCK = 32


def quantized(values: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.int8], Halves]:
    """As q8_0: int8, and for each 32 the half that they are multiplied by; NaN makes it NaN."""
    blocks = values.astype(np.float64).reshape(*values.shape[:-1], -1, BLOCK)
    scales = (np.abs(blocks).max(-1) / 127).astype(np.float16)
    d = scales.astype(np.float64)[..., None]
    quants = np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0)
    return np.clip(np.rint(quants), -127, 127).astype(np.int8).reshape(values.shape), scales.view(np.uint16)


def decoded(quants: npt.NDArray[np.int8], scales: Halves) -> Wide:
    """The values that they stand for."""
    return quants * np.repeat(scales.view(np.float16).astype(np.float64), BLOCK, axis=-1)


class Cache:
    """Keys and values: halves [2, ...], and what a kernel for a type of cache takes of them."""

    def __init__(self, halves: Halves, cache_type: str) -> None:
        values = halves.view(np.float16)
        if cache_type == "f16":
            self.wide: Wide = values.astype(np.float64)
            self.arrays: tuple[npt.NDArray[np.generic], ...] = tuple(halves)
        else:
            quants, scales = quantized(values)
            self.wide, self.arrays = decoded(quants, scales), (*quants, *scales)
