"""The compiler of the PyPI package `ziglang`: clang and lld for every target, with nothing else installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from .compile import CompileError, run

REQUIREMENT = "ziglang==0.17.1"


@functools.cache
def _home() -> Path:
    spec = importlib.util.find_spec("ziglang")
    if spec is None or spec.origin is None:
        raise CompileError(f"the compiler is not installed: pip install {REQUIREMENT}")
    return Path(spec.origin).parent


def installed() -> bool:
    return importlib.util.find_spec("ziglang") is not None


def version() -> str:
    """What the compiler calls itself; `CompileError` where it is not installed."""
    _home()
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as of

    try:
        return f"ziglang {of('ziglang')}"
    except PackageNotFoundError:
        return "ziglang"


def clang(arguments: Iterable[str | Path], what: str) -> str:
    """Compiles or assembles; gives the warnings."""
    return run([_executable(), "clang", "-resource-dir", _home() / "lib", *arguments], what)


def lld(arguments: Iterable[str | Path], what: str) -> str:
    """Links."""
    return run([_executable(), "ld.lld", *arguments], what)


def _executable() -> Path:
    return next((p for p in (_home() / "zig", _home() / "zig.exe") if p.is_file()), _home() / "zig")
