"""A tensor is a shape and a quant type on a device's memory: weights as GGUF blocks, activations as floats or q8_1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .driver import Buffer, Device
from .driver import device as get_device
from .quants import BY_NAME, F16, F32, Q8_1, QuantType, padded, quant_type

_DTYPES: dict[str, type[np.generic]] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class Tensor:
    """`shape` is in elements, row-major; a row is `row_bytes` long and rows follow each other without a gap.

    A row of Q8_1 holds `padded(k)` elements, k = shape[-1]. Raises `ValueError` if the buffer is too small.
    """

    __slots__ = ("buffer", "device", "shape", "type")

    def __init__(self, buffer: Buffer, shape: Sequence[int], type: QuantType | str, device: Device) -> None:
        self.buffer, self.type, self.device = buffer, quant_type(type, "Tensor"), device
        self.shape = tuple(int(n) for n in shape)
        if not self.shape or min(self.shape) < 0:
            raise ValueError(f"a tensor's shape must be one or more numbers from 0 on, not {self.shape}")
        if buffer.nbytes < self.nbytes:
            raise ValueError(
                f"a {self.type} tensor of shape {self.shape} takes {self.nbytes} bytes, the buffer has {buffer.nbytes}"
            )

    @classmethod
    def empty(cls, shape: Sequence[int], type: QuantType | str = F32, device: str | Device = "auto") -> Tensor:
        """A tensor of uninitialized memory."""
        where, row = get_device(device), quant_type(type, "Tensor.empty")
        return cls(where.allocate(tensor_bytes(row, shape), "a tensor"), shape, row, where)

    @classmethod
    def from_numpy(
        cls,
        array: npt.ArrayLike,
        type: QuantType | str | None = None,
        shape: Sequence[int] | None = None,
        device: str | Device = "auto",
    ) -> Tensor:
        """Floats (float32, float16) as they are, or raw bytes (uint8) as blocks of `type` with a `shape` in elements.

        On the CPU the tensor shares the array's memory; to a GPU it is copied.
        """
        a = np.asarray(array)
        if type is None:
            by_dtype = {np.dtype(np.float32): F32, np.dtype(np.float16): F16}
            if a.dtype not in by_dtype:
                raise ValueError(f"an array of {a.dtype} needs a `type` (one of {' '.join(BY_NAME)})")
            type, shape = by_dtype[a.dtype], shape or a.shape
        if shape is None:
            raise ValueError(f"raw {quant_type(type)} bytes need a `shape` in elements")
        where = get_device(device)
        return cls(where.upload(a), shape, type, where)

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.type, self.shape[-1])

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix: the product of all dimensions but the last."""
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    def numpy(self) -> npt.NDArray[Any]:
        """The tensor as an array: floats in their shape, blocks as bytes [..., row_bytes], BF16 as uint16.

        On the CPU without a copy; from a GPU it is copied, after what the device's stream has been given.
        """
        dtype = _DTYPES.get(self.type.name)
        shape = self.shape if dtype is not None else (*self.shape[:-1], self.row_bytes)
        if self.device.kind == "cpu":
            return self.buffer.array(dtype or np.uint8, shape)
        return self.buffer.read(dtype or np.uint8, shape)

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __repr__(self) -> str:
        return f"<{self.type} tensor {self.shape} on {self.device.kind}>"


def row_bytes(type: QuantType, k: int) -> int:
    """Bytes of a row of k elements; rows of Q8_1 are padded."""
    return type.row_bytes(padded(k) if type is Q8_1 else k)


def tensor_bytes(type: QuantType, shape: Sequence[int]) -> int:
    """Bytes of a tensor."""
    return int(np.prod(shape[:-1], dtype=np.int64)) * row_bytes(type, shape[-1])
