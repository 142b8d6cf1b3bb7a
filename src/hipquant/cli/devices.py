"""`hipquant devices`: what models can run on, and why something else cannot be used."""

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

    found = [_describe(device) for device in hipquant.devices()]
    missing = {kind: reason for kind in GPUS if (reason := _missing(kind))}
    if as_json:
        emit_json({"devices": found, "unavailable": missing})
        return
    head = ("name", "device", "code object", "threads", "free memory")
    rows = [[d["name"], d["device"], d["target"], str(d["threads"]), _gib(d["free_memory"])] for d in found]
    emit(table(head, rows, words=3))
    for device in found:
        for rejected in device["rejected"]:
            emit(f"\n{device['name']} does not use {rejected['target']}: {rejected['reason']}")
    for kind, reason in missing.items():
        emit(f"\n{GPUS[kind]}: {reason}")
    emit("\n")


def _describe(device: Any) -> dict[str, Any]:
    return {
        "name": device.kind,
        "device": device.name,
        "target": device.target.name,
        "threads": device.threads,
        "free_memory": device.free_memory,
        "rejected": [{"target": r.target, "reason": r.reason} for r in device.rejected],
    }


def _missing(kind: str) -> str:
    import hipquant

    try:
        hipquant.device(kind)
    except hipquant.DeviceNotFoundError as error:
        return str(error)
    return ""


def _gib(nbytes: int | None) -> str:
    return "unknown" if nbytes is None else f"{nbytes / 2**30:,.1f} GiB"
