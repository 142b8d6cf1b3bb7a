"""A conversation: in the terminal, and as the tokens that a model is to continue."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ..chat import ChatTemplate
from ..errors import ChatTemplateError, HipquantError
from .common import Bar, device_options, emit, interruptible, model_argument, note, open_model, tolerate_output_encoding
from .run import generation_options, sampling_params, stats, turn_limit, turn_params

if TYPE_CHECKING:
    from ..generate import Generation
    from ..models import Model
    from ..sampling import SamplingParams

HELP = """\
/reset   forget the conversation
/help    this list
/quit    end (so do Ctrl-D, and Ctrl-C at the prompt)
Ctrl-C stops an answer. Everything else is said to the model."""
SEQUENCE = 0


@click.command("chat")
@model_argument
@generation_options
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--stats", is_flag=True, help="Times on standard error after each answer.")
@device_options
def command(model: str | None, system: str | None, stats: bool, **options: Any) -> None:
    """Talks with MODEL: a GGUF file, a folder, or a name such as HuggingFaceTB/SmolLM2-1.7B-Instruct (default: the
    demo model, which tells a story in turns), by the chat template that the file brings.

    Ctrl-C stops an answer, and at the prompt ends the program, as Ctrl-D does; /help lists the commands. When the
    context is full, the oldest turns are forgotten.
    """
    params = sampling_params(options)
    tolerate_output_encoding()
    loaded = open_model(model, options["device"], options["threads"], options["context"])
    with interruptible():
        converse(loaded, params, turn_limit(model, options["tokens"]), options["stop"], system, stats)


class Conversation:
    """Messages and their tokens. A later prompt begins with the very tokens of the earlier ones, generated ones too
    (encoding their text again could cut it otherwise), so that the KV cache is not computed twice."""

    def __init__(self, model: Model, system: str | None = None) -> None:
        self.model, self.tokenizer = model, model.tokenizer
        self.template = ChatTemplate.of(self.tokenizer)
        # The default template has no token that ends a turn, so the model goes on and speaks for the user.
        self.stop = ("\nUser:",) if self.tokenizer.chat_template is None else ()
        if self.stop:
            note("The file has no chat template: turns are written as User: and Assistant:.", dim=True)
        self.system = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = list(self.system)
        self._text, self._tokens = "", list[int]()  # of the last prompt, then with what was said to it

    def ask(self, text: str) -> None:
        self.messages.append({"role": "user", "content": text})

    def take_back(self) -> None:
        """Forgets the last message."""
        self.messages.pop()

    def prompt(self) -> list[int]:
        """The tokens of the conversation so far."""
        text = self.template.render(self.messages)
        tokens = self._continued(text)
        if tokens is None:
            tokens = self.tokenizer.encode(text, parse_special=True)
        self._text, self._tokens = text, tokens
        return tokens

    def _continued(self, text: str) -> list[int] | None:
        """The known tokens and those of the rest, unless the text does not continue the known one."""
        if not self._tokens or not text.startswith(self._text):
            return None
        rest = text[len(self._text) :]
        tokens = self.tokenizer.encode(rest, add_special=False, parse_special=True)
        begin = self.tokenizer.token_bytes(tokens[0]).decode("utf-8", "ignore") if tokens else ""
        if not rest.startswith(begin):  # SentencePiece begins a text with a space, which is none here
            return None
        return self._tokens + tokens

    def answer(self, text: str, generation: Generation) -> None:
        """Adds what the model said to the prompt. Templates may differ from it by white space around it."""
        said = text.strip()
        self.messages.append({"role": "assistant", "content": said})
        prompt, tokens = self._text.rstrip(), self._tokens + generation.tokens
        self._text, self._tokens = "", []
        if generation.finish_reason not in ("end", "length", "context"):
            return  # the tokens go further than the text
        with contextlib.suppress(ChatTemplateError):
            whole = self.template.render(self.messages, add_generation_prompt=False)
            at = whole.find(said, len(prompt))
            if at >= 0 and whole[:at].rstrip() == prompt:
                self._text, self._tokens = whole[: at + len(said)], tokens

    def shortened_prompt(self) -> tuple[list[int], int]:
        """The prompt, and how many of the oldest turns were forgotten: when three quarters of the context are full, so
        many that half of it is free."""
        forgotten, first, limit = 0, len(self.system), self.model.context * 3 // 4
        tokens = self.prompt()
        while len(tokens) > limit and len(self.messages) > first + 1:
            limit = self.model.context // 2
            del self.messages[first : first + 2]
            forgotten += 1
            tokens = self.prompt()
        return tokens, forgotten


def converse(
    model: Model,
    params: SamplingParams,
    limit: int | None,
    stop: Sequence[str],
    system: str | None,
    show_stats: bool,
    first: str | None = None,
) -> None:
    """Talks with the user of the terminal until the end of the input; `first` is a message that is known already."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (line editing and history for input)
    conversation, turn = Conversation(model, system), 0
    note(f"{model.name}. Ctrl-D ends, /help lists the commands.", dim=True)
    ask = itertools.chain(() if first is None else (first.strip(),), iter(_ask, None))
    for text in ask:
        if text in ("/quit", "/exit"):
            return
        if text == "/help":
            note(HELP)
        elif text == "/reset":
            conversation.reset()
            note("The conversation is forgotten.", dim=True)
        elif text:
            _turn(conversation, text, turn_params(params, turn), limit, (*stop, *conversation.stop), show_stats)
            turn += 1


def _ask() -> str | None:
    """A line of the user's, None at the end."""
    try:
        if sys.stdout.isatty():
            return input("> ").strip()
        sys.stderr.write("> ")
        sys.stderr.flush()
        return input().strip()
    except (EOFError, KeyboardInterrupt):
        note("")
        return None
    except UnicodeDecodeError:
        note("That was not valid text; please say it again.")
        return ""


def _turn(
    conversation: Conversation, text: str, params: SamplingParams, limit: int | None, stop: Sequence[str], show: bool
) -> None:
    conversation.ask(text)
    said, generation = "", None
    try:
        tokens, forgotten = conversation.shortened_prompt()
        if forgotten:
            note(f"(the context is full: the {forgotten} oldest turns are forgotten)", dim=True)
        with Bar("prompt") as bar:
            generation = conversation.model.generate(
                tokens, max_tokens=limit, params=params, stop=stop, sequence=SEQUENCE, progress=bar
            )
            for piece in generation:
                emit(piece if said.strip() else piece.lstrip())
                said += piece
    except KeyboardInterrupt:
        if generation is not None:
            generation.finish_reason = "interrupted"
    except HipquantError as error:
        note(f"Error: {error}")
        conversation.take_back()
        return
    emit("\n")
    _close_turn(conversation, said, generation, show)


def _close_turn(conversation: Conversation, said: str, generation: Generation | None, show: bool) -> None:
    if generation is None or not said.strip():
        conversation.take_back()
        note("(no answer)", dim=True)
    else:
        conversation.answer(said, generation)
    if generation is None:
        return
    if generation.finish_reason == "interrupted":
        note("(stopped)", dim=True)
    elif generation.finish_reason == "context":
        note("(the context is full)", dim=True)
    if show:
        note(stats(generation), dim=True)
