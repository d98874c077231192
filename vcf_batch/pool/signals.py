"""Ctrl-C and SIGTERM in a run: the first one ends it in order, the second one at once."""

import signal
import threading
from types import FrameType
from typing import Any

from vcf_batch import ending
from vcf_batch.errors import Interrupted

LOOK_AGAIN_SECONDS = 0.02
"""Seconds after which a signal that came in an import is looked at again."""


class Signals:
    """Handler that turns SIGINT and SIGTERM into :class:`vcf_batch.errors.Interrupted`, raised when the block is left.

    The first signal arrives in the block as KeyboardInterrupt, the only exception that Ray's blocking calls let
    through. Leaving the block then ends the workers and frees the output. A second signal ends the process at once,
    with the signal's exit code. No finished shard is lost.

    Code that Python calls by itself, such as an import or a hook of a fork, may swallow and print what is raised in it.
    So in an import KeyboardInterrupt waits until that is over; :meth:`check` raises it once more; and a process of the
    command line ends at once as long as it holds nothing.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        self._holds = not ending.is_installed()

    def __enter__(self) -> "Signals":
        self.install()
        return self

    def install(self) -> None:
        """Install the handler. Another call takes back signals that something else has taken."""
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGINT: self._receive, signal.SIGTERM: self._receive, signal.SIGALRM: self._interrupt}
            for number, handler in handlers.items():
                before = signal.signal(number, handler)
                self._before.setdefault(number, before)

    def hold(self) -> None:
        """Note that the run is about to own the output, so that from here on it has to be ended in order."""
        self._holds = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal has arrived. The run asks again and again."""
        if self._received is not None:
            raise KeyboardInterrupt

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            ending.at_once(128 + number, "Stopped at once. Finished shards are kept: rerun the same command to go on.")
        if not self._holds:
            ending.at_once(128 + number, "Interrupted. Finished shards are kept: rerun the same command to go on.")
        self._received = number
        self._interrupt(number, frame)

    def _interrupt(self, _: int, frame: FrameType | None) -> None:
        if ending.in_import(frame):
            signal.setitimer(signal.ITIMER_REAL, LOOK_AGAIN_SECONDS)
        else:
            raise KeyboardInterrupt

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        # Any exception after a signal is a consequence of the signal.
        if kind is not None and (self._received or issubclass(kind, KeyboardInterrupt)):
            raise Interrupted(self._received or signal.SIGINT) from None
