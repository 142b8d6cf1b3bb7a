"""The embedded code objects, as containers that `Device.get_or_load_func` picks from.

`QUANTIZED` has the kernels that frameworks load by name, `ENGINE` those of the engine on GPUs. The CPU has one object
for both.
"""

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

    `bytes()` of it is one offload bundle with every AMD target, the thing that a framework embeds. `engine`: the files
    with the kernels of the GPU engine, which lie in the same folder.
    """

    def __init__(self, folder: Path, *, engine: bool = False) -> None:
        self.folder, self.engine = folder, engine
        self.label = "this installation's engine" if engine else "this installation"

    def filename(self, target: GpuTarget) -> str:
        return target.engine_filename if self.engine else target.filename

    def path(self, filename: str) -> Path | None:
        """The file, or None where this installation does not hold it."""
        path = self.folder / filename
        return path if path.is_file() else None

    def files(self) -> list[Path]:
        """Every code object that is there."""
        found = (p for kind in ("so", "hsaco", "ptx") for p in self.folder.glob(f"*.{kind}"))
        return sorted(p for p in found if p.stem.endswith(".engine") == self.engine)

    def targets(self) -> dict[str, Path]:
        """The GPU targets that are there."""
        return {t.name: path for t in GPU_TARGETS if (path := self.path(self.filename(t))) is not None}

    def __bytes__(self) -> bytes:
        """The AMD bundle. Targets that are missing are compiled, which takes minutes and is announced.

        Raises `InvalidCodeObjectError` where that cannot be done.
        """
        objects = {t.name: p.read_bytes() for t in AMD_TARGETS if (p := self.path(self.filename(t))) is not None}
        missing = [t for t in AMD_TARGETS if t.name not in objects]
        if missing:
            objects |= self._compiled(missing)
        return bundle.pack({t.name: objects[t.name] for t in AMD_TARGETS})

    def _compiled(self, missing: list[GpuTarget]) -> dict[str, bytes]:
        # What compiles lies above this room: it is called on demand, and never needed to run a model.
        from ..cli.common import Bar, note
        from ..toolchain import zig
        from ..toolchain.compile import CompileError, build_objects
        from ..toolchain.gpu import engine_objects, gpu_objects

        lacks = f"{self.label} lacks the code objects of {len(missing)} of {len(AMD_TARGETS)} AMD targets"
        if not zig.installed():
            raise InvalidCodeObjectError(f"{lacks}, and the compiler for them: pip install {zig.REQUIREMENT}")
        note(f"{lacks}: compiling them, which takes minutes")
        with contextlib.ExitStack() as stack:
            folder = self.folder
            if not os.access(folder, os.W_OK):
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            bar = stack.enter_context(Bar("compiling"))
            try:
                plan = engine_objects(missing) if self.engine else gpu_objects(missing)
                build_objects(plan, folder, progress=bar)
            except CompileError as error:
                raise InvalidCodeObjectError(f"{lacks}, and compiling them did not succeed: {error}") from error
            return {t.name: (folder / self.filename(t)).read_bytes() for t in missing}

    def __repr__(self) -> str:
        return f"<code objects: {', '.join(p.stem for p in self.files()) or 'none'}>"


QUANTIZED = CodeObjects(FOLDER)
ENGINE = CodeObjects(FOLDER, engine=True)
