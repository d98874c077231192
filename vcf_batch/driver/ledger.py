"""What of a run is committed, and what is set aside."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from vcf_batch import sharding
from vcf_batch.driver.fault import Fault
from vcf_batch.driver.progress import duration
from vcf_batch.errors import StorageError, VcfBatchError, redact
from vcf_batch.output import progress_file, receipts
from vcf_batch.output.progress_file import Told
from vcf_batch.output.sums import RunSums
from vcf_batch.records import STATUSES, Receipt, Shard, Status
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask

MAX_SET_ASIDE = 16
"""How many shards in a row may fail for good, while none is committed, before the run gives up on the others."""

MAX_NAMED = 64
"""How many of the shards that were set aside are named: a bound on memory, and on the length of a message."""

TELL_SECONDS = 10.0
"""Between two versions of the progress file."""


@dataclass(frozen=True)
class Summary:
    """What became of a run's rows, those that were finished before included."""

    output: str
    rows: int
    counts: dict[Status, int]
    resumed_rows: int
    """Rows that were finished before."""
    seconds: float

    @property
    def failed_fraction(self) -> float:
        """Share of the rows that failed, 0 to 1."""
        return self.counts["failed"] / self.rows

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[status]:,} {status}" for status in STATUSES)
        new = self.rows - self.resumed_rows
        rate = f", {new / self.seconds:.2f} samples a second" if new and self.seconds else ""
        resumed = f" ({self.resumed_rows:,} of them were there before)" if self.resumed_rows else ""
        return f"{redact(self.output)}: {self.rows:,} rows{resumed}: {counts}; {duration(self.seconds)}{rate}"


class Ledger:
    """Counts a run's shards, and tells so in :mod:`vcf_batch.output.progress_file`; what the output holds is read once.

    Args:
        job: the run.
        now: the clock.

    Raises:
        StorageError: the output cannot be read or written.
    """

    def __init__(self, job: Job, now: Callable[[], float] = time.monotonic) -> None:
        self._output, self._shards, self._redo = job.config.output, job.shards, job.redo
        self._now = now
        self._fingerprint = job.fingerprint
        self.totals = RunSums()
        self._older: dict[int, Receipt] = {}
        """For each partly regenerated shard, by index: an old receipt with the same device and batch marks."""
        self._rows = job.manifest.num_rows
        fingerprints = {job.fingerprint, *job.extends}
        alike: dict[str, Receipt] = {}
        for receipt in receipts.read(job.config.output):
            index = receipt.shard.index
            if receipt.fingerprint in fingerprints and index < len(job.shards):
                if index not in job.redo:
                    self.totals.add(receipt)
                elif not all(job.redo[index]):
                    # Shards are many, but few are marked differently.
                    self._older[index] = alike.setdefault(f"{receipt.device} {receipt.sampled_at_once}", receipt)
        self.finished_rows = self.totals.counts.total()
        self.resumed_rows = self.finished_rows + sum(mask.count(False) for mask in job.redo.values())
        self.left = len(job.shards) - len(self.totals.done)
        """Shards that are neither committed nor set aside."""
        self._set_aside: list[tuple[ShardTask, str]] = []
        """The first shards that were, and why."""
        self._set_aside_count = self._set_aside_in_a_row = 0
        self._last: Fault | None = None
        """Why the last one was set aside."""
        self._tell()

    @property
    def counts(self) -> Mapping[Status, int]:
        """Rows of the finished shards by status; 0 where there are none."""
        return self.totals.counts

    def remaining(self) -> Iterator[Shard]:
        """The shards that were not there at the beginning, in order."""
        return sharding.remaining(self._shards, self.totals.done)

    def rows_of(self, shard: Shard) -> list[int]:
        """Rows of a shard that are generated: all of them, unless some samples are kept."""
        mask = self._redo.get(shard.index, bytes([True]) * len(shard))
        return [row for row, chosen in enumerate(mask, start=shard.start) if chosen]

    def whole(self, receipt: Receipt) -> Receipt:
        """Complete a worker's receipt of a shard with what an older receipt says of the samples that it kept."""
        older = self._older.get(receipt.shard.index)
        return receipt.keeping(older) if older else receipt

    def committed(self, task: ShardTask, receipt: Receipt) -> None:
        """Count a shard that exists from now on."""
        self.left -= 1
        self._set_aside_in_a_row = 0
        self.finished_rows += len(task.shard)
        self.totals.add(receipt)
        if not self.left or self._now() - self._told >= TELL_SECONDS:
            self._try_to_tell()

    def set_aside(self, task: ShardTask, fault: Fault) -> None:
        """Count a shard that has failed for good.

        Raises:
            StorageError, VcfBatchError: :data:`MAX_SET_ASIDE` in a row have; there is no use in going on.
        """
        self.left -= 1
        if len(self._set_aside) < MAX_NAMED:
            self._set_aside.append((task, fault.reason))
        self._set_aside_count += 1
        self._set_aside_in_a_row += 1
        self._last = fault
        self._try_to_tell()
        if self._set_aside_in_a_row == MAX_SET_ASIDE:
            self.raise_if_incomplete()

    def raise_if_incomplete(self) -> None:
        """Refuse to call a run done that lacks shards.

        Raises:
            StorageError, VcfBatchError: shards were set aside; with their names and the last one's reason.
        """
        if self._last is None:
            return
        fault = self._last
        more = self._set_aside_count - len(self._set_aside)
        kind = StorageError if isinstance(fault.error, StorageError) else VcfBatchError
        raise kind(
            f"{self._set_aside_count} of {len(self._shards)} shards failed again and again: "
            f"{', '.join(task.title for task, _ in self._set_aside)}{f' and {more:,} more' if more else ''}. "
            f"The last reason: {fault.reason}\n"
            "What is finished is kept: once the cause is gone, rerun the same command to go on."
        ) from fault.error

    def summary(self, seconds: float) -> Summary:
        """The counts of the whole run."""
        return Summary(
            output=self._output,
            rows=self._rows,
            counts={status: self.totals.counts[status] for status in STATUSES},
            resumed_rows=self.resumed_rows,
            seconds=seconds,
        )

    def _tell(self) -> None:
        set_aside = {task.shard.name: why for task, why in self._set_aside}
        progress_file.publish(self._output, Told(self._fingerprint, self.totals, set_aside))
        self._told = self._now()

    def _try_to_tell(self) -> None:
        # Nothing depends on it; where the storage fails, commits say so.
        with contextlib.suppress(StorageError):
            self._tell()
