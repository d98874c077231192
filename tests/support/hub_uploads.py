"""A Hugging Face Hub on this machine that takes commits to data sets, and counts them."""

import base64
import hashlib
import json
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from support import hub_server
from support.hub_server import Hub

LARGE = (".tar", ".parquet")
"""Endings of names that the Hub keeps as large files."""


class UploadHub(Hub):
    """The requests that the client makes to list and change a data set, beside those of :class:`Hub`."""

    commits: ClassVar[list[list[str]]] = []
    """The paths of each commit, in order. A deleted one begins with a minus."""
    uploads: ClassVar[list[str]] = []
    """SHA-256 of each content that was uploaded."""
    contents: ClassVar[dict[str, bytes]] = {}
    """What was uploaded, by SHA-256, committed or not."""
    refused_after: ClassVar[list[int]] = []
    """Number of commits after which no other one is taken; empty for any number."""
    after_commit: ClassVar[list[Callable[[Path], None]]] = []
    """Called after each commit with the repository."""
    failing_once: ClassVar[list[str]] = []
    """Ends of paths for which the next POST gets the answer 503."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        parts = path.removeprefix("/api").removeprefix("/datasets/").split("/")
        folder, rest = self.repositories.get("/".join(parts[:2])), parts[2:]
        if "/datasets/" not in path:
            super().do_GET()
        elif folder is None:
            self._refuse(404, "RepoNotFound")
        elif rest[:1] == ["tree"]:
            within = folder.joinpath(*rest[2:])
            if within.is_dir():
                self._answer_json([self._listed(folder, each) for each in sorted(within.iterdir())])
            else:
                self._refuse(404, "EntryNotFound")
        elif rest[:1] == ["resolve"]:
            self._send_file("/".join(parts[:2]), "/".join(rest[2:]))
        else:
            self._answer_json(self._info("/".join(parts[:2])))

    def do_POST(self) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        data = self.rfile.read(int(self.headers["Content-Length"]))
        failing = [end for end in self.failing_once if path.endswith(end)]
        if failing:
            self.failing_once.remove(failing[0])
            self._refuse(503, "Unavailable")
        elif path == "/api/validate-yaml":
            self._answer_json({"errors": [], "warnings": []})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer_json({"objects": [self._instruction(each) for each in json.loads(data)["objects"]]})
        elif "/preupload/" in path:
            asked = json.loads(data)["files"]
            self._answer_json({"files": [self._mode(self._folder(path), each["path"]) for each in asked]})
        elif "/paths-info/" in path:
            wanted = json.loads(data)["paths"] if data[:1] == b"{" else urllib.parse.parse_qs(data.decode())["paths"]
            folder = self._folder(path)
            self._answer_json([self._entry(folder, name) for name in wanted if (folder / name).exists()])
        elif "/commit/" in path:
            self._commit(self._folder(path), [json.loads(line) for line in data.splitlines()])
        else:
            self._refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(data).hexdigest() == oid
        self.uploads.append(oid)
        self.contents[oid] = data
        self._send(200, b"", {})

    def _folder(self, path: str) -> Path:
        return self.repositories["/".join(path.split("/")[3:5])]

    def _listed(self, folder: Path, path: Path) -> dict[str, Any]:
        name = str(path.relative_to(folder))
        return self._entry(folder, name) if path.is_file() else {"type": "directory", "path": name, "oid": "0" * 40}

    def _entry(self, folder: Path, name: str) -> dict[str, Any]:
        data = (folder / name).read_bytes()
        entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": _git(data)}
        if name.endswith(LARGE):
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _mode(self, folder: Path, name: str) -> dict[str, Any]:
        entry = self._entry(folder, name) if (folder / name).exists() else {}
        mode = "lfs" if name.endswith(LARGE) else "regular"
        oid = entry.get("lfs", entry).get("oid")
        return {"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _instruction(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.contents:
            return wanted
        href = f"http://{self.headers['Host']}/lfs/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, folder: Path, lines: list[dict[str, Any]]) -> None:
        if self.refused_after and len(self.commits) >= self.refused_after[0]:
            self._refuse(403, "NoMoreCommits")
            return
        changed = []
        for line in lines[1:]:
            value, file = line["value"], folder / line["value"]["path"]
            if line["key"] == "deletedFile":
                file.unlink()
            else:
                inline = line["key"] == "file"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(value["content"]) if inline else self.contents[value["oid"]])
            changed.append("-" * (line["key"] == "deletedFile") + value["path"])
        self.commits.append(changed)
        for check in self.after_commit:
            check(folder)
        oid = f"{len(self.commits):040x}"
        self._answer_json(
            {"commitUrl": f"http://{self.headers['Host']}/datasets/me/set/commit/{oid}", "commitOid": oid}
        )


def _git(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running(folder: Path) -> Iterator[type[UploadHub]]:
    """A Hub with the data set ``me/set``, whose files are in ``folder``, which the client in this process asks."""
    from huggingface_hub import HfFileSystem, constants

    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("commits", "uploads", "contents", "refused_after", "after_commit", "failing_once"):
            patch.setattr(UploadHub, name, type(getattr(UploadHub, name))())
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        with hub_server.running(UploadHub):
            UploadHub.repositories["me/set"] = folder
            HfFileSystem.clear_instance_cache()
            yield UploadHub
            HfFileSystem.clear_instance_cache()
