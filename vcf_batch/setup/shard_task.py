"""What a worker is given to do: what the driver, the pool and a worker share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vcf_batch.records import Shard


@dataclass(frozen=True)
class ShardTask:
    """What a worker is given to do: an attempt at a shard, or a trial of some of its rows. Small, and picklable."""

    shard: Shard
    """The rows of the manifest that are generated."""
    attempt: int = 1
    """Number of the attempt at the shard, from 1."""
    selected: frozenset[int] | None = None
    """Numbers of the rows that a trial generates, and throws away; None for an attempt."""
    verdicts: Mapping[int, str] = field(default_factory=dict)
    """Why rows fail without being generated, by row number. A trial leaves it aside."""
    last_attempt: bool = False
    """Whether trouble with one reference fails its rows, not the attempt. On trial it always does."""
    sampled_at_once: int | None = None
    """Rows at most, where memory is too small for the run's batches. The receipt says so, because samples may then
    differ in their last bits."""

    @property
    def is_trial(self) -> bool:
        """Whether it leaves no files."""
        return self.selected is not None

    @property
    def not_generated(self) -> Mapping[int, str]:
        """Why rows are not generated, by row number: their verdicts, or on trial that they are not selected."""
        if self.selected is None:
            return self.verdicts
        numbers = range(self.shard.start, self.shard.stop)
        return {number: "left out of a trial" for number in numbers if number not in self.selected}

    @property
    def is_alone(self) -> bool:
        """Whether its worker gets no other shard beside it, so that only this one is to blame if it dies."""
        return self.attempt > 1

    @property
    def title(self) -> str:
        """The shard and its rows, for people."""
        what = f"{self.shard.name} (rows {self.shard.start} to {self.shard.stop - 1})"
        return what if self.selected is None else f"{what}, trial of {len(self.selected)} of its rows"
