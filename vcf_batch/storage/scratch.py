"""Scratch folders of workers on local disk: no worker leaves one behind, not even one that was killed."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "vcf-batch-scratch-"
_OWNER = "owner"
"""A file in each folder that its process holds locked for as long as it lives; the kernel lets go of it."""


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """A folder for the length of the block."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX) as path, open(os.path.join(path, "new"), "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        os.rename(owner.name, os.path.join(path, _OWNER))  # nobody sees it unlocked
        yield path


def clean() -> None:
    """Delete the folders of processes on this machine that were killed."""
    for owner in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError), owner.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where the process lives
            shutil.rmtree(owner.parent)
