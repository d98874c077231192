"""Disks without room: how they are recognised in any library's error, and how they are told."""

import errno
import os
import re
import shutil

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a disk, or of a user's share of it, that is full."""

# Libraries written in Rust and C++ have errors of their own classes. torch tells no reason at all.
_TEXT = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed|inline_container")


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk has no room."""
    return getattr(error, "errno", None) in FULL or bool(_TEXT.search(str(error)))


def told(folder: str, needed: int | None) -> str:
    """The state of the disk in words.

    Args:
        folder: where the file should be, or a folder in which it does not exist yet.
        needed: number of bytes that should be written; None if it is not known.
    """
    there = folder
    while not os.path.isdir(there) and os.path.dirname(there) != there:
        there = os.path.dirname(there)
    try:
        free = f"{shutil.disk_usage(there).free:,} are free"
    except OSError:
        free = "none is free"
    wanted = "more bytes than there are" if needed is None else f"{needed:,} bytes"
    return f"No space left on the disk, or in your share of it: {wanted} are needed in {folder}, and {free}"
