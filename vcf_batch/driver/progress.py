"""The progress of a run, and of commands: a live bar on a terminal, or a plain line now and then in a log.

The log has lines for people, or one JSON object a line for programs. A run in a notebook has a bar too.
"""

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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

_STEPS_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}]"
"""Form of a command's bar. tqdm's own form tells a rate below 1 as the seconds of a step."""

_HEAD = len("100%|" + "| ")
_LEAST_BAR = 5
"""Fewest columns of a run's bar itself."""

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
        verbosity: see :attr:`vcf_batch.config.run_config.RunConfig.verbosity`. In ``json``, ``normal`` is ``verbose``.
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
                bar_format=_STEPS_FORMAT,
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


@contextlib.contextmanager
def awaiting(doing: str) -> Iterator[None]:
    """Log what is waited for, and how long it takes every :data:`LINE_SECONDS` until it is there.

    Args:
        doing: what is waited for, such as ``starting Ray``.
    """
    begin, ended = time.monotonic(), threading.Event()

    def tell() -> None:
        while not ended.wait(LINE_SECONDS):
            _log.info("%s, %s so far", doing, _whole(time.monotonic() - begin))

    _log.info("%s", doing)
    teller = threading.Thread(target=tell, name="awaiting", daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()


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
        self._start = self._begin = self._shown = now()
        self._bar: Any = None
        if bar is not None and (in_notebook() or bar.isatty()):
            if in_notebook():
                from tqdm.auto import tqdm  # a widget, where there are widgets
            else:
                from tqdm import tqdm
            start = bar_format([f"{done:,}/{total:,}"])
            self._bar = tqdm(total=total, initial=done, file=bar, dynamic_ncols=True, bar_format=start)
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
        now = self._now()
        if phase:
            self._begin, self._initial = now, done  # The time left follows from the time that workers work.
        # What is done again counts from there: a rate is never negative.
        self._initial = min(self._initial, done)
        rate = (done - self._initial) / max(now - self._begin, 1e-9)
        left = f"{_whole((self._total - done) / rate)} left" if rate > 0 else ""
        if self._bar is not None:
            passed, count = _whole(now - self._start), f"{done:,}/{self._total:,}"
            is_done = done == self._total
            work = [count, f"{failed:,} failed", f"in {passed}" if is_done else left or passed]
            work += [] if is_done else [plural(workers, "worker")]
            work += [f"{rate:.2f} a second"] if rate > 0 else []
            self._draw(done, [phase, passed, count] if phase else [*work, *_scores(means)])
        elif now - self._shown >= LINE_SECONDS:
            self._shown = now
            share = f"{done:,} of {self._total:,} samples ({done / self._total:.0%})"
            work = [f"{rate:.2f} a second", left or "time left unknown", f"{failed:,} failed", *_scores(means)]
            words = [phase] if phase else [*work, plural(workers, "worker")]
            self.note(", ".join([share, *words]), "progress", rows=done)

    def _draw(self, done: int, words: list[str]) -> None:
        self._bar.n = done
        self._bar.bar_format = bar_format(words, self._bar.format_dict["ncols"])
        self._bar.refresh()

    def note(self, message: str, event: str = "note", level: int = logging.INFO, **fields: Any) -> None:
        """Log a message.

        Args:
            event: kind of the event, for programs.
            fields: known fields of :data:`FIELDS`.
        """
        _log.log(level, message, extra={"event": event, **fields})


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


def _whole(seconds: float) -> str:
    """Seconds in words, without fractions: for what changes at each look."""
    whole = round(seconds)
    return f"{whole}s" if whole < 60 else duration(whole)


def _scores(means: Mapping[str, float]) -> list[str]:
    return [f"{name} {mean:.3f}" for name, mean in means.items()]


def bar_format(parts: Sequence[str], columns: int | None = None) -> str:
    """The form of a run's bar with as many words as fit beside it.

    Args:
        parts: the words, those that matter most first. The first part is always there, cut or without a bar if need be.
        columns: width of the terminal. None, or less than 1 as tqdm has it of a terminal without a size, is all words.
    """
    if columns is None or columns < 1:
        words = ", ".join(parts)
    elif (room := columns - _HEAD - _LEAST_BAR) >= len(parts[0]):
        words = _fitting(parts, room)
    else:
        return _escaped(_fitting(parts, columns))
    return "{percentage:3.0f}%|{bar}| " + _escaped(words)


def _fitting(parts: Sequence[str], columns: int) -> str:
    """As many of the parts, from the first one on, as fit into so many columns."""
    words = parts[0][:columns]
    for part in parts[1:]:
        if len(words) + len(f", {part}") > columns:
            break
        words += f", {part}"
    return words


def _escaped(words: str) -> str:
    return words.replace("{", "{{").replace("}", "}}")


def plural(count: int, noun: str) -> str:
    """A count and its noun, in the singular or the plural."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def plural_are(count: int, noun: str) -> str:
    """A count and its noun, with *is* or *are*."""
    return f"{plural(count, noun)} {'is' if count == 1 else 'are'}"


def told_truncated(count: int) -> str:
    """What is told of prompts that were cut off at the length of the text encoder."""
    return f"prompts of {plural(count, 'row')}, at the length of the text encoder"
