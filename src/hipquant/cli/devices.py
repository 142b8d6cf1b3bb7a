"""`hipquant devices`: what there is to run on, which code objects it uses, and why something else cannot be used."""

from __future__ import annotations

from typing import Any

import click

from .common import emit, emit_json, json_option, table

GPUS = {"hip": "AMD GPUs", "cuda": "NVIDIA GPUs"}


@click.command("devices")
@json_option
def command(as_json: bool) -> None:
    """Lists the devices, the code objects that they do not use, and what is not available."""
    import hipquant

    devices, missing = [hipquant.device("cpu")], {}
    for kind in GPUS:
        try:
            devices += _gpus(kind)
        except hipquant.HipquantError as error:
            missing[kind] = str(error)
    found = [describe(device) for device in devices]
    if as_json:
        emit_json({"devices": found, "unavailable": missing})
        return
    head = ("name", "device", "target", "code object", "compute units", "memory", "free memory")
    emit(table(head, [_row(each) for each in found], words=4))
    for device in found:
        for reason, targets in _by_reason(device["rejected"]).items():
            emit(f"\n{device['name']} does not use {' '.join(targets)}: {reason}")
        if engine_missing := device.get("engine_missing"):
            emit(f"\n{device['name']} runs no models: {engine_missing}")
    for kind, reason in missing.items():
        emit(f"\n{GPUS[kind]}: {reason}")
    emit("\n")


def _row(device: dict[str, Any]) -> list[str]:
    if device["name"] == "cpu":
        units = f"{device['threads']} threads"
    else:
        units = f"{device['compute_units']}, waves of {device['wave_size']}"
    words = [device["name"], device["device"], device["target"], device["code_object"] or "none"]
    return [*words, units, _gib(device["memory"]), _gib(device["free_memory"])]


def _gpus(kind: str) -> list[Any]:
    from ..driver.gpu import device_count, open_device

    return [open_device(kind, index) for index in range(device_count(kind))]


def describe(device: Any) -> dict[str, Any]:
    """A device as `hipquant devices --json` gives it."""
    common = {
        "name": device.kind if device.kind == "cpu" else repr(device),
        "device": device.name,
        "target": device.target.name,
        "free_memory": device.free_memory,
        "rejected": [{"target": r.target, "reason": r.reason} for r in device.rejected],
    }
    if device.kind == "cpu":
        own = {"code_object": device.target.name, "memory": None, "threads": device.threads}
    else:
        own = {
            "code_object": device.object_target,
            "engine_missing": device.engine_missing or None,
            "memory": device.memory,
            "compute_units": device.compute_units,
            "wave_size": device.wave_size,
            "driver_version": ".".join(map(str, device.driver_version)),
        }
    return common | own


def _by_reason(rejected: list[dict[str, str]]) -> dict[str, list[str]]:
    """Targets by the reason that they share, so that thirty targets of other GPUs take one line."""
    targets: dict[str, list[str]] = {}
    for each in rejected:
        targets.setdefault(each["reason"], []).append(each["target"])
    return targets


def _gib(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 2**30:,.1f} GiB"
