"""The task of a worker, which the driver, the pool and the worker share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vcf_batch.records import Shard


@dataclass(frozen=True)
class ShardTask:
    """Task of a worker: an attempt at a shard, or a trial of some of its rows. Small, and picklable."""

    shard: Shard
    """The shard whose rows are generated."""
    attempt: int = 1
    """Number of the attempt at the shard, from 1."""
    selected: frozenset[int] | None = None
    """Numbers of the rows that a trial generates and discards; None for an attempt."""
    verdicts: Mapping[int, str] = field(default_factory=dict)
    """Reasons of the rows that fail without being generated, by row number. A trial ignores them."""
    last_attempt: bool = False
    """Whether trouble with one reference fails its rows, not the attempt. In a trial it always does."""
    sampled_at_once: int | None = None
    """Largest number of rows sampled at once, if memory is too small for the run's batches; else None. The receipt has
    it, because samples may then differ in their last bits."""

    @property
    def is_trial(self) -> bool:
        """Whether the task is a trial, which leaves no files."""
        return self.selected is not None

    @property
    def not_generated(self) -> Mapping[int, str]:
        """Reasons of the rows that are not generated, by row number. In a trial, these are the rows left out."""
        if self.selected is None:
            return self.verdicts
        numbers = range(self.shard.start, self.shard.stop)
        return {number: "left out of a trial" for number in numbers if number not in self.selected}

    @property
    def is_alone(self) -> bool:
        """Whether the worker gets no other shard beside it, so that only this shard is to blame if the worker dies."""
        return self.attempt > 1

    @property
    def title(self) -> str:
        """Name and rows of the shard, for people."""
        what = f"{self.shard.name} (rows {self.shard.start} to {self.shard.stop - 1})"
        return what if self.selected is None else f"{what}, trial of {len(self.selected)} of its rows"
