"""Devices by name. One interface for every kind of silicon: Device, Module, Function, Stream, Event, Graph, Buffer."""

from __future__ import annotations

import contextlib
import re
import threading

from ..errors import DeviceNotFoundError
from . import cpu
from .base import Buffer, Device, Event, Function, Graph, Module, Rejection, Stream

__all__ = ["Buffer", "Device", "Event", "Function", "Graph", "Module", "Rejection", "Stream", "device", "devices"]

GPU_KINDS = ("hip", "cuda")

_lock = threading.Lock()
_cpu: cpu.Device | None = None


def device(name: str | Device = "auto") -> Device:
    """The device of a name: `cpu`, `hip`, `hip:1`, `cuda`, ... `DeviceNotFoundError` says what there is.

    `auto`: the device that models run on: the CPU.
    """
    if isinstance(name, Device):
        return name
    found = re.fullmatch(r"([a-z]+)(?::(\d{1,4}))?", name.lower())
    kind, index = (found[1], int(found[2] or 0)) if found else ("", 0)
    if kind in ("auto", "cpu") and not index:
        return _the_cpu()
    if kind in GPU_KINDS:
        from .gpu import open_device

        return open_device(kind, index)
    raise DeviceNotFoundError(f"no device {name!r}; there are: auto, {', '.join(_names())}")


def _the_cpu() -> cpu.Device:
    global _cpu
    with _lock:
        if _cpu is None:
            _cpu = cpu.Device()
        return _cpu


def _names() -> list[str]:
    """The names of the devices that are there."""
    from .gpu import device_count

    names = ["cpu"]
    for kind in GPU_KINDS:
        with contextlib.suppress(DeviceNotFoundError):
            names += [f"{kind}:{i}" for i in range(device_count(kind))]
    return names


def devices() -> list[Device]:
    """Every device that is there."""
    return [device(name) for name in _names()]
