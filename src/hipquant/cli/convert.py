"""`hipquant convert`: a model's folder from Hugging Face to a GGUF file."""

from __future__ import annotations

from pathlib import Path

import click

from .common import Bar, emit, interruptible

TYPES = ("F32", "F16", "BF16")


@click.command("convert")
@click.argument("folder")
@click.argument("out")
@click.option(
    "--type", "kind", type=click.Choice(TYPES, case_sensitive=False), help="Of matrices (default: as stored)."
)
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
def command(folder: str, out: str, kind: str | None, force: bool) -> None:
    """Converts FOLDER, a model as Hugging Face has it, to the GGUF file OUT.

    FOLDER holds config.json, tokenizer.json and safetensors of llama, mistral, phi-2, phi-3, qwen2, qwen3, gemma2 or
    gemma3. `hipquant quantize` makes the result smaller.
    """
    from ..convert import convert_folder
    from ..quants import BY_NAME

    with interruptible(), Bar("converting") as bar:
        seconds = convert_folder(folder, out, BY_NAME[kind.upper()] if kind else None, replace=force, progress=bar)
    emit(f"{out}: {Path(out).stat().st_size / 2**20:,.1f} MiB in {seconds:.1f} s\n")
