"""Which shard a worker gets next: fresh ones in order, failed ones again, later and elsewhere. No Ray here."""

import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass

from vcf_batch.records import Shard

PAUSES = (10.0, 60.0)
"""Seconds that a shard waits after its first failure, its second, and so on. The failure after the last pause is final:
the shard is set aside."""

MAX_WAITING = 100
"""Failed shards that wait before no fresh one is begun: a bound on memory, and a brake where everything fails."""


@dataclass(frozen=True)
class Task:
    """One attempt at a shard."""

    shard: Shard
    attempt: int = 1
    failures: int = 0
    """Attempts that failed for a reason that may lie in the shard; losing a node is none."""
    failed_on: frozenset[str] = frozenset()
    """Nodes of these attempts."""
    not_before: float = 0.0
    """On the monotonic clock."""

    @property
    def is_last(self) -> bool:
        return self.failures == len(PAUSES)

    @property
    def title(self) -> str:
        return f"{self.shard.name} (rows {self.shard.start} to {self.shard.stop - 1})"

    def new_id(self) -> str:
        """A name for this attempt that no other one has, even of another driver."""
        return f"{self.shard.name}-{self.attempt}-{uuid.uuid4().hex[:8]}"


class ShardQueue:
    """Shards that no worker has.

    Args:
        shards: what is to be done; taken one by one.
    """

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._fresh = iter(shards)
        self._again: list[Task] = []

    @property
    def is_waiting(self) -> bool:
        """Whether failed shards wait for their next attempt."""
        return bool(self._again)

    def take(self, node: str, nodes: Iterable[str]) -> Task | None:
        """The next task for a worker; None if there is none now.

        A failed shard goes before fresh ones once its pause is over, and to a node where it has not failed as long as
        one has workers: one node's trouble shall not use up its attempts.

        Args:
            node: where the worker is.
            nodes: where any worker is.
        """
        now = time.monotonic()
        for task in self._again:
            if task.not_before <= now and (node not in task.failed_on or task.failed_on.issuperset(nodes)):
                self._again.remove(task)
                return task
        if len(self._again) >= MAX_WAITING:
            return None
        shard = next(self._fresh, None)
        return None if shard is None else Task(shard)

    def repeat(self, task: Task) -> None:
        """Try again at once: the node went away."""
        self._again.append(Task(task.shard, task.attempt + 1, task.failures, task.failed_on))

    def failed(self, task: Task, node: str) -> bool:
        """Try again later, unless that was the last attempt.

        Returns:
            Whether there is another attempt.
        """
        if task.is_last:
            return False
        pause = time.monotonic() + PAUSES[task.failures]
        self._again.append(Task(task.shard, task.attempt + 1, task.failures + 1, task.failed_on | {node}, pause))
        return True
