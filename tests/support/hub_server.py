"""A Hugging Face Hub on this machine: folders as repositories, for the real client of ``huggingface_hub``."""

import hashlib
import json
import socketserver
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import pytest


def commit_of(repository: str) -> str:
    """The one commit of a repository, which is its branch ``main`` and its tag ``v1``."""
    return hashlib.sha1(repository.encode()).hexdigest()


def newer_commit_of(repository: str) -> str:
    """The commit that ``main`` is once a repository is in :attr:`Hub.moved`. It has the same files."""
    return hashlib.sha1(f"{repository} moved".encode()).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The requests that the client makes to find a model and to download its files. Anything else gets a 404."""

    protocol_version = "HTTP/1.1"
    repositories: ClassVar[dict[str, Path]] = {}
    """Folder of each repository, by its id."""
    gated: ClassVar[set[str]] = set()
    moved: ClassVar[set[str]] = set()
    """Repositories whose branch ``main`` somebody has committed to."""
    dying: ClassVar[set[str]] = set()
    """Names of files in whose middle the connection dies."""
    requests: ClassVar[list[str]] = []
    """Method and path of each request."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.requests.append(f"{self.command} {path}")
        parts = path.removeprefix("/api/models").split("/")[1:]
        repository, rest = "/".join(parts[:2]), parts[2:]
        if repository not in self.repositories:
            self._refuse(401, "RepoNotFound")
        elif repository in self.gated:
            self._refuse(403, "GatedRepo")
        elif len(rest) > 1 and rest[1] not in ("main", "v1", *self._commits(repository)):
            self._refuse(404, "RevisionNotFound")
        elif path.startswith("/api/models/") and (not rest or rest[0] in ("revision", "tree")):
            self._answer_json(self._tree(repository) if rest[:1] == ["tree"] else self._info(repository, *rest[1:]))
        elif rest[:1] == ["resolve"]:
            self._send_file(repository, "/".join(rest[2:]))
        else:
            self._refuse(404, "EntryNotFound")

    def _files(self, repository: str) -> dict[str, Path]:
        folder = self.repositories[repository]
        return {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def _commits(self, repository: str) -> list[str]:
        """The commits of a repository, the newest one last."""
        return [commit_of(repository), *([newer_commit_of(repository)] if repository in self.moved else [])]

    def _info(self, repository: str, revision: str = "main") -> object:
        commits = self._commits(repository)
        sha = revision if revision in commits else commits[-1 if revision == "main" else 0]
        siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in self._files(repository).items()]
        return {"id": repository, "sha": sha, "siblings": siblings}

    def _tree(self, repository: str) -> object:
        files = self._files(repository).items()
        return [{"type": "file", "path": name, "size": p.stat().st_size, "oid": _etag(p)} for name, p in files]

    def _answer_json(self, document: object) -> None:
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send_file(self, repository: str, name: str) -> None:
        file = self._files(repository).get(name)
        headers = {"X-Repo-Commit": commit_of(repository)}
        if file is None:
            self._send(404, b"", {**headers, "X-Error-Code": "EntryNotFound"})
            return
        data, begin = file.read_bytes(), 0
        headers |= {"ETag": f'"{_etag(file)}"', "Accept-Ranges": "bytes"}
        if wanted := self.headers.get("Range"):
            begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        # It does not get further than that at any try, so the client gives up.
        sent = max(0, len(data) // 2 - begin) if name.rpartition("/")[2] in self.dying else None
        self._send(206 if wanted else 200, data[begin:], headers, sent)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], sent: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:sent])
            self.close_connection = sent is not None

    def log_message(self, format: str, *args: object) -> None:
        pass


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True


@contextmanager
def running(kind: type[Hub] = Hub) -> Iterator[type[Hub]]:
    """An empty Hub, which the client in this process asks from now on. Fill :attr:`Hub.repositories`."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch, _Server(("127.0.0.1", 0), kind) as server:
        endpoint = f"http://127.0.0.1:{server.server_address[1]}"
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "*")
        patch.setenv("HF_ENDPOINT", endpoint)  # for processes that are started
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in ("repositories", "gated", "moved", "dying", "requests"):
            patch.setattr(Hub, name, type(getattr(Hub, name))())
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield Hub
        finally:
            server.shutdown()
            thread.join()
