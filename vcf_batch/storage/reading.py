"""Reading of files: whole, in part, hashed or downloaded; and their size, date and existence."""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, BinaryIO, cast

import fsspec.asyn

from vcf_batch.errors import StorageError, redact
from vcf_batch.records import FileEntry
from vcf_batch.storage import local, room
from vcf_batch.storage.drivers import filesystem
from vcf_batch.storage.listing import checksum
from vcf_batch.storage.paths import as_local_path, is_local, is_s3
from vcf_batch.storage.resilient_file import ResilientFile
from vcf_batch.storage.retries import NotAFileError, http_status, may_pass, retried, translated

CHUNK_BYTES = 1 << 20
DATE_SECONDS = 2.0
"""Coarsest resolution of the dates of files, as FAT has it."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """A version of a file as the storage tells it without reading the file."""

    text: str
    """Checksum or ETag of an object, else the time of the last write. Another text may mean another content."""
    exact: str | None
    """A text that changes with every write, for this one place of the file. On a local disk it has the inode and the
    time of the last change of the inode, which no program can set. None if a later write may leave it as it is, because
    its time has hardly passed."""


def open_read(url: str) -> BinaryIO:
    """Open a file for reading, as a context manager. It is seekable if the server supports that.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: at opening, and while reading.
    """
    return cast(BinaryIO, ResilientFile(url, lambda: _open(url)))


def read_bytes(url: str, limit: int | None = None, under: str | None = None) -> bytes:
    """The file's bytes.

    Args:
        url: the file.
        limit: number of bytes that are read, from the first one. Ask for one more than you accept, to notice a larger
            file.
        under: a local folder that ``url``, a local path, must lie in: see :func:`vcf_batch.storage.local.open_read`.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_s3(url):
        return _in_one_request(url, limit)
    if limit is None and not is_local(url):
        fs, path = _fresh(url)
        return retried("read", url, lambda: bytes(fs.cat_file(path)))
    with ResilientFile(url, lambda: _open(url, under)) as file:
        return file.read(-1 if limit is None else limit)


def read_start(url: str, count: int) -> bytes:
    """The first ``count`` bytes of a file, all of a shorter one. Of a remote file no more than these are sent.

    Some object stores, S3 not among them, refuse this for an empty file.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(url) or is_s3(url):
        return read_bytes(url, count)
    fs, path = _fresh(url)
    return retried("read", url, lambda: bytes(fs.cat_file(path, start=0, end=count)))[:count]


def _in_one_request(url: str, limit: int | None) -> bytes:
    """The bytes of an object on S3, as :func:`read_bytes` gives them.

    s3fs itself would ask for the size of the object first, to read the parts of a large one side by side, and would try
    25 times where a server hangs.
    """
    fs, path = _fresh(url)
    bucket, key, version_id = fs.split_path(path)
    given = {"Bucket": bucket, "Key": key}
    if version_id is not None:
        given["VersionId"] = version_id
    if limit is not None:
        given["Range"] = f"bytes=0-{limit - 1}"

    def read() -> bytes:
        try:
            answer = fs.call_s3("get_object", **given)
            return bytes(fsspec.asyn.sync(fs.loop, answer["Body"].read))[:limit]  # Some servers send the whole object.
        except Exception as error:
            if http_status(error) == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                return b""  # An empty object has no first byte.
            raise

    return retried("read", url, read)


def read_text(url: str) -> str:
    """The file's text, decoded from UTF-8.

    Raises:
        UnicodeDecodeError: the file is not UTF-8.
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see :mod:`vcf_batch.storage`.
    """
    return read_bytes(url).decode("utf-8")


def size(url: str) -> int:
    """The file's size in bytes.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see :mod:`vcf_batch.storage`.
    """
    info = _info(url)
    if info["type"] != "file":
        raise NotAFileError(errno.EISDIR, "not a regular file", redact(url))
    return int(info["size"] or 0)


def modified(url: str) -> float | None:
    """Time of the last write, in seconds since 1970 by the storage's clock; None if the storage keeps none.

    Raises:
        FileNotFoundError, PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(url):
        return retried("look up", url, lambda: os.stat(as_local_path(url)).st_mtime)
    fs, path = filesystem(url)

    def ask() -> float:
        fs.invalidate_cache(path)
        return cast(float, fs.modified(path).timestamp())

    try:
        return retried("look up", url, ask)
    except NotImplementedError:
        return None


def stamp(url: str) -> Stamp | None:
    """The version of a file; None if the storage tells neither checksums nor dates.

    Raises:
        FileNotFoundError, PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(url):
        status = retried("look up", url, lambda: os.stat(as_local_path(url)))
        exact = f"{status.st_ino} {status.st_mtime_ns} {status.st_ctime_ns}"
        changed = max(status.st_mtime, status.st_ctime)
        return Stamp(str(status.st_mtime_ns), exact if time.time() - changed > DATE_SECONDS else None)
    text = checksum(_info(url))
    if text is not None:
        return Stamp(text, text)
    date = modified(url)
    if date is None:
        return None
    return Stamp(repr(date), repr(date) if time.time() - date > DATE_SECONDS else None)


def version(url: str) -> str | None:
    """What tells the content of an object on S3 from any other: its ETag. None on other storages.

    Raises:
        FileNotFoundError, PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    return _info(url).get("ETag") if is_s3(url) else None


def remote_checksum(url: str) -> str | None:
    """Checksum or ETag that a remote storage keeps of a file's content; None for a local file, or where it keeps none.

    Raises:
        FileNotFoundError, PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    if is_local(url):
        return None
    entry = _info(url)
    # The Hub names a file's content by its Git object.
    return checksum(entry) or entry.get("blob_id")


def exists(url: str) -> bool:
    """Whether there is such a file or folder. A storage that does not answer raises an error instead.

    Raises:
        PermissionError, StorageError: see :mod:`vcf_batch.storage`.
    """
    try:
        _info(url)
    except FileNotFoundError:
        return False
    return True


def digest(url: str) -> FileEntry:
    """Size and SHA-256 of a file, streamed.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see :mod:`vcf_batch.storage`.
    """
    sha, total = hashlib.sha256(), 0
    with open_read(url) as file:
        while chunk := file.read(CHUNK_BYTES):
            sha.update(chunk)
            total += len(chunk)
    return FileEntry(total, sha.hexdigest())


def download(url: str, local_path: str) -> None:
    """Copy a file to ``local_path``, whole or not at all, and compare its size with the announced one.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see :mod:`vcf_batch.storage`. The first three
            concern ``url`` only; ``local_path`` that cannot be written is a StorageError.
    """

    def fetch() -> None:
        announced = size(url)
        of_url: Exception | None = None

        def fill(temporary: str) -> None:
            nonlocal of_url
            open(temporary, "wb").close()  # whoever may not write fails here
            try:
                if is_local(url):
                    shutil.copyfile(as_local_path(url), temporary)
                else:
                    fs, path = filesystem(url)
                    fs.get_file(path, temporary)
                # 0 stands for an unknown size: a streaming server announces none.
                if announced and os.path.getsize(temporary) != announced:
                    raise ConnectionError(f"{os.path.getsize(temporary)} of {announced} bytes arrived")
            except Exception as error:
                of_url = error
                raise

        try:
            local.publish(local_path, fill, create=False)
        except OSError as error:
            if (error is of_url and not room.is_full(error)) or may_pass(error):
                raise
            raise translated("write", local_path, error, 1, (), announced or None) from error

    retried("download", url, fetch)


@contextlib.contextmanager
def reading_threads(count: int, name: str = "") -> Iterator[ThreadPoolExecutor]:
    """Threads by which a generator reads ahead. Leaving the block cancels what has not begun, and waits for nothing.

    A generator that nobody reads to its end is closed where Python collects garbage. That may be within the start of a
    thread, whose locks are held then: to wait for another thread there never ends.

    Args:
        count: number of threads.
        name: begin of their names.
    """
    threads = ThreadPoolExecutor(count, name)
    try:
        yield threads
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def refusals_as_storage_errors() -> Iterator[None]:
    """Turn a PermissionError in the block into a StorageError, for files that a run cannot do without.

    Raises:
        StorageError: instead of the PermissionError, with its message.
    """
    try:
        yield
    except PermissionError as error:
        raise StorageError(str(error)) from error


def _open(url: str, under: str | None = None) -> Any:
    if is_local(url):
        return local.open_read(as_local_path(url), under)
    fs, path = _fresh(url)
    return fs.open(path, "rb")


def _fresh(url: str) -> tuple[Any, str]:
    """The driver of a remote file and the path in it, without what the driver remembers of the file.

    The Hub's driver keeps listings whatever its options say, and would read a file in its former size.
    """
    fs, path = filesystem(url)
    fs.invalidate_cache(path)
    return fs, path


def _info(url: str) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        if is_local(url):
            status = os.stat(as_local_path(url))
            kind = "file" if stat.S_ISREG(status.st_mode) else "other"
            return {"type": kind, "size": status.st_size}
        fs, path = _fresh(url)
        return cast(dict[str, Any], fs.info(path))

    return retried("look up", url, ask)
