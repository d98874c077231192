"""What a worker is given to do: what the driver, the pool and a worker share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from vcf_batch.records import Shard


@dataclass(frozen=True)
class ShardTask:
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
    def is_alone(self) -> bool:
        """Whether its worker gets no other shard beside it: if a worker dies again, then of this one."""
        return self.attempt > 1

    @property
    def title(self) -> str:
        what = f"{self.shard.name} (rows {self.shard.start} to {self.shard.stop - 1})"
        return what if self.selected is None else f"{what}, trial of {len(self.selected)} of its rows"
