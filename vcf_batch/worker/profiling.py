"""Where the time of a shard goes: a trace of its first batches, for Perfetto or chrome://tracing."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Self

import torch
from torch.profiler import ProfilerActivity, profile

from vcf_batch import storage
from vcf_batch.worker.clock import Clock

BATCHES = 4
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
        self._left = BATCHES
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
