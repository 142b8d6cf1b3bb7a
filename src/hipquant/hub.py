"""Models by name: a file, a folder, an alias, or a repository of the Hugging Face hub.

    model.gguf, models/, models/:Q4_K_M                                what is on this machine
    microsoft/phi-2, 7b-mistral                                        aliases (`aliases.py`)
    owner/name, owner/name:Q4_K_M, owner/name@revision:file.gguf       repositories

A path that exists is always meant first. Repositories need the package huggingface-hub (`pip install hipquant[hub]`),
whose cache, token and variables (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) are used.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .aliases import alias
from .errors import InvalidModelFileError, ModelNotFoundError
from .model_files import choose, models_among

if TYPE_CHECKING:
    from .hub_download import Listing

Say = Callable[[str], None]
_log = logging.getLogger(__name__)
_NAME = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?:@([\w./-]+))?(?::([\w./+-]+))?", re.ASCII)
_NO_REPOSITORY = re.compile(r"\.\.|--|(^|/)[.-]|[.-](/|$)|\.(gguf|git)$", re.IGNORECASE)  # by the hub's own rules


class Name(NamedTuple):
    """A repository, a revision of it (None: the newest) and which of its files is meant: a quant or a file's name."""

    repository: str
    revision: str | None = None
    wanted: str | None = None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def parse(name: str) -> Name | None:
    """What a name that is no path means; None for one that can only be a path."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    base, revision, wanted = found.groups()
    if known := alias(base):
        return Name(known.repository, revision or known.revision, wanted or known.file)
    if "/" not in base or len(base) > 96 or _NO_REPOSITORY.search(base) or ".." in (revision or ""):
        return None
    return Name(base, revision, wanted)


def find(name: str | os.PathLike[str], *, free: int | None = None, say: Say = _log.info) -> Path:
    """The path of a model's file (the first of its parts), downloaded where it is not on this machine yet.

    Of a folder or repository with several quants, the best whose weights fit into `free` bytes is taken, unless the
    name tells one. `say` gets lines about what is chosen and downloaded. What does not exist and is no name of a
    repository is returned as a path.

    Raises `ModelNotFoundError` for a name that nothing has, `DownloadError` for what does not arrive,
    `OutOfDeviceMemoryError` where nothing fits, `UnsupportedQuantTypeError` for a quant that hipquant does not run.
    """
    path = Path(name)
    if name and path.is_dir():
        return _in_folder(path, None, free, say)
    if path.exists() or not isinstance(name, str):
        return path
    folder, colon, wanted = name.rpartition(":")
    if colon and Path(folder).is_dir():
        return _in_folder(Path(folder), wanted, free, say)
    meant = parse(name)
    return path if meant is None else _in_repository(meant, name, free, say)


def _in_folder(folder: Path, wanted: str | None, free: int | None, say: Say) -> Path:
    try:
        files = {p.relative_to(folder).as_posix(): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    except OSError as error:
        raise InvalidModelFileError(f"{folder}: the folder cannot be read: {error.strerror}") from None
    models = models_among(files)
    if not models:
        raise ModelNotFoundError(f"{folder} has no GGUF model{_instead(files)}")
    return folder / choose(models, wanted, str(folder), free, say).paths[0]


def _in_repository(name: Name, given: str, free: int | None, say: Say) -> Path:
    try:
        from . import hub_download as hub
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("huggingface_hub", "filelock"):
            raise
        raise ModelNotFoundError(
            f"there is no file {given!r}; to look for {name} on the Hugging Face hub, the package huggingface-hub is "
            "needed: pip install 'hipquant[hub]'"
        ) from None
    listing = hub.look_up(name.repository, name.revision, say)
    models = models_among(listing.sizes)
    if not models:
        raise _no_models(listing)
    held = [model for model in models if all(hub.cached(listing, path) for path in model.paths)]
    model = choose(models, name.wanted, str(name) if listing.online else f"the cache of {name}", free, say, held)
    if model not in held:
        say(f"downloading {model} of {name} to {hub.cache_folder()}")
    paths = [hub.download(listing, path, say) for path in model.paths]
    return paths[0]


def _no_models(listing: Listing) -> ModelNotFoundError:
    from .hub_download import sibling_with_models

    instead = _instead([*listing.others, *listing.files])
    other = sibling_with_models(listing.repository)
    where = f"at https://huggingface.co/models?other=base_model:quantized:{listing.repository}"
    there = f"but {other} has: give that name" if other else f"quantized ones may be found {where}"
    return ModelNotFoundError(f"{listing.repository} has no GGUF model{instead}; {there}")


def _instead(files: Iterable[str]) -> str:
    """What is there in the place of a GGUF model."""
    names = [file.lower() for file in files]
    if any(name.endswith(".gguf") for name in names):
        return ": a part of a split one is missing, or they are no models of text"
    if any(name.endswith((".safetensors", ".bin", ".pth", ".pt")) for name in names):
        return ", but weights in another format"
    return ""
