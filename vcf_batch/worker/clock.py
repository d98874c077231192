"""The clock of a shard: the time of its phases, and its progress."""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vcf_batch import storage
from vcf_batch.storage import scratch


class Clock:
    """Clock of one shard: the time of its phases, and its progress. Any thread may use it.

    Call it with the name of a phase for a context manager that times the phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        """Seconds spent in each phase, summed over threads."""
        self.samples_done = 0
        """Number of samples written."""
        self.progress = 0
        """Count that grows with everything that is done for the shard. A heartbeat shows it."""
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
            self.note_progress()

    def note_progress(self) -> None:
        """Note progress, such as the end of a phase, a denoising step or a part of a file."""
        self.progress += 1

    def note_sample(self) -> None:
        """Note that one more sample is written."""
        self.samples_done += 1
        self.note_progress()

    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.monotonic() - self._begin


PROFILED_BATCHES = 4
"""Number of batches after which the recording ends. Each kernel is an event, and a whole shard would give millions."""


class Profile(Clock):
    """Clock of a shard that also records every thread and the GPU; use it with ``with``.

    The ranges in the trace have the names of the phases in the receipt's timings.

    Args:
        url: URL of the trace, JSON as Chrome reads it. It is written when the ``with`` block is left.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self._left = PROFILED_BATCHES
        gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
        self._profiler = profile(activities=[ProfilerActivity.CPU, *gpu], experimental_config=every_thread)

    def __enter__(self) -> Self:
        self._profiler.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Stop the recording, and write the trace.

        Raises:
            StorageError: the storage failed.
        """
        if self._left > 0:
            self._profiler.stop()
        with scratch.temporary("a profile") as folder:
            trace = os.path.join(folder, "trace.json")
            self._profiler.export_chrome_trace(trace)
            storage.upload(trace, self._url)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with super().__call__(phase):
            yield
        if phase == "wait_for_scores":
            self._left -= 1
            if not self._left:
                self._profiler.stop()
