"""`hipquant run`: text after a prompt, or a conversation."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from .common import (
    DEMO,
    Bar,
    F,
    device_options,
    emit,
    emit_json,
    interruptible,
    json_option,
    model_argument,
    note,
    open_model,
    placement,
    read_stdin,
)
from .common import tolerate_output_encoding as tolerate

if TYPE_CHECKING:
    from ..generate import Generation
    from ..models import Model
    from ..sampling import SamplingParams

STORY = "Once upon a time"  # what the demo model is asked for where no prompt is given
DEFAULT_TOKENS = 200
STORY_TOKENS = 100  # of a turn of the demo model, which never ends one by itself


def generation_options(function: F) -> F:
    """How text is made: the tokens, their choice, where it ends."""
    options = (
        click.option("-n", "--tokens", type=click.IntRange(min=0), help="Most tokens (default: 200; chat: no limit)."),
        click.option("--temp", default=0.8, show_default=True, help="Temperature; 0 always takes the best token."),
        click.option("--top-k", default=40, show_default=True, help="Choose among the k best tokens; 0: all."),
        click.option("--top-p", default=0.95, show_default=True, help="Choose among the best that sum to p; 1: all."),
        click.option(
            "--min-p", default=0.05, show_default=True, help="Least probability relative to the best; 0: all."
        ),
        click.option(
            "--repeat-penalty", default=1.0, show_default=True, help="Divides logits of recent tokens; 1: off."
        ),
        click.option(
            "--seed", type=click.IntRange(min=0), help="Repeats a run (default: a new one, shown at the end)."
        ),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            callback=_stops,
            help="End where this text comes; may be given several times.",
        ),
        click.option(
            "-c", "--context", type=click.IntRange(min=1), help="Tokens of the context (default: at most 8192)."
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def _stops(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    if "" in texts:
        raise click.BadParameter("an empty text is found everywhere")
    return texts


def sampling_params(options: dict[str, Any]) -> SamplingParams:
    """Of the values of `generation_options`."""
    import numpy.random  # noqa: F401 (imported here, where Ctrl-C just ends, and not by the sampler)

    from ..sampling import SamplingParams

    seed = options["seed"]
    return SamplingParams(
        temperature=options["temp"],
        top_k=options["top_k"],
        top_p=options["top_p"],
        min_p=options["min_p"],
        repetition_penalty=options["repeat_penalty"],
        seed=int.from_bytes(os.urandom(4), "little") if seed is None else seed,
    )


@click.command("run")
@model_argument
@click.option("-p", "--prompt", help="The text to continue, or with --chat to answer (default: standard input).")
@click.option("-i", "--interactive", is_flag=True, help="A conversation, as `hipquant chat`; -p is its first message.")
@generation_options
@click.option("--chat/--no-chat", default=None, help="Use the model's chat template, or continue the text as it is.")
@click.option("--system", metavar="TEXT", help="With --chat: what the model is told before the conversation.")
@click.option("--stats/--no-stats", default=None, help="Times on standard error (default: not in a conversation).")
@click.option("--verbose-prompt", is_flag=True, help="Show the tokens of the prompt on standard error.")
@device_options
@json_option
def command(model: str | None, prompt: str | None, interactive: bool, chat: bool | None, **options: Any) -> int:
    """Generates text with MODEL: a GGUF file, a folder, or a name such as microsoft/phi-2 or
    TheBloke/phi-2-GGUF:Q4_K_M (default: the demo model, a teller of fairy tales).

    With -p or text on standard input, the text is printed and continued. Without either, on a terminal, a
    conversation begins (with the demo model: a story, told in turns). --chat with -p answers one message and prints
    the answer alone.

    In a conversation, Ctrl-C stops an answer, and at the prompt ends the program, as Ctrl-D does; /help lists the
    commands. When the context is full, the oldest turns are forgotten.
    """
    if interactive and (chat is False or options["as_json"]):
        raise click.UsageError("-i is for conversations in the terminal, without --no-chat and --json")
    first = prompt
    if interactive:
        prompt, chat = None, True
    else:
        prompt, chat = _mode(model, prompt, chat, options["as_json"])
    if options["system"] is not None and not chat:
        raise click.UsageError("--system is for --chat")
    params = sampling_params(options)
    if prompt == "":
        raise click.ClickException("the prompt is empty: give a text with -p or on standard input")
    tolerate()
    begun = time.perf_counter()
    where = options["device"], options["threads"]
    kinds = {key: options[key] for key in ("cache_type", "gpu_layers")}
    loaded = open_model(model, *where, options["context"], **kinds)
    if prompt is None:
        from .chat import converse

        limit = turn_limit(model, options["tokens"])
        with interruptible():
            converse(loaded, params, limit, options["stop"], options["system"], bool(options["stats"]), first)
        return 0
    return _Run(loaded, params, begun, options).go(prompt, chat)


def turn_limit(model: str | None, tokens: int | None) -> int | None:
    """Most tokens of a turn of a conversation."""
    return STORY_TOKENS if model in (None, DEMO) and tokens is None else tokens


def _mode(model: str | None, prompt: str | None, chat: bool | None, as_json: bool) -> tuple[str | None, bool]:
    """The prompt, None for a conversation, and whether the chat template is to be used."""
    if prompt is not None:
        return prompt, bool(chat)
    if sys.stdin is None or not sys.stdin.isatty():
        text = read_stdin("standard input")
        return text or (STORY if model is None and not chat else ""), bool(chat)
    if as_json or chat is False:
        raise click.UsageError("give a prompt with -p or on standard input")
    return None, True


class _Run:
    """One generation: prints it as it comes, then what it cost."""

    def __init__(self, model: Model, params: SamplingParams, begun: float, options: dict[str, Any]) -> None:
        self.model, self.params, self.begun, self.options = model, params, begun, options
        self.load_seconds = time.perf_counter() - begun
        self.first_token_seconds: float | None = None

    def go(self, prompt: str, chat: bool) -> int:
        """Returns the exit code."""
        as_json, text = self.options["as_json"], ""
        with Bar("prompt") as bar:
            generation = self._start(prompt, chat, bar)
            if self.options["verbose_prompt"]:
                _show_tokens(self.model, generation.prompt)
            if not as_json and not chat:
                emit(prompt)
            try:
                with interruptible():
                    for piece in generation:
                        if self.first_token_seconds is None:
                            self.first_token_seconds = time.perf_counter() - self.begun
                        if not as_json:
                            emit(piece.lstrip() if chat and not text.strip() else piece)
                        text += piece
            except KeyboardInterrupt:
                generation.finish_reason = "interrupted"
        if as_json:
            emit_json(self._report(generation, text))
        else:
            emit("\n")
        if self.options["stats"] is not False and not as_json:
            note("\n" + self._stats(generation))
        return 130 if generation.finish_reason == "interrupted" else 0

    def _start(self, prompt: str, chat: bool, bar: Bar) -> Generation:
        limit, stop, tokens = self.options["tokens"], self.options["stop"], None
        if chat:
            from .chat import Conversation

            conversation = Conversation(self.model, self.options["system"])
            conversation.ask(prompt)
            tokens, stop = conversation.prompt(), (*stop, *conversation.stop)
        elif limit is None:
            limit = DEFAULT_TOKENS
        return self.model.generate(
            prompt if tokens is None else tokens, max_tokens=limit, params=self.params, stop=stop, progress=bar
        )

    def _stats(self, generation: Generation) -> str:
        model = self.model
        weights = f"{model.weights_bytes / 2**20:,.1f} MiB of weights"
        return (
            f"loaded     {self.load_seconds:.2f} s, {model.name}, {weights}, {_device(model)}\n"
            f"{stats(generation)}; seed {self.params.seed}"
        )

    def _report(self, generation: Generation, text: str) -> dict[str, object]:
        t = generation.timings
        return {
            "text": text,
            "tokens": generation.tokens,
            "prompt_tokens": t.prompt_tokens,
            "model": self.model.name,
            "device": _device(self.model),
            "finish_reason": generation.finish_reason,
            "seed": self.params.seed,
            "weights_bytes": self.model.weights_bytes,
            "timings": {
                "load_seconds": self.load_seconds,
                "first_token_seconds": self.first_token_seconds,  # since loading began
                "prompt_seconds": t.prompt_seconds,
                "prompt_tokens_per_second": t.prompt_tokens_per_second,
                "generation_seconds": t.generation_seconds,
                "generated_tokens": len(generation.tokens),
                "generated_tokens_per_second": t.generated_tokens_per_second,
            },
        }


def _device(model: Model) -> str:
    device = model.device
    if device.kind == "cpu":
        return f"cpu ({device.target.name}, {device.threads} threads)"
    on_gpu = f"{device} ({device.name}, {device.target.name})"
    return on_gpu if len(model.parts) == 1 else f"{on_gpu}: {placement(model)}"


def stats(generation: Generation) -> str:
    """Two lines: what the prompt and what the generated text cost."""
    t = generation.timings
    held = t.prompt_tokens - t.prompt_computed if t.prompt_computed else 0
    cached = f" ({held} of them in the cache)" if held else ""
    return (
        f"prompt     {t.prompt_tokens} tokens{cached}, {t.prompt_seconds:.3f} s, "
        f"{t.prompt_tokens_per_second:,.1f} tokens/s\n"
        f"generated  {len(generation.tokens)} tokens, {t.generation_seconds:.3f} s, "
        f"{t.generated_tokens_per_second:,.1f} tokens/s; {ENDS[generation.finish_reason]}"
    )


ENDS = {
    "": "not finished",
    "end": "the model ended it",
    "stop": "a stop text came",
    "length": "the limit of tokens was reached",
    "context": "the context is full",
    "interrupted": "interrupted",
}


def turn_params(params: SamplingParams, turn: int) -> SamplingParams:
    """Another seed for each turn of a conversation, the same ones when it is repeated."""
    return replace(params, seed=(params.seed or 0) + turn)


def _show_tokens(model: Model, tokens: list[int]) -> None:
    for token in tokens:
        note(f"{token:7d} {model.tokenizer.token_bytes(token).decode('utf-8', 'backslashreplace')!r}")
