"""The queue of shards for workers: fresh shards in order, and failed shards again, later and on other nodes."""

from collections.abc import Callable, Collection, Iterable, Sequence

from vcf_batch.driver.failing_shard import FailingShard
from vcf_batch.driver.fault import Fault
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask

MAX_WAITING = 100
"""Largest number of failed shards that wait. At this number no fresh shard is begun, which bounds memory, and slows a
run in which everything fails."""


class ShardQueue:
    """Queue of the shards that no worker has.

    Args:
        shards: shards to generate, taken one by one.
        rows_of: gives the rows of a shard that are generated.
        now: reads the clock.
        batch_size: the batch size of the run, if smaller batches are allowed where memory is too small; else None.
    """

    def __init__(
        self,
        shards: Iterable[Shard],
        rows_of: Callable[[Shard], Sequence[int]],
        now: Callable[[], float],
        batch_size: int | None = None,
    ) -> None:
        self._fresh = iter(shards)
        self._rows_of, self._now = rows_of, now
        self._batch_size = batch_size
        self._waiting: list[FailingShard] = []
        self._at_work: dict[Shard, FailingShard] = {}
        """Shards that have failed before, and that a worker has now."""

    @property
    def waiting(self) -> int:
        """Number of failed shards that wait for their next attempt."""
        return len(self._waiting)

    def take(self, node: str, nodes: Collection[str]) -> ShardTask | None:
        """Take the next task for a worker that has none; None if there is none now.

        Once its pause is over, a failed shard goes before fresh ones. It goes to a node where it has not failed, as
        long as workers are there, so that one node cannot use up its attempts.

        Args:
            node: node of the worker.
            nodes: nodes of all workers.
        """
        if (failing := self._due(node, nodes)) is None:
            return self._take_fresh()
        self._waiting.remove(failing)
        self._at_work[failing.shard] = failing
        return failing.task()

    def take_beside(self, node: str, nodes: Collection[str]) -> ShardTask | None:
        """Take a fresh shard for a worker that has another one; None if a failed shard is due, which goes alone.

        Args:
            node: node of the worker.
            nodes: nodes of all workers.
        """
        return self._take_fresh() if self._due(node, nodes) is None else None

    def _due(self, node: str, nodes: Collection[str]) -> FailingShard | None:
        now = self._now()
        for failing in self._waiting:
            if failing.not_before <= now and (node not in failing.failed_on or failing.failed_on.issuperset(nodes)):
                return failing
        return None

    def _take_fresh(self) -> ShardTask | None:
        if len(self._waiting) >= MAX_WAITING:
            return None
        shard = next(self._fresh, None)
        return None if shard is None else ShardTask(shard)

    def done(self, task: ShardTask) -> None:
        """Forget a shard that is committed or set aside; queue a shard again whose trial has survived."""
        failing = self._at_work.pop(task.shard, None)
        if failing is not None and task.selected is not None:
            failing.survived(task)
            self._waiting.append(failing)

    def generated(self, task: ShardTask, node: str) -> bool:
        """Whether a shard that a node has generated may be committed; if not, it is tried again.

        See :meth:`vcf_batch.driver.failing_shard.FailingShard.is_proven`.
        """
        failing = self._at_work.get(task.shard)
        if failing is None or failing.is_proven(task, node):
            return True
        self.repeat(task)
        return False

    def repeat(self, task: ShardTask) -> None:
        """Queue a shard again at once. No failure is counted."""
        failing = self._take_failing(task)
        failing.repeat()
        self._waiting.append(failing)

    def failed(self, task: ShardTask, fault: Fault) -> bool:
        """Count a failure of a shard, and queue the shard again unless that was its last attempt.

        Returns:
            Whether there is another attempt.
        """
        failing = self._take_failing(task)
        if more := failing.failed(task, fault):
            self._waiting.append(failing)
        return more

    def forgive(self, node: str) -> None:
        """Discard the failures on a node, which gets no more work."""
        for failing in [*self._waiting, *self._at_work.values()]:
            failing.forgive(node)

    def _take_failing(self, task: ShardTask) -> FailingShard:
        return self._at_work.pop(task.shard, None) or FailingShard(
            task.shard, self._rows_of(task.shard), self._batch_size, self._now
        )
