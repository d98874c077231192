"""The progress of a run, and of commands: a live bar on a terminal, or a plain line now and then in a log.

The log has lines for people, or one JSON object a line for programs. A run in a notebook has a bar too.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal, Self, TextIO, TypeVar

_log = logging.getLogger(__name__)

LINE_SECONDS = 10.0
"""Seconds between two lines, where there is no live bar."""

FIELDS = ("shard", "worker", "node", "rows", "seconds", "exit_code")
"""Further fields that an event may have, in its record's ``extra``."""

BAR_SECONDS = 1.0
"""Seconds after which a command's bar appears, so that what is quick shows none."""

_LEVELS = {"quiet": logging.WARNING, "normal": logging.INFO, "verbose": logging.DEBUG}


class _JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": getattr(record, "event", "note"),
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        return json.dumps(line)


class _Lines(logging.StreamHandler[TextIO]):
    """Writes to a stream, or to what standard error is at that moment, and below no bar."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream)
        self._given = stream

    def emit(self, record: logging.LogRecord) -> None:
        clear_bars()
        self.stream = self._given or sys.stderr
        super().emit(record)


def configure_log(log_format: str, verbosity: str = "normal", stream: TextIO | None = None) -> None:
    """Set the format of this process's log.

    Args:
        log_format: ``text``, or ``json``.
        verbosity: see :attr:`vcf_batch.config.RunConfig.verbosity`. In ``json``, ``normal`` is ``verbose``.
        stream: stream of the log; None is standard error.
    """
    as_json, package = log_format == "json", logging.getLogger("vcf_batch")
    handler = _Lines(stream)
    handler.setFormatter(_JsonLines() if as_json else logging.Formatter("%(message)s"))
    package.handlers = [handler]
    package.setLevel(logging.DEBUG if as_json and verbosity == "normal" else _LEVELS[verbosity])


Item = TypeVar("Item")

_bars: list[Any] = []
"""Bars that are shown now, of a run and of :class:`Steps`."""
_steps_are_shown: Literal["nowhere", "log", "bar"] = "nowhere"


def show_steps(log_format: str, verbosity: str) -> None:
    """Let this process show its :class:`Steps` beside such a log, as a command does. A library is silent."""
    global _steps_are_shown
    has_bar = bar_stream(log_format, verbosity) is not None
    _steps_are_shown = "nowhere" if verbosity == "quiet" else "bar" if has_bar else "log"


class Steps:
    """Display of how far one part of a command is; use it with ``with``.

    It is a bar on standard error, if that is a terminal, and else a line in the log every :data:`LINE_SECONDS`.

    Args:
        doing: what is done, such as ``reading``.
        total: number of steps.
        noun: what a step is, such as ``shard``.
        now: reads the clock.
    """

    def __init__(self, doing: str, total: int, noun: str, now: Callable[[], float] = time.monotonic) -> None:
        self._doing, self._total, self._noun, self._now = doing, total, noun, now
        self._begin = self._shown = now()
        self._done = 0
        self._bar: Any = None

    def __enter__(self) -> Self:
        if _steps_are_shown == "bar" and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                desc=self._doing,
                total=self._total,
                unit=f" {self._noun}s",
                file=sys.stderr,
                dynamic_ncols=True,
                delay=BAR_SECONDS,
                leave=False,
            )
            _bars.append(self._bar)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _close(self._bar)

    def advance(self) -> None:
        """Count one more step."""
        self._done += 1
        if self._bar is not None:
            self._bar.update()
        elif _steps_are_shown != "nowhere" and (now := self._now()) - self._shown >= LINE_SECONDS:
            self._shown, total = now, max(self._total, self._done)
            left = duration((now - self._begin) * (total - self._done) / self._done)
            done = f"{self._done:,} of {plural(total, self._noun)} ({self._done / total:.0%})"
            _log.info("%s: %s, %s left", self._doing, done, left, extra={"event": "progress"})


def steps(items: Iterable[Item], doing: str, total: int, noun: str) -> Iterator[Item]:
    """Pass items on, and show how many have been dealt with: see :class:`Steps`."""
    with Steps(doing, total, noun) as shown:
        for item in items:
            yield item
            shown.advance()


def clear_bars() -> None:
    """Take bars away until they change again, so that something else can be printed."""
    for bar in _bars:
        bar.clear()


def _close(bar: Any) -> None:
    """Let a bar be shown no more, if there is one."""
    if bar is not None:
        _bars.remove(bar)
        bar.close()


def bar_stream(log_format: str, verbosity: str) -> TextIO | None:
    """The stream that a live bar may be on, beside such a log."""
    return None if log_format == "json" or verbosity == "quiet" else sys.stderr


class Progress:
    """Display of a run's progress; use it with ``with``.

    Args:
        total: number of rows of the run.
        done: number of rows that were finished before.
        bar: stream that shows a live bar if it is a terminal, or a notebook's; None for lines in the log alone.
        now: reads the clock.
    """

    def __init__(
        self, total: int, done: int, bar: TextIO | None = None, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._initial, self._now = total, done, now
        self._begin = self._shown = now()
        self._bar: Any = None
        if bar is not None and (in_notebook() or bar.isatty()):
            if in_notebook():
                from tqdm.auto import tqdm  # a widget, where there are widgets
            else:
                from tqdm import tqdm
            self._bar = tqdm(total=total, initial=done, unit=" samples", file=bar, dynamic_ncols=True)
            _bars.append(self._bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        _close(self._bar)

    def update(
        self,
        done: int,
        failed: int,
        workers: int,
        means: Mapping[str, float] = MappingProxyType({}),
        phase: str = "",
    ) -> None:
        """Show the state. A line in the log comes at most every :data:`LINE_SECONDS`.

        Args:
            done: number of finished rows, those finished before included. It may fall when a shard is tried again.
            failed: number of finished rows that failed.
            workers: number of workers that are ready.
            means: mean of each score so far.
            phase: what happens before a worker is ready; empty once one is.
        """
        outcome = phase or _outcome(failed, workers, means)
        # What is done again counts from there: a rate is never negative.
        self._initial = min(self._initial, done)
        if self._bar is not None:
            self._bar.initial = self._initial
            self._bar.set_postfix_str(outcome, refresh=False)
            self._bar.n = done
            self._bar.refresh()
        elif self._now() - self._shown >= LINE_SECONDS:
            self._shown = self._now()
            self.note(self._line(done, outcome, bool(phase)), "progress", rows=done)

    def note(self, message: str, event: str = "note", level: int = logging.INFO, **fields: Any) -> None:
        """Log a message.

        Args:
            event: kind of the event, for programs.
            fields: known fields of :data:`FIELDS`.
        """
        _log.log(level, message, extra={"event": event, **fields})

    def _line(self, done: int, outcome: str, waits: bool) -> str:
        share = f"{done:,} of {self._total:,} samples ({done / self._total:.0%})"
        if waits:
            return f"{share}, {outcome}"
        rate = (done - self._initial) / max(self._shown - self._begin, 1e-9)
        left = f"{duration((self._total - done) / rate)} left" if rate > 0 else "time left unknown"
        return f"{share}, {rate:.2f} a second, {left}, {outcome}"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = ipython and ipython.get_ipython()
    return bool(shell and "IPKernelApp" in shell.config)


def duration(seconds: float) -> str:
    """Seconds in words, such as ``1h 02m``, ``3m 05s`` or ``4.2s``."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def _outcome(failed: int, workers: int, means: Mapping[str, float]) -> str:
    scores = "".join(f", {name} {mean:.3f}" for name, mean in means.items())
    return f"{failed} failed{scores}, {plural(workers, 'worker')}"


def plural(count: int, noun: str) -> str:
    """A count and its noun, in the singular or the plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def plural_are(count: int, noun: str) -> str:
    """A count and its noun, with *is* or *are*."""
    return f"{plural(count, noun)} {'is' if count == 1 else 'are'}"


def told_truncated(count: int) -> str:
    """What is told of prompts that were cut off at the length of the text encoder."""
    return f"prompts of {plural(count, 'row')}, at the length of the text encoder"
