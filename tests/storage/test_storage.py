"""Storage: whole files or none, uncached listings, bounded waiting, one set of errors on every storage."""

import contextlib
import errno
import hashlib
import http.server
import os
import pickle
import threading
import time
import types
import uuid
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from support import runs
from vcf_batch import storage
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.records import FileEntry
from vcf_batch.storage import drivers, local, retries


class Flaky(MemoryFileSystem):
    """An object store in memory that fails as it is told: ``{method: [error or None, ...]}``, one for each call."""

    protocol = "flaky"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    failures: ClassVar[dict[str, list[Exception | None]]] = {}
    calls: ClassVar[list[str]] = []
    lose_answer = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("flaky://", "memory://", 1))

    @classmethod
    def _fail(cls, method: str) -> None:
        cls.calls.append(method)
        if (planned := cls.failures.get(method)) and (error := planned.pop(0)):
            raise error

    def cat_file(self, path, *args, **kwargs):
        self._fail("cat_file")
        return super().cat_file(path, *args, **kwargs)

    def info(self, path, **kwargs):
        self._fail("info")
        return super().info(path, **kwargs)

    def ls(self, path, *args, **kwargs):
        self._fail("ls")
        return super().ls(path, *args, **kwargs)

    def pipe_file(self, path, value, **kwargs):
        if self.lose_answer:
            super().pipe_file(path, value, **kwargs)
        self._fail("pipe_file")
        super().pipe_file(path, value, **kwargs)

    def rm_file(self, path):
        super().rm_file(path)
        self._fail("rm_file")

    def put_file(self, lpath, rpath, **kwargs):
        super().put_file(lpath, rpath, **kwargs)
        self._fail("put_file")


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses between attempts, noted and not taken."""
    taken: list[float] = []
    monkeypatch.setattr(retries, "time", types.SimpleNamespace(monotonic=time.monotonic, sleep=taken.append))
    return taken


@pytest.fixture
def flaky() -> Iterator[type[Flaky]]:
    Flaky.store.clear()
    Flaky.failures, Flaky.calls, Flaky.lose_answer = {}, [], False
    yield Flaky
    Flaky.lose_answer = False


@pytest.fixture(params=["local", "file", "memory", "s3", "faulty"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param in ("s3", "faulty"):
        return request.getfixturevalue(request.param)
    return {"local": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{uuid.uuid4().hex}"}[
        request.param
    ]


# Names


def test_local_paths_become_absolute_and_urls_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("a/../b") == str(tmp_path / "b")
    assert storage.absolute("file:///data/x/") == "/data/x"
    assert storage.absolute("~") == os.path.expanduser("~")
    assert storage.absolute("s3://bucket/a/../b") == "s3://bucket/a/../b"
    assert storage.is_local("a")
    assert storage.is_local("file:///a")
    assert not storage.is_local("s3://a")


@pytest.mark.parametrize(
    ("base", "names", "joined"),
    [
        ("/out", ("a",), "/out/a"),
        ("/out/", ("a/b", "c"), "/out/a/b/c"),
        ("/", ("a",), "/a"),
        ("out", ("a",), "out/a"),
        ("s3://bucket", ("a",), "s3://bucket/a"),
        ("s3://bucket/x/", ("a",), "s3://bucket/x/a"),
        ("memory://", ("a",), "memory://a"),
        ("file:///x", ("a",), "file:///x/a"),
    ],
)
def test_join(base: str, names: tuple[str, ...], joined: str) -> None:
    assert storage.join(base, *names) == joined


@pytest.mark.parametrize(
    ("url", "folder"),
    [("/a/b", "/a"), ("/a", "/"), ("/", "/"), ("a", "."), ("a/b/", "a"), ("s3://b/k", "s3://b"), ("s3://b", "s3://b")],
)
def test_parent(url: str, folder: str) -> None:
    assert storage.parent(url) == folder


@given(
    base=st.sampled_from(["/out", "out/x", "s3://bucket", "s3://bucket/x", "memory://x", "file:///x"]),
    name=st.text("abcXYZ019._-[]*? ", min_size=1, max_size=12),
)
def test_a_joined_name_has_its_base_as_parent(base: str, name: str) -> None:
    url = storage.join(base, name)
    assert storage.parent(url) == base
    assert storage.name(url) == name


def test_credentials_in_urls_never_appear_in_messages(flaky: type[Flaky]) -> None:
    url = "flaky://user:secret@host/a?token=secret"
    for failure in (OSError("no: " + url), PermissionError(url), FileNotFoundError(url)):
        flaky.failures = {"cat_file": [failure]}
        with pytest.raises((OSError, StorageError)) as caught:
            storage.read_bytes(url)
        assert "secret" not in str(caught.value)
        assert "flaky://host/a" in str(caught.value)


def test_a_protocol_without_a_driver_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"nosuch://.*Install"):
        storage.read_bytes("nosuch://user:secret@x/y")


# Whole files


def test_a_published_file_reads_back(root: str) -> None:
    url = storage.join(root, "deep/er/a.bin")
    assert not storage.exists(url)
    storage.publish_bytes(url, b"first")
    storage.publish_bytes(url, "zwölf".encode())
    assert storage.exists(url)
    assert storage.exists(storage.parent(url))
    assert storage.size(url) == 6
    assert storage.read_text(url) == "zwölf"
    assert storage.read_bytes(url, limit=3) == b"zw\xc3"
    assert storage.read_bytes(url, limit=100) == "zwölf".encode()
    assert storage.read_start(url, 3) == b"zw\xc3"
    assert storage.read_start(url, 100) == "zwölf".encode()
    assert storage.digest(url) == FileEntry(6, hashlib.sha256("zwölf".encode()).hexdigest())


def test_an_open_file_can_seek(root: str) -> None:
    url = storage.join(root, "a")
    storage.publish_bytes(url, b"0123456789")
    with storage.open_read(url) as file:
        assert file.seekable()
        assert file.readable()
        assert file.seek(4) == 4
        assert file.read(3) == b"456"
        assert file.seek(-2, os.SEEK_END) == 8
        assert file.read() == b"89"
        assert file.tell() == 10
        assert file.read(1) == b""
    assert file.closed


def test_of_several_creators_one_wins_and_its_bytes_stay(tmp_path: Path) -> None:
    url = str(tmp_path / "run.json")

    def create(number: int) -> bool:
        try:
            storage.publish_bytes(url, str(number).encode() * 1000, create=True)
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(create, range(8)))
    assert sum(won) == 1
    assert storage.read_bytes(url) == str(won.index(True)).encode() * 1000
    assert storage.list_files(str(tmp_path)) == {"run.json": 1000}
    assert os.listdir(tmp_path) == ["run.json"]


def test_create_refuses_a_file_that_is_there(root: str) -> None:
    url = storage.join(root, "a")
    storage.publish_bytes(url, b"old", create=True)
    with pytest.raises(FileExistsError):
        storage.publish_bytes(url, b"new", create=True)
    assert storage.read_bytes(url) == b"old"


@pytest.fixture
def without_links(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system like FAT and many over object stores."""

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    monkeypatch.setattr(local, "CREATOR_SECONDS", 0.05)


def before_the_content(monkeypatch: pytest.MonkeyPatch, event: Callable[[], object]) -> None:
    """Let something happen once, after a creator has the name and before it writes."""

    def opened(file: Any, mode: str) -> Any:
        if isinstance(file, int) and mode == "wb":
            monkeypatch.setattr(local, "open", open, raising=False)
            event()
        return open(file, mode)

    monkeypatch.setattr(local, "open", opened, raising=False)


@pytest.mark.usefixtures("without_links")
def test_create_works_without_hard_links(tmp_path: Path) -> None:
    url = str(tmp_path / "a")
    storage.publish_bytes(url, b"old", create=True)
    with pytest.raises(FileExistsError):
        storage.publish_bytes(url, b"new", create=True)
    assert storage.read_bytes(url) == b"old"
    test_of_several_creators_one_wins_and_its_bytes_stay(tmp_path / "several")


@pytest.mark.usefixtures("without_links")
def test_a_creator_that_died_without_hard_links_leaves_what_counts_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it leaves is empty, and the next creator replaces it, with hard links or without."""
    url = str(tmp_path / "a")
    for undo in (False, True):

        def die() -> None:
            raise runs.Killed

        before_the_content(monkeypatch, die)
        with pytest.raises(runs.Killed):
            storage.publish_bytes(url, b"theirs", create=True)
        assert storage.list_files(str(tmp_path)) == {"a": 0}
        if undo:
            monkeypatch.undo()
        storage.publish_bytes(url, b"ours", create=True)
        assert storage.read_bytes(url) == b"ours"
        assert os.listdir(tmp_path) == ["a"]
        storage.remove(url)


@pytest.mark.usefixtures("without_links")
def test_a_creator_suspended_without_hard_links_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another takes it for dead and creates the file; it wakes up and is told so."""
    url = str(tmp_path / "a")
    before_the_content(monkeypatch, lambda: storage.publish_bytes(url, b"faster", create=True))
    with pytest.raises(FileExistsError):
        storage.publish_bytes(url, b"late", create=True)
    assert storage.read_bytes(url) == b"faster"


def test_a_creator_goes_on_where_the_file_that_was_there_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a driver waits for the lease of another, which ends."""
    link = os.link

    def late(source: str, target: str) -> None:
        monkeypatch.setattr(os, "link", link)
        raise FileExistsError(errno.EEXIST, "File exists", target)

    monkeypatch.setattr(os, "link", late)
    storage.publish_bytes(str(tmp_path / "a"), b"ours", create=True)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.usefixtures("without_links")
def test_a_creator_whose_file_is_deleted_creates_it_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another took it for dead, and the name is free by now."""
    before_the_content(monkeypatch, (tmp_path / "a").unlink)
    storage.publish_bytes(str(tmp_path / "a"), b"late", create=True)
    assert storage.read_bytes(str(tmp_path / "a")) == b"late"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.usefixtures("without_links")
def test_a_creator_at_work_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").touch()
    at_work = types.SimpleNamespace(sleep=lambda _: (tmp_path / "a").write_bytes(b"theirs"))
    monkeypatch.setattr(local, "time", at_work)
    with pytest.raises(FileExistsError):
        storage.publish_bytes(str(tmp_path / "a"), b"ours", create=True)
    assert storage.read_bytes(str(tmp_path / "a")) == b"theirs"


@pytest.mark.usefixtures("without_links")
def test_a_creator_that_fails_without_hard_links_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill_up() -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before_the_content(monkeypatch, fill_up)
    with pytest.raises(StorageError, match="No space left"):
        storage.publish_bytes(str(tmp_path / "a"), b"x", create=True)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "a")
    storage.publish_bytes(url, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        storage.publish_bytes(url, b"new")
    with pytest.raises(StorageError, match="No space left"):
        storage.upload(url, str(tmp_path / "b"))
    assert os.listdir(tmp_path) == ["a"]
    assert storage.read_bytes(url) == b"old"


def test_upload_and_download(root: str, tmp_path: Path) -> None:
    source, back, url = tmp_path / "source", tmp_path / "back" / "file", storage.join(root, "x/y.tar")
    source.write_bytes(os.urandom(3_000_000))
    parts: list[int] = []
    storage.upload(str(source), url, lambda: parts.append(1))
    assert storage.size(url) == 3_000_000
    assert len(parts) >= (3 if storage.is_local(url) else url.startswith("s3:"))  # heartbeats while a caller waits
    storage.download(url, str(back))
    assert back.read_bytes() == source.read_bytes()
    assert os.listdir(back.parent) == ["file"]


def test_an_upload_that_arrives_short_is_an_error(flaky: type[Flaky], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    original = flaky.put_file

    def cut(self: Flaky, lpath: str, rpath: str, **kwargs: Any) -> None:
        original(self, lpath, rpath, **kwargs)
        self.store[self._strip_protocol(rpath)].truncate(4)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flaky, "put_file", cut)
        with pytest.raises(StorageError, match="4 of 10 bytes"):
            storage.upload(str(tmp_path / "a"), "flaky://a")


def test_move_replaces_and_leaves_no_source(root: str) -> None:
    source, target = storage.join(root, "_staging/1/00000.tar"), storage.join(root, "00000.tar")
    storage.publish_bytes(target, b"old")
    storage.publish_bytes(source, b"new")
    storage.move(source, target)
    assert storage.read_bytes(target) == b"new"
    assert not storage.exists(source)
    with pytest.raises(FileNotFoundError):
        storage.move(source, target)
    assert storage.read_bytes(target) == b"new"


def test_remove(root: str) -> None:
    url = storage.join(root, "a")
    storage.publish_bytes(url, b"x")
    storage.remove(url)
    storage.remove(url, missing_ok=True)
    with pytest.raises(FileNotFoundError):
        storage.remove(url)


def test_what_is_gone_at_the_second_try_was_deleted_by_the_first_only_if_that_asked_for_it(
    flaky: type[Flaky], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing file is an error, unless a request to delete it failed before, which may have had its effect."""
    flaky.failures = {"info": [TimeoutError()]}
    with pytest.raises(FileNotFoundError):
        storage.remove("flaky://missing")
    storage.publish_bytes("flaky://a", b"x")
    flaky.failures = {"rm_file": [TimeoutError()]}
    storage.remove("flaky://a")
    assert not storage.exists("flaky://a")

    unlink, failures = os.unlink, [OSError(errno.ESTALE, "Stale file handle")]

    def deleting(path: str) -> None:
        unlink(path)
        if failures:
            raise failures.pop()

    (tmp_path / "a").touch()
    monkeypatch.setattr(os, "unlink", deleting)
    storage.remove(str(tmp_path / "a"))
    with pytest.raises(FileNotFoundError):
        storage.remove(str(tmp_path / "a"))


def test_remove_tree_takes_brackets_and_stars_literally(root: str) -> None:
    for name in ("run[1]/a", "run[1]/b/c", "run1/a", "run*/a"):
        storage.publish_bytes(storage.join(root, name), b"x")
    storage.remove_tree(storage.join(root, "run[1]"))
    storage.remove_tree(storage.join(root, "run*"))
    storage.remove_tree(storage.join(root, "never there"))
    assert storage.list_tree(root) == {"run1/a": 1}


# Listings


def test_listings_give_sizes_and_see_other_writers_at_once(root: str) -> None:
    assert storage.list_files(root) == {}
    assert storage.list_files(storage.join(root, "missing")) == {}
    assert storage.list_tree(storage.join(root, "missing")) == {}
    for number, name in enumerate(["a", "b.tar", "sub/c", "sub/deeper/d"]):
        storage.publish_bytes(storage.join(root, name), b"x" * number)
        assert number == 0 or storage.list_tree(root)[name] == number
    assert storage.list_files(root) == {"a": 0, "b.tar": 1}
    assert storage.list_tree(root) == {"a": 0, "b.tar": 1, "sub/c": 2, "sub/deeper/d": 3}
    assert storage.list_files(storage.join(root, "a")) == {}
    assert storage.list_tree(storage.join(root, "a")) == {}


def test_checksums_are_those_that_the_store_keeps(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "sub/b"):
        storage.publish_bytes(f"flaky://checksums/{name}", name.encode())
    assert storage.list_checksums("flaky://checksums") == {"a": (1, None), "sub/b": (5, None)}
    ls = flaky.ls
    monkeypatch.setattr(flaky, "ls", lambda *a, **k: [entry | {"ETag": "x"} for entry in ls(*a, **k)])
    assert storage.list_checksums("flaky://checksums") == {"a": (1, "x"), "sub/b": (5, "x")}
    assert storage.list_checksums("flaky://missing") == {}


def test_local_listings_leave_out_unfinished_files(tmp_path: Path) -> None:
    (tmp_path / ".tmp-0123").write_bytes(b"half")
    os.symlink("nowhere", tmp_path / "broken")
    assert storage.list_files(str(tmp_path)) == {}
    assert storage.list_tree(str(tmp_path)) == {}


# Errors


@pytest.mark.parametrize("name", ["missing", "a/b", "x" * 300, "null\0byte"])
def test_names_that_cannot_exist_are_missing_files(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").write_bytes(b"x")
    url = f"{tmp_path}/{name}"
    for read in (storage.read_bytes, storage.size, storage.open_read, storage.remove):
        with pytest.raises(FileNotFoundError):
            read(url)
    assert not storage.exists(url)


def test_pipes_folders_and_devices_are_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for url in (str(tmp_path / "pipe"), str(tmp_path), "/dev/null"):
        for read in (storage.read_bytes, storage.size, storage.open_read):
            with pytest.raises(storage.NotAFileError):
                read(url)


def test_a_folder_of_an_object_store_is_not_a_file() -> None:
    storage.publish_bytes("memory://folder-test/a", b"x")
    with pytest.raises(storage.NotAFileError):
        storage.size("memory://folder-test")


def _boto(name: str, **arguments: Any) -> Exception:
    exceptions = pytest.importorskip("botocore.exceptions")
    return getattr(exceptions, name)(**arguments)


def _refused_by_s3(status: int, code: str) -> OSError:
    cause = _boto(
        "ClientError",
        error_response={"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}},
        operation_name="PutObject",
    )
    error = OSError(errno.EINVAL, code)
    error.__cause__ = cause
    return error


PASSING = {
    "throttled": lambda: OSError(errno.EBUSY, "SlowDown"),
    "timeout": TimeoutError,
    "reset": lambda: ConnectionResetError(errno.ECONNRESET, "reset"),
    "boto refused": lambda: _boto("EndpointConnectionError", endpoint_url="http://x"),
    "boto read timeout": lambda: _boto("ReadTimeoutError", endpoint_url="http://x"),
    "boto cut": lambda: _boto("IncompleteReadError", actual_bytes=1, expected_bytes=2),
    "conditional conflict": lambda: _refused_by_s3(409, "ConditionalRequestConflict"),
}


@pytest.mark.parametrize("make", PASSING.values(), ids=PASSING.keys())
def test_what_may_pass_is_tried_again_with_growing_pauses(
    flaky: type[Flaky], pauses: list[float], make: Callable[[], Exception]
) -> None:
    storage.publish_bytes("flaky://a", b"x")
    flaky.failures = {"cat_file": [make() for _ in range(retries.TRIES - 1)]}
    assert storage.read_bytes("flaky://a") == b"x"
    assert len(pauses) == retries.TRIES - 1
    assert pauses == sorted(pauses)

    flaky.failures, flaky.calls = {"cat_file": [make() for _ in range(100)]}, []
    with pytest.raises(StorageError, match=rf"flaky://a after {retries.TRIES} tries.*Check"):
        storage.read_bytes("flaky://a")
    assert flaky.calls == ["cat_file"] * retries.TRIES


def test_no_attempt_starts_after_the_time_limit(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", -1.0)
    flaky.failures = {"cat_file": [TimeoutError(), None]}
    with pytest.raises(StorageError):
        storage.read_bytes("flaky://a")
    assert flaky.calls == ["cat_file"]


def test_a_pause_counts_towards_the_time_limit(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    """The last pause is half a minute long; no try starts so long after the limit."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        started.append(now)

    started: list[float] = []
    monkeypatch.setattr(retries, "time", types.SimpleNamespace(monotonic=lambda: now, sleep=sleep))
    monkeypatch.setattr(retries, "RETRY_SECONDS", 20.0)
    monkeypatch.setattr(retries._jitter, "random", lambda: 0.5)
    flaky.failures = {"cat_file": [TimeoutError() for _ in range(100)]}
    with pytest.raises(StorageError, match="after 5 tries"):
        storage.read_bytes("flaky://a")
    assert started == [0.25, 1.0, 3.25, 10.0]


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (PermissionError("AccessDenied"), PermissionError),
        (FileNotFoundError("NoSuchBucket"), FileNotFoundError),
        (OSError(errno.EINVAL, "InvalidRequest"), StorageError),
        (RuntimeError("driver confused"), StorageError),
        (TypeError("our mistake"), TypeError),
    ],
)
def test_what_stays_wrong_is_tried_once(flaky: type[Flaky], failure: Exception, expected: type[Exception]) -> None:
    flaky.failures = {"cat_file": [failure]}
    with pytest.raises(expected):
        storage.read_bytes("flaky://a")
    assert flaky.calls == ["cat_file"]


def test_missing_credentials_are_a_refusal(flaky: type[Flaky]) -> None:
    flaky.failures = {"cat_file": [_boto("NoCredentialsError")]}
    with pytest.raises(PermissionError, match="credentials"):
        storage.read_bytes("flaky://a")


@pytest.mark.parametrize("failure", [PermissionError("AccessDenied"), FileNotFoundError("NoSuchBucket")])
def test_every_failure_of_writing_is_a_storage_error(flaky: type[Flaky], failure: Exception) -> None:
    flaky.failures = {"pipe_file": [failure]}
    with pytest.raises(StorageError, match="cannot write flaky://a"):
        storage.publish_bytes("flaky://a", b"x")


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x")
    with pytest.raises(StorageError):
        storage.publish_bytes(str(tmp_path / "a" / "b"), b"x")


def test_a_storage_that_cannot_be_asked_has_no_absent_files(flaky: type[Flaky]) -> None:
    for method, ask in (("info", storage.exists), ("ls", storage.list_files)):
        flaky.failures = {method: [OSError(errno.EBUSY, "down") for _ in range(100)]}
        with pytest.raises(StorageError):
            ask("flaky://a")


def test_a_failed_precondition_means_that_the_file_exists(flaky: type[Flaky]) -> None:
    storage.publish_bytes("flaky://a", b"theirs")
    flaky.failures = {"pipe_file": [_refused_by_s3(412, "PreconditionFailed")]}
    with pytest.raises(FileExistsError):
        storage.publish_bytes("flaky://a", b"ours", create=True)


def test_a_creator_that_lost_only_the_answer_has_won(flaky: type[Flaky]) -> None:
    flaky.lose_answer = True
    flaky.failures = {"pipe_file": [TimeoutError()]}
    storage.publish_bytes("flaky://a", b"ours", create=True)
    assert storage.read_bytes("flaky://a") == b"ours"


def test_a_creator_that_lost_to_a_file_that_is_gone_is_told_so(flaky: type[Flaky]) -> None:
    """No other error leaves the storage, though the file cannot be compared."""
    refused = _refused_by_s3(412, "PreconditionFailed")
    flaky.failures = {"pipe_file": [TimeoutError(), refused], "cat_file": [FileNotFoundError("NoSuchKey")]}
    with pytest.raises(FileExistsError):
        storage.publish_bytes("flaky://a", b"ours", create=True)


def test_errors_while_reading_an_open_file_are_translated(flaky: type[Flaky], monkeypatch: pytest.MonkeyPatch) -> None:
    storage.publish_bytes("flaky://a", b"x")
    with storage.open_read("flaky://a") as file, monkeypatch.context() as patch:

        def cut(*_: object) -> bytes:
            raise _boto("ReadTimeoutError", endpoint_url="http://x")

        patch.setattr(flaky.store["/a"], "read", cut)
        with pytest.raises(StorageError, match="cannot read flaky://a"):
            file.read()


# Options of the drivers


def test_s3_has_time_limits_and_no_listings_cache_beside_the_users_options(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    users = {"endpoint_url": "http://127.0.0.1:1", "config_kwargs": {"s3": {"addressing_style": "path"}}}
    monkeypatch.setitem(fsspec.config.conf, "s3", users)
    fs, path = drivers.filesystem("s3://bucket/key")
    assert path == "bucket/key"
    assert fs.endpoint_url == "http://127.0.0.1:1"
    assert fs.config_kwargs["s3"] == {"addressing_style": "path"}
    assert fs.config_kwargs["connect_timeout"] <= 10
    assert fs.config_kwargs["read_timeout"] <= 30
    assert not fs.dircache.use_listings_cache


def test_drivers_get_no_option_that_they_refuse() -> None:
    assert drivers._options("gs") == {"use_listings_cache": False}
    assert drivers._options("sftp") == drivers._options("ssh") == {}


# An S3 server behind trouble


@pytest.fixture
def proxy(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from support import s3_server

    with s3_server.Proxy(s3_endpoint) as proxy:
        monkeypatch.setitem(fsspec.config.conf, "s3", s3_server.options(proxy.endpoint))
        yield proxy
        proxy.shutdown()


def test_an_object_whose_download_is_cut_is_whole_in_the_end(s3: str, proxy: Any, tmp_path: Path) -> None:
    """An object store that truncates a download is detected, and asked again."""
    data, url = os.urandom(200_000), f"{s3}/a"
    storage.publish_bytes(url, data)
    for read in (lambda: storage.read_bytes(url), lambda: storage.read_bytes(url, limit=150_000)):
        proxy.cuts = 2
        assert data.startswith(read())
        assert proxy.cuts == 0
    proxy.cuts = 2
    storage.download(url, str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == data
    assert proxy.cuts == 0


def test_an_object_is_read_in_one_request(s3: str, proxy: Any) -> None:
    """No request asks for its size first, whether it is read as a whole or its begin, and whether there is one."""
    for content in (b"content", b""):
        storage.publish_bytes(f"{s3}/a", content)
        for limit in (None, 3, 1000):
            before = proxy.requests
            assert storage.read_bytes(f"{s3}/a", limit) == content[:limit]
            assert proxy.requests == before + 1
    before = proxy.requests
    for limit in (None, 3):
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{s3}/none", limit)
    assert proxy.requests == before + 2


def test_an_object_is_read_in_the_version_that_its_url_names(s3: str) -> None:
    fs, _ = drivers.filesystem(s3)
    fs.mkdir("versions")
    fs.call_s3("put_bucket_versioning", Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    storage.publish_bytes("s3://versions/a", b"first")
    version = fs.call_s3("head_object", Bucket="versions", Key="a")["VersionId"]
    storage.publish_bytes("s3://versions/a", b"second")
    assert storage.read_bytes("s3://versions/a") == b"second"
    assert storage.read_bytes(f"s3://versions/a?versionId={version}", limit=3) == b"fir"


def test_an_s3_server_that_hangs_is_given_up(s3: str, proxy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts and retries are set explicitly: a hung endpoint costs a few requests, each with a time limit."""
    monkeypatch.setattr(drivers, "_READ_SECONDS", 0.1)
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.0)
    proxy.hangs = True
    with pytest.raises(StorageError, match="reachable"):
        storage.read_bytes(f"{s3}/a")
    assert proxy.requests == 5


# A web server


class _Answers(http.server.BaseHTTPRequestHandler):
    """``/N`` answers with status N, ``/flaky`` fails once, ``/stream`` announces no size, ``/hang`` never answers,
    ``/cut`` ends early twice."""

    body = b"0123456789" * 1000
    seen: ClassVar[list[str]] = []
    cuts: ClassVar[list[bool]] = []
    release = threading.Event()

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = self.path.partition("?")[0]
        self.seen.append(path)
        if path == "/hang":
            self.release.wait(20)
            return
        if path[1:].isdigit():
            self.send_error(int(path[1:]))
            return
        if path == "/flaky" and self.seen.count(path) == 1:
            self.send_error(503)
            return
        self.send_response(200)
        if path != "/stream":
            self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        if with_body:
            with contextlib.suppress(ConnectionError):
                ends_early = path == "/cut" and self.cuts and self.cuts.pop()
                self.wfile.write(self.body[: 6000 if ends_early else None])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    pytest.importorskip("aiohttp")
    _Answers.seen.clear()
    _Answers.cuts[:] = [True, True]
    _Answers.release.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    _Answers.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_web_is_read_with_a_limit(web: str) -> None:
    assert storage.read_bytes(web + "/a.png") == _Answers.body
    assert storage.read_bytes(web + "/a.png", limit=25) == _Answers.body[:25]
    assert storage.read_bytes(web + "/stream", limit=9000) == _Answers.body[:9000]
    assert storage.read_bytes(web + "/flaky") == _Answers.body


def test_a_file_that_ends_early_is_read_on_from_where_it_ended(web: str, tmp_path: Path) -> None:
    """A truncated download is detected, and repeated."""
    assert storage.read_bytes(web + "/cut") == _Answers.body
    _Answers.cuts[:] = [True, True]
    with storage.open_read(web + "/cut") as file:
        parts = [file.read(1000), file.read(4500), file.read(2000), file.read()]
    assert b"".join(parts) == _Answers.body
    _Answers.cuts[:] = [True, True]
    storage.download(web + "/cut", str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == _Answers.body
    _Answers.cuts[:] = [True] * 100
    with pytest.raises(StorageError):
        storage.read_bytes(web + "/cut", limit=9000)
    with pytest.raises(StorageError):
        storage.download(web + "/cut", str(tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_the_web_is_downloaded(web: str, tmp_path: Path) -> None:
    for name in ("a", "stream"):
        storage.download(f"{web}/{name}", str(tmp_path / name))
        assert (tmp_path / name).read_bytes() == _Answers.body


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (400, FileNotFoundError),
        (401, PermissionError),
        (403, PermissionError),
        (404, FileNotFoundError),
        (410, FileNotFoundError),
        (500, StorageError),
        (501, StorageError),
    ],
)
def test_answers_of_the_web(web: str, status: int, expected: type[Exception]) -> None:
    for limit in (None, 10):
        with pytest.raises(expected) as caught:
            storage.read_bytes(f"{web}/{status}?sig=secret", limit=limit)
        assert "secret" not in str(caught.value)


def test_a_server_that_hangs_is_given_up(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drivers, "_READ_SECONDS", 0.1)
    with pytest.raises(StorageError, match=f"after {retries.TRIES} tries"):
        storage.read_bytes(web + "/hang")


def test_a_server_that_is_not_there_is_a_storage_error() -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(StorageError, match="reachable"):
        storage.read_bytes("http://127.0.0.1:9/a")


def test_arrow_sees_the_same_storage(tmp_path: Path) -> None:
    """What a library writes through Arrow is what this module reads, and it can be sent to another process."""
    for url in (str(tmp_path / "x"), f"memory://arrow-{uuid.uuid4().hex}/x"):
        filesystem, path = storage.arrow_filesystem(url)
        with pickle.loads(pickle.dumps(filesystem)).open_output_stream(path) as stream:
            stream.write(b"content")
        assert storage.read_bytes(url) == b"content"


def test_the_storage_dates_its_files(root: str) -> None:
    """Not every driver knows dates; those of real storages do."""
    url, missing = storage.join(root, "file"), storage.join(root, "missing")
    storage.publish_bytes(url, b"x")
    date = storage.modified(url)
    if root.startswith("faulty"):
        assert date is None
        return
    assert date is not None
    assert abs(time.time() - date) < 600
    with pytest.raises(FileNotFoundError):
        storage.modified(missing)


def test_a_folder_that_may_not_be_listed_cannot_be_removed(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an object store, whose files are listed first, that is trouble of the storage as for every other deletion."""
    storage.publish_bytes(f"{s3}/folder/file", b"x")
    monkeypatch.setattr(drivers.filesystem(s3)[0], "ls", _refused)
    with pytest.raises(StorageError, match="refused"):
        storage.remove_tree(f"{s3}/folder")


def _refused(*_: object, **__: object) -> None:
    raise PermissionError("refused")


def test_a_generator_that_is_left_waits_for_no_thread() -> None:
    """It may be closed within the start of another thread, where a wait would never end."""
    released, ended = threading.Event(), threading.Event()

    def read(number: int) -> int:
        if number:
            released.wait(20)
            ended.set()
        return number

    def generator() -> Generator[int]:
        with storage.reading_threads(2, "left") as threads:
            yield from threads.map(read, range(9))

    left = generator()
    assert next(left) == 0
    left.close()
    assert not ended.is_set()
    released.set()
