"""The errors of hipquant. Each message says what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HipquantError(Exception):
    """Base class: `except hipquant.HipquantError` catches everything that hipquant raises on purpose."""


class InvalidModelFileError(HipquantError, ValueError):
    """The file is not a GGUF model that can be used: what was found, at which key, tensor or byte."""


class ModelNotFoundError(HipquantError, ValueError):
    """No model of this name, or none that may be had: the message says where it was looked for, and what there is."""


class DownloadError(HipquantError, RuntimeError):
    """A model that could not be downloaded; what has arrived is kept, unless it is wrong."""


class OutputFileError(HipquantError, OSError):
    """A file that cannot be written: it exists, there is no room, no permission."""


class QuantizationError(HipquantError, ValueError):
    """Weights, types or an importance matrix with which a model cannot be quantized."""


class UnsupportedQuantTypeError(HipquantError, ValueError):
    """A quant type that an operation does not know."""

    def __init__(self, found: object, operation: str, supported: Iterable[str] = ()) -> None:
        self.found, self.operation, self.supported = found, operation, tuple(supported)
        known = f"; supported: {' '.join(self.supported)}" if self.supported else ""
        super().__init__(f"{operation} does not support quant type {found}{known}")


class KernelNotFoundError(HipquantError, KeyError):
    """A code object has no kernel of this name."""

    def __init__(self, name: str, target: str, known: Iterable[str]) -> None:
        self.name, self.target = name, target
        names = list(known)
        self.nearest = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"nearest: {', '.join(self.nearest)}" if self.nearest else f"it holds {len(names)} kernels"
        super().__init__(f"no kernel {name!r} in the code object for {target}; {hint}")

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0])


class InvalidCodeObjectError(HipquantError, ValueError):
    """Bytes that are not a code object for this device: what they are, what they hold, why each was rejected."""


class DriverError(HipquantError, RuntimeError):
    """A driver call failed: symbol, code, name and context."""

    def __init__(self, symbol: str, code: int, name: str, context: str) -> None:
        self.symbol, self.code, self.name, self.context = symbol, code, name, context
        super().__init__(f"{symbol} failed with {name} ({code}): {context}")


class DeviceNotFoundError(HipquantError, RuntimeError):
    """No device of the kind asked for; the message lists those that are there."""


class OutOfDeviceMemoryError(HipquantError, MemoryError):
    """An allocation that does not fit."""

    def __init__(self, asked: int, free: int | None, purpose: str) -> None:
        self.asked, self.free = asked, free
        have = "" if free is None else f", {free / 2**20:,.0f} MiB are free"
        super().__init__(f"{purpose} needs {asked / 2**20:,.0f} MiB{have}; use a smaller model, context or quant type")


class ContextLengthError(HipquantError, ValueError):
    """More tokens than the context holds."""


class TokenizerError(HipquantError, ValueError):
    """Text or tokens that the model's vocabulary cannot express, or a model without one."""


class ChatTemplateError(HipquantError, ValueError):
    """A chat template that does not compile or fails while it is rendered."""
