"""How far a run is: one live bar on a terminal, a plain line now and then in a log."""

import sys
import time
from typing import Self, TextIO

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Between two lines where the output is not a terminal."""


class Progress:
    """Counts a run's samples; use it with ``with``.

    Args:
        total: rows of the run.
        done: rows that an earlier attempt at the run finished.
        stream: where to show it; None is standard error.
    """

    def __init__(self, total: int, done: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total, self._initial = total, done
        self._begin = self._shown = time.monotonic()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(total=total, initial=done, unit=" samples", file=self._stream, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, done: int, failed: int, workers: int) -> None:
        """Show the state, if it is time to.

        Args:
            done: rows finished, those of earlier attempts included; it may go back when a shard is tried again.
            failed: how many of the finished rows failed.
            workers: workers that are ready.
        """
        if self._bar is not None:
            self._bar.set_postfix_str(f"{failed} failed, {_plural(workers, 'worker')}", refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif time.monotonic() - self._shown >= LINE_SECONDS:
            self._shown = time.monotonic()
            self.note(self._line(done, failed, workers))

    def note(self, message: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(message, file=self._stream, flush=True)

    def _line(self, done: int, failed: int, workers: int) -> str:
        rate = (done - self._initial) / max(self._shown - self._begin, 1e-9)
        left = f"{duration((self._total - done) / rate)} left" if rate > 0 else "time left unknown"
        return (
            f"{done:,} of {self._total:,} samples ({done / self._total:.0%}), {rate:.2f} a second, {left}, "
            f"{failed} failed, {_plural(workers, 'worker')}"
        )


def duration(seconds: float) -> str:
    """Seconds as people say them, such as ``1h 02m``, ``3m 05s`` or ``4.2s``."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
