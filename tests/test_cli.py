"""The command line: as a function with click's runner, and as a process where pipes, signals and terminals matter."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import hipquant
from hipquant.cli.app import cli
from hipquant.cli.chat import Conversation
from hipquant.cli.common import BAR_AFTER, Bar, table
from hipquant.cli.perplexity import _Score
from models import write_llama
from vocabulary import BEGIN, CHATML, TOKENS, write_speaker

COMMAND = [sys.executable, "-m", "hipquant"]
DEMO = Path(hipquant.__file__).parent / "demo" / "demo.gguf"
needs_demo = pytest.mark.skipif(not DEMO.exists(), reason="this checkout has no demo model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def plain(folder):
    """A model with a vocabulary, without a chat template, that never ends by itself."""
    return str(write_speaker(folder / "plain.gguf", ends=False, context=2048).path)


@pytest.fixture(scope="module")
def chatty(folder):
    return str(write_speaker(folder / "chatty.gguf", chat_template=CHATML, context=512).path)


@pytest.fixture(scope="module")
def mute(folder):
    """A model without a vocabulary."""
    return str(write_llama(folder / "mute.gguf", n_embd=64, n_ff=128, n_head=2, n_kv=1, n_vocab=96).path)


def call(*args: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, list(args), input=stdin, prog_name="hipquant")


def json_of(*args: str, stdin: str | None = None) -> dict:
    result = call(*args, "--json", stdin=stdin)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)


def start(*args: str, **options) -> subprocess.Popen:
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen([*COMMAND, *args], text=True, errors="replace", env=buffered, **options)


def error_of(result: Result) -> str:
    """The one sentence of a failed call."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("Error: ")


# --- run ---


def test_text_and_statistics(plain):
    result = call("run", plain, "-p", "in the", "-n", "5", "--seed", "7")
    assert result.exit_code == 0
    assert result.stdout.startswith("in the")
    assert result.stdout.endswith("\n")
    for word in ("loaded", "MiB of weights", "prompt     4 tokens", "generated  5 tokens", "tokens/s", "seed 7"):
        assert word in result.stderr
    assert call("run", plain, "-p", "in the", "-n", "5", "--no-stats").stderr == ""


def test_json_is_one_object(plain):
    report = json_of("run", plain, "-p", "in the", "-n", "6", "--seed", "1")
    tokens, timings = report["tokens"], report["timings"]
    assert len(tokens) == 6
    assert all(0 <= t < len(TOKENS) for t in tokens)
    tokenizer = hipquant.load(plain).tokenizer
    assert report["text"] == tokenizer.decode(tokens, start=False)
    assert (report["prompt_tokens"], report["finish_reason"], report["seed"]) == (4, "length", 1)
    assert report["model"] == "plain"
    assert report["device"].startswith("cpu")
    assert timings["generated_tokens"] == 6
    assert timings["load_seconds"] + timings["prompt_seconds"] < timings["first_token_seconds"] < 10
    assert timings["prompt_tokens_per_second"] == pytest.approx(4 / timings["prompt_seconds"])
    assert timings["generated_tokens_per_second"] == pytest.approx(5 / timings["generation_seconds"])


def test_a_seed_repeats_a_run(plain):
    runs = [json_of("run", plain, "-p", "in", "-n", "20", "--seed", seed)["text"] for seed in ("5", "5", "6")]
    assert runs[0] == runs[1] != runs[2]
    drawn = [json_of("run", plain, "-p", "in", "-n", "1")["seed"] for _ in range(2)]
    assert drawn[0] != drawn[1]
    again = json_of("run", plain, "-p", "in", "-n", "20", "--temp", "0")["text"]
    assert again == json_of("run", plain, "-p", "in", "-n", "20", "--temp", "0", "--seed", "9")["text"]


def test_the_prompt_may_come_from_standard_input(plain):
    given = json_of("run", plain, "-p", "in the", "-n", "8", "--seed", "1")
    read = json_of("run", plain, "-n", "8", "--seed", "1", stdin="in the\n")
    assert (read["text"], read["prompt_tokens"]) == (given["text"], given["prompt_tokens"])
    assert call("run", plain, "-n", "0", stdin="in the\n").stdout == "in the\n"
    assert "not UTF-8: byte 2 is 0xFF" in error_of(call("run", plain, stdin=b"in\xff"))


def test_stop_ends_before_the_text(plain):
    whole = json_of("run", plain, "-p", "in", "-n", "40", "--seed", "3")["text"]
    stop = whole[20:22]
    report = json_of("run", plain, "-p", "in", "-n", "40", "--seed", "3", "--stop", "no such", "--stop", stop)
    assert report["finish_reason"] == "stop"
    assert report["text"] == whole[: whole.index(stop)]
    assert call("run", plain, "-p", "in", "--stop", "").exit_code == 2


def test_no_tokens_are_fine(plain):
    result = call("run", plain, "-p", "in the", "-n", "0")
    assert (result.exit_code, result.stdout) == (0, "in the\n")
    report = json_of("run", plain, "-p", "in the", "-n", "0")
    assert (report["text"], report["tokens"], report["timings"]["first_token_seconds"]) == ("", [], None)


def test_the_default_length(plain):
    assert len(json_of("run", plain, "-p", "in", "--seed", "1")["tokens"]) == 200


def test_the_context_ends_a_run(plain):
    report = json_of("run", plain, "-p", "in the", "-n", "100", "-c", "24", "--seed", "1")
    assert report["finish_reason"] == "context"
    assert len(report["tokens"]) == 20


def test_prompt_tokens_are_shown(plain):
    shown = call("run", plain, "-p", "in", "-n", "0", "--no-stats", "--verbose-prompt").stderr
    assert [line.split(maxsplit=1) for line in shown.splitlines()] == [
        [str(TOKENS.index(BEGIN)), repr(BEGIN)],
        [str(TOKENS.index("in")), "'in'"],
    ]


def test_threads(plain, cpu):
    before = cpu.threads
    try:
        assert "1 threads" in json_of("run", plain, "-p", "in", "-n", "1", "--threads", "1")["device"]
    finally:
        cpu.threads = before


def test_what_users_get_wrong(plain, mute, folder):
    (folder / "text.gguf").write_text("no model")
    cases = {
        ("run", plain, "-p", ""): "the prompt is empty",
        ("run", plain, "-p", "in " * 3000): "the context holds 2048",
        ("run", plain, "-p", "in", "--device", "toaster"): "no device 'toaster'",
        ("run", plain, "-p", "in", "--temp", "-1"): "temperature",
        ("run", plain, "-p", "in", "--temp", "nan"): "temperature",
        ("run", plain, "-p", "in", "--top-p", "2"): "top_p",
        ("run", plain, "-p", "in", "-c", "9999"): "context must be from 1 to the 2048",
        ("run", mute, "-p", "in"): "no vocabulary",
        ("run", str(folder / "none.gguf"), "-p", "in"): "none.gguf",
        ("run", str(folder), "-p", "in"): str(folder),
        ("run", str(folder / "text.gguf"), "-p", "in"): "text.gguf",
        ("perplexity", plain, str(folder / "none.txt")): "none.txt: No such file or directory",
        ("perplexity", plain, str(folder)): f"{folder}: Is a directory",
        ("bench", plain, "-p", "5000"): "context must be from 1 to the 2048",
    }
    for args, words in cases.items():
        assert words in error_of(call(*args)), args
    assert "the prompt is empty" in error_of(call("run", plain, stdin=""))
    on_a_gpu = error_of(call("run", plain, "-p", "in", "--device", "cuda"))
    assert any(words in on_a_gpu for words in ("driver library", "finds no", "no code object")), on_a_gpu
    assert "2 layers are to run on a GPU" in error_of(call("run", plain, "-p", "in", "--gpu-layers", "2"))


@pytest.mark.parametrize(
    "args",
    [
        ["run", "-p", "in", "-n", "-1"],
        ["run", "a.gguf", "--model", "b.gguf", "-p", "in"],
        ["run", "-i", "--json"],
        ["run", "-i", "--no-chat"],
        ["chat", "--json"],
        ["run", "-p", "in", "-n", "many"],
        ["run", "-p", "in", "--threads", "0"],
        ["run", "-p", "in", "--seed", "-1"],
        ["run", "-p", "in", "--system", "Be brief."],
        ["run", "-p", "in", "--no-such-option"],
        ["bench", "--batch", "1,33"],
        ["bench", "--batch", "one"],
        ["run", "-p", "in", "--gpu-layers", "-1"],
        ["perplexity", "demo", "text", "--gpu-layers", "x"],
        ["perplexity", "demo"],
        ["dance"],
    ],
)
def test_wrong_calls(args):
    result = call(*args)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_debugging_shows_where_it_happened(monkeypatch):
    monkeypatch.setenv("HIPQUANT_DEBUG", "1")
    assert isinstance(call("run", "none.gguf", "-p", "in").exception, hipquant.InvalidModelFileError)


# --- as a process ---


@needs_demo
def test_the_demo_tells_a_story():
    done = subprocess.run([*COMMAND, "run", "-n", "30", "--seed", "1"], capture_output=True, text=True, input="")
    assert done.returncode == 0
    assert done.stdout.startswith("Once upon a time")
    assert len(done.stdout.split()) > 15


def test_a_closed_pipe_is_no_error(plain):
    process = start("run", plain, "-p", "in the", "-n", "1500")
    assert process.stdout.read(3) == "in "
    process.stdout.close()
    process.wait(timeout=20)
    assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@pytest.mark.parametrize("args", [["run", "MODEL", "-p", "in", "-n", "3"], ["devices", "--json"], ["--help"]])
def test_output_that_cannot_be_written(plain, args):
    with open("/dev/full", "w") as full:
        process = start(*(plain if a == "MODEL" else a for a in args), stdout=full)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert said.removeprefix("Error: standard output cannot be written: ").removeprefix("Error: ") == (
        "No space left on device\n"
    )
    assert ("standard output" in said) == (args != ["--help"])  # which click writes itself


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_ends_with_what_there_is(plain, as_json):
    process = start("run", plain, "-p", "in the", "-n", "2000", "--verbose-prompt", *(["--json"] if as_json else []))
    for _ in range(4):  # the tokens of the prompt: the next thing it does is to generate
        process.stderr.readline()
    if not as_json:
        process.stdout.read(8)
    else:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.15)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said
    if as_json:
        report = json.loads(out)
        assert report["finish_reason"] == "interrupted"
        assert 0 < len(report["tokens"]) < 2000
    else:
        assert "interrupted" in said
        assert "tokens/s" in said


def test_ctrl_c_while_it_waits_for_a_prompt(plain):
    process = start("run", plain, stdin=subprocess.PIPE)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "\n")
    assert process.returncode == 130


def test_ctrl_c_while_modules_are_imported(plain):
    """Extension modules lose a KeyboardInterrupt or turn it into another error."""
    code = """if True:
        import os, signal, sys
        from hipquant.cli import main
        class Finder:
            def find_spec(self, name, path, target=None):
                if name == "numpy":
                    try:
                        os.kill(os.getpid(), signal.SIGINT)
                    except KeyboardInterrupt:
                        pass
        sys.meta_path.insert(0, Finder())
        main()
    """
    done = subprocess.run([sys.executable, "-c", code, "run", plain, "-p", "in"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\n")


def test_help_and_version_need_no_numpy():
    code = "import sys; sys.argv[1:] = ['run', '--help']\ntry: import hipquant.__main__ as m; m.main()\nfinally:\n"
    code += " print(sorted({'numpy', 'jinja2', 'rich', 'tokenizers'} & sys.modules.keys()), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "--temp" in done.stdout
    assert done.stderr == "[]\n"
    assert call("--version").stdout == f"hipquant, version {hipquant.__version__}\n"
    for name in ("run", "bench", "devices", "perplexity"):
        assert f"\n  {name} " in call("--help").stdout


@needs_demo
def test_a_run_imports_only_what_it_needs():
    code = "import sys; sys.argv[1:] = ['run', '-n', '2']\ntry: import hipquant.__main__ as m; m.main()\nfinally:\n"
    code += " print(sorted({'jinja2', 'rich', 'hipquant.chat'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, input="")
    assert done.stdout.splitlines()[-1] == "[]"


# --- chat ---


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


# --- bench, devices ---


def test_bench(mute):
    report = json_of("bench", mute, "-p", "9", "-n", "4", "-r", "2", "--batch", "1,3,32")
    assert [r["test"] for r in report["results"]] == ["pp9", "tg4", "batch1 tg4", "batch3 tg4", "batch32 tg4"]
    for result in report["results"]:
        assert len(result["rates"]) == 2
        assert min(result["rates"]) <= result["median"] <= max(result["rates"])
        assert result["rates"][0] > 0
    assert {"model", "device", "threads", "versions"} <= report.keys()
    shown = call("bench", mute, "-p", "9", "-n", "0", "-r", "1").stdout
    assert shown.index("threads") < shown.index("pp9")
    assert "tg" not in shown


def test_a_report_to_send(mute, tmp_path):
    """The device, the sizes and the figures; no path."""
    report = tmp_path / "report.json"
    shown = call("bench", mute, "-p", "9", "-n", "2", "-r", "1", "--batch", "2", "--report", str(report)).stdout
    assert "pp9" in shown
    text = report.read_text()
    found = json.loads(text)
    assert [r["test"] for r in found["results"]] == ["pp9", "tg2", "batch2 tg2"]
    assert found["device"]["code_object"].startswith("x86-64" if platform.machine() == "x86_64" else "aarch64")
    assert sum(found["model"]["bytes_by_type"].values()) >= found["model"]["weights_bytes"] > 0
    assert found["read_ceiling_bytes_per_second"] > 0
    assert found["parts"] == [{"device": "cpu", "layers": 2, "weights_bytes": found["model"]["weights_bytes"]}]
    assert str(tmp_path) not in text
    assert str(mute) not in text
    nowhere = str(tmp_path / "none" / "report.json")
    assert "cannot be written" in error_of(call("bench", mute, "--report", nowhere))


def test_bench_times_no_nonsense(mute, monkeypatch):
    from hipquant.models import Model

    monkeypatch.setattr(Model, "forward", lambda self, *args, **more: np.full(self.n_vocab, np.nan, np.float32))
    assert "not finite" in error_of(call("bench", mute))


def test_devices():
    report = json_of("devices")
    (cpu,) = (d for d in report["devices"] if d["name"] == "cpu")
    device = hipquant.device("cpu")
    assert (cpu["threads"], cpu["target"]) == (device.threads, device.target.name)
    assert cpu["free_memory"] > 1 << 20
    shown = call("devices").stdout
    assert device.target.name in shown
    for reason in [*report["unavailable"].values(), *(r["reason"] for r in cpu["rejected"])]:
        assert reason in shown


def test_rejected_code_objects_are_listed():
    environment = os.environ | {"HIPQUANT_CPU_TARGET": "x86-64-v3"}
    if hipquant.device("cpu").target.name not in ("x86-64-v3", "x86-64-v4-vnni"):
        pytest.skip("this machine runs no x86-64-v3 code")
    done = subprocess.run([*COMMAND, "devices"], capture_output=True, text=True, env=environment)
    assert "does not use x86-64-v4-vnni: HIPQUANT_CPU_TARGET asks for x86-64-v3" in done.stdout


def test_tables_are_markdown():
    assert table(("a", "long"), [["word", "1"]]) == "| a    | long |\n| ---- | ---: |\n| word |    1 |\n"


# --- perplexity ---


def naive_perplexity(model, tokens, context):
    """Chunk by chunk, in float64, from the logits of all positions at once: (perplexity, standard error)."""
    surprise = []
    for start in range(0, len(tokens) - context + 1, context):
        chunk = [model.tokenizer.bos_id, *tokens[start + 1 : start + context]]
        logits = model.forward(chunk, 0, logits="all").astype(np.float64)
        for i in range(context // 2, context - 1):
            surprise.append(np.logaddexp.reduce(logits[i]) - logits[i][chunk[i + 1]])
    mean, deviation = np.mean(surprise), np.std(surprise, ddof=1)
    return math.exp(mean), math.exp(mean) * deviation / math.sqrt(len(surprise)), len(surprise)


def test_perplexity(plain, folder):
    text = "in the beginning there was another on the other side\n" * 12
    (folder / "text.txt").write_text(text)
    report = json_of("perplexity", plain, str(folder / "text.txt"), "-c", "50")
    model = hipquant.load(plain, context=50)
    expected, error, count = naive_perplexity(model, model.tokenizer.encode(text[:-1]), 50)
    assert report["tokens"] == count == 24 * report["chunks"]
    assert report["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert report["standard_error"] == pytest.approx(error, rel=1e-4)
    bits = math.log2(report["perplexity"]) * report["tokens"]
    assert report["bits_per_byte"] == pytest.approx(bits / report["bytes"])
    assert json_of("perplexity", plain, "-", "-c", "50", "--chunks", "2", stdin=text)["chunks"] == 2
    assert "one chunk takes 512" in error_of(call("perplexity", plain, "-", stdin="too short"))


def test_the_standard_error_is_that_of_the_mean(plain):
    score = _Score(hipquant.load(plain).tokenizer)
    random = np.random.default_rng(0)
    logits, targets = random.standard_normal((40, len(TOKENS))).astype(np.float32), random.integers(0, 99, 40).tolist()
    score.add(logits, targets)
    nats = np.log(np.exp(logits).sum(axis=1)) - logits[range(40), targets]
    assert score.error == pytest.approx(np.exp(nats.mean()) * nats.std(ddof=1) / np.sqrt(40), rel=1e-4)


@needs_demo
def test_perplexity_of_the_demo_model(data):
    report = json_of("perplexity", "demo", str(data / "heldout.txt"), "--chunks", "4")
    assert report["perplexity"] < 40
    assert report["bits_per_byte"] < 1.4
    assert report["tokens"] == 4 * 255


# --- the bar ---


def test_the_bar_waits_and_goes(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Bar("loading") as bar:
        bar(1, 10)
        assert capsys.readouterr().err == ""
        bar.begun -= BAR_AFTER
        bar(2, 10)
        assert "loading" in capsys.readouterr().err
        bar(10, 10)
        assert bar._bar is None


def test_no_bar_without_a_terminal(capsys):
    with Bar("loading") as bar:
        bar.begun -= BAR_AFTER
        bar(2, 10)
    assert capsys.readouterr().err == ""
