"""Where the time of a shard goes, and how far it is."""

import contextlib
import threading
import time
from collections.abc import Iterator

from torch.profiler import record_function


class Clock:
    """How far a shard is, read from other threads: seconds spent in each phase, summed over threads, and samples."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.samples_done = 0
        """Samples that are written."""
        self.ticks = 0
        """Grows with every phase and every denoising step: it shows whether anything moves."""
        self._begin = time.monotonic()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.monotonic()
        try:
            with record_function(phase):  # for --profile
                yield
        finally:
            with self._lock:
                self.seconds[phase] = round(self.seconds.get(phase, 0.0) + time.monotonic() - begin, 3)
            self.tick()

    def tick(self) -> None:
        """Something is done."""
        self.ticks += 1

    def elapsed(self) -> float:
        return time.monotonic() - self._begin
