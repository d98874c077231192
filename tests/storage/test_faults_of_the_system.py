"""Every call of the operating system fails, one by one: each function of the storage raises what it documents."""

import builtins
import errno
import fcntl
import os
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from vcf_batch import storage
from vcf_batch.errors import StorageError
from vcf_batch.storage import retries, scratch

CALLS = ("fstat", "fsync", "link", "lstat", "mkdir", "open", "rename", "replace", "rmdir", "scandir", "stat", "unlink")
READING = (FileNotFoundError, PermissionError, storage.NotAFileError, StorageError)
CODES = [errno.EIO, errno.ENOSPC, errno.EACCES, errno.ESTALE]


class Faults:
    """Counts the calls of the operating system, and lets one fail, or every one from there on.

    Args:
        code: the error.
        first: number of the call that fails.
        lasts: whether the later ones fail too.
    """

    def __init__(self, code: int, first: int, lasts: bool) -> None:
        self._code, self._first, self._lasts = code, first, lasts
        self.calls = 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in [*((os, name) for name in CALLS), (builtins, "open"), (fcntl, "flock")]:
                patch.setattr(owner, name, self._failing(getattr(owner, name)))
            yield

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._first or (self._lasts and self.calls > self._first):
                raise OSError(self._code, os.strerror(self._code), arguments[0])
            return call(*arguments, **options)

        return wrapped


class Place:
    """A folder with a few files, anew for each try."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder)
        for name in ("old", "source", "tree/deep/a", "tree/b"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"old")
        (folder / ".tmp-left").write_bytes(b"half")

    def __getitem__(self, name: str) -> str:
        return os.path.join(self.root, name)

    def content(self, name: str) -> bytes | None:
        path = Path(self.root, name)
        return path.read_bytes() if path.is_file() else None


def read_open(place: Place) -> bytes:
    with storage.open_read(place["old"]) as file:
        return file.read()


def use_scratch(place: Place) -> str:
    with scratch.folder() as folder:
        return folder[:0]


FUNCTIONS: dict[str, tuple[Callable[[Place], Any], tuple[type[Exception], ...], Any]] = {
    "publish_bytes": (lambda place: storage.publish_bytes(place["old"], b"new"), (StorageError,), None),
    "publish_bytes in a new folder": (
        lambda place: storage.publish_bytes(place["x/y/new"], b"new"),
        (StorageError,),
        None,
    ),
    "create": (lambda place: storage.publish_bytes(place["tree/new"], b"new", create=True), (StorageError,), None),
    "upload": (lambda place: storage.upload(place["source"], place["tree/new"]), (StorageError,), None),
    "download": (lambda place: storage.download(place["source"], place["tree/new"]), READING, None),
    "move": (lambda place: storage.move(place["source"], place["old"]), (StorageError,), None),
    "remove": (lambda place: storage.remove(place["old"]), (StorageError,), None),
    "remove_tree": (lambda place: storage.remove_tree(place["tree"]), (StorageError,), None),
    "remove_unfinished": (lambda place: storage.remove_unfinished(place.root), (StorageError,), None),
    "read_bytes": (lambda place: storage.read_bytes(place["old"]), READING[1:], b"old"),
    "open_read": (read_open, READING[1:], b"old"),
    "size": (lambda place: storage.size(place["old"]), READING[1:], 3),
    "exists": (lambda place: storage.exists(place["old"]), (PermissionError, StorageError), True),
    "modified": (lambda place: storage.modified(place["old"]) and 1, (PermissionError, StorageError), 1),
    "digest": (lambda place: storage.digest(place["old"]).size, READING[1:], 3),
    "list_files": (
        lambda place: storage.list_files(place.root),
        (PermissionError, StorageError),
        {"old": 3, "source": 3},
    ),
    "list_tree": (
        lambda place: storage.list_tree(place["tree"]),
        (PermissionError, StorageError),
        {"deep/a": 3, "b": 3},
    ),
    "scratch.folder": (use_scratch, (StorageError,), ""),
    "scratch.clean": (lambda place: scratch.clean(), (), None),
}
"""What is called, the errors that its documentation names for a file that is there, and what it returns."""


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "time", types.SimpleNamespace(monotonic=lambda: 0.0, sleep=lambda _: None))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "for good"])
def test_whatever_fails_only_documented_errors_leave_the_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, lasts: bool
) -> None:
    """No OSError leaves vcf_batch.storage but those that the caller can act on; a file is whole whatever fails."""
    call, documented, expected = FUNCTIONS[function]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    number = 0
    for code in CODES:
        first, is_over = 1, False
        while not is_over:
            place, faults = Place(tmp_path / f"{(number := number + 1)}"), Faults(code, first, lasts)
            what = f"{errno.errorcode[code]} at call {first}"
            error: Exception | None = None
            with faults.at_work():
                try:
                    found = call(place)
                except Exception as caught:
                    error = caught
            is_over = faults.calls < first
            if error is None:
                assert found == expected, what
            else:
                assert isinstance(error, documented), f"{what}: {error!r}"
                assert not is_over, what
                assert all(place.content(name) in (None, b"old", b"new") for name in ("old", "tree/new", "x/y/new"))
            first += 1
        assert first > 2, "there are calls that fail"


def test_a_folder_that_cannot_be_looked_at_is_not_a_file_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FileExistsError comes from creating a file only if there is such a file."""
    (tmp_path / "folder").mkdir()
    stat = os.stat

    def fail(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("folder"):
            raise OSError(errno.EIO, "Input/output error", path)
        return stat(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", fail)
        with pytest.raises(StorageError, match="Input/output error"):
            storage.publish_bytes(str(tmp_path / "folder/a"), b"x", create=True)
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="not a folder"):
        storage.publish_bytes(str(tmp_path / "file/a"), b"x", create=True)


def test_a_download_that_cannot_be_written_is_no_fault_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"x")
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*file/a"):
        storage.download(str(tmp_path / "source"), str(tmp_path / "file/a"))
    with pytest.raises(FileNotFoundError):
        storage.download(str(tmp_path / "missing"), str(tmp_path / "a"))


def test_a_folder_in_which_others_delete_files_is_removed_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that another driver deletes first does not end the removal of the others."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in "abc":
        (folder / name).touch()
    unlink = os.unlink

    def overtaken(path: Any, **options: Any) -> None:
        monkeypatch.setattr(os, "unlink", unlink)
        unlink(path, **options)
        unlink(path, **options)

    monkeypatch.setattr(os, "unlink", overtaken)
    storage.remove_tree(str(folder))
    assert not folder.exists()
