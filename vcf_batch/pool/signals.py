"""Ctrl-C and SIGTERM: the first one ends a run in order, the second one at once."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from vcf_batch.errors import Interrupted


class Signals:
    """Handler that turns SIGINT and SIGTERM into :class:`vcf_batch.errors.Interrupted`, raised when the block is left.

    The first signal arrives in the block as KeyboardInterrupt, the only exception that Ray's blocking calls let
    through. Leaving the block then ends the workers and frees the output. A second signal ends the process at once,
    with the signal's exit code. No finished shard is lost.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        self.install()
        return self

    def install(self) -> None:
        """Install the handler. Another call takes back signals that something else has taken."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                before = signal.signal(number, self._receive)
                self._before.setdefault(number, before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            sys.stderr.write("\nStopped at once. Finished shards are kept: rerun the same command to go on.\n")
            sys.stderr.flush()
            os._exit(128 + number)
        self._received = number
        raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # Any exception after a signal is a consequence of the signal.
        if kind is not None and (self._received or issubclass(kind, KeyboardInterrupt)):
            raise Interrupted(self._received or signal.SIGINT) from None
