"""A worker in a process of its own, on some node of a Ray cluster.

Libraries such as numpy and torch read the environment when they are loaded. So this module brings none of them: the
constructor sets the environment first.
"""

import contextlib
import functools
import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray

from vcf_batch.setup.environment import environment

if TYPE_CHECKING:
    from vcf_batch.driver.cluster import Heartbeat, Loaded
    from vcf_batch.output.receipts import Receipt
    from vcf_batch.records import RowMask
    from vcf_batch.setup.job import Job
    from vcf_batch.setup.shard_task import ShardTask


@contextlib.contextmanager
def nothing_collected() -> Iterator[None]:
    """Keep Python from looking for garbage: imports and models make a million objects that stay, now and afterwards."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class Actor:
    """Process that holds a :class:`vcf_batch.worker.worker.Worker` once it is loaded.

    Ray runs an actor in a process that has run nothing before, so the environment can be set here. With a
    ``runtime_env`` Ray would start another process than the ones that wait. The constructor has no arguments, because
    Ray loads pyarrow and numpy to unpickle any.
    """

    def __init__(self) -> None:
        os.environ.update(environment(int(ray.get_runtime_context().get_assigned_resources()["CPU"])))
        self._job: Any = None
        self._worker: Any = None

    @ray.method(concurrency_group="heartbeats")
    def heartbeat(self) -> "Heartbeat":
        """Return the node and the progress of this worker, also while it works on shards."""
        from vcf_batch.driver.cluster import Heartbeat

        progress, samples = (self._worker.progress, self._worker.samples_done) if self._worker else ({}, {})
        return Heartbeat(ray.get_runtime_context().get_node_id(), progress, samples)

    @nothing_collected()
    def load(self, job: "Job") -> "Loaded":
        """Check that this node sees the storage, load the worker, and return its device.

        Args:
            job: the run.
        """
        from vcf_batch.driver.cluster import Loaded
        from vcf_batch.setup import storage_check

        storage_check.check_storage(job)
        from vcf_batch.worker import device_type, worker  # takes seconds

        self._job, self._worker = job, worker.load(job)
        return Loaded(self._worker.components.device.description, device_type.is_mixed())

    @ray.method(concurrency_group="shards")
    def run(
        self, task: "ShardTask", attempt_id: str, redo: "RowMask | None"
    ) -> "tuple[Receipt, dict[str, str]] | None":
        """Do a task, and return the receipt and the staged files, or None after a trial.

        Args:
            task: the task.
            attempt_id: name of the attempt, which its staged files bear.
            redo: mask of the rows that are generated, see
                :class:`vcf_batch.output.kept_samples.KeptSamples`; None for all.
        """
        from vcf_batch.output.kept_samples import KeptSamples

        note_progress = functools.partial(self._worker.note_progress, attempt_id)
        kept = KeptSamples(self._job.config, self._job.manifest, task.shard, redo, note_progress)
        return self._worker.run(task, attempt_id, kept)
