"""Scales of blocks that are not finite are found before they do harm."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from gguf_bytes import file_of, peak_bytes, tensor
from hipquant.errors import InvalidModelFileError
from hipquant.gguf_file import find_invalid_scales
from hipquant.quants import BY_NAME, F32, MATRIX_TYPES, QUANT_TYPES, QuantType

NOT_FINITE = {"F32": [0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001], "BF16": [0x7F80, 0xFF80, 0x7FC0, 0xFF81]}
NOT_FINITE["Q8_K"] = NOT_FINITE["F32"]
LARGEST = {"F32": 0xFF7FFFFF, "Q8_K": 0xFF7FFFFF, "BF16": 0xFF7F}


def scale_fields(kind: QuantType) -> tuple[tuple[int, ...], int]:
    return kind.scales or (0,), 4 if kind.name in ("F32", "Q8_K") else 2


@pytest.mark.parametrize("kind", QUANT_TYPES, ids=str)
def test_invalid_scales_are_found(kind: QuantType) -> None:
    """With all other bits set, so that only the scales can tell."""
    offsets, width = scale_fields(kind)
    n = (1 << 16) + 3  # more than are looked at at once
    raw = np.full((n, kind.block_bytes), 0xFF, np.uint8)
    for at in offsets:
        raw[:, at : at + width] = list(LARGEST.get(kind.name, 0xFBFF).to_bytes(width, "little"))
    assert find_invalid_scales(kind, raw.reshape(-1)) is None
    for at, bits in product(offsets, NOT_FINITE.get(kind.name, [0x7C00, 0xFC00, 0x7E00, 0x7C01])):
        broken = raw.copy()
        for block in (n - 1, 1 << 16, (1 << 16) - 1, 5, 0):
            broken[block, at : at + width] = list(bits.to_bytes(width, "little"))
            assert find_invalid_scales(kind, broken.reshape(-1)) == block


def test_the_first_invalid_scale_counts() -> None:
    raw = np.zeros((10, 20), np.uint8)
    raw[7, 1] = raw[3, 3] = 0x7C  # d of block 7, m of block 3
    assert find_invalid_scales(BY_NAME["Q4_1"], raw.reshape(-1)) == 3


def test_no_blocks_and_parts_of_blocks() -> None:
    assert find_invalid_scales(F32, np.empty(0, np.uint8)) is None
    with pytest.raises(ValueError, match="17 bytes"):
        find_invalid_scales(BY_NAME["Q4_0"], np.zeros(17, np.uint8))


@pytest.mark.parametrize("kind", MATRIX_TYPES, ids=str)
def test_scales_are_checked_without_copies(kind: QuantType) -> None:
    raw = np.zeros((16 << 20) // kind.block_bytes * kind.block_bytes, np.uint8)
    assert peak_bytes(lambda: find_invalid_scales(kind, raw)) < 1 << 20


def test_check_scales_names_tensor_and_block(opened: Any) -> None:
    raw = bytearray(file_of(tensors=(tensor(b"w", (64, 3), BY_NAME["Q4_0"].ggml_id),), data=6 * 18))
    raw[-18:-16] = b"\x00\x7e"
    file = opened(bytes(raw))
    with pytest.raises(InvalidModelFileError, match=r"'w' \(Q4_0\) .* scale of a block at row 2, column 32 \(block 5"):
        file.check_scales("w")
