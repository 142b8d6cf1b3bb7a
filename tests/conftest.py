"""Builds what is out of date before the tests run, and gives them the device.

HIPQUANT_TARGETS="cpu gfx1100" builds no more than that: tests of other targets then see what is there.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hipquant as hq
from gguf_bytes import write_everything
from hipquant.driver import Device
from hipquant.gguf_file import GGUFFile
from models import write_llama
from vocabulary import CHATML, write_speaker


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a background job, whose commands would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # once, before the workers of pytest-xdist start
        _build(os.environ.get("HIPQUANT_TARGETS", "amd nvidia cpu").replace(",", " ").split())


def _build(words: list[str]) -> None:
    from hipquant.targets import select
    from hipquant.toolchain.build import build, plan
    from hipquant.toolchain.compile import OUTPUT, CompileError, up_to_date

    targets = select(words)
    try:
        stale = [o.filename for o in plan(targets, engine=True) if not up_to_date(o, OUTPUT)]
        if stale:
            print(f"building {len(stale)} code objects; all of them take minutes", file=sys.stderr)
            build(targets, engine=True)
    except CompileError as error:
        pytest.exit(str(error), returncode=1)


@pytest.fixture(scope="session")
def cpu() -> Device:
    return hq.device("cpu")


@pytest.fixture(scope="session")
def data() -> Path:
    return Path(__file__).parent / "data"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of a test's own."""
    return np.random.default_rng([ord(c) for c in request.node.name])


@pytest.fixture
def opened(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    """Opens bytes as a file."""

    def open_bytes(raw: bytes) -> GGUFFile:
        path = tmp_path / "m.gguf"
        path.write_bytes(raw)
        return GGUFFile(path)

    return open_bytes


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "everything.gguf"
    write_everything(path)
    assert path.stat().st_size < 20_000
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with a vocabulary, without a chat template, that never ends by itself."""
    return str(write_speaker(tmp_path_factory.mktemp("cli") / "plain.gguf", ends=False, context=2048).path)


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a chat template."""
    return str(write_speaker(tmp_path_factory.mktemp("cli") / "chatty.gguf", chat_template=CHATML, context=512).path)


@pytest.fixture(scope="session")
def mute(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without a vocabulary."""
    sizes = {"n_embd": 64, "n_ff": 128, "n_head": 2, "n_kv": 1, "n_vocab": 96}
    return str(write_llama(tmp_path_factory.mktemp("cli") / "mute.gguf", **sizes).path)
