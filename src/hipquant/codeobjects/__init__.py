"""The embedded code objects: `QUANTIZED`, the container that `Device.get_or_load_func` picks from."""

from __future__ import annotations

from pathlib import Path

from ..errors import InvalidCodeObjectError

FOLDER = Path(__file__).parent


class CodeObjects:
    """The code objects of this installation, one file a target. A device loads the best one that it can run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, filename: str) -> Path | None:
        """The file, or None where this installation does not hold it."""
        path = self.folder / filename
        return path if path.is_file() else None

    def files(self) -> list[Path]:
        """Every code object that is there."""
        return sorted(self.folder.glob("*.so"))

    def __bytes__(self) -> bytes:
        raise InvalidCodeObjectError(
            "this installation holds code objects for the CPU only; an AMD bundle cannot be had from it"
        )

    def __repr__(self) -> str:
        return f"<code objects: {', '.join(p.stem for p in self.files()) or 'none'}>"


QUANTIZED = CodeObjects(FOLDER)
