"""Models by architecture: one file each, `Config` + `Model`, on the layers of `layers.py`."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ..driver import Device
from ..driver import device as get_device
from ..errors import InvalidModelFileError
from ..gguf_file import GGUFFile, StringArray
from ..hub import find
from ..tokenizer import has_vocabulary
from .model import Model

ARCHITECTURES = {"llama": "llama"}  # general.architecture -> module
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
    progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Loads a GGUF model (default: the demo model of the package) onto a device.

    `path` is a file, a folder, or the name of a model such as "microsoft/phi-2" or "TheBloke/phi-2-GGUF:Q4_K_M",
    which `hipquant.hub.find` looks for where there is no such path.
    `context` is the number of positions of a sequence (default: what the model was trained for, at most 8192),
    `sequences` the number of independent sequences in the KV cache (default: 4 on the CPU, whose memory is used as
    it fills, 1 on a GPU, where it is taken at once).
    `progress(done, total)` is called with bytes of weights. Raises `InvalidModelFileError`,
    `ModelNotFoundError`, `DownloadError`, `UnsupportedQuantTypeError`, `OutOfDeviceMemoryError` or
    `DeviceNotFoundError`.
    """
    on = get_device(device)
    if sequences is None:
        sequences = DEFAULT_SEQUENCES if on.kind == "cpu" else 1
    file = GGUFFile(find(path, free=on.free_memory) if path is not None else DEMO)
    architecture = file.require("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise InvalidModelFileError(
            f"{file.path}: architecture {architecture!r} is not known; there are: {', '.join(ARCHITECTURES)}"
        )
    _check_vocabulary(file)
    model: Model = import_module(f".{ARCHITECTURES[architecture]}", __name__).load(
        file, on, context, sequences, progress
    )
    return model
