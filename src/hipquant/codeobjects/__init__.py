"""The embedded code objects: `QUANTIZED`, the container that `Device.get_or_load_func` picks from."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from ..errors import InvalidCodeObjectError
from ..targets import AMD_TARGETS, GPU_TARGETS, GpuTarget
from . import bundle

FOLDER = Path(__file__).parent


class CodeObjects:
    """The code objects of this installation, one file a target. A device loads the best one that it can run.

    `bytes()` of it is one offload bundle with every AMD target, the thing that a framework embeds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, filename: str) -> Path | None:
        """The file, or None where this installation does not hold it."""
        path = self.folder / filename
        return path if path.is_file() else None

    def files(self) -> list[Path]:
        """Every code object that is there."""
        return sorted(p for kind in ("so", "hsaco", "ptx") for p in self.folder.glob(f"*.{kind}"))

    def targets(self) -> dict[str, Path]:
        """The GPU targets that are there."""
        return {t.name: path for t in GPU_TARGETS if (path := self.path(t.filename)) is not None}

    def __bytes__(self) -> bytes:
        """The AMD bundle. Targets that are missing are compiled, which takes minutes and is announced.

        Raises `InvalidCodeObjectError` where that cannot be done.
        """
        objects = {t.name: p.read_bytes() for t in AMD_TARGETS if (p := self.path(t.filename)) is not None}
        missing = [t for t in AMD_TARGETS if t.name not in objects]
        if missing:
            objects |= self._compiled(missing)
        return bundle.pack({t.name: objects[t.name] for t in AMD_TARGETS})

    def _compiled(self, missing: list[GpuTarget]) -> dict[str, bytes]:
        # What compiles lies above this room: it is called on demand, and never needed to run a model.
        from ..cli.common import Bar, note
        from ..toolchain import zig
        from ..toolchain.build import build
        from ..toolchain.compile import CompileError

        lacks = f"this installation lacks the code objects of {len(missing)} of {len(AMD_TARGETS)} AMD targets"
        if not zig.installed():
            raise InvalidCodeObjectError(f"{lacks}, and the compiler for them: pip install {zig.REQUIREMENT}")
        note(f"{lacks}: compiling them, which takes minutes")
        with contextlib.ExitStack() as stack:
            folder = self.folder
            if not os.access(folder, os.W_OK):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            bar = stack.enter_context(Bar("compiling"))
            try:
                build(missing, folder, progress=bar)
            except CompileError as error:
                raise InvalidCodeObjectError(f"{lacks}, and compiling them did not succeed: {error}") from error
            return {t.name: (folder / t.filename).read_bytes() for t in missing}

    def __repr__(self) -> str:
        return f"<code objects: {', '.join(p.stem for p in self.files()) or 'none'}>"


QUANTIZED = CodeObjects(FOLDER)
