"""Failed starts of workers: longer and longer pauses, and an end."""

import pytest

from vcf_batch.driver import backoff
from vcf_batch.driver.backoff import MAX_BACKOFF_SECONDS, START_ATTEMPTS, StartBackoff


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(backoff, "time", clock)
    return clock


def test_pauses_grow_and_end(clock: Clock) -> None:
    subject, pauses = StartBackoff(), list[float]()
    for _ in range(10):
        assert subject.may_begin
        began = clock.now = clock.now + 1
        pause = subject.failed(began)
        assert pause is not None and not subject.may_begin
        pauses.append(pause)
        clock.now += pause
    assert pauses[0] == 1
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_BACKOFF_SECONDS


def test_workers_that_fail_to_start_together_count_once(clock: Clock) -> None:
    subject = StartBackoff()
    for _ in range(9):
        subject.failed(99.0)
    assert subject.failures == 1
    for _ in range(START_ATTEMPTS - 1):
        assert not subject.used_up
        clock.now += 1
        subject.failed(clock.now)
    assert subject.used_up
    subject.reset()
    assert subject.may_begin and not subject.used_up
