"""Runs compilers, many at a time, and keeps what is up to date.

A code object is joined from *parts*, one run of a compiler each. Both are remembered by fingerprints of everything
that they are made from, the parts in the hidden folder `.parts` beside the objects: a change recompiles the parts that
it touches, and an interrupted build goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import HipquantError

PACKAGE = Path(__file__).parent.parent
OUTPUT = PACKAGE / "codeobjects"
MANIFEST, FACTS, PARTS = "manifest.json", "facts.json", ".parts"
Progress = Callable[[int, int], None]
Facts = dict[str, dict[str, Any]]  # of one code object: kernel -> instruction facts


class CompileError(HipquantError, RuntimeError):
    """A compiler is missing, or refused a source: its own message, and which file and target."""


@dataclass(frozen=True)
class Part:
    """One run of a compiler. `make(scratch, to)` writes the file; `scratch` is a folder of this build."""

    name: str
    fingerprint: str
    make: Callable[[Path, Path], None]


@dataclass(frozen=True)
class Object:
    """A code object. `join(parts, scratch, to)` writes it, and says what the instructions of its kernels are.

    `prepare(scratch)` writes what the parts include: it is called once for each `Object` before any is compiled.
    """

    filename: str
    target: str
    parts: tuple[Part, ...]
    join: Callable[[Sequence[Path], Path, Path], Facts | None]
    prepare: Callable[[Path], None]
    joined_by: str = ""  # fingerprint of what joins, beside the parts

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.filename, self.joined_by, *(p.fingerprint for p in self.parts))


def fingerprint(*of: object, files: Iterable[Path] = ()) -> str:
    """Changes whenever one of the things does, or a file."""
    h = hashlib.sha256(repr(of).encode())
    for path in sorted(files):
        data = path.read_bytes()
        h.update(f"\n{path.name} {len(data)}\n".encode() + data)
    return h.hexdigest()


def run(command: Sequence[str | Path], what: str, **more_env: str) -> str:
    """Runs a compiler; gives what it wrote to standard error. `CompileError` with its message where it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C", **more_env},
        )
    except OSError as error:
        raise CompileError(f"{what} failed: {words[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        message = done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}"
        raise CompileError(f"{what} failed:\n{message}")
    return done.stderr


def write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all; a process that has the old one loaded keeps it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def up_to_date(object: Object, output: Path) -> bool:
    known = read_json(output / MANIFEST).get(object.filename)
    return known == object.fingerprint and (output / object.filename).is_file()


def build_objects(
    objects: Sequence[Object], output: Path, *, jobs: int | None = None, progress: Progress | None = None
) -> list[Path]:
    """Builds the objects that are not up to date into a folder, `jobs` at a time (default: processors).

    The parts are compiled in the order given: those that take longest come first. Gives the files.
    `progress(done, total)` is called after each step. Raises `CompileError`, and `OSError` where the folder cannot be
    written.
    """
    (output / PARTS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        todo = [o for o in objects if not up_to_date(o, output)]
        if todo:
            _Build(todo, output, Path(scratch), progress).run(jobs or processors())
    return [output / o.filename for o in objects]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Files and what is remembered of them change together, also where two builds write to one folder."""
    with (folder / "lock").open("a") as file:
        try:
            import fcntl
        except ImportError:  # not a Unix
            yield
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class _Build:
    """The steps of one call of `build_objects`: parts, and objects once their parts are there.

    The scratch folder holds every part, those that are up to date too: nobody else replaces them there.
    """

    def __init__(self, objects: Sequence[Object], output: Path, scratch: Path, progress: Progress | None) -> None:
        self.objects, self.output, self.scratch, self.progress = objects, output, scratch, progress
        self.parts = output / PARTS
        parts = {p.name: p for o in objects for p in o.parts}
        with _locked(self.parts):
            known = read_json(self.parts / MANIFEST)
            have = {p.name for p in parts.values() if known.get(p.name) == p.fingerprint and self._take(p)}
        self.missing = {name: part for name, part in parts.items() if name not in have}
        self.queue, self.waiting = list(self.missing.values()), list(objects)
        self.done, self.total = 0, len(self.missing) + len(objects)

    def _take(self, part: Part) -> bool:
        try:
            shutil.copyfile(self.parts / part.name, self.scratch / part.name)
        except FileNotFoundError:
            return False
        return True

    def run(self, jobs: int) -> None:
        for o in self.objects:
            o.prepare(self.scratch)
        with ThreadPoolExecutor(jobs) as pool:
            running: dict[Future[Facts | None], Part | Object] = {}
            while self.done < self.total:
                while len(running) < jobs and (what := self._next()) is not None:
                    running[pool.submit(self._do, what)] = what
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self._finish(running.pop(future), future.result())

    def _next(self) -> Part | Object | None:
        """An object whose parts are there, otherwise the next part, if any."""
        for o in self.waiting:
            if not any(p.name in self.missing for p in o.parts):
                self.waiting.remove(o)
                return o
        return self.queue.pop(0) if self.queue else None

    def _do(self, what: Part | Object) -> Facts | None:
        if isinstance(what, Part):
            what.make(self.scratch, self.scratch / what.name)
            return None
        return what.join([self.scratch / p.name for p in what.parts], self.scratch, self._joined(what))

    def _joined(self, o: Object) -> Path:
        return self.scratch / f"joined-{o.filename}"  # a part may have the object's name

    def _finish(self, what: Part | Object, facts: Facts | None) -> None:
        with _locked(self.parts):
            if isinstance(what, Part):
                write(self.parts / what.name, (self.scratch / what.name).read_bytes())
                _update(self.parts / MANIFEST, what.name, what.fingerprint)
                del self.missing[what.name]
            else:
                self._record(what, facts)
        self.done += 1
        if self.progress:
            self.progress(self.done, self.total)

    def _record(self, o: Object, facts: Facts | None) -> None:
        """The manifest last: an interruption before it makes the object be joined again."""
        data = self._joined(o).read_bytes()
        write(self.output / o.filename, data)
        known = {"sha256": hashlib.sha256(data).hexdigest(), "kernels": facts} if facts is not None else None
        _update(self.output / FACTS, o.target, known)
        _update(self.output / MANIFEST, o.filename, o.fingerprint)


def _update(path: Path, key: str, value: object) -> None:
    """Sets a key of a JSON object in a file; None removes it."""
    every = read_json(path)
    every.pop(key, None)
    if value is not None:
        every[key] = value
    write(path, (json.dumps(every, indent=1, sort_keys=True) + "\n").encode())
