"""Builds what is out of date before the tests run, and gives them the device."""

from __future__ import annotations

from pathlib import Path

import pytest

import hipquant as hq
from hipquant.driver import Device


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # once, not in every worker of pytest-xdist
        from hipquant.toolchain.compile import build_cpu

        build_cpu()


@pytest.fixture(scope="session")
def cpu() -> Device:
    return hq.device("cpu")


@pytest.fixture(scope="session")
def data() -> Path:
    return Path(__file__).parent / "data"
