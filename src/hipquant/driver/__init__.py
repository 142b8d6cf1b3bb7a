"""Devices by name. One interface for every kind of silicon: Device, Module, Function, Stream, Event, Graph, Buffer."""

from __future__ import annotations

import threading

from ..errors import DeviceNotFoundError
from .cpu import Buffer, Device, Event, Function, Graph, Module, Stream

__all__ = ["Buffer", "Device", "Event", "Function", "Graph", "Module", "Stream", "device", "devices"]

_lock = threading.Lock()
_cpu: Device | None = None


def device(name: str | Device = "auto") -> Device:
    """The device of a name: `auto` (the best there is) or `cpu`. `DeviceNotFoundError` says what there is."""
    global _cpu
    if isinstance(name, Device):
        return name
    kind = name.lower().partition(":")[0]
    if kind in ("auto", "cpu") and name.lower() in ("auto", "cpu", "cpu:0"):
        with _lock:
            if _cpu is None:
                _cpu = Device()
            return _cpu
    if kind in ("cuda", "hip", "rocm", "gpu", "nvidia", "amd"):
        raise DeviceNotFoundError(f"no device {name!r}: this version of hipquant runs on the CPU only; use 'cpu'")
    raise DeviceNotFoundError(f"no device {name!r}; there are: auto, cpu")


def devices() -> list[Device]:
    """Every device that is there."""
    return [device("cpu")]
