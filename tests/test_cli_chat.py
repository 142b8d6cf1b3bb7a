"""Conversations on the command line: on pipes, and on a terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import time

import pytest

import hipquant
from command_line import COMMAND, call, json_of, needs_demo
from hipquant.cli.chat import Conversation
from vocabulary import BEGIN


def test_one_answer_without_the_question(chatty):
    result = call("run", chatty, "--chat", "-p", "in the", "-n", "4", "--seed", "2", "--system", "Be brief.")
    assert result.exit_code == 0
    assert "in the" not in result.stdout
    model = hipquant.load(chatty)
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nin the<|im_end|>\n<|im_start|>assistant\n"
    tokens = model.tokenizer.encode(text, parse_special=True)
    assert f"prompt     {len(tokens)} tokens" in result.stderr
    expected = model.generate(tokens, max_tokens=4, seed=2).text
    assert result.stdout == expected.lstrip() + "\n"


def test_chat_and_interactive_are_one_conversation(chatty):
    model, seed = hipquant.load(chatty), 7
    conversation, answers = Conversation(model, "Be brief."), []
    for turn, said in enumerate(("in the", "and on")):
        conversation.ask(said)
        generation = model.generate(conversation.prompt(), max_tokens=5, seed=seed + turn)
        answers.append(generation.text)
        conversation.answer(answers[-1], generation)
    expected = "".join(answer.lstrip() + "\n" for answer in answers)
    options = ("-n", "5", "--seed", str(seed), "--system", "Be brief.")
    for args, stdin in (
        (("chat", chatty, *options), "in the\nand on\n"),
        (("run", "--model", chatty, "-i", *options), "in the\nand on\n"),
        (("run", "-i", chatty, "-p", "in the", *options), "and on\n"),
    ):
        result = call(*args, stdin=stdin)
        assert result.exit_code == 0, result.output
        assert result.stdout == expected, args
    assert "prompt  " in call("chat", chatty, *options, "--stats", stdin="in the\n").stderr


def test_a_model_without_a_template_says_so(plain, chatty):
    for model, said in ((plain, True), (chatty, False)):
        result = call("chat", model, "-n", "3", stdin="in\n")
        assert ("no chat template: turns are written as User: and Assistant:" in result.stderr) == said


@needs_demo
def test_a_story_in_turns():
    result = call("chat", "-n", "8", "--seed", "1", stdin="Tell me more\n")
    assert result.exit_code == 0
    assert len(result.stdout.split()) > 3


def test_an_answer_ends_at_a_stop_text(chatty, plain):
    whole = json_of("run", chatty, "--chat", "-p", "in the", "-n", "12", "--seed", "2")
    report = json_of("run", chatty, "--chat", "-p", "in the", "-n", "12", "--seed", "2", "--stop", whole["text"][3:5])
    assert (report["finish_reason"], report["text"]) == ("stop", whole["text"][:3])
    # Without a template of its own, the model would go on and speak for the user.
    assert Conversation(hipquant.load(plain)).stop == ("\nUser:",)
    assert Conversation(hipquant.load(chatty)).stop == ()


@pytest.mark.parametrize("kind", ["plain", "chatty"])
def test_a_conversation_computes_nothing_twice(kind, request):
    model = hipquant.load(request.getfixturevalue(kind), sequences=1)
    conversation, said = Conversation(model, "Be brief."), 0
    for turn in range(4):
        conversation.ask(f"question {turn}")
        tokens = conversation.prompt()
        generation = model.generate(tokens, max_tokens=6, seed=turn, sequence=0)
        conversation.answer(generation.text, generation)
        assert generation.tokens
        new = len(tokens) - said  # and the token generated last, which the model has not seen yet
        assert generation.timings.prompt_computed == (new + 1 if turn else new)
        said = len(tokens) + len(generation.tokens)
        assert model.tokenizer.decode(tokens, skip_special=False).count("question") == turn + 1


def test_what_is_said_is_in_the_next_prompt(chatty):
    model = hipquant.load(chatty, sequences=1)
    conversation = Conversation(model)
    conversation.ask("one")
    generation = model.generate(conversation.prompt(), max_tokens=5, seed=0)
    said = generation.text[:-2]
    assert said.strip()
    generation.finish_reason = "interrupted"  # then tokens may go further than the text
    conversation.answer(said, generation)
    conversation.ask("two")
    end = "<|im_end|>\n<|im_start|>"
    assert model.tokenizer.decode(conversation.prompt(), skip_special=False).removeprefix(BEGIN) == (
        f"<|im_start|>user\none{end}assistant\n{said.strip()}{end}user\ntwo{end}assistant\n"
    )


def test_old_turns_are_forgotten_when_the_context_is_full(chatty):
    model = hipquant.load(chatty, context=200, sequences=1)
    conversation = Conversation(model, "Be brief.")
    forgotten = 0
    for turn in range(12):
        conversation.ask(f"question {turn}")
        tokens, n = conversation.shortened_prompt()
        forgotten += n
        assert len(tokens) <= (100 if n else 150)
        text = model.tokenizer.decode(tokens)
        assert "Be brief." in text
        assert f"question {turn}" in text
        assert ("question 0" in text) == (forgotten == 0)
        conversation.messages.append({"role": "assistant", "content": "yes"})
    assert forgotten > 3


PROMPT = r"(^|\r\n)> $"


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *args: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm"
            os.execv(COMMAND[0], [*COMMAND, *args])

    def read_until(self, pattern: str, seconds: float = 20.0) -> str:
        """What comes until the pattern matches its end."""
        text, end = b"", time.monotonic() + seconds
        while not re.search(pattern, text.decode("utf-8", "replace")):
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], f"{pattern} is not in {text!r}"
            text += os.read(self.fd, 4096)
        return text.decode("utf-8", "replace")

    def send(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def say(self, message: str) -> str:
        """Sends a line; what comes until the next prompt."""
        self.send(message + "\n")
        return self.read_until(PROMPT)

    def ended(self, seconds: float) -> bool:
        """Whether the command ends within this time."""
        end = time.monotonic() + seconds
        with contextlib.suppress(OSError):  # what a terminal says when its last user is gone
            while select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]:
                if not os.read(self.fd, 4096):
                    return True
            return False
        return True

    def exit_code(self) -> int:
        """Waits for the end."""
        assert self.ended(60), "the command does not end"
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal():
    """Starts a command on a terminal."""
    started = []

    def start_one(*args: str) -> Terminal:
        started.append(Terminal(*args))
        return started[-1]

    yield start_one
    for one in started:
        one.close()


def test_a_conversation_on_a_terminal(chatty, terminal):
    child = terminal("run", chatty, "-n", "6", "--seed", "1", "--stats")
    assert "chatty" in child.read_until(PROMPT)
    counts = [int(re.search(r"prompt +(\d+) tokens", child.say("hello"))[1])]
    for message in ("and then", "more"):
        shown = child.say(message)
        prompt, cached = re.search(r"prompt +(\d+) tokens \((\d+) of them in the cache\)", shown).groups()
        assert counts[-1] < int(cached) < int(prompt)
        counts.append(int(prompt))
    assert re.search("/reset +forget", child.say("/help"))
    assert "forgotten" in child.say("/reset")
    assert f"prompt     {counts[0]} tokens" in child.say("hello")
    child.send("/quit\n")
    assert child.exit_code() == 0


@pytest.mark.parametrize("leave", ["\x03", "\x04"], ids=["Ctrl-C", "Ctrl-D"])
def test_leaving_at_the_prompt(chatty, terminal, leave):
    child = terminal("run", chatty)
    child.read_until(PROMPT)
    for _ in range(20):  # Python misses a signal that comes between showing the prompt and waiting for a key
        child.send(leave)
        if child.ended(1):
            break
    assert child.exit_code() == 0


def test_ctrl_c_stops_an_answer_only(plain, terminal):
    child = terminal("run", plain, "--chat", "--min-p", "0", "--top-p", "1", "--top-k", "0", "--seed", "1")
    child.read_until(PROMPT)
    child.send("hello\n")
    child.read_until("hello\r\n[^\r\n]{10}")
    child.send("\x03")
    child.read_until(r"\(stopped\)(.|\s)*\n> $")
    assert "Error: the prompt has" in child.say("x " * 1500)  # longer than the context
    child.send("/quit\n")
    assert child.exit_code() == 0
