"""A shard whose attempts fail: what is tried next, and when it is given up."""

import itertools
from collections.abc import Callable, Sequence

from vcf_batch.driver.bisection import REPEATS, Bisection
from vcf_batch.driver.fault import Failure, Fault
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask

PAUSES: tuple[float, ...] = (10.0, 60.0)
"""Seconds that a shard waits after its first failure, its second, and so on. The failure after the last pause is final
for trouble: the shard is set aside. Crashes are then looked into."""

LOSS_PAUSES: tuple[float, ...] = (0.0, 5.0, 15.0, 45.0, 135.0)
"""Seconds that a shard waits after it lost its node for the first time, the second, and so on. That is nobody's fault;
but where it goes on after the last pause, it counts as a crash."""

MAX_CULPRITS = 16
"""Rows of one shard that may be blamed. Where more seem to kill their workers, something else does."""


class FailingShard:
    """One shard, from its first failure until it is committed or set aside.

    Trouble and crashes have a budget each, so that neither uses up the other's: a shard is tried ``len(PAUSES) + 1``
    times in all against trouble, and as often against crashes. Then a row that kills its workers is looked for
    (:class:`vcf_batch.driver.bisection.Bisection`), blamed, and the rest generated; and again, if that kills a worker
    too. A verdict counts where the row died alone on several nodes, or on that which generated the rest.

    Args:
        shard: the shard.
        rows: those of the shard that are generated.
        batch_size: the run's, if smaller batches are allowed where memory is too small.
        now: the clock.
    """

    def __init__(self, shard: Shard, rows: Sequence[int], batch_size: int | None, now: Callable[[], float]) -> None:
        self.shard = shard
        self._rows, self._now = rows, now
        self.not_before = 0.0
        """When it may be tried next, on the clock."""
        self._batch_size = self._sampled_at_once = batch_size
        self._attempt = 1
        self._failures: dict[Failure, list[str]] = {failure: [] for failure in Failure}
        """Nodes of the attempts that failed."""
        self._verdicts: dict[int, str] = {}
        self._search: Bisection | None = None
        self._searched_on: list[str] = []
        """Nodes of the trials that died."""
        self._symptom = ""
        """Seen the first time that the last suspect died alone."""
        self._alone_on: set[str] = set()
        """Nodes where the last suspect died alone."""
        self._seen_on: dict[int, set[str]] = {}
        """Nodes where each blamed row died alone."""
        self._any_survived = self._in_vain = False

    @property
    def failed_on(self) -> set[str]:
        """Nodes that get it last: where the last suspect died alone, if it did, else where anything failed. A suspect
        shall show elsewhere, too."""
        return self._alone_on or {*itertools.chain(*self._failures.values()), *self._searched_on}

    def task(self) -> ShardTask:
        """What is tried next."""
        return ShardTask(
            self.shard,
            self._attempt,
            self._search.trial if self._search else None,
            dict(self._verdicts),
            len(self._failures[Failure.TROUBLE]) == len(PAUSES),
            self._sampled_at_once if self._sampled_at_once != self._batch_size else None,
        )

    def repeat(self) -> None:
        """Try the same again at once: the attempt was ended by no failure of its own."""
        self._attempt += self._search is None
        self.not_before = 0.0

    def failed(self, task: ShardTask, fault: Fault) -> bool:
        """Take the failure of an attempt or a trial.

        Returns:
            Whether there is a next one; if not, the shard is set aside.
        """
        failure, node = fault.failure, fault.node
        if failure is Failure.MEMORY and self._sampled_at_once is not None and self._failures[failure]:
            # Once more in a fresh process, without what was left in the other's memory, was not enough.
            if self._sampled_at_once > 1:
                self._failures[failure].append(node)
                self._sampled_at_once //= 2
                self.repeat()
                return True
            failure = Failure.CRASH
        if failure is Failure.LOSS and len(self._failures[failure]) == len(LOSS_PAUSES):
            failure = Failure.CRASH
        if failure is Failure.CRASH and task.selected is not None:
            self._died(task, fault)
            return True
        self.repeat()
        if failure is Failure.CRASH:
            return self._crashed(node)
        return self._wait(failure, node)

    def survived(self, task: ShardTask) -> None:
        """Take the success of a trial."""
        self._any_survived = True
        if self._search is not None and task.selected == self._search.trial:
            self._search.survived()
            if self._search.in_vain:
                self._search, self._alone_on, self._in_vain = None, set(), True

    def forgive(self, node: str) -> None:
        """Count what failed on a node no more."""
        if node in self._failures[Failure.MEMORY]:
            self._sampled_at_once = self._batch_size
        crashed = node in self._failures[Failure.CRASH]
        for failures in self._failures.values():
            failures[:] = [other for other in failures if other != node]
        if crashed or node in self._searched_on:
            self._search, self._searched_on, self._alone_on, self._verdicts = None, [], set(), {}
            self._any_survived = self._in_vain = False
        self.not_before = 0.0

    def is_proven(self, task: ShardTask, node: str) -> bool:
        """Whether the rest of the shard, which a node has generated, may be committed beside the task's verdicts.

        If not, the rows are tried again. Where one died on a single node, and the rest went well on another one, that
        may be the difference between the nodes.
        """
        if task.verdicts != self._verdicts:  # a node was forgiven meanwhile
            return False
        for row, nodes in self._seen_on.items():
            if row in self._verdicts and len(nodes) == 1 and node not in nodes:
                del self._verdicts[row]
                self._look_among([row])
                self._alone_on = nodes
                return False
        return True

    def _wait(self, failure: Failure, node: str) -> bool:
        pauses = LOSS_PAUSES if failure is Failure.LOSS else PAUSES
        self._failures[failure].append(node)
        if len(self._failures[failure]) > len(pauses):
            return False
        self.not_before = self._now() + pauses[len(self._failures[failure]) - 1]
        return True

    def _crashed(self, node: str) -> bool:
        """Take the crash of a whole attempt."""
        # Two searches from both ends and no trial that went well: then it is hardly the rows.
        doubtful = len(self._verdicts) >= 2 and not self._any_survived
        if self._in_vain or doubtful or len(self._verdicts) == MAX_CULPRITS:
            return False
        if not self._verdicts and self._wait(Failure.CRASH, node):
            return True
        suspects = [row for row in self._rows if row not in self._verdicts]
        self._look_among(suspects[::-1] if len(self._verdicts) % 2 else suspects)
        return True

    def _look_among(self, suspects: Sequence[int]) -> None:
        self._search, self._symptom, self._alone_on = Bisection(suspects), "", set()

    def _died(self, task: ShardTask, fault: Fault) -> None:
        """Take the crash of a trial."""
        self._searched_on.append(fault.node)
        search = self._search
        # Not so if a node was forgiven meanwhile.
        if search is not None and task.selected == search.trial:
            if len(search.trial) == 1:
                self._symptom = self._symptom or fault.symptom
                self._alone_on.add(fault.node)
            search.died()
            if search.culprit is not None:
                self._verdicts[search.culprit] = (
                    f"{self._symptom}; so it was each of the {REPEATS} times that this row was generated alone, and "
                    "not with the other rows of its shard. Check its prompt and its references"
                )
                self._seen_on[search.culprit], self._alone_on = self._alone_on, set()
                self._search = None
