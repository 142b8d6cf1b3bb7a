"""`hipquant export`: the AMD bundle with what a framework embeds it by."""

from __future__ import annotations

from pathlib import Path

import click

from ..wiring import PROFILES
from .common import Bar, TargetsCommand, emit, interruptible, note


@click.command("export", cls=TargetsCommand)
@click.argument("kind", type=click.Choice(("rocm-rs", "c")))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--target", "words", multiple=True, metavar="T", help="Take only this AMD target (repeatable).")
@click.option("--profile", type=click.Choice(PROFILES), default="hip", show_default=True, help="The kernels' names.")
def command(kind: str, folder: Path, words: tuple[str, ...], profile: str) -> None:
    """Writes quantized.hsaco, one bundle for every AMD target, to FOLDER with what embeds it.

    rocm-rs: quantized_stub.rs, a constant with checks when it is compiled and tested. c: quantized.h and quantized.c,
    for gcc and clang. The bundle is verified first; targets that the installation does not hold are compiled.
    """
    from ..codeobjects import QUANTIZED
    from ..targets import AMD_TARGETS, GpuTarget, select
    from ..toolchain.compile import CompileError
    from ..toolchain.export import amd_bundle, export

    chosen = select(words) if words else AMD_TARGETS
    targets = [t for t in chosen if isinstance(t, GpuTarget) and t.vendor == "amd"]
    if len(targets) < len(chosen):
        others = ", ".join(t.name for t in chosen if t not in targets)
        raise click.ClickException(f"the bundle holds AMD targets only, not {others}")
    missing = [t for t in targets if profile != "hip" or QUANTIZED.path(t.filename) is None]
    if missing:
        note(f"compiling {len(missing)} targets under the name profile {profile}, which takes minutes")
    try:
        with interruptible(), Bar("compiling") as bar:
            bundle = amd_bundle(targets, profile, bar)
    except CompileError as error:
        raise click.ClickException(str(error)) from None
    for path in export(kind, folder, bundle, profile):
        emit(f"{path}\n")
