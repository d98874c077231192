"""Storage once, for local paths and every fsspec URL: open, list, publish whole files. No other module does it.

A *url* is a local path, a ``file://`` URL, or a URL of any installed fsspec protocol (``s3://``, ``gs://``, ``memory://``).
Three promises hold on all of them:

* A file is published whole or not at all. Local files are written beside their place, flushed to disk and renamed;
  objects are put in one request (or one multipart upload that is completed last). No file is ever opened for writing
  under its final name: leaving ``with fs.open(url, "wb")`` through an exception publishes the part that was written.
* Listings are never cached: another writer's file is seen as soon as the storage shows it.
* Nothing waits for ever: connecting and reading have time limits, and what may pass (throttling, timeouts, resets) is
  tried a few times with growing pauses (:mod:`vcf_batch.storage_errors`).

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
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

import fsspec
import fsspec.config
import fsspec.core

from vcf_batch.errors import StorageError, UsageError, redact
from vcf_batch.records import FileEntry
from vcf_batch.storage_errors import MOVING, READING, NotAFileError, T, attempt, translated

_CONNECT_SECONDS = 5
_READ_SECONDS = 20
_HTTP_SECONDS = 1800
_CONNECTIONS = 64
_CHUNK = 1 << 20
_TEMPORARY = ".tmp-"
_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "etag")
_NO_LISTINGS_CACHE = ("sftp", "ssh")
"""Drivers that keep no listings, and hand every option that they do not know to their connection, which refuses it."""

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


# Reading


def open_read(url: str) -> BinaryIO:
    """Open a file for reading; use it with ``with``. Seekable, wherever the server can do it.

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: at opening, and while reading.
    """
    return cast(BinaryIO, _Reader(attempt("open", url, lambda: _open(url)), url))


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

    return attempt("read", url, read)


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

    return _listed(url, listing)


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
        return {file: int(info["size"] or 0) for file, info in _find(url)}

    return _listed(url, listing)


def list_checksums(url: str) -> dict[str, tuple[int, str | None]]:
    """Like :func:`list_tree` for URLs that are not local: size, and the checksum that the store keeps, if it does.

    Raises:
        PermissionError, StorageError: see the module.
    """

    def listing() -> dict[str, tuple[int, str | None]]:
        return {
            file: (int(info["size"] or 0), next((str(info[key]) for key in _CHECKSUMS if info.get(key)), None))
            for file, info in _find(url)
        }

    return _listed(url, listing)


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

    attempt("download", url, fetch)


@contextlib.contextmanager
def refusals_as_storage_errors() -> Iterator[None]:
    """Within the block a PermissionError becomes a StorageError: for what a run cannot do without.

    Raises:
        StorageError: instead of the PermissionError, with its message.
    """
    try:
        yield
    except PermissionError as error:
        raise StorageError(str(error)) from error


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
        attempt("write", url, publish, (FileExistsError,) if create else ())
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

    attempt("upload", url, put, ())


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

        attempt("move", source, rename, MOVING)
        return
    fs, path = _filesystem(source)
    attempt("copy", source, lambda: fs.cp_file(path, _filesystem(target)[1]), MOVING)
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
        attempt("delete", url, delete, MOVING)


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
        attempt("delete", url, delete, MOVING)


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
            raise translated("read", self._url, error, 1, READING) from error


def _split(url: str) -> tuple[str, str]:
    """``scheme://`` (empty for a path) and the rest."""
    scheme, separator, rest = url.partition("://")
    return (scheme + separator, rest) if separator else ("", url)


def _local(url: str) -> str:
    return url.removeprefix("file://")


def _filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem (one per process and protocol) and the path in it."""
    protocol = url.partition("://")[0]
    try:
        return fsspec.core.url_to_fs(url, **_options(protocol))
    except (ImportError, ValueError) as error:
        message = f"cannot use {redact(url)}: {error}. Install the fsspec driver of {protocol}:// or use another URL."
        raise UsageError(message) from error


def _options(protocol: str) -> dict[str, Any]:
    """What a driver is created with."""
    options: dict[str, Any] = {} if protocol in _NO_LISTINGS_CACHE else {"use_listings_cache": False}
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
    return options


def _listed(url: str, listing: Callable[[], dict[str, T]]) -> dict[str, T]:
    try:
        return attempt("list", url, listing)
    except FileNotFoundError:
        return {}


def _find(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Relative path of each file under a folder that is not local, and what its store says of it."""
    fs, path = _filesystem(url)
    fs.invalidate_cache(path)
    prefix = path.rstrip("/") + "/"
    for file, info in cast(dict[str, dict[str, Any]], fs.find(path, detail=True)).items():
        if info["type"] == "file" and file.startswith(prefix):
            yield file.removeprefix(prefix), info


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

    return attempt("look up", url, ask)


def _local_files(folder: str) -> Iterator[tuple[str, int]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found = entry.is_file() and not entry.name.startswith(_TEMPORARY)
                size = entry.stat().st_size if found else 0
            except OSError as error:
                # A file that vanishes meanwhile was not there: listings race with other writers. Nor is a link in a
                # circle a file.
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
            else:
                if found:
                    yield entry.name, size


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
