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
        NotAFileError: something else stands there.
        OSError: it cannot be opened.
    """
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotAFileError(errno.EISDIR, "not a regular file", path)
    return open(descriptor, "rb")


def files(folder: str) -> Iterator[tuple[str, int]]:
    """Name and size of each file directly in a folder; not of those that are still being written."""
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


def tree(top: str) -> Iterator[tuple[str, int]]:
    """Relative path and size of each file under a folder, at any depth."""
    for folder, _, _ in os.walk(top, onerror=_raise):
        # A folder that vanishes meanwhile was not there, like a file.
        with contextlib.suppress(FileNotFoundError):
            for name, size in files(folder):
                yield os.path.relpath(os.path.join(folder, name), top), size


def unfinished(folder: str) -> list[str]:
    """Paths of the files directly in a folder that are still being written, or that were when their writer died."""
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.name.startswith(_TEMPORARY)]
    except FileNotFoundError:
        return []


def publish(path: str, fill: Callable[[str], object], create: bool) -> None:
    """Let ``fill`` write a temporary file beside ``path``; flush it to disk; give it its name.

    Raises:
        FileExistsError: ``create``, and the name is taken.
        OSError: it cannot be written.
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
        # File systems over object stores have no hard links; claiming the name first keeps one winner.
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
