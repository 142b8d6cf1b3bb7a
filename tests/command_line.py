"""Calling the command line: as a function with click's runner, and as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import hipquant
from hipquant.cli.app import cli

COMMAND = [sys.executable, "-m", "hipquant"]
DEMO = Path(hipquant.__file__).parent / "demo" / "demo.gguf"
needs_demo = pytest.mark.skipif(not DEMO.exists(), reason="this checkout has no demo model")


def call(*args: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in args], input=stdin, prog_name="hipquant")


def json_of(*args: str, stdin: str | None = None) -> dict:
    result = call(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def start(*args: str, **options) -> subprocess.Popen:
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen([*COMMAND, *args], text=True, errors="replace", env=buffered, **options)


def error_of(result: Result) -> str:
    """The one sentence of a failed call."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ")
