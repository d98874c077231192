"""Files of this machine: opened without waiting, listed while others write, published whole or not at all."""

import contextlib
import errno
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO

from vcf_batch.storage.retries import NotAFileError

_TEMPORARY = ".tmp-"


def open_read(path: str) -> BinaryIO:
    """Open a regular file.

    Raises:
        NotAFileError: ``path`` is not a regular file.
        OSError: the file cannot be opened.
    """
    # O_NONBLOCK: otherwise opening a pipe without a writer would wait forever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(errno.EISDIR, "not a regular file", path)
    return open(descriptor, "rb")


def files(folder: str) -> Iterator[tuple[str, int]]:
    """Name and size of each file directly in a folder, without the temporary files of writers."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                found = entry.is_file() and not entry.name.startswith(_TEMPORARY)
                size = entry.stat().st_size if found else 0
            except OSError as error:
                # Left out: a file that another writer deletes during the listing, and a link that leads in a circle.
                if error.errno not in (errno.ENOENT, errno.ELOOP):
                    raise
            else:
                if found:
                    yield entry.name, size


def tree(top: str) -> Iterator[tuple[str, int]]:
    """Relative path and size of each file under a folder, at any depth, without the temporary files of writers."""
    for folder, _, _ in os.walk(top, onerror=_raise):
        # A folder deleted during the listing is left out, like a file.
        with contextlib.suppress(FileNotFoundError):
            for name, size in files(folder):
                yield os.path.relpath(os.path.join(folder, name), top), size


def unfinished(folder: str) -> list[str]:
    """Paths of the temporary files directly in a folder: still being written, or left by a killed writer."""
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.name.startswith(_TEMPORARY)]
    except FileNotFoundError:
        return []


def publish(path: str, fill: Callable[[str], object], create: bool) -> None:
    """Write a temporary file in the folder of ``path`` with ``fill``, flush it to disk, and rename it to ``path``.

    Raises:
        FileExistsError: ``create`` is true and ``path`` exists.
        OSError: the file cannot be written.
    """
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
        sync_folder(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        # File systems over object stores have no hard links. Creating the name first lets only one writer win.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        os.replace(temporary, path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: str) -> None:
    """Flush the folder of ``path`` to disk, so that a rename in it lasts."""
    # Some network file systems cannot flush a folder; the rename is then as durable as they make it.
    with contextlib.suppress(OSError):
        _sync(os.path.dirname(path) or ".")


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
