"""Failed starts of workers: longer and longer pauses, and an end."""

from support.simulated import Clock
from vcf_batch.driver.workers import MAX_BACKOFF_SECONDS, START_ATTEMPTS, StartBackoff


def test_pauses_grow_and_end() -> None:
    clock, pauses = Clock(), list[float]()
    subject = StartBackoff(clock.now)
    for _ in range(10):
        assert subject.may_begin
        began = clock.seconds = clock.seconds + 1
        pause = subject.failed(began)
        assert pause is not None and not subject.may_begin
        pauses.append(pause)
        clock.seconds += pause
    assert pauses[0] == 1
    assert pauses == sorted(pauses)
    assert pauses[-1] == MAX_BACKOFF_SECONDS


def test_workers_that_fail_to_start_together_count_once() -> None:
    clock = Clock()
    subject = StartBackoff(clock.now)
    for _ in range(9):
        subject.failed(0.0)
    assert subject.failures == 1
    for _ in range(START_ATTEMPTS - 1):
        assert not subject.used_up
        clock.seconds += 1
        subject.failed(clock.seconds)
    assert subject.used_up
    subject.reset()
    assert subject.may_begin and not subject.used_up
