"""GGUF-quantized language models from Python, on ahead-of-time compiled kernels wired up by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import (
    ChatTemplateError,
    ContextLengthError,
    DeviceNotFoundError,
    DownloadError,
    DriverError,
    HipquantError,
    InvalidCodeObjectError,
    InvalidModelFileError,
    KernelNotFoundError,
    ModelNotFoundError,
    OutOfDeviceMemoryError,
    TokenizerError,
    UnsupportedQuantTypeError,
)

if TYPE_CHECKING:
    from . import hub, ops
    from .codeobjects import QUANTIZED
    from .driver import device, devices
    from .models import Model, load
    from .tensor import Tensor

__version__ = "0.1.0"

# Where the public names live; imported when they are first used, so that `import hipquant` costs next to nothing.
_LAZY = {
    "QUANTIZED": "codeobjects",
    "Model": "models",
    "Tensor": "tensor",
    "device": "driver",
    "devices": "driver",
    "hub": "",
    "load": "models",
    "ops": "",
}

__all__ = [
    "QUANTIZED",
    "ChatTemplateError",
    "ContextLengthError",
    "DeviceNotFoundError",
    "DownloadError",
    "DriverError",
    "HipquantError",
    "InvalidCodeObjectError",
    "InvalidModelFileError",
    "KernelNotFoundError",
    "Model",
    "ModelNotFoundError",
    "OutOfDeviceMemoryError",
    "Tensor",
    "TokenizerError",
    "UnsupportedQuantTypeError",
    "__version__",
    "device",
    "devices",
    "hub",
    "load",
    "ops",
]


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'hipquant' has no attribute {name!r}")
    from importlib import import_module

    home = _LAZY[name]
    value = getattr(import_module(f".{home}", __name__), name) if home else import_module(f".{name}", __name__)
    globals()[name] = value
    return value
