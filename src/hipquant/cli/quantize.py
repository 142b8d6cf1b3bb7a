"""`hipquant quantize`: a GGUF file of floats to one of quantized weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from .common import Bar, emit, emit_json, interruptible, json_option, note, table

if TYPE_CHECKING:
    from ..quantize import Plan


@click.command("quantize")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.argument("kind", metavar="TYPE")
@click.option("--imatrix", metavar="FILE", help="An importance matrix, by llama-imatrix: GGUF or .dat.")
@click.option("--allow-requantize", is_flag=True, help="Take IN though its weights are quantized already.")
@click.option("--output-tensor-type", "output", metavar="T", help="The type of output.weight.")
@click.option("--token-embedding-type", "embedding", metavar="T", help="The type of token_embd.weight.")
@click.option("-t", "--threads", type=click.IntRange(1, 256), help="Threads (default: cores).")
@click.option("--dry-run", is_flag=True, help="List the tensors with their types and sizes; write nothing.")
@click.option("--force", is_flag=True, help="Replace OUT if it exists.")
@json_option
def command(
    source: str,
    out: str,
    kind: str,
    imatrix: str | None,
    allow_requantize: bool,
    output: str | None,
    embedding: str | None,
    threads: int | None,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Quantizes the GGUF file IN (F32, F16 or BF16) to OUT.

    TYPE is Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 F16 BF16 F32, or one of the mixes Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S
    Q5_K_M Q6_K. Tensors get the types that llama.cpp's llama-quantize gives them. OUT appears when it is whole.
    """
    from ..driver import device
    from ..gguf_file import GGUFFile
    from ..quantize import file_type, load_importance, matrix_type, plan, quantize_file

    wanted, types = file_type(kind), [None if t is None else matrix_type(t) for t in (output, embedding)]
    cpu = device("cpu")
    if threads is not None:
        cpu.threads = threads
    with GGUFFile(source) as file:
        importance = None if imatrix is None else load_importance(imatrix)
        made = plan(
            file,
            wanted,
            importance=importance,
            allow_requantize=allow_requantize,
            output=types[0],
            embedding=types[1],
        )
        for sentence in made.notes:
            note(sentence)
        seconds = 0.0
        if not dry_run:
            with interruptible(), Bar(f"quantizing to {wanted.name}") as bar:
                seconds = quantize_file(made, out, replace=force, device=cpu, progress=bar)
        _show(made, out, seconds, dry_run, as_json)


def _show(made: Plan, out: str, seconds: float, dry_run: bool, as_json: bool) -> None:
    before, after = made.bytes_before, made.bytes_after
    if as_json:
        emit_json(
            {
                "file": None if dry_run else out,
                "type": made.kind.name,
                "bytes_before": before,
                "bytes_after": after,
                "bits_per_weight": 8 * after / made.weights,
                "tensors": {c.info.name: c.type.name for c in made.choices},
                "notes": made.notes,
                "seconds": seconds,
            }
        )
        return
    if dry_run:
        sizes = zip(made.choices, made.entries, strict=True)
        rows = [[c.info.name, c.info.type.name, c.type.name, _mib(c.info.nbytes), _mib(e.nbytes)] for c, e in sizes]
        emit(table(("tensor", "from", "to", "MiB", "to MiB"), rows, words=3) + "\n")
    types = ", ".join(f"{n} {name}" for name, n in made.types.items())
    emit(
        f"{'would be ' if dry_run else ''}{out}: {made.kind.name}, tensors: {types}\n"
        f"{_mib(before)} MiB ({8 * before / made.weights:.2f} bits a weight) -> {_mib(after)} MiB "
        f"({8 * after / made.weights:.2f})" + ("" if dry_run else f" in {seconds:.1f} s") + "\n"
    )


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.1f}"
