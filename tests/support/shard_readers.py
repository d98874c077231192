"""Readers of shards that other processes run. They import little, as each process does so anew."""

import os
import signal
from collections.abc import Callable
from typing import Any

from vcf_batch.errors import StorageError
from vcf_batch.records import Shard


class StrikingReader:
    """Reader that does something at the sixth shard, and returns the name of each.

    Args:
        strike: a function without arguments.
    """

    def __init__(self, strike: Callable[[], Any]) -> None:
        self._strike = strike

    def __call__(self, shard: Shard) -> str:
        if shard.index == 5:
            self._strike()
        return shard.name


def killed() -> None:
    """End this process as the kernel does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def failed() -> None:
    """Raise what a storage does."""
    raise StorageError("the store is down")


def unsendable(shard: Shard) -> Any:
    """A result that cannot be pickled."""
    return lambda: shard


class TwoTexts(Exception):
    """An exception that can be pickled, and not read back."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first}, {second}")


def raises_what_cannot_be_read(shard: Shard) -> Any:
    raise TwoTexts("the first", "the second")


def exits(shard: Shard) -> Any:
    raise SystemExit(0)
