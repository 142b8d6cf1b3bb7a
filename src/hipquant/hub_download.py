"""The Hugging Face hub by the package huggingface-hub: what a repository holds, and its files in the cache.

Large files are written into the library's cache from here: a download that broke off is continued by the next one
(the library's newer versions begin anew), and what has arrived is compared with the SHA-256 that the hub tells.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, in no __all__

from .errors import DownloadError, HipquantError, ModelNotFoundError
from .model_files import gib

Say = Callable[[str], None]
_COMMIT, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")
_TIMEOUT = 10.0  # seconds until the hub must have answered


@dataclass(frozen=True)
class Remote:
    """A file of a repository; files in plain git have no SHA-256."""

    nbytes: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The GGUF files of a repository at a commit; not `online`: those of them that are in the cache."""

    repository: str
    revision: str
    commit: str
    files: dict[str, Remote]
    others: tuple[str, ...] = ()
    online: bool = True

    @property
    def sizes(self) -> dict[str, int]:
        return {path: remote.nbytes for path, remote in self.files.items()}

    @property
    def folder(self) -> Path:
        """Where the cache keeps this repository."""
        return _folder(self.repository)


def cache_folder() -> Path:
    return Path(constants.HF_HUB_CACHE)


def _folder(repository: str) -> Path:
    return cache_folder() / repo_folder_name(repo_id=repository, repo_type="model")


def look_up(repository: str, revision: str | None, say: Say) -> Listing:
    """What the hub has of a repository, or the cache where the hub cannot be reached (which is said).

    Raises `ModelNotFoundError` for a repository or revision that is not there or not open to the user.
    """
    wanted = revision or constants.DEFAULT_REVISION
    if constants.HF_HUB_OFFLINE:
        return _in_cache(repository, wanted, "HF_HUB_OFFLINE is set")
    try:
        return _checked(_asked(repository, wanted), repository, wanted)
    except HipquantError:
        raise
    except Exception as error:
        explained = _explained(error, repository, wanted)
        if _is_outage(error):
            listing = _in_cache(repository, wanted, str(explained))
            say(f"{explained}; what is in the cache is used")
            return listing
        raise explained from error


def _asked(repository: str, revision: str) -> Any:
    return HfApi(endpoint=constants.ENDPOINT).model_info(
        repository, revision=revision, files_metadata=True, timeout=_TIMEOUT
    )


def _checked(info: Any, repository: str, revision: str) -> Listing:
    """The hub's answer, of which nothing is believed that becomes part of a path."""
    files, others = {}, []
    for sibling in info.siblings or ():
        path, size = sibling.rfilename, sibling.size
        if not path.lower().endswith(".gguf"):
            others.append(path)
            continue
        if any(part in ("", ".", "..") for part in path.split("/")) or re.search(r'[\\:*?"<>|\x00-\x1f]', path):
            raise DownloadError(f"{repository} names a file {path!r}, which is no plain path within it: refused")
        sha256 = sibling.lfs.sha256 if sibling.lfs is not None else None
        if type(size) is not int or size < 0 or (sha256 is not None and not _SHA256.fullmatch(sha256)):
            raise ValueError(f"size {size!r} and SHA-256 {sha256!r} of {path}")
        files[path] = Remote(size, sha256)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise ValueError(f"commit {info.sha!r}")
    return Listing(repository, revision, info.sha, files, tuple(others))


def _in_cache(repository: str, revision: str, why: str) -> Listing:
    """The files of the revision that the cache holds."""
    commit, folder = revision, _folder(repository)
    if not _COMMIT.fullmatch(revision):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = (folder / "refs" / revision).read_text().strip()
    snapshot = folder / "snapshots" / commit
    files = {}
    if _COMMIT.fullmatch(commit):
        paths = (p for p in snapshot.rglob("*.gguf") if p.is_file())
        files = {p.relative_to(snapshot).as_posix(): Remote(p.stat().st_size, None) for p in paths}
    if not files:
        at = "" if revision == constants.DEFAULT_REVISION else f" at revision {revision!r}"
        raise ModelNotFoundError(f"{repository}{at} is not in the cache ({cache_folder()}), and {why}")
    return Listing(repository, revision, commit, files, online=False)


def cached(listing: Listing, path: str) -> Path | None:
    """The file in the cache, or None."""
    found = try_to_load_from_cache(
        listing.repository, path, cache_dir=constants.HF_HUB_CACHE, revision=listing.commit, repo_type="model"
    )
    return Path(found) if isinstance(found, str) else None


def sibling_with_models(repository: str) -> str | None:
    """The repository of the same name with -GGUF behind it, where there is one with GGUF files."""
    try:
        listing = _checked(_asked(f"{repository}-GGUF", constants.DEFAULT_REVISION), f"{repository}-GGUF", "")
    except Exception:  # it is only a hint in the message of another error
        return None
    return listing.repository if listing.files else None


def download(listing: Listing, path: str, say: Say) -> Path:
    """The file in the cache, downloaded if it is not there. Raises `DownloadError`, or `ModelNotFoundError` for a
    file that is not open to the user."""
    if (held := cached(listing, path)) is not None:
        return held
    remote = listing.files[path]
    blob = listing.folder / "blobs" / (remote.sha256 or "")
    partial = blob.with_name(f"{remote.sha256}.incomplete")
    try:
        if remote.sha256 is not None and remote.nbytes <= constants.MAX_HTTP_DOWNLOAD_SIZE:
            with _alone(listing, remote.sha256, say):
                if not blob.exists():
                    _fetch(listing, path, remote, partial)
                    os.replace(partial, blob)
        found = hf_hub_download(  # makes the entry in the snapshot; larger files it also downloads
            listing.repository,
            path,
            revision=listing.commit,
            cache_dir=constants.HF_HUB_CACHE,
            endpoint=constants.ENDPOINT,
        )
    except HipquantError:
        raise
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code == 416:  # it ends where the rest begins
            partial.unlink(missing_ok=True)
        kept = partial.stat().st_size if partial.exists() else 0
        raise _explained(error, listing.repository, listing.revision, path, kept, remote.nbytes) from error
    _keep_revision(listing)
    return Path(found)


@contextlib.contextmanager
def _alone(listing: Listing, sha256: str, say: Say) -> Iterator[None]:
    """The library's own lock for a file of the cache."""
    lock = cache_folder() / ".locks" / listing.folder.name / f"{sha256}.lock"
    for folder in (lock.parent, listing.folder / "blobs"):
        folder.mkdir(parents=True, exist_ok=True)
    own = FileLock(lock)
    try:
        own.acquire(timeout=0)
    except Timeout:
        say("another process is downloading it; waiting for that")
        own.acquire()
    try:
        yield
    finally:
        own.release()


class _TooMuch(Exception):
    """More arrives than was announced; or all of the file again, though only the rest was asked for."""


class _Bounded(io.BufferedWriter):
    """A file that takes no more than it should, whatever is sent."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(io.FileIO(path, "ab"))
        self.limit = limit

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > self.limit:
            raise _TooMuch
        return super().write(data)


def _fetch(listing: Listing, path: str, remote: Remote, partial: Path) -> None:
    """All of the file into `partial`, from where an earlier download ended; checked and on the disk."""
    if partial.exists() and partial.stat().st_size > remote.nbytes:
        partial.unlink()
    free, there = shutil.disk_usage(partial.parent).free, partial.stat().st_size if partial.exists() else 0
    if free < remote.nbytes - there:
        raise DownloadError(
            f"{path} of {listing.repository} takes another {gib(remote.nbytes - there)}, and {cache_folder()} has "
            f"{gib(free)} free: make room, or name another folder by HF_HOME"
        )
    url = hf_hub_url(listing.repository, path, revision=listing.commit, endpoint=constants.ENDPOINT)
    try:
        with _Bounded(partial, remote.nbytes) as file:
            there = file.seek(0, io.SEEK_END)
            name = path.rpartition("/")[2]
            http_get(
                url,
                file,
                resume_size=there,
                headers=build_hf_headers(),
                expected_size=remote.nbytes,
                displayed_filename=name,
            )
            file.flush()
            os.fsync(file.fileno())
    except _TooMuch as error:
        partial.unlink()
        raise DownloadError(f"{path} of {listing.repository} is longer than the hub announces: try again") from error
    with open(partial, "rb") as arrived:
        sha256 = hashlib.file_digest(arrived, "sha256").hexdigest()
    if sha256 != remote.sha256:
        partial.unlink()
        raise DownloadError(
            f"{path} of {listing.repository} arrived damaged: its SHA-256 is {sha256}, the hub announces "
            f"{remote.sha256}; it was deleted: try again"
        )


def _keep_revision(listing: Listing) -> None:
    """Notes which commit a branch or tag was, as the library does, so that it is found without a network."""
    if listing.revision != listing.commit:
        with contextlib.suppress(OSError):
            note = listing.folder / "refs" / listing.revision
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(listing.commit)


def _is_outage(error: Exception) -> bool:
    """Whether what the cache holds may stand in for the hub."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code == 429
    return isinstance(error, OfflineModeIsEnabled) or _is_transport(error)


def _is_transport(error: Exception) -> bool:
    """Errors of the HTTP library, which is not the same one in all versions of huggingface-hub."""
    return any(kind.__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore") for kind in type(error).__mro__)


def _explained(
    error: Exception, repository: str, revision: str, path: str = "", kept: int = 0, nbytes: int = 0
) -> HipquantError:
    """One sentence: what went wrong, and what to do."""
    hub, what = constants.ENDPOINT, f"{path} of {repository}" if path else repository
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repository, revision, what)
    again = f"; {gib(kept)} of {gib(nbytes)} are kept, and the same command continues with them" if kept else ""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadError(f"the disk of {cache_folder()} is full{again}: make room, or name another by HF_HOME")
    if isinstance(error, OSError) and error.errno is not None and not _is_transport(error):
        return DownloadError(f"{error.filename or cache_folder()}: {error.strerror}")
    reason = str(error).partition("\n")[0] or type(error).__name__
    if isinstance(error, OSError) or _is_transport(error):
        if path:
            return DownloadError(f"the download of {what} broke off ({reason}){again}")
        return DownloadError(f"the hub {hub} cannot be reached ({reason})")
    return DownloadError(f"{hub} does not answer as a hub about {what} ({reason}): check HF_ENDPOINT and the network")


def _refused(error: HfHubHTTPError, repository: str, revision: str, what: str) -> HipquantError:
    hub, status = constants.ENDPOINT, error.response.status_code
    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return ModelNotFoundError(f"{repository} is gated: accept its terms at {hub}/{repository}, and {login}")
    if isinstance(error, RevisionNotFoundError):
        return ModelNotFoundError(f"{repository} has no revision {revision!r}")
    if isinstance(error, RepositoryNotFoundError):
        return ModelNotFoundError(
            f"there is no file or folder {repository!r}, and no such model at {hub} that is open to you; if it is "
            f"private, {login}"
        )
    if status == 401:
        return ModelNotFoundError(f"{hub} does not accept the token for {what}: {login}")
    if status == 403:
        return ModelNotFoundError(f"{hub} refuses {what} (403): {login}, with a token that may read it")
    if status == 404:
        return ModelNotFoundError(f"{hub} has no {what}")
    if status == 429:
        return DownloadError(f"{hub} has had too many requests (429): try again later, or {login}")
    return DownloadError(f"{hub} fails about {what} ({status} {error.response.reason_phrase}): try again later")
