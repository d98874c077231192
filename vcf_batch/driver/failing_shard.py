"""A shard whose attempts fail: its next attempt or trial, and the decision to set it aside."""

import itertools
from collections.abc import Callable, Sequence

from vcf_batch.driver.bisection import REPEATS, Bisection
from vcf_batch.driver.fault import Failure, Fault
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask

PAUSES: tuple[float, ...] = (10.0, 60.0)
"""Seconds that a shard waits after its first failure, after its second, and so on. After a failure beyond the last
pause, a shard with trouble is set aside, and a shard with crashes is bisected."""

LOSS_PAUSES: tuple[float, ...] = (0.0, 5.0, 15.0, 45.0, 135.0)
"""Seconds that a shard waits after the first loss of its node, after the second, and so on. A loss is nobody's fault,
but a loss beyond the last pause counts as a crash."""

MAX_CULPRITS = 16
"""Largest number of rows of one shard that are blamed. If more rows seem to kill their workers, the cause lies
elsewhere."""


class FailingShard:
    """One shard, from its first failure until it is committed or set aside.

    Trouble and crashes have a budget each, of ``len(PAUSES) + 1`` attempts. When crashes have used up theirs, a row
    that kills its workers is searched for (:class:`vcf_batch.driver.bisection.Bisection`) and blamed, and the rest of
    the shard is generated. The search is repeated if the rest kills a worker too. A verdict counts if the row died
    alone on several nodes, or on the node that generated the rest.

    Args:
        shard: the shard.
        rows: rows of the shard that are generated.
        batch_size: the batch size of the run, if smaller batches are allowed where memory is too small; else None.
        now: reads the clock.
    """

    def __init__(self, shard: Shard, rows: Sequence[int], batch_size: int | None, now: Callable[[], float]) -> None:
        self.shard = shard
        self._rows, self._now = rows, now
        self.not_before = 0.0
        """Earliest time of the next attempt, on the clock."""
        self._batch_size = self._sampled_at_once = batch_size
        self._attempt = 1
        self._failures: dict[Failure, list[str]] = {failure: [] for failure in Failure}
        """Nodes of the attempts that failed, by kind of failure."""
        self._verdicts: dict[int, str] = {}
        self._search: Bisection | None = None
        self._searched_on: list[str] = []
        """Nodes of the trials that killed their worker."""
        self._symptom = ""
        """Symptom of the last suspect when it first died alone."""
        self._alone_on: set[str] = set()
        """Nodes where the last suspect died alone."""
        self._seen_on: dict[int, set[str]] = {}
        """Nodes where each blamed row died alone."""
        self._any_survived = self._in_vain = False

    @property
    def failed_on(self) -> set[str]:
        """Nodes that get the shard last: those where the last suspect died alone, else all where anything failed.

        A suspect is tried on other nodes too, because its node may be to blame.
        """
        return self._alone_on or {*itertools.chain(*self._failures.values()), *self._searched_on}

    def task(self) -> ShardTask:
        """The next attempt or trial."""
        return ShardTask(
            self.shard,
            self._attempt,
            self._search.trial if self._search else None,
            dict(self._verdicts),
            len(self._failures[Failure.TROUBLE]) == len(PAUSES),
            self._sampled_at_once if self._sampled_at_once != self._batch_size else None,
        )

    def repeat(self) -> None:
        """Let the next attempt, or the same trial, begin at once. No failure is counted."""
        self._attempt += self._search is None
        self.not_before = 0.0

    def failed(self, task: ShardTask, fault: Fault) -> bool:
        """Take the failure of an attempt or a trial.

        Returns:
            Whether there is another attempt or trial; if not, the shard is set aside.
        """
        failure, node = fault.failure, fault.node
        if failure is Failure.MEMORY and self._sampled_at_once is not None and self._failures[failure]:
            # The first failure is tried again with the same batches, in a fresh process. Later ones halve them.
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
        """Discard the failures on a node."""
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

        If not, the rows are tried again. The nodes may be to blame if a row died on one of them only, and another one
        generated the rest.
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
        # Two searches from both ends, and no trial survived: the rows are hardly the cause.
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
        # The search is another one if a node was forgiven meanwhile.
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
