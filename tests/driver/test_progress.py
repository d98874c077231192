"""What a run shows of itself."""

import io
import logging
import re
import sys
import types
from collections.abc import Iterator

import pytest

from vcf_batch.driver import progress
from vcf_batch.driver.progress import Progress, configure_log, duration


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
    assert "40/100" in stream.getvalue()
    assert "1 failed, lpips 0.250, 1 worker" in stream.getvalue()


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
