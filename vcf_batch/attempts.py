"""A shard whose attempts fail: what is tried next, and when it is given up. No Ray here."""

import enum
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vcf_batch.blame import REPEATS, Search
from vcf_batch.records import Shard

PAUSES: tuple[float, ...] = (10.0, 60.0)
"""Seconds that a shard waits after its first failure, its second, and so on. The failure after the last pause is final
for trouble: the shard is set aside. Crashes are then looked into."""

MAX_CULPRITS = 16
"""Rows of one shard that may be blamed. Where more seem to kill their workers, something else does."""


class Failure(enum.Enum):
    """Why an attempt failed."""

    TROUBLE = enum.auto()
    """Storage, network or a machine failed. No row is to blame."""
    MEMORY = enum.auto()
    """The GPU's memory did not hold a batch."""
    CRASH = enum.auto()
    """The worker died, hung or raised what nobody expected. A row may be to blame."""


@dataclass(frozen=True)
class Task:
    """What a worker is given: an attempt at a shard, or a trial of some of its rows."""

    shard: Shard
    attempt: int = 1
    selected: frozenset[int] | None = None
    """On trial: the rows that are generated, and thrown away."""
    verdicts: Mapping[int, str] = field(default_factory=dict)
    """Rows that fail without a try, and why."""
    last_attempt: bool = False
    """Trouble with one reference fails its rows, not the attempt."""
    sampled_at_once: int | None = None
    """Rows at most, where memory is too small for the run's batches."""

    @property
    def title(self) -> str:
        what = f"{self.shard.name} (rows {self.shard.start} to {self.shard.stop - 1})"
        return what if self.selected is None else f"{what}, trial of {len(self.selected)} of its rows"

    def new_id(self) -> str:
        """A name for this attempt that no other one has, even of another driver."""
        return f"{self.shard.name}-{self.attempt}-{uuid.uuid4().hex[:8]}"


class Case:
    """One shard, from its first failure until it is committed or set aside.

    Trouble and crashes have a budget each, so that neither uses up the other's: a shard is tried ``len(PAUSES) + 1``
    times in all against trouble, and as often against crashes. Then a row that kills its workers is looked for
    (:class:`vcf_batch.blame.Search`), blamed, and the rest generated; and again, if that kills a worker too.

    Args:
        shard: the shard.
        rows: those of the shard that are generated.
        batch_size: the run's, if smaller batches are allowed where memory is too small.
    """

    def __init__(self, shard: Shard, rows: Sequence[int], batch_size: int | None) -> None:
        self.shard = shard
        self._rows = rows
        self.not_before = 0.0
        """On the monotonic clock."""
        self._batch_size = self._sampled_at_once = batch_size
        self._attempt = 1
        self._troubles: list[str] = []
        self._shortages: list[str] = []
        self._crashes: list[str] = []
        """Nodes of the attempts that failed."""
        self._verdicts: dict[int, str] = {}
        self._search: Search | None = None
        self._searched_on: list[str] = []
        """Nodes of the trials that died."""
        self._any_survived = self._in_vain = False

    @property
    def failed_on(self) -> set[str]:
        """Nodes where it failed."""
        return {*self._troubles, *self._shortages, *self._crashes, *self._searched_on}

    def task(self) -> Task:
        """What is tried next."""
        return Task(
            self.shard,
            self._attempt,
            self._search.trial if self._search else None,
            dict(self._verdicts),
            len(self._troubles) == len(PAUSES),
            self._sampled_at_once if self._sampled_at_once != self._batch_size else None,
        )

    def repeat(self) -> None:
        """The attempt was lost, with its node."""
        self._attempt += self._search is None
        self.not_before = 0.0

    def failed(self, task: Task, node: str, failure: Failure, symptom: str) -> bool:
        """An attempt or a trial failed.

        Args:
            task: what was tried.
            node: where.
            failure: why.
            symptom: why, for people; it may end in a row's error message, so nothing of time or place is in it.

        Returns:
            Whether there is a next one; if not, the shard is set aside.
        """
        if failure is Failure.MEMORY and self._sampled_at_once is not None and self._shortages:
            # Once more in a fresh process, without what was left in the other's memory, was not enough.
            if self._sampled_at_once > 1:
                self._shortages.append(node)
                self._sampled_at_once //= 2
                self.repeat()
                return True
            failure = Failure.CRASH
        if failure is Failure.CRASH and task.selected is not None:
            self._died(task, node, symptom)
            return True
        self.repeat()
        if failure is Failure.CRASH:
            return self._crashed(node)
        return self._wait(self._shortages if failure is Failure.MEMORY else self._troubles, node)

    def survived(self, task: Task) -> None:
        """A trial went well."""
        self._any_survived = True
        if self._search is not None and task.selected == self._search.trial:
            self._search.survived()
            if self._search.in_vain:
                self._search, self._in_vain = None, True

    def forgive(self, node: str) -> None:
        """What failed on a node does not count."""
        if node in self._shortages:
            self._sampled_at_once = self._batch_size
        for failures in (self._troubles, self._shortages, self._crashes):
            failures[:] = [other for other in failures if other != node]
        if node in self._searched_on:
            self._search, self._searched_on, self._verdicts = None, [], {}
        self.not_before = 0.0

    def _wait(self, failures: list[str], node: str) -> bool:
        failures.append(node)
        if len(failures) > len(PAUSES):
            return False
        self.not_before = time.monotonic() + PAUSES[len(failures) - 1]
        return True

    def _crashed(self, node: str) -> bool:
        """A whole attempt crashed."""
        # Two searches from both ends and no trial that went well: then it is hardly the rows.
        doubtful = len(self._verdicts) >= 2 and not self._any_survived
        if self._in_vain or doubtful or len(self._verdicts) == MAX_CULPRITS:
            return False
        if not self._verdicts and self._wait(self._crashes, node):
            return True
        suspects = [row for row in self._rows if row not in self._verdicts]
        self._search = Search(suspects[::-1] if len(self._verdicts) % 2 else suspects)
        return True

    def _died(self, task: Task, node: str, symptom: str) -> None:
        """A trial crashed."""
        self._searched_on.append(node)
        search = self._search
        # Not so if a node was forgiven meanwhile.
        if search is not None and task.selected == search.trial:
            search.died()
            if search.culprit is not None:
                self._verdicts[search.culprit] = (
                    f"{symptom}; so it was each of the {REPEATS} times that this row was generated alone, and not with "
                    "the other rows of its shard. Check its prompt and its references"
                )
                self._search = None
