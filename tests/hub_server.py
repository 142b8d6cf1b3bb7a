"""A small Hugging Face hub on this machine: repositories, files with ranges, and the faults that a test asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`repositories` maps names to files; `fault` is asked before each answer and may send another one."""

    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    fault: Callable[[Handler], bool] | None = None
    announced: dict[str, str] = field(default_factory=dict)  # SHA-256 by path, where it is not that of the content
    lfs: bool = True  # else the files lie in git itself
    sizes: dict[str, int] = field(default_factory=dict)  # by path, where the listing tells another one
    revisions: tuple[str, ...] = ("main", COMMIT)
    requests: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def sha256(self, path: str, content: bytes) -> str:
        return self.announced.get(path, hashlib.sha256(content).hexdigest())

    def downloads(self) -> list[str]:
        """The ranges of the downloads so far, "" for whole files."""
        return [range for _, path, range in self.requests if path.startswith("/cdn/")]


def name(content: bytes) -> str:
    """What the content is called on the server that the hub sends downloads to."""
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range", "")))
        if self.hub.fault is not None and self.hub.fault(self):
            return
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self.info(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.file(found[1], found[2], found[3])
        elif path.startswith("/cdn/"):
            self.content(
                next(c for files in self.hub.repositories.values() for c in files.values() if path[5:] == name(c))
            )
        else:
            self.fail(404)

    def fail(self, status: int, code: str = "", message: str = "") -> bool:
        """An error as the hub words it; true, so that a fault may end with it."""
        self.answer(status, {"X-Error-Code": code, "X-Error-Message": message}, json.dumps({"error": message}).encode())
        return True

    def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def info(self, repository: str, revision: str) -> None:
        files = self.hub.repositories.get(repository)
        if files is None:
            self.fail(404, "RepoNotFound", "Repository not found")
        elif revision not in self.hub.revisions:
            self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            siblings = [self.sibling(path, content) for path, content in files.items()]
            body = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
            self.answer(200, {"Content-Type": "application/json"}, json.dumps(body).encode())

    def sibling(self, path: str, content: bytes) -> dict[str, object]:
        size = self.hub.sizes.get(path, len(content))
        lfs = {"sha256": self.hub.sha256(path, content), "size": size, "pointerSize": 134}
        return {"rfilename": path, "size": size, "blobId": "0" * 40} | ({"lfs": lfs} if self.hub.lfs else {})

    def file(self, repository: str, revision: str, path: str) -> None:
        content = self.hub.repositories.get(repository, {}).get(path)
        if content is None or revision not in self.hub.revisions:
            self.fail(404, "EntryNotFound")
            return
        etag = f'"{self.hub.sha256(path, content)}"'
        headers = {"X-Repo-Commit": COMMIT, "X-Linked-Etag": etag, "X-Linked-Size": str(len(content))}
        port = urlsplit(self.hub.url).port  # another name of this machine: no token may go there
        self.answer(302, headers | {"Location": f"http://localhost:{port}/cdn/{name(content)}"}, b"")

    def content(self, content: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            if start >= len(content):
                self.fail(416)
                return
            self.answer(206, {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}, content[start:])
        else:
            self.answer(200, {}, content)

    def cut(self, content: bytes, sent: int) -> bool:
        """Announces all of it, and closes the connection after `sent` bytes."""
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:sent])
        self.wfile.flush()
        self.close_connection = True
        return True


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
