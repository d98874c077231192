"""Files of this machine: opened without waiting, listed while others write, published whole or not at all."""

import contextlib
import errno
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO

from vcf_batch.storage.retries import NotAFileError

CREATOR_SECONDS = 1.0
"""Seconds after which a file that is still empty has lost its creator, on a file system without hard links."""

_TEMPORARY = ".tmp-"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
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
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotAFileError(errno.EISDIR, "not a regular file", path)
        return open(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


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


def unfinished(folder: str, silent_for: float) -> list[str]:
    """Paths of the temporary files directly in a folder: still being written, or left by a killed writer.

    Args:
        silent_for: seconds since the last write, by this machine's clock, from which on a file is listed; 0 lists all.
    """
    found: list[str] = []
    # A folder or a file that is deleted meanwhile is left out.
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.name.startswith(_TEMPORARY) and (
                    not silent_for or time.time() - os.stat(entry.path).st_mtime >= silent_for
                ):
                    found.append(entry.path)
    return found


def publish(path: str, fill: Callable[[str], object], create: bool) -> None:
    """Write a temporary file in the folder of ``path`` with ``fill``, flush it to disk, and rename it to ``path``.

    Raises:
        FileExistsError: ``create`` is true and ``path`` exists.
        OSError: the file cannot be written.
    """
    folder = os.path.dirname(path) or "."
    _make_folder(folder)
    temporary = os.path.join(folder, _TEMPORARY + uuid.uuid4().hex)
    try:
        fill(temporary)
        _sync(temporary)
        if create:
            _create(temporary, path)
        else:
            os.replace(temporary, path)
        sync_folder(path)
    finally:
        # One that stays is deleted with those of killed writers; the outcome is that of the steps before.
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def remove_tree(top: str) -> None:
    """Delete a folder and everything in it, if it exists, also while others delete files in it.

    Raises:
        OSError: a file or folder cannot be deleted.
    """
    try:
        shutil.rmtree(top)
    except (FileNotFoundError, NotADirectoryError):
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISDIR(os.lstat(top).st_mode):
                raise OSError(errno.ENOTEMPTY, "others delete files in the folder too", top) from None


def _make_folder(folder: str) -> None:
    """Make a folder and its parents, unless it is there.

    Raises:
        NotADirectoryError: a file stands in its place.
        OSError: the folder cannot be made or looked at.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except FileExistsError as error:
        # makedirs also raises this if it cannot look at a folder that is there. This look tells why.
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "not a folder", folder) from error


def _create(temporary: str, path: str) -> None:
    """Give a whole file its final name. A file there that stays empty is one whose creator died, and is replaced."""
    try:
        _link(temporary, path)
    except FileExistsError:
        if not _is_abandoned(path):
            raise
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        _link(temporary, path)


def _is_abandoned(path: str) -> bool:
    """Whether a file is empty, and nobody writes it within :data:`CREATOR_SECONDS`; or is gone by now."""
    try:
        before = os.stat(path)
        if before.st_size or not stat.S_ISREG(before.st_mode):
            return False
        time.sleep(CREATOR_SECONDS)
        after = os.stat(path)
    except FileNotFoundError:
        return True
    return (after.st_size, after.st_mtime_ns) == (0, before.st_mtime_ns)


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _write_new(path, _content(temporary))


def _write_new(path: str, data: bytes) -> None:
    """Create a file and write it in place, for file systems without hard links, such as FAT and many network ones.

    Creating the name lets only one writer win. A writer that dies before its data is there leaves an empty file, which
    counts as absent. One that is suspended there longer than :data:`CREATOR_SECONDS` writes into a file that has no
    name any more, and replaces nothing.

    Raises:
        FileExistsError: another writer was first, or took this one for dead.
        OSError: the file cannot be written.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError:
        with contextlib.suppress(OSError):
            if data.startswith(_content(path)):
                os.unlink(path)
        raise
    try:
        stays = _content(path) == data
    except FileNotFoundError:
        stays = False
    if not stays:
        raise FileExistsError(errno.EEXIST, "another writer was faster", path)


def _content(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


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
