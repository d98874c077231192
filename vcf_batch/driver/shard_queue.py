"""Which shard a worker gets next: fresh ones in order, failed ones again, later and elsewhere."""

from collections.abc import Callable, Collection, Iterable, Sequence

from vcf_batch.driver.failing_shard import FailingShard
from vcf_batch.driver.fault import Fault
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask

MAX_WAITING = 100
"""Failed shards that wait before no fresh one is begun: a bound on memory, and a brake where everything fails."""


class ShardQueue:
    """Shards that no worker has.

    Args:
        shards: what is to be done; taken one by one.
        rows_of: the rows of a shard that are generated.
        now: the clock.
        batch_size: the run's, if smaller batches are allowed where memory is too small.
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
        """Shards that a worker has, and that have failed before."""

    @property
    def waiting(self) -> int:
        """Failed shards that wait for their next attempt."""
        return len(self._waiting)

    def take(self, node: str, nodes: Collection[str]) -> ShardTask | None:
        """Take the next task for a worker that has none; None if there is none now.

        Once its pause is over, a failed shard goes before fresh ones. As long as a node where it has not failed has
        workers, it goes there: one node's trouble shall not use up its attempts.

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
        """Take a fresh shard for a worker that has another one; None if a failed shard is due, which goes alone.

        Args:
            node: where the worker is.
            nodes: where any worker is.
        """
        return self._take_fresh() if self._due(node, nodes) is None else None

    def _due(self, node: str, nodes: Collection[str]) -> FailingShard | None:
        now = self._now()
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
        """Forget a shard that is committed or set aside; go on with one whose trial has survived."""
        case = self._at_work.pop(task.shard, None)
        if case is not None and task.selected is not None:
            case.survived(task)
            self._waiting.append(case)

    def generated(self, task: ShardTask, node: str) -> bool:
        """Whether a shard that a node has generated may be committed; if not, it is tried again.

        See :meth:`vcf_batch.driver.failing_shard.FailingShard.is_proven`.
        """
        case = self._at_work.get(task.shard)
        if case is None or case.is_proven(task, node):
            return True
        self.repeat(task)
        return False

    def repeat(self, task: ShardTask) -> None:
        """Try again at once: the attempt was ended by no failure of its own."""
        case = self._case(task)
        case.repeat()
        self._waiting.append(case)

    def failed(self, task: ShardTask, fault: Fault) -> bool:
        """Try again, later where that may help, unless that was the last attempt.

        Returns:
            Whether there is another attempt.
        """
        case = self._case(task)
        if more := case.failed(task, fault):
            self._waiting.append(case)
        return more

    def forgive(self, node: str) -> None:
        """Count what failed on a node no more: it gets no more work."""
        for case in [*self._waiting, *self._at_work.values()]:
            case.forgive(node)

    def _case(self, task: ShardTask) -> FailingShard:
        return self._at_work.pop(task.shard, None) or FailingShard(
            task.shard, self._rows_of(task.shard), self._batch_size, self._now
        )
