"""Weights in planes: what `repack_*` writes is taken apart by numpy, and what `get_rows_planes_*` reads is gguf's.

The kernels are simulated and emulated. The layouts are those of `kernels/gpu/planes.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pytest

import reference
from engine_runs import EMULATED, WAVES, needs_sanitizers, started
from hipquant import wiring
from hipquant.quants import WEIGHT_TYPES, QuantType, padded, plane_bytes, plane_units
from hipquant.toolchain.cases import random_blocks, random_bytes
from planes import Backend

Raw = npt.NDArray[np.uint8]
POISON = 0xA5
pytestmark = needs_sanitizers

# Of a type: pieces of 16 bytes of a unit, the sizes of what else a unit has, and of what a super-block has.
LAYOUTS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "Q4_0": (2, (4,), ()),
    "Q4_1": (2, (8,), ()),
    "Q5_0": (2, (8, 4), ()),
    "Q5_1": (2, (16,), ()),
    "Q8_0": (4, (4,), ()),
    "Q2_K": (1, (4,), (4,)),
    "Q3_K": (1, (8,), (16,)),
    "Q4_K": (2, (), (16,)),
    "Q5_K": (2, (8,), (16,)),
    "Q6_K": (3, (4,), (2,)),
}


@pytest.fixture(scope="module", params=WAVES + EMULATED)
def simulator(request: pytest.FixtureRequest) -> Iterator[Backend]:
    with started(request.param, "repack") as found:
        yield found


def sections(kind: QuantType, planes: Raw, rows: int, units: int) -> list[Raw]:
    """The planes of a matrix: pieces [row][unit][piece * 16], then [row][unit or super-block][bytes]."""
    pieces, of_unit, of_super = LAYOUTS[kind.name]
    shapes = [
        (rows, pieces, units, 16),
        *((rows, units, n) for n in of_unit),
        *((rows, units // 4, n) for n in of_super),
    ]
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    assert ends[-1] == planes.size
    first, *others = (part.reshape(shape) for part, shape in zip(np.split(planes, ends[:-1]), shapes, strict=True))
    return [first.swapaxes(1, 2).reshape(rows, units, -1), *others]


def fives_of(pieces: Raw, others: Raw) -> Raw:
    """From a byte for each pair of 64 weights, and two bits for each second one of a pair: [..., first or second,
    half, 16]. Word j of `others` has in bits 2i, 2i + 1 of byte b those of pair 16j + 4i + b."""
    words = others.reshape(*others.shape[:-1], 2, 1, 4) >> 2 * np.arange(4, dtype=np.uint8)[:, None] & 3
    upper = (pieces >> 5 ^ 4) << 2 | words.reshape(pieces.shape)
    return np.stack([pieces & 31, upper], axis=-2).reshape(*pieces.shape[:-1], 2, 2, 16)


def pairs_of(piece: Raw) -> Raw:
    """From a piece of two bits for each of 64 weights, those of weight 16s + j in bits 2s, 2s + 1 of byte j."""
    return np.concatenate([piece >> 2 * s & 3 for s in range(4)], axis=-1)


def together(values: Raw, width: int) -> Raw:
    """Fields of `width` bits, in the last axis but one, put together to bytes: the first one lowest."""
    return np.bitwise_or.reduce([values[..., i, :] << width * i for i in range(values.shape[-2])])


def blocks_of_32(kind: QuantType, parts: list[Raw]) -> Raw:
    """Blocks as a file has them [row][block][bytes], two of each unit, from the sections of a matrix."""
    rows = len(parts[0])

    def halved(part: Raw) -> Raw:
        return part.reshape(rows, -1, part.shape[-1] // 2)

    if kind.name in ("Q4_0", "Q4_1", "Q8_0"):
        quants = halved(parts[0]) ^ (0 if kind.name == "Q8_0" else 0x80)
        return np.concatenate([halved(parts[1]), quants], axis=-1)
    fifth, scales = (parts[1], parts[2]) if kind.name == "Q5_0" else np.split(parts[1], 2, axis=-1)
    fives = halved(fives_of(parts[0], fifth).swapaxes(-2, -3).reshape(rows, -1, 64))
    high = np.packbits(fives >> 4, axis=-1, bitorder="little")
    return np.concatenate([halved(scales), high, together(fives.reshape(*fives.shape[:-1], 2, 16) & 15, 4)], axis=-1)


def super_blocks(kind: QuantType, parts: list[Raw]) -> Raw:
    """The same of super-blocks, each from four units."""
    rows, head = len(parts[0]), parts[-1]

    def joined(part: Raw) -> Raw:
        return part.reshape(rows, -1, 4 * part.shape[-1])

    def weights(part: Raw, *shape: int) -> Raw:
        return joined(part).reshape(rows, -1, *shape)

    def bytes_of(part: Raw) -> Raw:
        return part.reshape(rows, head.shape[1], -1)

    if kind.name == "Q2_K":
        quants = together(weights(pairs_of(parts[0] ^ 0x80), 2, 4, 32), 2)
        return np.concatenate([joined(parts[1]), bytes_of(quants), head], axis=-1)
    if kind.name == "Q3_K":
        piece, more = parts[0] ^ 0x80, parts[1].reshape(*parts[1].shape[:-1], 2, 4)
        third = np.stack([more & 7, more >> 3 & 7], axis=-2).reshape(piece.shape)
        last = piece >> 6 << 1 | np.stack([more >> 6 & 1, more >> 7], axis=-2).reshape(piece.shape)
        quants = np.concatenate([piece & 7, piece >> 3 & 7, third, last], axis=-1)
        low, third = together(weights(quants & 3, 2, 4, 32), 2), together(weights(quants >> 2, 8, 32), 1)
        return np.concatenate([third, bytes_of(low), head[..., :14]], axis=-1)
    if kind.name == "Q4_K":
        return np.concatenate([head, joined(parts[0] ^ 0x80)], axis=-1)
    if kind.name == "Q5_K":
        fives = fives_of(parts[0], parts[1])
        low, fifth = together(weights(fives & 15, 4, 2, 32), 4), together(weights(fives >> 4, 8, 32), 1)
        return np.concatenate([head, fifth, bytes_of(low)], axis=-1)
    first, second, third = np.split(parts[0], 3, axis=-1)
    last = (first >> 6 ^ 2) << 4 | second >> 6 << 2 | third >> 6
    sixes = np.concatenate([parts[0] & 63, last], axis=-1)
    low, high = weights(sixes & 15, 2, 2, 64), weights(sixes >> 4, 2, 4, 32)  # half, nibble or two bits, place
    return np.concatenate([bytes_of(together(low, 4)), bytes_of(together(high, 2)), joined(parts[1]), head], axis=-1)


def blocks_of(kind: QuantType, planes: Raw, rows: int, k: int) -> Raw:
    """Rows of blocks [row][bytes] from planes; what lies behind a row is zeros."""
    parts = sections(kind, planes, rows, plane_units(k))
    found = super_blocks(kind, parts) if kind.is_super_block else blocks_of_32(kind, parts)
    if kind.name == "Q3_K":
        assert not parts[-1][..., 14:].any()
    n = k // kind.block_size
    assert all(not found[:, n:, at : at + 2].any() for at in kind.scales)
    return found[:, :n].reshape(rows, -1)


def repack(simulator: Backend, kind: QuantType, blocks: Raw, planes: Raw, first: int, rows: int, k: int) -> None:
    """Puts blocks, at an address that is no more than even, in planes of `rows` rows."""
    row = wiring.kernel(f"repack_{kind.suffix}")
    grid = row.grid(nrows=len(blocks), units=plane_units(k))
    simulator.launch(row, grid, (blocks, planes, k, len(blocks), first, rows), [2, 0, 0, 0, 0, 0])


def row_of(kind: QuantType, nblocks: int) -> int:
    """Weights of a row of so many blocks of 32, or of the super-blocks that they begin."""
    return padded(nblocks * 32, kind.block_size)


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda t: t.suffix)
@pytest.mark.parametrize(
    ("nblocks", "parts"),
    [(1, [1]), (3, [2, 1, 3]), (8, [4, 9]), (35, [13, 17])],  # the last part is more than a block of threads
)
def test_repacking_can_be_undone(simulator: Backend, kind: QuantType, nblocks: int, parts: list[int]) -> None:
    """Random bytes come back bit for bit, and each part touches its own rows alone."""
    rows, k, first = sum(parts), row_of(kind, nblocks), 0
    blocks = random_bytes(kind, rows, k)
    planes = np.full(plane_bytes(kind, rows, k), POISON, np.uint8)
    for n in parts:
        before = sections(kind, planes.copy(), rows, plane_units(k))
        repack(simulator, kind, blocks[first : first + n], planes, first, rows, k)
        for old, new in zip(before, sections(kind, planes, rows, plane_units(k)), strict=True):
            np.testing.assert_array_equal(new[:first], old[:first])
            assert (new[first + n :] == POISON).all()
        first += n
    np.testing.assert_array_equal(blocks_of(kind, planes, rows, k), blocks)


@pytest.mark.parametrize("kind", WEIGHT_TYPES, ids=lambda t: t.suffix)
@pytest.mark.parametrize("make", [random_blocks, random_bytes])
@pytest.mark.parametrize("nblocks", [1, 3, 6, 37])
def test_rows(simulator: Backend, kind: QuantType, make: Callable[[QuantType, int, int], Raw], nblocks: int) -> None:
    """Rows by id are what gguf makes of the file's blocks, bit for bit; those of no row are zeros."""
    rows, k = 5, row_of(kind, nblocks)
    blocks = make(kind, rows, k)
    planes = np.full(plane_bytes(kind, rows, k), POISON, np.uint8)
    repack(simulator, kind, blocks, planes, 0, rows, k)
    ids = np.array([4, 0, 5, 2, 4, 2**32 - 1, 1], np.uint32)
    found = np.full((len(ids), k), -1, np.float32)
    row = wiring.kernel(f"get_rows_planes_{kind.suffix}")
    simulator.launch(row, row.grid(nids=len(ids), units=plane_units(k)), (planes, ids, found, k, rows))
    with np.errstate(invalid="ignore", over="ignore"):  # any bits at all are infinite and NaN scales too
        values = reference.dequantize(kind, blocks, (rows, k))
    expected = np.concatenate([values, np.zeros((1, k), np.float32)])[np.minimum(ids, rows)]
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    there = ~np.isnan(expected)
    np.testing.assert_array_equal(found[there].view(np.uint32), expected[there].view(np.uint32))
