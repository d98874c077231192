"""Storage once, for local paths and every fsspec URL: open, list, publish whole files. No other module does it.

A *url* is a local path, a ``file://`` URL, or a URL of any installed fsspec protocol (``s3://``, ``gs://``, ``memory://``).
Three promises hold on all of them:

* A file is published whole or not at all. Local files are written beside their place, flushed to disk and renamed;
  objects are put in one request (or one multipart upload that is completed last). No file is ever opened for writing
  under its final name: leaving ``with fs.open(url, "wb")`` through an exception publishes the part that was written.
* Listings are never cached: another writer's file is seen as soon as the storage shows it.
* Nothing waits for ever: connecting and reading have time limits, and what may pass (throttling, timeouts, resets) is
  tried :data:`ATTEMPTS` times with growing pauses, with no new attempt after :data:`RETRY_SECONDS`.

Errors, the same on every storage, with credentials removed from their messages:

======================== ============================================================================================
``FileNotFoundError``    reading, moving, removing: no such file (also: a name that cannot exist, such as one too long)
``PermissionError``      reading, listing: the storage refuses
:class:`NotAFileError`   reading: a directory, pipe, socket or device stands there; it is not waited on
``FileExistsError``      :func:`publish_bytes` with ``create``: the file is there already
``StorageError``         everything else that storage or network do, and every failure of writing, refusals included
``UsageError``           no fsspec driver for the URL's protocol
======================== ============================================================================================
"""

import contextlib
import errno
import hashlib
import io
import os
import random
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import fsspec.config
import fsspec.core

from vcf_batch.errors import StorageError, UsageError, VcfBatchError
from vcf_batch.records import FileEntry

ATTEMPTS = 4
"""How often an operation is tried in all while its failure may pass."""
RETRY_SECONDS = 60.0
"""No new attempt starts later than this after the first: some drivers wait minutes within one attempt."""

_CONNECT_SECONDS = 5
_READ_SECONDS = 20
_HTTP_SECONDS = 1800
_CONNECTIONS = 64
_CHUNK = 1 << 20
_TEMPORARY = ".tmp-"
_WEB = ("http://", "https://")

_NO_SUCH_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP}
_PASSING_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EHOSTUNREACH,
    errno.EIO,
    errno.ENETUNREACH,
    errno.ENOTEMPTY,
    errno.EREMOTEIO,
    errno.ESTALE,
}
_PASSING_HTTP = {408, 409, 425, 429, 500, 502, 503, 504}
# Drivers have error classes of their own; named here, so that no driver needs to be imported.
_PASSING_CLASSES = {
    "ClientConnectionError",
    "ClientPayloadError",
    "ConnectionError",
    "HTTPClientError",
    "IncompleteRead",
    "IncompleteReadError",
    "ResponseStreamingError",
    "ServiceRequestError",
    "ServiceResponseError",
    "TransportError",
}
_ABSENT_CLASSES = {"InvalidURL", "TooManyRedirects"}
_REFUSED_CLASSES = {"NoCredentialsError", "PartialCredentialsError", "ClientAuthenticationError"}
_MISTAKES = (TypeError, AttributeError, LookupError, AssertionError, NotImplementedError, MemoryError)

_jitter = random.Random()

T = TypeVar("T")


class NotAFileError(OSError):
    """A directory, pipe, socket or device stands where a file was expected."""


Kinds = tuple[type[OSError], ...]

_READING: Kinds = (FileNotFoundError, PermissionError, NotAFileError)
_MOVING: Kinds = (FileNotFoundError,)


# Names


def is_local(url: str) -> bool:
    """True for a path and a ``file://`` URL."""
    return "://" not in url or url.startswith("file://")


def absolute(url: str) -> str:
    """The absolute path of a local ``url`` (``~`` is expanded); other URLs unchanged."""
    return os.path.abspath(os.path.expanduser(_local(url))) if is_local(url) else url


def join(base: str, *names: str) -> str:
    """``base`` and relative ``names`` with single slashes between them."""
    root, path = _split(base)
    parts = [path.rstrip("/"), *(part.strip("/") for part in names)]
    joined = "/".join(part for part in parts if part)
    return root + ("/" + joined.lstrip("/") if path.startswith("/") else joined)


def parent(url: str) -> str:
    """The folder that holds ``url``. The parent of a bucket or a root is itself."""
    root, path = _split(url)
    folder, slash, _ = path.rstrip("/").rpartition("/")
    if slash:
        return root + (folder or "/")
    return url if root or path.startswith("/") else "."


def name(url: str) -> str:
    """The last component of ``url``."""
    return _split(url)[1].rstrip("/").rpartition("/")[2]


def redact(text: str) -> str:
    """``text`` with user names, passwords and query strings (signatures, tokens) removed from every URL in it."""
    text = re.sub(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s/'\"]*@", r"\1", text)
    return re.sub(r"(://[^\s?'\"]*)\?[^\s'\"]*=[^\s'\"]*", r"\1?...", text)


# Reading


def open_read(url: str) -> BinaryIO:
    """Open a file for reading; use it with ``with``. Seekable, wherever the server can do it.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: at opening, and while reading.
    """
    return cast(BinaryIO, _Reader(_attempt("open", url, lambda: _open(url)), url))


def read_bytes(url: str, limit: int | None = None) -> bytes:
    """The file's bytes, at most the first ``limit`` of them (ask for one more than allowed to notice a larger file).

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see the module.
    """

    def read() -> bytes:
        if limit is None and not is_local(url):
            fs, path = _filesystem(url)
            return bytes(fs.cat_file(path))
        with contextlib.closing(_open(url)) as file:
            return file.read() if limit is None else _read_fully(file, limit)

    return _attempt("read", url, read)


def read_text(url: str) -> str:
    """The file's bytes as UTF-8.

    Raises:
        UnicodeDecodeError: they are not.
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see the module.
    """
    return read_bytes(url).decode("utf-8")


def size(url: str) -> int:
    """The file's size in bytes.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see the module.
    """
    info = _info(url)
    if info["type"] != "file":
        raise NotAFileError(errno.EISDIR, "not a regular file", redact(url))
    return int(info["size"] or 0)


def exists(url: str) -> bool:
    """True for a file or a folder. A storage that cannot be asked raises; it does not count as an absent file.

    Raises:
        PermissionError, StorageError: see the module.
    """
    try:
        _info(url)
    except FileNotFoundError:
        return False
    return True


def digest(url: str) -> FileEntry:
    """Size and SHA-256 of a file, streamed.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see the module.
    """
    sha, total = hashlib.sha256(), 0
    with open_read(url) as file:
        while chunk := file.read(_CHUNK):
            sha.update(chunk)
            total += len(chunk)
    return FileEntry(total, sha.hexdigest())


def list_files(url: str) -> dict[str, int]:
    """Name and size of the files directly in a folder; ``{}`` if there is no such folder. One uncached listing.

    Raises:
        PermissionError, StorageError: see the module.
    """

    def listing() -> dict[str, int]:
        if is_local(url):
            return dict(_local_files(_local(url)))
        fs, path = _filesystem(url)
        fs.invalidate_cache(path)
        entries = fs.ls(path, detail=True)
        return {name(e["name"]): int(e["size"] or 0) for e in entries if e["type"] == "file" and e["name"] != path}

    return _listed("list", url, listing)


def list_tree(url: str) -> dict[str, int]:
    """Relative path and size of all files under a folder, at any depth; ``{}`` if there is no such folder. Uncached.

    Raises:
        PermissionError, StorageError: see the module.
    """

    def listing() -> dict[str, int]:
        if is_local(url):
            found_locally: dict[str, int] = {}
            top = _local(url)
            for folder, _, _ in os.walk(top, onerror=_raise):
                # A folder that vanishes meanwhile was not there, like a file.
                with contextlib.suppress(FileNotFoundError):
                    for file, length in _local_files(folder):
                        found_locally[os.path.relpath(os.path.join(folder, file), top)] = length
            return found_locally
        fs, path = _filesystem(url)
        fs.invalidate_cache(path)
        prefix = path.rstrip("/") + "/"
        found = cast(dict[str, dict[str, Any]], fs.find(path, detail=True))
        return {
            file.removeprefix(prefix): int(info["size"] or 0)
            for file, info in found.items()
            if info["type"] == "file" and file.startswith(prefix)
        }

    return _listed("list", url, listing)


def download(url: str, local_path: str) -> None:
    """Copy a file to ``local_path``, whole or not at all; the size that arrives is the size that was announced.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see the module.
    """

    def fetch() -> None:
        announced = size(url)

        def fill(temporary: str) -> None:
            if is_local(url):
                shutil.copyfile(_local(url), temporary)
            else:
                fs, path = _filesystem(url)
                fs.get_file(path, temporary)
            # Servers that stream do not announce a size: 0 stands for unknown there.
            if announced and os.path.getsize(temporary) != announced:
                raise ConnectionError(f"{os.path.getsize(temporary)} of {announced} bytes arrived")

        _publish_local(local_path, fill, create=False)

    _attempt("download", url, fetch)


# Writing


def publish_bytes(url: str, data: bytes, create: bool = False) -> None:
    """Write a whole file at once, replacing what is there; readers see the old bytes or the new ones.

    Args:
        create: only if there is no such file yet. Of several writers one wins.

    Raises:
        FileExistsError: ``create``, and the file is there.
        StorageError: see the module.
    """
    tries = 0

    def publish() -> None:
        nonlocal tries
        tries += 1
        if is_local(url):
            _publish_local(_local(url), lambda temporary: _write(temporary, data), create)
            return
        fs, path = _filesystem(url)
        fs.pipe_file(path, data, **({"mode": "create"} if create else {}))

    try:
        _attempt("write", url, publish, (FileExistsError,) if create else ())
    except FileExistsError:
        # An earlier try may have won and only its answer was lost.
        if tries == 1 or read_bytes(url) != data:
            raise


def upload(local_path: str, url: str) -> None:
    """Copy a local file to ``url``, whole or not at all, and check the size that arrived.

    Raises:
        StorageError: see the module.
    """

    def put() -> None:
        if is_local(url):
            _publish_local(_local(url), lambda temporary: shutil.copyfile(local_path, temporary), create=False)
            return
        fs, path = _filesystem(url)
        fs.put_file(local_path, path)
        arrived, sent = fs.info(path)["size"], os.path.getsize(local_path)
        if arrived != sent:
            raise ConnectionError(f"{arrived} of {sent} bytes arrived")

    _attempt("upload", url, put, ())


def move(source: str, target: str) -> None:
    """Give a file another name in the same storage, replacing what is there.

    Locally a rename; elsewhere a copy within the server and a delete.

    Raises:
        FileNotFoundError: there is no ``source`` (or, locally, no folder to move it to).
        StorageError: see the module.
    """
    if is_local(source):

        def rename() -> None:
            os.replace(_local(source), _local(target))
            _sync_folder(_local(target))

        _attempt("move", source, rename, _MOVING)
        return
    fs, path = _filesystem(source)
    _attempt("copy", source, lambda: fs.cp_file(path, _filesystem(target)[1]), _MOVING)
    remove(source, missing_ok=True)


def remove(url: str, missing_ok: bool = False) -> None:
    """Delete one file.

    Raises:
        FileNotFoundError: there is none, unless ``missing_ok``.
        StorageError: see the module.
    """

    def delete() -> None:
        if is_local(url):
            os.unlink(_local(url))
            return
        fs, path = _filesystem(url)
        if not missing_ok:
            fs.info(path)  # an object store deletes what does not exist without a word
        fs.rm_file(path)

    with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])):
        _attempt("delete", url, delete, _MOVING)


def remove_tree(url: str) -> None:
    """Delete a folder and everything in it; fine if there is none.

    Raises:
        StorageError: see the module.
    """

    def delete() -> None:
        if is_local(url):
            shutil.rmtree(_local(url))
            return
        fs, path = _filesystem(url)
        fs.invalidate_cache(path)
        # Not fs.rm(recursive=True): it reads brackets and stars in names as patterns.
        for file in fs.find(path):
            fs.rm_file(file)

    with contextlib.suppress(FileNotFoundError):
        _attempt("delete", url, delete, _MOVING)


# How it is done


class _Reader(io.RawIOBase):
    """A file open for reading whose errors are this module's."""

    def __init__(self, file: Any, url: str) -> None:
        self._file = file
        self._url = url

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def read(self, size: int | None = -1, /) -> bytes:
        return self._do(lambda: self._file.read() if size is None or size < 0 else _read_fully(self._file, size))

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._do(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _do(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            raise _translated("read", self._url, error, 1, _READING) from error


def _split(url: str) -> tuple[str, str]:
    """``scheme://`` (empty for a path) and the rest."""
    scheme, separator, rest = url.partition("://")
    return (scheme + separator, rest) if separator else ("", url)


def _local(url: str) -> str:
    return url.removeprefix("file://")


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem (one per process and protocol) and the path in it."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        # One inner attempt: s3fs itself makes five of each request, and so do we of the whole operation.
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": {"max_attempts": 1},
            "max_pool_connections": _CONNECTIONS,
        }
    elif protocol in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=_HTTP_SECONDS, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        options["client_kwargs"] = {"timeout": timeout}
    # fsspec lets explicit options replace the user's configuration (FSSPEC_S3_... variables): merge instead.
    for option, value in fsspec.config.conf.get(protocol, {}).items():
        options[option] = {**options[option], **value} if isinstance(options.get(option), dict) else value
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        message = f"cannot use {redact(url)}: {error}. Install the fsspec driver of {protocol}:// or use another URL."
        raise UsageError(message) from error


def _attempt(action: str, url: str, call: Callable[[], T], stay: Kinds = _READING) -> T:
    """``call()``, again while its failure may pass; then this module's error.

    Args:
        stay: errors that a caller of this operation can act on; all others become StorageErrors.
    """
    begin = time.monotonic()
    number = 0
    while True:
        number += 1
        try:
            return call()
        except Exception as error:
            cause = error
            # fsspec's web driver calls whatever goes wrong in looking a file up, timeouts too, a missing file.
            if url.startswith(_WEB) and isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception):
                cause = error.__cause__
            last = number == ATTEMPTS or time.monotonic() - begin > RETRY_SECONDS
            if last or not _may_pass(cause):
                translated = _translated(action, url, cause, number, stay)
                if translated is error:
                    raise
                raise translated from error
        time.sleep(0.25 * 4 ** (number - 1) * (0.5 + _jitter.random()))


def _listed(action: str, url: str, listing: Callable[[], dict[str, int]]) -> dict[str, int]:
    try:
        return _attempt(action, url, listing)
    except FileNotFoundError:
        return {}


def _http_status(error: BaseException) -> int | None:
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        for attribute in ("status", "status_code", "code"):
            if isinstance(status := getattr(candidate, attribute, None), int):
                return status
    return None


def _classes(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _may_pass(error: Exception) -> bool:
    if isinstance(error, (VcfBatchError, *_MISTAKES)):
        return False
    return (
        isinstance(error, (TimeoutError, ConnectionError))
        or getattr(error, "errno", None) in _PASSING_ERRNO
        or _http_status(error) in _PASSING_HTTP
        or bool(_classes(error) & _PASSING_CLASSES)
    )


def _translated(action: str, url: str, error: Exception, attempts: int, stay: Kinds) -> Exception:
    """The error that the module's docstring promises for ``error``; ``error`` itself where it is a mistake of ours."""
    if isinstance(error, (VcfBatchError, *_MISTAKES)):
        return error
    where, status = redact(url), _http_status(error)
    reason = redact(f"{type(error).__name__}: {error}")
    refused = isinstance(error, PermissionError) or status in (401, 403) or bool(_classes(error) & _REFUSED_CLASSES)
    known: OSError | None = None
    if isinstance(error, FileExistsError) or status == 412:
        known = FileExistsError(errno.EEXIST, "the file is there already", where)
    elif refused:
        known = PermissionError(errno.EACCES, f"refused ({reason}); check credentials and permissions", where)
    elif isinstance(error, (NotAFileError, IsADirectoryError)) or getattr(error, "errno", None) == errno.ENXIO:
        known = NotAFileError(errno.EISDIR, "not a regular file", where)
    elif _is_absent(url, error, status):
        known = FileNotFoundError(errno.ENOENT, f"no such file (HTTP {status})" if status else "no such file", where)
    if isinstance(known, stay):
        return known
    tried = f" after {attempts} attempts" if attempts > 1 else ""
    remedy = "credentials and permissions" if refused else "that the storage is reachable, exists and has room"
    return StorageError(f"cannot {action} {where}{tried}: {reason}. Check {remedy}.")


def _is_absent(url: str, error: Exception, status: int | None) -> bool:
    if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in _NO_SUCH_FILE:
        return True
    if "embedded null" in str(error) or _classes(error) & _ABSENT_CLASSES:
        return True
    # A web server that answers with 4xx has nothing at that address, whatever it calls that.
    refusals = range(400, 500) if url.startswith(_WEB) else (404, 410)
    return status in refusals and status not in _PASSING_HTTP


def _open(url: str) -> Any:
    if not is_local(url):
        fs, path = _filesystem(url)
        return fs.open(path, "rb")
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(_local(url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(errno.EISDIR, "not a regular file", url)
    return open(descriptor, "rb")


def _read_fully(file: Any, count: int) -> bytes:
    """``count`` bytes or all there are: streaming HTTP files return less than asked for."""
    chunks: list[bytes] = []
    while count > 0 and (chunk := file.read(count)):
        chunks.append(chunk)
        count -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def _info(url: str) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        if is_local(url):
            status = os.stat(_local(url))
            kind = "file" if stat.S_ISREG(status.st_mode) else "other"
            return {"type": kind, "size": status.st_size}
        fs, path = _filesystem(url)
        fs.invalidate_cache(path)
        return cast(dict[str, Any], fs.info(path))

    return _attempt("look up", url, ask)


def _local_files(folder: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            # A file that vanishes meanwhile was not there: listings race with other writers.
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file() and not entry.name.startswith(_TEMPORARY):
                    yield entry.name, entry.stat().st_size


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _publish_local(path: str, fill: Callable[[str], object], create: bool) -> None:
    """Let ``fill`` write a temporary file beside ``path``; flush it to disk; give it its name."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, _TEMPORARY + uuid.uuid4().hex)
    try:
        fill(temporary)
        _sync(temporary)
        if create:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
        _sync_folder(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # File systems over object stores have no hard links; claiming the name first keeps one winner.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temporary, path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: str) -> None:
    # Some network file systems cannot flush a folder; the rename is then as durable as they make it.
    with contextlib.suppress(OSError):
        _sync(os.path.dirname(path) or ".")
