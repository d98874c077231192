"""Storage once, for local paths and every fsspec URL: open, list, publish whole files. No other module does it.

A *url* is a local path, a ``file://`` URL, or a URL of any installed fsspec protocol (``s3://``, ``gs://``, ``memory://``).
Three promises hold on all of them:

* A file is published whole or not at all. Local files are written beside their place, flushed to disk and renamed;
  objects are put in one request (or one multipart upload that is completed last). No file is ever opened for writing
  under its final name: leaving ``with fs.open(url, "wb")`` through an exception publishes the part that was written.
* Listings are never cached: another writer's file is seen as soon as the storage shows it.
* Nothing waits for ever: connecting and reading have time limits, and what may pass (throttling, timeouts, resets) is
  tried a few times with growing pauses (:mod:`vcf_batch.storage.retries`).

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
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, cast

from fsspec.callbacks import Callback

from vcf_batch.errors import StorageError, redact
from vcf_batch.records import FileEntry
from vcf_batch.storage import local
from vcf_batch.storage.drivers import filesystem
from vcf_batch.storage.resilient_file import Reader
from vcf_batch.storage.retries import MOVING, NotAFileError, attempt

_CHUNK = 1 << 20
_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "etag")

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
    return cast(BinaryIO, Reader(url, lambda: _open(url)))


def read_bytes(url: str, limit: int | None = None) -> bytes:
    """The file's bytes, at most the first ``limit`` of them (ask for one more than allowed to notice a larger file).

    Raises:
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see the module.
    """
    if limit is None and not is_local(url):
        fs, path = filesystem(url)
        return attempt("read", url, lambda: bytes(fs.cat_file(path)))
    with open_read(url) as file:
        return file.read(-1 if limit is None else limit)


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


def modified(url: str) -> float | None:
    """When the file was last written, in seconds since 1970 by the storage's clock; None where that is not kept.

    Raises:
        FileNotFoundError, PermissionError, StorageError: see the module.
    """
    if is_local(url):
        return attempt("look up", url, lambda: os.stat(_local(url)).st_mtime)
    fs, path = filesystem(url)

    def ask() -> float:
        fs.invalidate_cache(path)
        return cast(float, fs.modified(path).timestamp())

    try:
        return attempt("look up", url, ask)
    except NotImplementedError:
        return None


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

    if is_local(url):
        return _local_listing(url, local.files)
    return {name(entry["name"]): int(entry["size"] or 0) for entry in _entries(url) if entry["type"] == "file"}


def list_tree(url: str) -> dict[str, int]:
    """Relative path and size of all files under a folder, at any depth; ``{}`` if there is no such folder. Uncached.

    Raises:
        PermissionError, StorageError: see the module.
    """

    if is_local(url):
        return _local_listing(url, local.tree)
    return {file: int(entry["size"] or 0) for file, entry in _walk(url)}


def list_checksums(url: str) -> dict[str, tuple[int, str | None]]:
    """Like :func:`list_tree` for URLs that are not local: size, and the checksum that the store keeps, if it does.

    Raises:
        PermissionError, StorageError: see the module.
    """

    return {
        file: (int(entry["size"] or 0), next((str(entry[key]) for key in _CHECKSUMS if entry.get(key)), None))
        for file, entry in _walk(url)
    }


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
                fs, path = filesystem(url)
                fs.get_file(path, temporary)
            # Servers that stream do not announce a size: 0 stands for unknown there.
            if announced and os.path.getsize(temporary) != announced:
                raise ConnectionError(f"{os.path.getsize(temporary)} of {announced} bytes arrived")

        local.publish(local_path, fill, create=False)

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
            local.publish(_local(url), lambda temporary: local.write(temporary, data), create)
            return
        fs, path = filesystem(url)
        fs.pipe_file(path, data, **({"mode": "create"} if create else {}))

    try:
        attempt("write", url, publish, (FileExistsError,) if create else ())
    except FileExistsError:
        # An earlier try may have won and only its answer was lost.
        if tries == 1 or read_bytes(url) != data:
            raise


def upload(local_path: str, url: str, tick: Callable[[], None] = lambda: None) -> None:
    """Copy a local file to ``url``, whole or not at all, and check the size that arrived.

    Args:
        tick: called for each part that has gone over.

    Raises:
        StorageError: see the module.
    """

    def copy(temporary: str) -> None:
        with open(local_path, "rb") as source, open(temporary, "wb") as target:
            while chunk := source.read(_CHUNK):
                target.write(chunk)
                tick()

    def put() -> None:
        if is_local(url):
            local.publish(_local(url), copy, create=False)
            return
        fs, path = filesystem(url)
        fs.put_file(local_path, path, callback=_Parts(tick))
        arrived, sent = size(url), os.path.getsize(local_path)
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
            local.sync_folder(_local(target))

        attempt("move", source, rename, MOVING)
        return
    fs, path = filesystem(source)
    attempt("copy", source, lambda: fs.cp_file(path, filesystem(target)[1]), MOVING)
    remove(source, missing_ok=True)


def remove(url: str, missing_ok: bool = False) -> None:
    """Delete one file.

    Raises:
        FileNotFoundError: there is none, unless ``missing_ok``.
        StorageError: see the module.
    """

    tries = 0

    def delete() -> None:
        nonlocal tries
        tries += 1
        if is_local(url):
            os.unlink(_local(url))
            return
        fs, path = filesystem(url)
        if not missing_ok:
            fs.info(path)  # an object store deletes what does not exist without a word
        fs.rm_file(path)

    try:
        attempt("delete", url, delete, MOVING)
    except FileNotFoundError:
        # An earlier try may have deleted it and only its answer was lost.
        if not missing_ok and tries == 1:
            raise


def remove_tree(url: str) -> None:
    """Delete a folder and everything in it; fine if there is none.

    Raises:
        StorageError: see the module.
    """

    if is_local(url):
        with contextlib.suppress(FileNotFoundError):
            attempt("delete", url, lambda: shutil.rmtree(_local(url)), MOVING)
        return
    # One by one: fs.rm(recursive=True) reads brackets and stars in names as patterns.
    for file in list_tree(url):
        remove(join(url, file), missing_ok=True)


def remove_unfinished(url: str) -> None:
    """Delete what killed writers left directly in a local folder. Other storages show nothing that is unfinished.

    Raises:
        StorageError: the storage failed.
    """
    if is_local(url):
        for path in attempt("list", url, lambda: local.unfinished(_local(url)), ()):
            remove(path, missing_ok=True)


# For a library that keeps files of its own


def arrow_filesystem(url: str) -> tuple[Any, str]:
    """Arrow's view of the storage, with this module's drivers and options, and the path of ``url`` in it.

    Raises:
        UsageError: see the module.
    """
    import pyarrow.fs  # nothing else here needs it

    if is_local(url):
        return pyarrow.fs.LocalFileSystem(), absolute(url)
    fs, path = filesystem(url)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


# How it is done


class _Parts(Callback):
    """Told by drivers of each part that has gone over."""

    def __init__(self, tick: Callable[[], None]) -> None:
        super().__init__()
        self._tick = tick

    def relative_update(self, inc: int = 1) -> None:
        self._tick()


def _split(url: str) -> tuple[str, str]:
    """``scheme://`` (empty for a path) and the rest."""
    scheme, separator, rest = url.partition("://")
    return (scheme + separator, rest) if separator else ("", url)


def _local(url: str) -> str:
    return url.removeprefix("file://")


def _local_listing(url: str, files: Callable[[str], Iterator[tuple[str, int]]]) -> dict[str, int]:
    try:
        return attempt("list", url, lambda: dict(files(_local(url))))
    except FileNotFoundError:
        return {}


def _entries(url: str) -> list[dict[str, Any]]:
    """What is directly in a folder that is not local, as its driver tells it; nothing if there is no such folder."""

    def listing() -> list[dict[str, Any]]:
        fs, path = filesystem(url)
        fs.invalidate_cache(path)
        return [entry for entry in fs.ls(path, detail=True) if entry["name"].rstrip("/") != path.rstrip("/")]

    try:
        return attempt("list", url, listing)
    except FileNotFoundError:
        return []


def _walk(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Relative path and entry of each file under a folder that is not local."""
    # Not fs.find: most drivers leave out what they fail to list, without a word.
    folders = [""]
    while folders:
        folder = folders.pop()
        for entry in _entries(join(url, folder)):
            path = f"{folder}/{name(entry['name'])}".removeprefix("/")
            if entry["type"] == "file":
                yield path, entry
            elif entry["type"] == "directory":
                folders.append(path)


def _open(url: str) -> Any:
    if is_local(url):
        return local.open_read(_local(url))
    fs, path = filesystem(url)
    return fs.open(path, "rb")


def _info(url: str) -> dict[str, Any]:
    def ask() -> dict[str, Any]:
        if is_local(url):
            status = os.stat(_local(url))
            kind = "file" if stat.S_ISREG(status.st_mode) else "other"
            return {"type": kind, "size": status.st_size}
        fs, path = filesystem(url)
        fs.invalidate_cache(path)
        return cast(dict[str, Any], fs.info(path))

    return attempt("look up", url, ask)
