"""Scratch folders of workers on local disk; those of killed workers are removed, too."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vcf_batch.errors import StorageError, VcfBatchError
from vcf_batch.storage import room

_PREFIX = "vcf-batch-scratch-"
_OWNER = "owner"
"""Name of the lock file in each folder. Its process holds the lock while it lives; the kernel releases it."""


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """Create a scratch folder, and remove it at the end of the block as far as that is possible.

    Raises:
        StorageError: the folder cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.callback(_remove, path := tempfile.mkdtemp(prefix=_PREFIX))
            owner = stack.enter_context(open(os.path.join(path, "new"), "w"))
            fcntl.flock(owner, fcntl.LOCK_EX)
            os.rename(owner.name, os.path.join(path, _OWNER))  # so that nobody sees it unlocked
        except OSError as error:
            raise _not_made(error) from error
        yield path


@contextlib.contextmanager
def temporary(what: str, needed: int | None = None) -> Iterator[str]:
    """Create a folder for files of this process alone, and remove it at the end of the block.

    Args:
        what: the files, for the message.
        needed: number of bytes that are written; None if it is not known.

    Raises:
        StorageError: the folder cannot be made, or its disk is full.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="vcf-batch-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _not_made(error) from error
    with made as path, writing(what, path, needed):
        yield path


@contextlib.contextmanager
def writing(what: str, path: str, needed: int | None = None) -> Iterator[None]:
    """Tell of a full disk in the block in full: the folder, the bytes that are needed and free, and the remedy.

    Args:
        what: the files that are written, for the message.
        path: the scratch folder.
        needed: number of bytes that are written; None if it is not known.

    Raises:
        StorageError: the disk is full. Other errors pass.
    """
    try:
        yield
    except VcfBatchError:
        raise
    except Exception as error:
        if not room.is_full(error):
            raise
        raise StorageError(
            f"cannot write {what}: {room.told(path, needed)}. Make room there, or set TMPDIR to a folder on a larger "
            "disk."
        ) from error


def _not_made(error: OSError) -> StorageError:
    return StorageError(
        f"cannot make a scratch folder: {error}. Set TMPDIR to a folder that can be written and has room."
    )


def clean() -> None:
    """Delete the scratch folders of this user's killed processes on this machine.

    What another user has put there under such a name is left alone, and nothing in it is opened.
    """
    folders: list[Path] = []
    with contextlib.suppress(OSError):
        folders += Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")
    for path in folders:
        # O_NONBLOCK: otherwise opening a pipe without a writer would wait forever.
        with (
            contextlib.suppress(OSError),
            _opened(path, os.O_DIRECTORY) as folder,
            _opened(_OWNER, os.O_NONBLOCK, folder) as owner,
        ):
            fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the process is alive
            shutil.rmtree(path)


@contextlib.contextmanager
def _opened(path: str | Path, flags: int, folder: int | None = None) -> Iterator[int]:
    """Open a folder or a regular file of this user, no link, and give its descriptor.

    Raises:
        OSError: it is something else, somebody else's, or gone.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | flags, dir_fd=folder)
    try:
        found = os.fstat(descriptor)
        if found.st_uid != os.geteuid() or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise PermissionError(errno.EPERM, "not a file or folder of this user", str(path))
        yield descriptor
    finally:
        os.close(descriptor)


def _remove(path: str) -> None:
    # What stays is removed by a later clean, at the latest by whoever empties the folder of temporary files.
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True)
