"""A worker that scores, in a process of its own on some node of a Ray cluster."""

from typing import TYPE_CHECKING

import ray

from vcf_batch.pool.actor import Actor, nothing_collected

if TYPE_CHECKING:
    from vcf_batch.driver.cluster import Loaded
    from vcf_batch.output.receipts import Receipt
    from vcf_batch.records import RowMask
    from vcf_batch.setup.shard_task import ShardTask
    from vcf_batch.worker.scoring.job import ScoredShard, ScoreJob


class ScoringActor(Actor):
    """Process that holds a :class:`vcf_batch.worker.scoring.worker.ScoringWorker` once it is loaded."""

    @nothing_collected()
    def load(self, job: "ScoreJob") -> "Loaded":  # type: ignore[override]
        """Check that this node sees the storage, load the scorers, and return the device.

        Args:
            job: the output and its scores.
        """
        from vcf_batch.driver.cluster import Loaded
        from vcf_batch.setup import storage_check

        storage_check.check_storage(job)
        from vcf_batch.worker import device_type
        from vcf_batch.worker.scoring import worker  # takes seconds

        self._worker = worker.load(job)
        return Loaded(self._worker.device.description, device_type.is_mixed())

    @ray.method(concurrency_group="shards")
    def run(  # type: ignore[override]
        self, task: "ShardTask", attempt_id: str, redo: "RowMask | None"
    ) -> "tuple[Receipt, list[ScoredShard]] | None":
        """Do a task, and return the shard's receipt and its scores, or None after a trial.

        Args:
            task: the task.
            attempt_id: name of the attempt.
            redo: None, as rows are scored together.
        """
        return self._worker.run(task, attempt_id)
