"""What does the Hugging Face hub answer to a download? Just enough of its protocol, on 127.0.0.1.

    GET  /api/models/<id>/revision/<revision>     the commit
    GET  /api/models/<id>/tree/<commit>           the paths and sizes
    HEAD /<id>/resolve/<commit>/<path>            ETag and size; for a large file a redirect to
    GET  /cdn/<sha256>                            the bytes, those that Range asks for

As on the hub, a gated repository shows its listing and keeps its files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, cast
from urllib.parse import unquote, urlsplit

LARGE = 100_000  # bytes; the hub keeps such a file under git LFS, behind the redirect


class Ask(NamedTuple):
    """A request for a file that the hub saw."""

    method: str
    name: str  # in the repository
    range: str | None


class Fault(NamedTuple):
    """What goes wrong with the next large file: its status, or a hang-up after `n_bytes`."""

    status: HTTPStatus = HTTPStatus.OK
    n_bytes: int | None = None


class FakeHub(ThreadingHTTPServer):
    """Repositories (id -> revision -> folder), faults to come, and files asked for so far."""

    daemon_threads = True

    def __init__(
        self, repositories: Mapping[str, Mapping[str, Path]], gated: frozenset[str]
    ) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories = repositories
        self.gated = gated
        self.folders = {
            commit_of(hub_id, revision): folder
            for hub_id, revisions in repositories.items()
            for revision, folder in revisions.items()
        }
        self.large = {
            sha256(path): path
            for folder in self.folders.values()
            for path in files_in(folder)
            if path.stat().st_size >= LARGE
        }
        self.faults: list[Fault] = []
        self.asks: list[Ask] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def cdn(self) -> str:
        """Another name than the endpoint's, so that the client takes it for another host."""
        return f"http://localhost:{self.server_port}/cdn"


class Answer(BaseHTTPRequestHandler):
    """The answer to one request; the connection closes after it."""

    timeout = 20  # seconds without a byte

    @property
    def hub(self) -> FakeHub:
        return cast(FakeHub, self.server)

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        match parts:
            case ["cdn", key]:
                self.send_large(self.hub.large[key])
            case ["api", "models", owner, name, "revision", revision]:
                self.send_revision(f"{owner}/{name}", revision)
            case ["api", "models", _, _, "tree", commit]:
                folder = self.hub.folders[commit]
                self.send_json([listed(path, folder) for path in files_in(folder)])
            case [owner, name, "resolve", commit, *names]:
                self.send_file(f"{owner}/{name}", commit, "/".join(names))
            case _:
                self.send_error(HTTPStatus.NOT_FOUND)

    def send_revision(self, hub_id: str, revision: str) -> None:
        if hub_id not in self.hub.repositories:
            self.refuse(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        elif revision not in self.hub.repositories[hub_id]:
            self.refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            self.send_json({"id": hub_id, "sha": commit_of(hub_id, revision)})

    def send_file(self, hub_id: str, commit: str, name: str) -> None:
        self.note(name)
        path = self.hub.folders[commit] / name
        if hub_id in self.hub.gated:
            self.refuse(HTTPStatus.UNAUTHORIZED, "GatedRepo", f"Access to {hub_id} is restricted.")
            return
        key, stated = sha256(path), {"X-Repo-Commit": commit}
        if key in self.hub.large:
            stated |= {"X-Linked-ETag": f'"{key}"', "X-Linked-Size": str(path.stat().st_size)}
            self.send(HTTPStatus.FOUND, {**stated, "Location": f"{self.hub.cdn}/{key}"})
        else:
            self.send(HTTPStatus.OK, {**stated, "ETag": f'"{key[:40]}"'}, path.read_bytes())

    def send_large(self, path: Path) -> None:
        self.note(path.name)
        data, wanted = path.read_bytes(), self.headers["Range"]
        fault = self.hub.faults.pop(0) if self.hub.faults else Fault()
        if fault.status != HTTPStatus.OK:
            self.send(fault.status)
        elif wanted is None:
            self.send(HTTPStatus.OK, body=data, n_bytes=fault.n_bytes)
        else:
            found = re.fullmatch(r"bytes=(\d+)-", wanted)
            assert found, f"a Range like bytes=5-, not {wanted}"
            start, n = int(found[1]), len(data)
            part = {"Content-Range": f"bytes {start}-{n - 1}/{n}"}
            self.send(HTTPStatus.PARTIAL_CONTENT, part, data[start:], n_bytes=fault.n_bytes)

    def note(self, name: str) -> None:
        self.hub.asks.append(Ask(self.command, name, self.headers["Range"]))

    def refuse(self, status: HTTPStatus, code: str, message: str) -> None:
        self.send(status, {"X-Error-Code": code, "X-Error-Message": message})

    def send_json(self, value: Any) -> None:
        self.send(HTTPStatus.OK, body=json.dumps(value).encode())

    def send(
        self,
        status: HTTPStatus,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        *,
        n_bytes: int | None = None,
    ) -> None:
        """Status, headers and, unless for HEAD, the first `n_bytes` (default: all) of the body."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:n_bytes])

    def log_message(self, *args: Any) -> None:
        """Keep the server quiet."""


@contextmanager
def fake_hub(
    repositories: Mapping[str, Mapping[str, Path]], *, gated: frozenset[str] = frozenset()
) -> Iterator[FakeHub]:
    """A hub with these repositories until the block ends."""
    with FakeHub(repositories, gated) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def commit_of(hub_id: str, revision: str) -> str:
    """40 hexadecimal digits, as of a git commit."""
    return hashlib.sha1(f"{hub_id}@{revision}".encode()).hexdigest()


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def listed(path: Path, folder: Path) -> dict[str, Any]:
    """A file's entry in the listing of its repository."""
    key, size = sha256(path), path.stat().st_size
    entry = {"type": "file", "path": path.relative_to(folder).as_posix(), "size": size}
    lfs = {"lfs": {"oid": key, "size": size, "pointerSize": 134}} if size >= LARGE else {}
    return {**entry, "oid": key[:40], **lfs}
