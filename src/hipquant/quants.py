"""The type table: one row a quant type. Everything that depends on a type reads it from here.

Block layouts: ggml (ggml/src/ggml-common.h of llama.cpp, MIT). A *block* is the unit that shares a scale `d`; the
K types pack 8 or 16 sub-blocks into a *super-block* of 256. Adding a type: one row here, one header in
`kernels/gpu/quants/`, one in `kernels/cpu/quants/`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .errors import UnsupportedQuantTypeError

QK8_1 = 32  # activations per q8_1 block
UNIT = 64  # weights of a unit of the engine's planes
MATRIX_ROW_PADDING = 512  # a row of q8_1 activations is padded to a multiple of this many elements


class Role(Enum):
    """What a type is used for."""

    WEIGHT = "weight"  # quantized weights: dequantized and multiplied
    DEQUANTIZE = "dequantize only"
    ACTIVATION = "activation"  # what activations are quantized to
    FLOAT = "float"


class DequantizeArgs(Enum):
    """Third argument of `dequantize_block_*`: how the kernel learns where the elements end."""

    NB32 = "int nb32"  # elements / 32
    K = "int k"  # elements
    GRID = ""  # nothing: whole super-blocks, one per block of the grid


@dataclass(frozen=True)
class DequantizeGeometry:
    """Launch geometry of `dequantize_block_*`: elements and threads of one block."""

    elements: int
    threads: int
    args: DequantizeArgs


@dataclass(frozen=True)
class QuantType:
    """One row: identity, layout and the launch geometry of the kernels that depend on the type.

    `block_size` is in elements, `block_bytes` in bytes; `scales` are the byte offsets of the half-precision scales in
    a block; `tile` is (mmq_x, mmq_y), the columns and rows of one block of `mul_mat_*`.
    """

    name: str
    ggml_id: int
    block_size: int
    block_bytes: int
    role: Role
    scales: tuple[int, ...] = ()
    dequantize: DequantizeGeometry | None = None
    tile: tuple[int, int] | None = None

    @property
    def suffix(self) -> str:
        """The type in kernel names: q4_0, q4_K, f16."""
        return self.name.lower().replace("_k", "_K")

    @property
    def is_super_block(self) -> bool:
        return self.block_size == 256

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of k elements; k must be a multiple of `block_size`."""
        if k % self.block_size:
            raise ValueError(f"a row of {self.name} must be a multiple of {self.block_size} elements long, not {k}")
        return k // self.block_size * self.block_bytes

    def __str__(self) -> str:
        return self.name


_NB32 = DequantizeGeometry(256, 32, DequantizeArgs.NB32)
_K512 = DequantizeGeometry(512, 256, DequantizeArgs.K)
_GRID64 = DequantizeGeometry(256, 64, DequantizeArgs.GRID)
_GRID32 = DequantizeGeometry(256, 32, DequantizeArgs.GRID)
_W, _D, _A, _F = Role.WEIGHT, Role.DEQUANTIZE, Role.ACTIVATION, Role.FLOAT

QUANT_TYPES: tuple[QuantType, ...] = (
    #         name  ggml_id size bytes role scales dequantize tile
    QuantType("Q4_0", 2, 32, 18, _W, (0,), _NB32, (64, 128)),
    QuantType("Q4_1", 3, 32, 20, _W, (0, 2), _NB32, (64, 128)),
    QuantType("Q5_0", 6, 32, 22, _W, (0,), _K512, (128, 64)),
    QuantType("Q5_1", 7, 32, 24, _W, (0, 2), _K512, (128, 64)),
    QuantType("Q8_0", 8, 32, 34, _W, (0,), _NB32, (128, 64)),
    QuantType("Q2_K", 10, 256, 84, _W, (80, 82), _GRID64, (64, 128)),
    QuantType("Q3_K", 11, 256, 110, _W, (108,), _GRID64, (128, 128)),
    QuantType("Q4_K", 12, 256, 144, _W, (0, 2), _GRID32, (64, 128)),
    QuantType("Q5_K", 13, 256, 176, _W, (0, 2), _GRID64, (64, 128)),
    QuantType("Q6_K", 14, 256, 210, _W, (208,), _GRID64, (64, 64)),
    QuantType("Q8_K", 15, 256, 292, _D, (), _GRID32),  # d is a float32 at byte 0
    QuantType("Q8_1", 9, 32, 36, _A, (0, 2)),
    QuantType("F32", 0, 1, 4, _F),
    QuantType("F16", 1, 1, 2, _F),
    QuantType("BF16", 30, 1, 2, _F),
)

BY_NAME: dict[str, QuantType] = {t.name: t for t in QUANT_TYPES}
BY_GGML_ID: dict[int, QuantType] = {t.ggml_id: t for t in QUANT_TYPES}
WEIGHT_TYPES: tuple[QuantType, ...] = tuple(t for t in QUANT_TYPES if t.role is Role.WEIGHT)
FLOAT_TYPES: tuple[QuantType, ...] = tuple(t for t in QUANT_TYPES if t.role is Role.FLOAT)
DEQUANTIZE_TYPES: tuple[QuantType, ...] = tuple(t for t in QUANT_TYPES if t.dequantize is not None)
MATRIX_TYPES: tuple[QuantType, ...] = WEIGHT_TYPES + FLOAT_TYPES  # types that a weight matrix of a model may have
F32, F16, BF16, Q8_1 = (BY_NAME[n] for n in ("F32", "F16", "BF16", "Q8_1"))


def quant_type(which: QuantType | str | int, operation: str = "hipquant") -> QuantType:
    """The row of a type given by itself, by name (any case) or by ggml id; `UnsupportedQuantTypeError` otherwise."""
    if isinstance(which, QuantType):
        return which
    found = BY_GGML_ID.get(which) if isinstance(which, int) else BY_NAME.get(str(which).upper())
    if found is None:
        shown = f"with ggml id {which}" if isinstance(which, int) else repr(which)
        raise UnsupportedQuantTypeError(shown, operation, BY_NAME)
    return found


def padded(k: int, multiple: int = MATRIX_ROW_PADDING) -> int:
    """k rounded up to a multiple: a row of activations takes `padded(k)` elements in q8_1."""
    return -(-k // multiple) * multiple


def plane_units(k: int) -> int:
    """Units of `UNIT` weights that the engine's planes (kernels/gpu/planes.h) cut a row into."""
    return -(-k // UNIT)


def plane_bytes(type: QuantType, rows: int, k: int) -> int:
    """Bytes of a matrix in planes: those of its blocks, where these fill a multiple of 4."""
    bytes_of_256 = 256 // type.block_size * type.block_bytes
    aligned = bytes_of_256 + 2 if type.name == "Q3_K" else bytes_of_256  # its scales are read as 16 bytes
    return rows * plane_units(k) * aligned // 4


def activation_bytes(n_padded: int) -> int:
    """Bytes of a column of activations in planes, of a multiple of `UNIT` values."""
    return n_padded // UNIT * 80
