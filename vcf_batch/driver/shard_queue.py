"""Which shard a worker gets next: fresh ones in order, failed ones again, later and elsewhere. No Ray here."""

import time
from collections.abc import Callable, Collection, Iterable, Sequence

from vcf_batch.driver.failing_shard import FailingShard, Failure
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask

MAX_WAITING = 100
"""Failed shards that wait before no fresh one is begun: a bound on memory, and a brake where everything fails."""


class ShardQueue:
    """Shards that no worker has.

    Args:
        shards: what is to be done; taken one by one.
        rows_of: the rows of a shard that are generated.
        batch_size: the run's, if smaller batches are allowed where memory is too small.
    """

    def __init__(
        self, shards: Iterable[Shard], rows_of: Callable[[Shard], Sequence[int]], batch_size: int | None = None
    ) -> None:
        self._fresh = iter(shards)
        self._rows_of = rows_of
        self._batch_size = batch_size
        self._waiting: list[FailingShard] = []
        self._at_work: dict[Shard, FailingShard] = {}
        """Shards that a worker has, and that have failed before."""

    @property
    def waiting(self) -> int:
        """Failed shards that wait for their next attempt."""
        return len(self._waiting)

    def take(self, node: str, nodes: Collection[str]) -> ShardTask | None:
        """The next task for a worker that has none; None if there is none now.

        A failed shard goes before fresh ones once its pause is over, and to a node where it has not failed as long as
        one has workers: one node's trouble shall not use up its attempts.

        Args:
            node: where the worker is.
            nodes: where any worker is.
        """
        if (case := self._due(node, nodes)) is None:
            return self._take_fresh()
        self._waiting.remove(case)
        self._at_work[case.shard] = case
        return case.task()

    def take_beside(self, node: str, nodes: Collection[str]) -> ShardTask | None:
        """A fresh shard for a worker that has another one; None if it shall soon be free for a failed one.

        Args:
            node: where the worker is.
            nodes: where any worker is.
        """
        return self._take_fresh() if self._due(node, nodes) is None else None

    def _due(self, node: str, nodes: Collection[str]) -> FailingShard | None:
        now = time.monotonic()
        for case in self._waiting:
            if case.not_before <= now and (node not in case.failed_on or case.failed_on.issuperset(nodes)):
                return case
        return None

    def _take_fresh(self) -> ShardTask | None:
        if len(self._waiting) >= MAX_WAITING:
            return None
        shard = next(self._fresh, None)
        return None if shard is None else ShardTask(shard)

    def done(self, task: ShardTask) -> None:
        """The shard is committed; or the trial survived, and the shard goes on."""
        case = self._at_work.pop(task.shard, None)
        if case is not None and task.selected is not None:
            case.survived(task)
            self._waiting.append(case)

    def generated(self, task: ShardTask, node: str) -> bool:
        """A node has generated a shard: whether it may be committed; else it is tried again.

        See :meth:`vcf_batch.driver.failing_shard.FailingShard.is_proven`.
        """
        case = self._at_work.get(task.shard)
        if case is None or case.is_proven(task, node):
            return True
        self.repeat(task)
        return False

    def repeat(self, task: ShardTask) -> None:
        """Try again at once: the worker was let go."""
        case = self._case(task)
        case.repeat()
        self._waiting.append(case)

    def failed(self, task: ShardTask, node: str, failure: Failure, symptom: str) -> bool:
        """Try again, later where that may help, unless that was the last attempt.

        Args:
            task: what failed.
            node: where.
            failure: why.
            symptom: why, for people: see :meth:`vcf_batch.driver.failing_shard.FailingShard.failed`.

        Returns:
            Whether there is another attempt.
        """
        case = self._case(task)
        if again := case.failed(task, node, failure, symptom):
            self._waiting.append(case)
        return again

    def forgive(self, node: str) -> None:
        """What failed on a node, which gets no more work, does not count."""
        for case in [*self._waiting, *self._at_work.values()]:
            case.forgive(node)

    def _case(self, task: ShardTask) -> FailingShard:
        return self._at_work.pop(task.shard, None) or FailingShard(
            task.shard, self._rows_of(task.shard), self._batch_size
        )
