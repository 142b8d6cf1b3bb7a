"""Models by architecture: one file each, named as `general.architecture` says, on the layers of `layers.py`."""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Literal

from ..driver import Device
from ..driver import device as get_device
from ..errors import InvalidModelFileError
from ..gguf_file import GGUFFile, StringArray
from ..hub import find
from ..tokenizer import has_vocabulary
from ..wiring import CACHE_TYPES
from .model import Model

SHARED = {
    "config",
    "cpu",
    "gpu",
    "gpu_experts",
    "gpu_weights",
    "layers",
    "model",
    "passes",
    "split",
}  # every other module is an architecture
ARCHITECTURES = tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name not in SHARED))
DEFAULT_SEQUENCES = 4
DEMO = Path(__file__).parent.parent / "demo" / "demo.gguf"

__all__ = ["ARCHITECTURES", "DEMO", "Model", "load"]


def _check_vocabulary(file: GGUFFile) -> None:
    """A vocabulary, where there is one, must have as many tokens as the embedding has rows."""
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or not has_vocabulary(file.metadata):
        return
    tokens = file.require("tokenizer.ggml.tokens", StringArray)
    if len(tokens) != embedding.shape[0]:
        file.fail(
            f"the vocabulary has {len(tokens)} tokens, the embedding {embedding.shape[0]} rows; convert the model again"
        )


def load(
    path: str | os.PathLike[str] | None = None,
    device: str | Device = "auto",
    *,
    context: int | None = None,
    sequences: int | None = None,
    cache_type: str = "f16",
    gpu_layers: int | Literal["auto"] = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Loads a GGUF model (default: the demo model of the package) onto a device.

    `path` is a file, a folder, or the name of a model such as "microsoft/phi-2" or "TheBloke/phi-2-GGUF:Q4_K_M",
    which `hipquant.hub.find` looks for where there is no such path.
    `context` is the number of positions of a sequence (default: what the model was trained for, at most 8192),
    `sequences` the number of independent sequences in the KV cache (default: 4 on the CPU, whose memory is used as
    it fills, 1 on a GPU, where it is taken at once).
    `cache_type` is how a GPU holds keys and values: "f16", or "q8_0" in 17/32 of the memory, for heads of a multiple of
    32 values; on the CPU it is "f16".
    `gpu_layers` is how many of the last layers run on the GPU, with the output matrix; the others, and the embedding,
    on the CPU. "auto": all of them, or `OutOfDeviceMemoryError`, which says how many would fit. 0: all on the CPU, and
    nothing is asked of the GPU.
    `progress(done, total)` is called with bytes of weights. Raises `InvalidModelFileError`,
    `ModelNotFoundError`, `DownloadError`, `UnsupportedQuantTypeError`, `OutOfDeviceMemoryError` or
    `DeviceNotFoundError`.
    """
    if cache_type not in CACHE_TYPES:
        raise ValueError(f"cache_type must be one of {', '.join(CACHE_TYPES)}, not {cache_type!r}")
    on, layers = _placed(get_device(device), gpu_layers)
    if sequences is None:
        sequences = DEFAULT_SEQUENCES if on.kind == "cpu" else 1
    file = GGUFFile(find(path, free=on.free_memory) if path is not None else DEMO)
    architecture = file.require("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise InvalidModelFileError(
            f"{file.path}: architecture {architecture!r} is not known; there are: {', '.join(ARCHITECTURES)}"
        )
    _check_vocabulary(file)
    model: Model = import_module(f".{architecture}", __name__).load(
        file, on, context, sequences, progress, cache_type, layers
    )
    return model


def _placed(device: Device, gpu_layers: int | Literal["auto"]) -> tuple[Device, int | None]:
    """The device of the last layers, and how many of them run there; None: all."""
    if gpu_layers == "auto":
        return device, None
    if not isinstance(gpu_layers, int) or gpu_layers < 0:
        raise ValueError(f"gpu_layers must be 'auto' or a number of layers from 0 on, not {gpu_layers!r}")
    if not gpu_layers:
        return get_device("cpu"), None
    if device.kind == "cpu":
        raise ValueError(
            f"{gpu_layers} layers are to run on a GPU, but the device is the CPU: name a GPU, as cuda or hip"
        )
    return device, gpu_layers
