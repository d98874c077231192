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
# O_PATH asks for no permission to list the folder. Only Linux has it; elsewhere a folder on the way must be readable.
_FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC
"""How a folder is opened on the way to a file."""


def open_read(path: str, under: str | None = None) -> BinaryIO:
    """Open a regular file.

    Args:
        path: the file.
        under: a folder that holds the file at some depth. No link is followed below it, so what is opened lies in it,
            whatever is renamed meanwhile. Both paths are absolute, and without ``..``.

    Raises:
        NotAFileError: ``path`` is not a regular file.
        OSError: the file cannot be opened.
    """
    # O_NONBLOCK: otherwise opening a pipe without a writer would wait forever.
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags) if under is None else _open_below(under, path, flags | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(errno.EISDIR, "not a regular file", path)
    return open(descriptor, "rb")


def _open_below(folder: str, path: str, flags: int) -> int:
    """Open ``path`` from ``folder`` on, each folder by the descriptor of the one above it, and give its descriptor."""
    if path == folder:
        return os.open(path, flags)
    *folders, name = os.path.relpath(path, folder).split(os.sep)
    descriptor = os.open(folder, _FOLDER)
    try:
        for part in folders:
            inner = os.open(part, _FOLDER | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        return os.open(name, flags, dir_fd=descriptor)
    finally:
        os.close(descriptor)


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
