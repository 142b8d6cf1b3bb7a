"""Downloads of models from a hub on this machine, with all its faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants, file_download

import hipquant
from hipquant.errors import DownloadError, ModelNotFoundError, OutOfDeviceMemoryError
from hipquant.hub import find
from hub_server import COMMIT, Handler, Hub, serving
from vocabulary import write_speaker

MIB, GIB = 1 << 20, 1 << 30
CONTENT = {"m.Q4_K_M.gguf": b"GGUF" + os.urandom(MIB), "m.Q8_0.gguf": b"GGUF" + os.urandom(2 * MIB)}
REPOSITORY = "tests/m-GGUF"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        hub.repositories[REPOSITORY] = dict(CONTENT)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.HUGGINGFACE_CO_URL_HOME)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{template}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what arrives is written in pieces of 10 MB
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        monkeypatch.setenv("HF_TOKEN", "")
        yield hub


def files_in_cache() -> list[str]:
    """What lies in the cache, without locks and notes of the library."""
    root = Path(constants.HF_HUB_CACHE)
    found = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return sorted(name for name in found if not name.startswith(".locks") and "CACHEDIR" not in name)


def blobs() -> dict[str, int]:
    root = Path(constants.HF_HUB_CACHE)
    return {path.name[64:]: path.stat().st_size for path in root.glob("models--*/blobs/*")}


def test_download_and_cache(hub: Hub) -> None:
    said: list[str] = []
    path = find(f"{REPOSITORY}:Q4_K_M", say=said.append)
    assert path.read_bytes() == CONTENT["m.Q4_K_M.gguf"]
    assert path.name == "m.Q4_K_M.gguf"
    assert COMMIT in path.parts
    assert said == [f"downloading m.Q4_K_M.gguf (1.0 MiB) of {REPOSITORY} to {constants.HF_HUB_CACHE}"]
    assert find(f"{REPOSITORY}:Q4_K_M", say=said.append) == path
    assert len(said) == len(hub.downloads()) == 1
    assert set(blobs()) == {""}
    # Without a choice, what is here already is taken; of what is not, the best.
    assert find(REPOSITORY, free=64 * GIB, say=said.append) == path
    assert "Q4_K_M is of those on this machine the best for 64.0 GiB" in said[-1]


def test_the_best_quant_for_the_memory(hub: Hub) -> None:
    assert find(REPOSITORY, free=GIB).name == "m.Q8_0.gguf"
    with pytest.raises(OutOfDeviceMemoryError):
        find(REPOSITORY, free=1000)


def test_alias_revision_and_file(hub: Hub) -> None:
    hub.repositories["TheBloke/phi-2-GGUF"] = {"phi-2.Q4_K_M.gguf": b"GGUF alias", "phi-2.Q8_0.gguf": b"GGUF8"}
    assert find("microsoft/phi-2").read_bytes() == b"GGUF alias"
    assert find("microsoft/phi-2:Q8_0").read_bytes() == b"GGUF8"
    assert find(f"{REPOSITORY}@{COMMIT}:m.Q8_0.gguf").name == "m.Q8_0.gguf"
    with pytest.raises(ModelNotFoundError, match=r"has no revision 'v9'"):
        find(f"{REPOSITORY}@v9")


def test_split_files_come_together(hub: Hub) -> None:
    hub.repositories["o/split"] = {f"s/m-Q8_0-0000{i}-of-00003.gguf": b"GGUF%d" % i for i in (1, 2, 3)}
    path = find("o/split")
    assert path.name == "m-Q8_0-00001-of-00003.gguf"
    assert [p.read_bytes() for p in sorted(path.parent.iterdir())] == [b"GGUF1", b"GGUF2", b"GGUF3"]


def test_files_in_git_itself_are_left_to_the_library(hub: Hub) -> None:
    hub.lfs = False
    assert find(f"{REPOSITORY}:Q4_K_M").read_bytes() == CONTENT["m.Q4_K_M.gguf"]
    hub.fault = lambda handler: handler.command == "HEAD" and handler.fail(403)
    with pytest.raises(hipquant.HipquantError, match="Q8_0.gguf of tests/m-GGUF"):
        find(f"{REPOSITORY}:Q8_0")


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = find(f"{REPOSITORY}:Q4_K_M")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert find(f"{REPOSITORY}:Q4_K_M") == find(REPOSITORY) == find(f"{REPOSITORY}@{COMMIT}") == path
    with pytest.raises(ModelNotFoundError, match="the cache of tests/m-GGUF has no 'Q8_0'; there are: :Q4_K_M"):
        find(f"{REPOSITORY}:Q8_0")
    with pytest.raises(ModelNotFoundError, match=r"o/name is not in the cache \(.*\), and HF_HUB_OFFLINE is set"):
        find("o/name")
    with pytest.raises(ModelNotFoundError, match="at revision 'v2' is not in the cache"):
        find(f"{REPOSITORY}@v2")
    assert len(hub.requests) == asked


def unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")


def failing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fault = lambda handler: handler.fail(503)


@pytest.mark.parametrize("outage", [unreachable, failing])
def test_without_the_hub_the_cache_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, outage: Callable[[Hub, pytest.MonkeyPatch], None]
) -> None:
    path, said = find(f"{REPOSITORY}:Q4_K_M"), list[str]()
    outage(hub, monkeypatch)
    assert find(f"{REPOSITORY}:Q4_K_M", say=said.append) == path
    assert said[0].endswith("; what is in the cache is used")
    with pytest.raises(ModelNotFoundError, match=r"is not in the cache .*(cannot be reached|fails about .*503)"):
        find("o/name")


def test_a_repository_without_gguf(hub: Hub) -> None:
    hub.repositories["o/name"] = {"model.safetensors": b"x", "README.md": b""}
    with pytest.raises(ModelNotFoundError, match=r"o/name has no GGUF model, but weights in another format; quantized"):
        find("o/name")
    hub.repositories["o/name-GGUF"] = {"name.Q8_0.gguf": b"GGUF"}
    with pytest.raises(ModelNotFoundError, match="in another format; but o/name-GGUF has: give that name"):
        find("o/name")


@pytest.mark.parametrize(
    ("status", "code", "message", "expected", "kind"),
    [
        (401, "RepoNotFound", "", "no such model .* open to you; if it is private, log in with", ModelNotFoundError),
        (401, "", "Invalid credentials in Authorization header", "does not accept the token", ModelNotFoundError),
        (401, "GatedRepo", "", "is gated: accept its terms at http", ModelNotFoundError),
        (403, "GatedRepo", "", "is gated: accept its terms at http", ModelNotFoundError),
        (403, "", "", r"refuses .* \(403\)", ModelNotFoundError),
        (404, "", "", "has no ", ModelNotFoundError),
        (429, "", "", "is not in the cache|too many requests", hipquant.HipquantError),
        (500, "", "", "is not in the cache|500", hipquant.HipquantError),
        (502, "", "", "is not in the cache|502", hipquant.HipquantError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", ["/api/", "/resolve/"])
def test_refusals_are_one_sentence(
    hub: Hub, status: int, code: str, message: str, expected: str, kind: type[Exception], part: str
) -> None:
    hub.fault = lambda handler: part in handler.path and handler.fail(status, code, message)
    with pytest.raises(kind, match=expected) as error:
        find(f"{REPOSITORY}:Q8_0")
    assert "\n" not in str(error.value)
    assert not any(name.endswith(".gguf") for name in files_in_cache())


def test_a_download_that_broke_off_is_continued(hub: Hub) -> None:
    """In the middle of a file the connection goes, and after that the hub: the next call takes the rest."""
    content, gone = CONTENT["m.Q8_0.gguf"], threading.Event()

    def fault(handler: Handler) -> bool:
        if gone.is_set() and handler.command == "GET":
            handler.close_connection = True
            return True
        if "/cdn/" not in handler.path:
            return False
        gone.set()
        return handler.cut(content, MIB)

    hub.fault = fault
    with pytest.raises(DownloadError, match=r"broke off \(.*1\.0 MiB of 2\.0 MiB are kept, and the same") as error:
        find(f"{REPOSITORY}:Q8_0")
    assert "\n" not in str(error.value)
    assert blobs() == {".incomplete": MIB}
    hub.fault = None
    before = len(hub.downloads())
    assert find(f"{REPOSITORY}:Q8_0").read_bytes() == content
    assert hub.downloads()[before:] == [f"bytes={MIB}-"]
    assert blobs() == {"": len(content)}


def test_a_short_break_is_bridged(hub: Hub) -> None:
    content, first = CONTENT["m.Q8_0.gguf"], threading.Event()

    def fault(handler: Handler) -> bool:
        if "/cdn/" not in handler.path or first.is_set():
            return False
        first.set()
        return handler.cut(content, MIB)

    hub.fault = fault
    assert find(f"{REPOSITORY}:Q8_0").read_bytes() == content
    assert hub.downloads() == ["", f"bytes={MIB}-"]


def test_a_hub_that_ignores_ranges(hub: Hub) -> None:
    content = CONTENT["m.Q8_0.gguf"]
    partial = leave_partial(content[:1000])
    hub.fault = lambda h: "Range" in h.headers and not h.headers.__delitem__("Range") and False
    assert find(f"{REPOSITORY}:Q8_0").read_bytes() == content
    assert not partial.exists()


def leave_partial(content: bytes, name: str = "m.Q8_0.gguf") -> Path:
    """What an earlier download left behind."""
    folder = Path(constants.HF_HUB_CACHE) / "models--tests--m-GGUF" / "blobs"
    folder.mkdir(parents=True)
    partial = folder / f"{Hub().sha256(name, CONTENT[name])}.incomplete"
    partial.write_bytes(content)
    return partial


def test_wrong_content_is_thrown_away(hub: Hub) -> None:
    leave_partial(b"not the beginning of it")
    with pytest.raises(DownloadError, match="arrived damaged: its SHA-256 is .* it was deleted: try again"):
        find(f"{REPOSITORY}:Q8_0")
    assert files_in_cache() == []
    assert find(f"{REPOSITORY}:Q8_0").read_bytes() == CONTENT["m.Q8_0.gguf"]


def test_a_partial_file_that_is_too_long_is_thrown_away(hub: Hub) -> None:
    leave_partial(CONTENT["m.Q8_0.gguf"] + b"more")
    assert find(f"{REPOSITORY}:Q8_0").read_bytes() == CONTENT["m.Q8_0.gguf"]


def test_wrong_size(hub: Hub) -> None:
    """The hub announces one byte more than it has, and later is right."""
    content = CONTENT["m.Q8_0.gguf"]
    hub.sizes["m.Q8_0.gguf"] = len(content) + 1
    with pytest.raises(DownloadError, match=r"broke off \(Consistency check failed: .* are kept"):
        find(f"{REPOSITORY}:Q8_0")
    assert blobs() == {".incomplete": len(content)}
    with pytest.raises(DownloadError, match=r"fails about m\.Q8_0\.gguf of tests/m-GGUF \(416 "):
        find(f"{REPOSITORY}:Q8_0")
    assert files_in_cache() == []
    hub.sizes.clear()
    assert find(f"{REPOSITORY}:Q8_0").read_bytes() == content


def test_wrong_hash(hub: Hub) -> None:
    hub.announced["m.Q8_0.gguf"] = "a" * 64
    with pytest.raises(DownloadError, match=f"the hub announces {'a' * 64}"):
        find(f"{REPOSITORY}:Q8_0")
    assert files_in_cache() == []


def test_more_than_announced(hub: Hub) -> None:
    content = CONTENT["m.Q8_0.gguf"] + bytes(20 * MIB)

    def fault(handler: Handler) -> bool:
        return "/cdn/" in handler.path and not handler.answer(200, {}, content)

    hub.fault = fault
    with pytest.raises(DownloadError, match=r"m\.Q8_0\.gguf of tests/m-GGUF is longer than the hub announces"):
        find(f"{REPOSITORY}:Q8_0")
    assert files_in_cache() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk(hub: Hub) -> None:
    partial = leave_partial(b"")
    partial.unlink()
    partial.symlink_to("/dev/full")
    with pytest.raises(DownloadError, match="the disk of .* is full: make room, or name another by HF_HOME"):
        find(f"{REPOSITORY}:Q8_0")
    assert not any(name.endswith(".gguf") for name in files_in_cache())


def test_too_little_room_is_said_before_the_download(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match=r"takes another 2\.0 MiB, and .* has 1\.0 MiB free"):
        find(f"{REPOSITORY}:Q8_0")
    assert hub.downloads() == []


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DownloadError, match="Not a directory"):
        find(f"{REPOSITORY}:Q8_0")
    assert hub.downloads() == []


@pytest.mark.parametrize(
    "path", ["../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "a\\..\\x.gguf", "C:x.gguf", "a//x.gguf"]
)
def test_hostile_names_are_refused(hub: Hub, path: str, tmp_path: Path) -> None:
    hub.repositories["o/evil"] = {path: b"GGUF", "fine.gguf": b"GGUF"}
    with pytest.raises(DownloadError, match="no plain path within it: refused"):
        find("o/evil")
    assert hub.downloads() == []
    assert files_in_cache() == []


@pytest.mark.parametrize(
    "body",
    [b"<html>Please log in</html>", b"[]", b'{"id": "o/x"}', b'{"id": "o/x", "sha": "../../x", "siblings": []}',
     b'{"id": "o/x", "sha": "' + COMMIT.encode() + b'", "siblings": [{"rfilename": "x.gguf", "size": -1}]}',
     b'{"id": "o/x", "sha": "' + COMMIT.encode() + b'", "siblings": [{"rfilename": "x.gguf", "size": 1, "lfs": '
     b'{"sha256": "../../../x", "size": 1, "pointerSize": 1}}]}'],
)  # fmt: skip
def test_answers_that_are_no_hubs(hub: Hub, body: bytes) -> None:
    hub.fault = lambda handler: not handler.answer(200, {}, body)
    with pytest.raises(DownloadError, match="does not answer as a hub about o/x"):
        find("o/x")


def test_the_token_is_for_the_hub_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    hub.fault = lambda h: bool(seen.add((h.path.split("/")[1] == "cdn", h.headers.get("Authorization"))))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    find(f"{REPOSITORY}:Q4_K_M")
    assert seen == {(False, "Bearer hf_secret"), (True, None)}


def test_two_at_once_download_once(hub: Hub) -> None:
    said: list[str] = []
    hub.fault = lambda handler: "/resolve/" in handler.path and time.sleep(0.2) is not None
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(find(f"{REPOSITORY}:Q8_0", say=said.append))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() for path in found] == [CONTENT["m.Q8_0.gguf"]] * 2
    assert hub.downloads() == [""]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "hipquant.hub_download")
    monkeypatch.delattr(hipquant, "hub_download")
    for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelNotFoundError, match=r"no file 'o/name'; .* pip install 'hipquant\[hub\]'"):
        find("o/name")


# --- in whole ---


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_speaker(tmp_path_factory.mktemp("speaker") / "m.gguf").path.read_bytes()


def test_load_takes_names(hub: Hub, speaker: bytes) -> None:
    hub.repositories["o/speaker"] = {"speaker.Q8_0.gguf": speaker}
    assert hipquant.load("o/speaker").forward([1], 0).shape == (269,)


def test_the_command(hub: Hub, speaker: bytes, tmp_path: Path) -> None:
    hub.repositories["TheBloke/phi-2-GGUF"] = {"phi-2.Q4_K_M.gguf": speaker}
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": ""}
    environment.pop("HF_HUB_CACHE", None)
    call = [
        sys.executable,
        "-m",
        "hipquant",
        "run",
        "--model",
        "microsoft/phi-2",
        "-p",
        "the",
        "-n",
        "3",
        "--seed",
        "1",
    ]
    runs = [subprocess.run(call, env=environment, capture_output=True, text=True, timeout=60) for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert "downloading phi-2.Q4_K_M.gguf" in runs[0].stderr
    assert "downloading" not in runs[1].stderr
    call[5] = "o/none"
    missing = subprocess.run(call, env=environment, capture_output=True, text=True, timeout=60)
    assert missing.returncode == 1
    assert missing.stderr.startswith("Error: there is no file or folder 'o/none', and no such model")
    assert missing.stderr.count("\n") == 1
