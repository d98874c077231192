"""Scratch folders of workers on local disk; those of killed workers are removed, too."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vcf_batch.errors import StorageError

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
            raise StorageError(
                f"cannot make a scratch folder: {error}. Set TMPDIR to a folder that can be written and has room."
            ) from error
        yield path


def clean() -> None:
    """Delete the scratch folders of killed processes on this machine."""
    owners: list[Path] = []
    with contextlib.suppress(OSError):
        owners += Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}")
    for owner in owners:
        with contextlib.suppress(OSError), owner.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the process is alive
            shutil.rmtree(owner.parent)


def _remove(path: str) -> None:
    # What stays is removed by a later clean, at the latest by whoever empties the folder of temporary files.
    with contextlib.suppress(OSError):
        shutil.rmtree(path, ignore_errors=True)
