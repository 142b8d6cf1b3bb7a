"""The command line: as a function with click's runner, and as a process where pipes and signals matter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

import hipquant
from command_line import COMMAND, call, error_of, json_of, needs_demo, start
from hipquant.cli.common import BAR_AFTER, Bar
from vocabulary import BEGIN, TOKENS

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


def test_what_users_get_wrong(plain, mute, tmp_path):
    (tmp_path / "text.gguf").write_text("no model")
    cases = {
        ("run", plain, "-p", ""): "the prompt is empty",
        ("run", plain, "-p", "in " * 3000): "the context holds 2048",
        ("run", plain, "-p", "in", "--device", "toaster"): "no device 'toaster'",
        ("run", plain, "-p", "in", "--temp", "-1"): "temperature",
        ("run", plain, "-p", "in", "--temp", "nan"): "temperature",
        ("run", plain, "-p", "in", "--top-p", "2"): "top_p",
        ("run", plain, "-p", "in", "-c", "9999"): "context must be from 1 to the 2048",
        ("run", mute, "-p", "in"): "no vocabulary",
        ("run", str(tmp_path / "none.gguf"), "-p", "in"): "none.gguf",
        ("run", str(tmp_path), "-p", "in"): str(tmp_path),
        ("run", str(tmp_path / "text.gguf"), "-p", "in"): "text.gguf",
        ("perplexity", plain, str(tmp_path / "none.txt")): "none.txt: No such file or directory",
        ("perplexity", plain, str(tmp_path)): f"{tmp_path}: Is a directory",
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
