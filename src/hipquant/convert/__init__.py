"""Converting a model's folder from Hugging Face (safetensors, config.json, tokenizer.json) to a GGUF file."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..driver import Device
from ..driver import device as get_device
from ..errors import InvalidModelFileError
from ..gguf_writer import GGUFWriter, KeyValue, TensorEntry, Uint32, encode_key
from ..quantize import FILE_TYPES, PART, QUANTIZATION_VERSION, float_rows, quantize_part
from ..quants import F32, QuantType, Role
from .architectures import Architecture, Config, architecture, model_keys, rope_tensors
from .safetensors import Stored, read_folder, read_json
from .vocabulary import read_vocabulary

__all__ = ["Conversion", "convert_folder", "plan_conversion"]

Order = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Source:
    """A tensor to write: the stored one, its rows in another order if `order` is there, `plus` added to each value."""

    entry: TensorEntry
    stored: Stored
    order: Order | None = None
    plus: float = 0.0


@dataclass(frozen=True)
class Conversion:
    """A GGUF file to be: its metadata, its tensors, and those that are computed from the config."""

    keys: dict[str, KeyValue]
    sources: list[Source]
    computed: dict[str, npt.NDArray[np.float32]]

    @property
    def entries(self) -> list[TensorEntry]:
        return [TensorEntry(n, F32, v.shape) for n, v in self.computed.items()] + [s.entry for s in self.sources]


def plan_conversion(folder: str | os.PathLike[str], kind: QuantType | None = None) -> Conversion:
    """Reads what describes the model, and checks it. `kind` is the type of the matrices, None for that of the source's;
    vectors are F32. Raises `InvalidModelFileError` or `TokenizerError` for what is missing, damaged or unknown."""
    where = Path(folder)
    config = Config(read_json(where / "config.json"), where / "config.json")
    arch, stored = architecture(config), read_folder(where)
    named = {name: t for t in stored.values() if (name := arch.tensor(t.name)) is not None}
    for name in arch.required(config.integer("num_hidden_layers")):
        if name not in named:
            raise InvalidModelFileError(f"{where}: there is no tensor for {name!r}; the download is incomplete")
    embedding = named["token_embd.weight"]
    if len(embedding.shape) != 2 or embedding.shape[1] != config.integer("hidden_size"):
        raise InvalidModelFileError(
            f"{where}: the embedding has shape {embedding.shape}, which config.json contradicts"
        )
    if config.raw.get("tie_word_embeddings"):
        named.pop("output.weight", None)
    matrices = kind or embedding.type
    sources = [_source(arch, config, name, t, matrices) for name, t in sorted(named.items(), key=_by_layer)]
    keys: dict[str, KeyValue] = {
        "general.architecture": arch.name,
        "general.type": "model",
        "general.name": str(config.raw.get("_name_or_path") or where.resolve().name),
        "general.file_type": Uint32(FILE_TYPES[matrices.name].id),
        "general.quantization_version": Uint32(QUANTIZATION_VERSION),
    }
    keys |= model_keys(arch, config, embedding.shape[0]) | read_vocabulary(where, config.raw, embedding.shape[0])
    return Conversion(keys, sources, rope_tensors(config))


def _by_layer(item: tuple[str, Stored]) -> tuple[int, str]:
    parts = item[0].split(".")
    return (int(parts[1]) if parts[0] == "blk" else -1), item[0]


def _source(arch: Architecture, config: Config, name: str, stored: Stored, matrices: QuantType) -> Source:
    entry = TensorEntry(name, matrices if len(stored.shape) > 1 else F32, stored.shape)
    order = None
    if arch.rotates_neighbours and (
        heads := {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2])
    ):
        if stored.shape[0] % (2 * heads):
            raise InvalidModelFileError(f"tensor {stored.name!r} has {stored.shape[0]} rows for {heads} heads")
        order = np.arange(stored.shape[0]).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    plus = 1.0 if arch.norm_from_zero and name.endswith("norm.weight") else 0.0
    return Source(entry, stored, order, plus)


def convert_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    kind: QuantType | None = None,
    *,
    replace: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Writes the GGUF file of a folder; the seconds that it took. `kind` as in `plan_conversion`.
    `progress(done, total)` is called with bytes written. Raises as `plan_conversion`, `QuantizationError` for a weight
    that is not finite, and `OutputFileError` if the file cannot be written; nothing is left then."""
    begun, device = time.perf_counter(), get_device("cpu")
    if kind is not None and kind.role is not Role.FLOAT:
        raise ValueError(f"a conversion is to F32, F16 or BF16, not {kind}: quantize the result")
    made = plan_conversion(folder, kind)
    keys, done = [encode_key(name, value) for name, value in made.keys.items()], 0
    with GGUFWriter(out, keys, made.entries, replace=replace) as writer:
        for values in made.computed.values():
            writer.write(values)
        for source in made.sources:
            for part in _parts(source, device):
                writer.write(part)
                done += part.nbytes
                if progress is not None:
                    progress(done, writer.nbytes)
    if progress is not None:
        progress(writer.nbytes, writer.nbytes)
    return time.perf_counter() - begun


def _parts(source: Source, device: Device) -> Iterator[npt.NDArray[np.uint8]]:
    """The bytes of a tensor in parts of whole rows. The order of a vector is that of its values."""
    stored, entry = source.stored, source.entry
    vector = len(stored.shape) == 1
    rows, k = (stored.shape[0], 1) if vector else (prod(stored.shape[:-1]), stored.shape[-1])
    raw = stored.data.reshape(rows, -1)
    step = max(1, PART // k)
    for at in range(0, rows, step):
        chosen = raw[at : at + step] if source.order is None else raw[source.order[at : at + step]]
        if vector:
            chosen, k = chosen.reshape(1, -1), len(chosen)
        x = float_rows(chosen, stored.type, k, device)
        if source.plus:
            x = x + np.float32(source.plus)
        yield quantize_part(x, entry.type, None, device, f"tensor {stored.name!r}", at * (1 if vector else k))
