"""Scratch folders of workers on local disk; those of killed workers are removed, too."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "vcf-batch-scratch-"
_OWNER = "owner"
"""Name of the lock file in each folder. Its process holds the lock while it lives; the kernel releases it."""


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """Create a scratch folder, and remove it at the end of the block."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as path, open(os.path.join(path, "new"), "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(owner.name, os.path.join(path, _OWNER))  # so that nobody sees it unlocked
        yield path


def clean() -> None:
    """Delete the scratch folders of killed processes on this machine."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError), owner.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if the process is alive
            shutil.rmtree(owner.parent)
