"""``faulty://``: an object store on local disk that fails as object stores do, in every process of a run.

This folder on PYTHONPATH is enough: fsspec finds the driver by the entry point beside this file. ``FAULTY`` in the
environment says what goes wrong, as JSON:

* ``every``: about one call in so many fails, before or after it has had its effect; which ones is drawn from ``seed``,
  the call and how often this process has made it before. Reading may also end early.
* ``full``: while this file exists, nothing can be written: there is no space left.
* ``pause``: seconds before the package's first repetition, in place of its own.
"""

import errno
import hashlib
import json
import os
from collections import Counter
from typing import Any

from botocore.exceptions import ClientError, ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from vcf_batch.storage import retries

_made: Counter[str] = Counter()


def _slow_down() -> Exception:
    """503, as s3fs hands it on once its own repetitions are used up."""
    answer: Any = {"Error": {"Code": "SlowDown"}, "ResponseMetadata": {"HTTPStatusCode": 503}}
    error = OSError(errno.EBUSY, "Please reduce your request rate.")
    error.__cause__ = ClientError(answer, "PutObject")
    return error


_TROUBLE = (
    _slow_down,
    lambda: ReadTimeoutError(endpoint_url="https://faulty"),
    lambda: ConnectTimeoutError(endpoint_url="https://faulty"),
    lambda: EndpointConnectionError(endpoint_url="https://faulty"),
    lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    lambda: TimeoutError("timed out"),
)


def _plan() -> dict[str, Any]:
    return json.loads(os.environ.get("FAULTY", "{}"))


def _draw(call: str, path: str) -> int | None:
    """A number if this call is to fail, else None."""
    plan = _plan()
    if not plan.get("every"):
        return None
    made = f"{call} {os.path.basename(path)}"
    _made[made] += 1
    drawn = hashlib.blake2b(f"{plan.get('seed', 0)} {made} {_made[made]}".encode(), digest_size=8)
    number, failing = divmod(int.from_bytes(drawn.digest(), "big"), plan["every"])
    return None if failing else number


def _do(call: str, path: str, effect: Any) -> Any:
    number = _draw(call, path)
    if number is None:
        return effect()
    if number % 2:
        effect()
    raise _TROUBLE[number // 2 % len(_TROUBLE)]()


def _check_space(path: str) -> None:
    if os.path.exists(_plan().get("full", "")):
        raise OSError(errno.ENOSPC, "No space left on device", path)


class _File:
    """A file open for reading, whose reads fail or end early."""

    def __init__(self, path: str, file: Any) -> None:
        self.path, self._file = path, file
        self.size = os.path.getsize(path)

    def read(self, count: int = -1) -> bytes:
        number = _draw("read", self.path)
        if number is not None and number % 3 == 0:
            self._file.seek(self.size)
            self.size += 1
        elif number is not None:
            raise _TROUBLE[number % len(_TROUBLE)]()
        return self._file.read(count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class FaultyStorage(AbstractFileSystem):
    protocol = "faulty"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._disk = LocalFileSystem(auto_mkdir=True)
        retries.PAUSE_SECONDS = _plan().get("pause", retries.PAUSE_SECONDS)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return path.removeprefix("faulty://").rstrip("/")

    def info(self, path: str, **options: Any) -> Any:
        return _do("info", path, lambda: self._disk.info(path))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return _do("ls", path, lambda: self._disk.ls(path, detail))

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        return _File(path, _do("open", path, lambda: self._disk.open(path, mode)))

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        return _do("cat_file", path, lambda: self._disk.cat_file(path))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        _check_space(path)
        _do("pipe_file", path, lambda: self._disk.pipe_file(path, value, mode))

    def put_file(self, lpath: str, rpath: str, *arguments: Any, **options: Any) -> None:
        _check_space(rpath)
        _do("put_file", rpath, lambda: self._disk.put_file(lpath, rpath))

    def get_file(self, rpath: str, lpath: str, *arguments: Any, **options: Any) -> None:
        number = _draw("get_file", rpath)
        self._disk.get_file(rpath, lpath)
        if number is not None:
            os.truncate(lpath, os.path.getsize(lpath) // 2)
            if number % 2:
                raise _TROUBLE[number // 2 % len(_TROUBLE)]()

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        _check_space(path2)
        _do("cp_file", path1, lambda: self._disk.cp_file(path1, path2))

    def rm_file(self, path: str) -> None:
        _do("rm_file", path, lambda: self._disk.rm_file(path))
