"""Where the time of a shard goes, and how far it is."""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from vcf_batch import storage


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


PROFILED_BATCHES = 4
"""That are sampled before the recording ends: each kernel is an event, and of a whole shard they would be millions."""


class Profile(Clock):
    """A shard's clock that records what every thread and the GPU do meanwhile; use it with ``with``.

    The ranges in the trace have the names of the phases in the receipt's timings.

    Args:
        url: of the trace, JSON as Chrome reads it. Written when the block is left.
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
        """
        Raises:
            StorageError: the storage failed.
        """
        if self._left > 0:
            self._profiler.stop()
        with tempfile.TemporaryDirectory(prefix="vcf-batch-profile-") as folder:
            trace = os.path.join(folder, "trace.json")
            self._profiler.export_chrome_trace(trace)
            storage.upload(trace, self._url)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with super().__call__(phase):
            yield
        if phase == "sample":
            self._left -= 1
            if not self._left:
                self._profiler.stop()
