"""What a run shows of itself."""

import contextlib
import fcntl
import io
import json
import logging
import os
import re
import select
import struct
import sys
import termios
import time
import types
from collections.abc import Callable, Iterator
from typing import TextIO

import pytest

from vcf_batch.driver import progress
from vcf_batch.driver.progress import Progress, Steps, awaiting, bar_format, configure_log, duration, show_steps, steps


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What the log gets."""
    stream = io.StringIO()
    configure_log("text", stream=stream)
    yield stream
    configure_log("text")


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, logged: io.StringIO) -> None:
    """Samples, rate, time left, failures, mean scores, workers."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    with Progress(100, 20) as shown:
        shown.update(60, 3, 2, {"lpips": 0.25})
        shown.note("a worker died", "worker_died")
    first, second = logged.getvalue().splitlines()
    assert first.startswith("60 of 100 samples (60%), ")
    assert first.endswith(" left, 3 failed, lpips 0.250, 2 workers")
    assert second == "a worker died"


def test_what_happens_before_a_worker_is_ready_is_said(monkeypatch: pytest.MonkeyPatch, logged: io.StringIO) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    stream = _Terminal()
    with Progress(100, 20) as in_log, Progress(100, 20, stream) as on_terminal:
        for shown in (in_log, on_terminal):
            shown.update(20, 0, 0, phase="loading the models on 2 workers")
    assert logged.getvalue() == "20 of 100 samples (20%), loading the models on 2 workers\n"
    assert "loading the models on 2 workers" in stream.getvalue()


def test_a_rate_is_never_negative(monkeypatch: pytest.MonkeyPatch, logged: io.StringIO) -> None:
    """What had been done may have to be done again, as by a training that resumes from an earlier checkpoint."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    seconds = iter(range(100))
    with Progress(100, 60, now=lambda: float(next(seconds))) as shown:
        shown.update(40, 0, 1)
        shown.update(50, 0, 1)
    first, second = logged.getvalue().splitlines()
    assert first.startswith("40 of 100 samples (40%), 0.00 a second, time left unknown")
    assert re.match(r"50 of 100 samples \(50%\), [1-9][.0-9]* a second, [0-9.]+s left", second)


def test_the_time_left_follows_from_the_time_that_workers_work(
    monkeypatch: pytest.MonkeyPatch, logged: io.StringIO
) -> None:
    """A start of a minute does not make the first minute's guess too long."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    seconds = iter([0.0, 60.0, 70.0])
    with Progress(100, 0, now=lambda: next(seconds)) as shown:
        shown.update(0, 0, 0, phase="loading the models on 2 workers")
        shown.update(20, 0, 2)
    assert logged.getvalue().splitlines()[1].startswith("20 of 100 samples (20%), 2.00 a second, 40s left, ")


def test_what_is_awaited_is_said_until_it_is_there(monkeypatch: pytest.MonkeyPatch, logged: io.StringIO) -> None:
    """Such as Ray, which takes half a minute to start on a busy machine."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.01)
    with awaiting("starting Ray on this machine"):
        while logged.getvalue().count("\n") < 3:
            time.sleep(0.01)
    said = logged.getvalue()
    assert re.match(r"starting Ray on this machine\n(starting Ray on this machine, 0s so far\n)+$", said)
    time.sleep(0.05)
    assert logged.getvalue() == said


def test_a_log_is_not_flooded(logged: io.StringIO) -> None:
    with Progress(100, 0) as shown:
        for done in range(100):
            shown.update(done, 0, 1)
            shown.note("a shard is finished", "shard_finished", logging.DEBUG)
    assert logged.getvalue() == ""


def test_a_terminal_gets_one_bar() -> None:
    stream = _Terminal()
    with Progress(100, 0, stream) as shown:
        shown.update(40, 1, 1, {"lpips": 0.25})
    assert re.search(r"40/100, 1 failed, .* left, 1 worker, .* a second, lpips 0\.250", stream.getvalue())


def test_a_notebook_gets_a_bar_though_it_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is known by its shell; IPython in a terminal, or in a script, is none."""
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    stream = io.StringIO()
    with Progress(100, 0, stream) as shown:
        shown.update(40, 1, 1)
    assert "40/100" in stream.getvalue()
    shell.config = {}
    assert not progress.in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: None))
    assert not progress.in_notebook()


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2s"), (59.9, "59.9s"), (185, "3m 05s"), (3725, "1h 02m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


COLUMNS = 40


MEANS = {"clip_score": 0.343, "clip_reference": 0.31, "lpips": 0.092}


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (40, "24/64, 0 failed, 40s left"),
        (80, "24/64, 0 failed, 40s left, 2 workers, 1.00 a second"),
        (110, "24/64, 0 failed, 40s left, 2 workers, 1.00 a second, clip_score 0.343, clip_reference 0.310"),
    ],
)
def test_beside_a_runs_bar_stand_whole_words(columns: int, words: str) -> None:
    """What matters most, as much of it as fits; nothing is cut off within a word."""
    seconds = iter([0.0, 10.0, 34.0])
    with terminal_of(columns) as (terminal, shown_there), Progress(64, 0, terminal, lambda: next(seconds)) as shown:
        shown.update(0, 0, 0, phase="loading the models on 2 workers")
        shown.update(24, 0, 2, MEANS)
        waiting, working = shown_there().rstrip().split("\r")[-2:]
    assert "loading the models on 2 workers, 10s" in waiting
    assert re.fullmatch(rf" 38%\|[^|]{{5,}}\| {re.escape(words)}", working.rstrip()) and len(working) <= columns


def test_a_bar_tells_what_there_is_to_tell() -> None:
    """No rate before a first sample, and at the end no workers, but how long it took."""
    seconds, stream = iter([0.0, 59.7, 70.0]), _Terminal()
    with Progress(64, 0, stream, lambda: next(seconds)) as shown:
        shown.update(0, 0, 2)
        shown.update(64, 0, 0)
    assert re.search(r"\| 0/64, 0 failed, 1m 00s, 2 workers *\r", stream.getvalue())
    assert re.search(r"\| 64/64, 0 failed, in 1m 10s, 0\.91 a second *\r", stream.getvalue())


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (None, "{percentage:3.0f}%|{bar}| loading {{it}}, 4s, 0/64"),
        (-1, "{percentage:3.0f}%|{bar}| loading {{it}}, 4s, 0/64"),
        (33, "{percentage:3.0f}%|{bar}| loading {{it}}, 4s"),
        (14, "loading {{it}}"),
        (7, "loading"),
    ],
)
def test_a_bar_gives_way_to_the_first_words(columns: int | None, shown: str) -> None:
    """They are cut only where they are longer than a line. A brace is a brace."""
    assert bar_format(["loading {it}", "4s", "0/64"], columns) == shown


@contextlib.contextmanager
def terminal_of(columns: int) -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A real terminal of so many columns, and what was written to it so far."""
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as terminal:

        def shown() -> str:
            terminal.flush()
            parts = []
            while select.select([ours], [], [], 0.2)[0]:
                parts.append(os.read(ours, 1 << 16))
            return b"".join(parts).decode()

        yield terminal, shown
    os.close(ours)


@pytest.fixture
def narrow_terminal() -> Iterator[tuple[TextIO, Callable[[], str]]]:
    """A terminal of few columns."""
    with terminal_of(COLUMNS) as opened:
        yield opened


@pytest.fixture
def shown_steps() -> Iterator[None]:
    """As in a command."""
    show_steps("text", "normal")
    yield
    show_steps("text", "quiet")


def test_a_command_says_in_the_log_how_far_it_is(logged: io.StringIO, shown_steps: None) -> None:
    """At most every ten seconds."""
    seconds = iter([0.0, 4.0, 10.0, 15.0, 21.0])
    with Steps("reading", 4_000, "shard", now=lambda: next(seconds)) as shown:
        for _ in range(4):
            shown.advance()
    assert logged.getvalue().splitlines() == [
        "reading: 2 of 4,000 shards (0%), 5h 33m left",
        "reading: 4 of 4,000 shards (0%), 5h 49m left",
    ]


def test_a_library_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch, logged: io.StringIO) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert [*steps(iter("abc"), "reading", 3, "shard")] == ["a", "b", "c"]
    assert not logged.getvalue()


def test_a_commands_bar_fits_a_narrow_terminal_and_goes_away_for_other_lines(
    monkeypatch: pytest.MonkeyPatch, shown_steps: None, narrow_terminal: tuple[TextIO, Callable[[], str]]
) -> None:
    """It is taken away before a line is printed, and at the end."""
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    terminal, shown = narrow_terminal
    monkeypatch.setattr(sys, "stderr", terminal)
    configure_log("text")
    for number in steps(range(3), "reading", 3, "shard"):
        if number == 1:
            logging.getLogger("vcf_batch").warning("00001: it is damaged")
    before, line, after = shown().partition("00001: it is damaged\r\n")
    assert re.search(r"\r +\r$", before) and "reading" in before and line and after.endswith("\r")
    assert all(len(part) <= COLUMNS for part in re.split(r"[\r\n]", before + after))


def test_a_log_of_json_has_no_bar(
    monkeypatch: pytest.MonkeyPatch, shown_steps: None, narrow_terminal: tuple[TextIO, Callable[[], str]]
) -> None:
    """Its progress is lines of JSON too."""
    terminal, shown = narrow_terminal
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "BAR_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    configure_log("json")
    show_steps("json", "normal")
    assert [*steps(range(2), "reading", 2, "shard")] == [0, 1]
    configure_log("text")
    first, second = map(json.loads, shown().splitlines())
    assert first["event"] == second["event"] == "progress" and "1 of 2 shards (50%)" in first["message"]


def test_a_runs_bar_fits_a_narrow_terminal(narrow_terminal: tuple[TextIO, Callable[[], str]]) -> None:
    terminal, shown_there = narrow_terminal
    with Progress(100_000, 20, terminal) as shown:
        shown.update(20, 3, 2, {"clip_score": 0.25, "lpips": 0.25})
    parts = re.split(r"[\r\n]", shown_there())
    assert any("20/100,000, 3 failed" in part for part in parts) and all(len(part) <= COLUMNS for part in parts)
