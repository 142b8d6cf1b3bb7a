"""The commands and how they end."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import click

from .. import __version__
from ..errors import HipquantError

COMMANDS = (
    "run", "chat", "bench", "devices", "perplexity", "convert", "quantize", "build", "inspect", "verify", "export"
)  # fmt: skip


class Commands(click.Group):
    """The modules beside this one; whatever a user can cause ends as a sentence and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __package__).command
        return command

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs a command and exits; click itself sees to a closed pipe (exit code 1, no words)."""
        try:
            result = super().main(*args, **(kwargs | {"standalone_mode": False}))
            code = result if isinstance(result, int) else 0
        except click.Abort:
            code = 130
        except click.ClickException as error:
            error.show()
            code = error.exit_code
        except (HipquantError, ValueError, OSError, MemoryError) as error:
            if os.environ.get("HIPQUANT_DEBUG") == "1":
                raise
            click.echo(f"Error: {_sentence(error)}", err=True)
            code = 1
        sys.exit(code)


def _sentence(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if isinstance(error, MemoryError) and not str(error):
        return "there is not enough memory; use a smaller model or context"
    return str(error) or type(error).__name__


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="hipquant")
def cli() -> None:
    """Runs GGUF-quantized language models on GPUs and CPUs.

    Try `hipquant run`: it tells a story, with the small model that comes with the package.
    """
