"""What a run shows of itself."""

import io

import pytest

from vcf_batch import progress
from vcf_batch.progress import Progress, duration


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    stream = io.StringIO()
    with Progress(100, 20, stream) as shown:
        shown.update(60, 3, 2)
        shown.note("a worker died")
    first, second = stream.getvalue().splitlines()
    assert first.startswith("60 of 100 samples (60%), ")
    assert first.endswith(" left, 3 failed, 2 workers")
    assert second == "a worker died"


def test_a_log_is_not_flooded() -> None:
    stream = io.StringIO()
    with Progress(100, 0, stream) as shown:
        for done in range(100):
            shown.update(done, 0, 1)
    assert stream.getvalue() == ""


def test_a_terminal_gets_one_bar() -> None:
    stream = _Terminal()
    with Progress(100, 0, stream) as shown:
        shown.update(40, 1, 1)
    assert "40/100" in stream.getvalue()
    assert "1 failed, 1 worker" in stream.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2s"), (59.9, "59.9s"), (185, "3m 05s"), (3725, "1h 02m")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
