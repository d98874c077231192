"""Paces the starts of workers where some fail. No Ray here."""

import time

START_ATTEMPTS = 5
"""How many workers in a row may fail to start, while none works, before the run gives up."""

MAX_BACKOFF_SECONDS = 30.0


class StartBackoff:
    """Counts failed starts, and waits longer and longer after each."""

    def __init__(self) -> None:
        self.failures = 0
        """In a row."""
        self._failed_at = self._not_before = 0.0

    @property
    def may_begin(self) -> bool:
        """Whether it is time for another start."""
        return time.monotonic() >= self._not_before

    @property
    def used_up(self) -> bool:
        """Whether so many have failed that the next one will not do better."""
        return self.failures >= START_ATTEMPTS

    def reset(self) -> None:
        """A worker has started, or the reason for the failures is gone."""
        self.failures, self._not_before = 0, 0.0

    def failed(self, began: float) -> float | None:
        """A worker has not started.

        Args:
            began: when it was asked for, on the monotonic clock.

        Returns:
            Seconds until the next start; None where it began before the last failure: of workers that were started
            together, only the first failure counts.
        """
        if began <= self._failed_at:
            return None
        self._failed_at = time.monotonic()
        self.failures += 1
        pause = min(2.0**self.failures / 2, MAX_BACKOFF_SECONDS)
        self._not_before = self._failed_at + pause
        return pause
