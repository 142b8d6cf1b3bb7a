"""The command `hipquant`: one module a command, imported when it is called, so that it starts quickly.

Exit codes: 0, 1 for an error (one sentence on standard error), 2 for a wrong call, 130 after Ctrl-C.
HIPQUANT_DEBUG=1 shows the traceback of an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType


def main() -> None:
    """The entry point of the command."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else Ctrl-C is to be ignored
        signal.signal(signal.SIGINT, _leave)
    from .app import cli

    try:
        cli.main(prog_name="hipquant")
    finally:
        _give_up_output()


def _leave(signum: int, frame: FrameType | None) -> None:
    """Ctrl-C where there is nothing to save (`common.interruptible` is the rest). Modules that are being imported
    turn a KeyboardInterrupt into other errors, or lose it."""
    with contextlib.suppress(OSError):
        os.write(2, b"\n")
    os._exit(130)


def _give_up_output() -> None:
    """What could not be written is dropped here, or Python would complain about it once more when it exits."""
    for stream in filter(None, (sys.__stdout__, sys.__stderr__)):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
