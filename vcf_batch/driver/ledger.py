"""The record of a run's shards that are committed, and of those that are set aside."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vcf_batch import sharding
from vcf_batch.driver.fault import Fault
from vcf_batch.driver.progress import duration, told_truncated
from vcf_batch.errors import StorageError, VcfBatchError, redact
from vcf_batch.output import progress_file, receipts
from vcf_batch.output.progress_file import Told, note_device
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.sums import RunSums
from vcf_batch.records import STATUSES, RowMask, Shard, Status
from vcf_batch.setup.job import Job
from vcf_batch.setup.shard_task import ShardTask

MAX_SET_ASIDE = 16
"""Number of shards that fail for good in a row, while none is committed, at which the run gives up on the others."""

MAX_NAMED = 64
"""Largest number of set-aside shards that are named: a bound on memory, and on the length of a message."""

TELL_SECONDS = 10.0
"""Seconds between two versions of the progress file."""


@dataclass(frozen=True)
class Summary:
    """Outcome of a run's rows, those that were finished before included."""

    output: str
    rows: int
    counts: dict[Status, int]
    resumed_rows: int
    """Number of rows that were finished before."""
    seconds: float
    truncated: int = 0
    """Number of rows whose prompt was cut off at the length of the text encoder."""

    @property
    def failed_fraction(self) -> float:
        """Share of the rows that failed, 0 to 1."""
        return self.counts["failed"] / self.rows

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain JSON types."""
        return {
            "output": redact(self.output),
            "rows": {"total": self.rows, "resumed": self.resumed_rows, **self.counts},
            "prompts_truncated": self.truncated,
            "seconds": round(self.seconds, 3),
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{self.counts[status]:,} {status}" for status in STATUSES)
        new = self.rows - self.resumed_rows
        rate = f", {new / self.seconds:.2f} samples a second" if new and self.seconds else ""
        resumed = f" ({self.resumed_rows:,} of them were there before)" if self.resumed_rows else ""
        cut = f"; cut off: {told_truncated(self.truncated)}" if self.truncated else ""
        return f"{redact(self.output)}: {self.rows:,} rows{resumed}: {counts}; {duration(self.seconds)}{rate}{cut}"


class Ledger:
    """Count of a run's shards, published with :mod:`vcf_batch.output.progress_file`.

    Args:
        job: the run.
        now: reads the clock.

    Raises:
        StorageError: the output cannot be read or written.
    """

    _output: str | None
    """The output that the counts are published in; None for none."""
    _redo: Mapping[int, RowMask]
    _fingerprints: frozenset[str]

    def __init__(self, job: Job, now: Callable[[], float] = time.monotonic) -> None:
        self._begin(job.shards, now)
        self._output, self._rows, self._redo = job.config.output, job.manifest.num_rows, job.redo
        self._fingerprints = frozenset((job.fingerprint, *job.extends))
        there = progress_file.look(job.config.output, self._fingerprints, job.shards, job.redo)
        if there.fingerprint and len(there.totals.done) == len(job.shards):
            # Not every receipt was read. Before a run counts as finished, damage within a size is found, too.
            there = progress_file.count(job.config.output, self._fingerprints, job.shards)
        self._counted = dataclasses.replace(there, fingerprint=job.fingerprint)
        self.devices.update(there.devices)
        self._read_older(job)
        self.finished_rows = self.totals.counts.total()
        self.resumed_rows = self.finished_rows + sum(mask.count(False) for mask in job.redo.values())
        self.left = len(job.shards) - len(self.totals.done)
        self._tell()

    def _read_older(self, job: Job) -> None:
        """Read the receipts of the shards that are done again."""
        alike: dict[str, Receipt] = {}
        for receipt in receipts.read(job.config.output, job.redo.__contains__) if job.redo else ():
            if receipt.fingerprint in self._fingerprints:
                note_device(self.devices, receipt)
                if not all(job.redo[receipt.shard.index]):
                    # One receipt stands for all with the same marks, which bounds memory.
                    marks = f"{receipt.device} {receipt.sampled_at_once}"
                    self._older[receipt.shard.index] = alike.setdefault(marks, receipt)

    @classmethod
    def of(cls, shards: Sequence[Shard], now: Callable[[], float] = time.monotonic) -> "Ledger":
        """Count of some shards of an output that something else than generating is done with. Nothing is published.

        Args:
            shards: the shards, none of which is done.
            now: reads the clock.
        """
        ledger = cls.__new__(cls)
        ledger._begin(shards, now)
        return ledger

    def _begin(self, shards: Sequence[Shard], now: Callable[[], float]) -> None:
        self._shards, self._now = shards, now
        self._output = None
        self._rows = 0
        self._redo, self._fingerprints = {}, frozenset()
        self._counted = Told("")
        self._older: dict[int, Receipt] = {}
        """An old receipt for each shard with kept samples, by index. Its device and batch marks are the shard's."""
        self.devices: dict[str, Mapping[str, Any]] = {}
        """One device for each type of the receipts that were there, by type, without shards of several types."""
        self.finished_rows = self.resumed_rows = 0
        self.left = len(shards)
        """Number of shards that are neither committed nor set aside."""
        self._set_aside: list[tuple[ShardTask, str]] = []
        """The first shards that were set aside, each with the reason."""
        self._set_aside_count = self._set_aside_in_a_row = 0
        self._last: Fault | None = None
        """Fault for which the last shard was set aside."""
        self._told = now()
        self._has_news = False
        """Whether a shard was committed since it was last told."""

    @property
    def totals(self) -> RunSums:
        """Sums over the finished shards."""
        return self._counted.totals

    @property
    def counts(self) -> Mapping[Status, int]:
        """Rows of the finished shards by status; 0 where there are none."""
        return self.totals.counts

    def remaining(self) -> Iterator[Shard]:
        """Shards that were not committed when the run began, in order."""
        return sharding.remaining(self._shards, self.totals.done)

    def rows_of(self, shard: Shard) -> list[int]:
        """Rows of a shard that are generated: all of them, unless some samples are kept."""
        mask = self._redo.get(shard.index, bytes([True]) * len(shard))
        return [row for row, chosen in enumerate(mask, start=shard.start) if chosen]

    def stays(self, shard: Shard) -> frozenset[str]:
        """Fingerprints of receipts with which a shard is not replaced: none if it is generated again on purpose."""
        return frozenset() if shard.index in self._redo else self._fingerprints

    def whole(self, receipt: Receipt) -> Receipt:
        """Complete a worker's receipt of a shard with the marks of the samples that it kept."""
        older = self._older.get(receipt.shard.index)
        return receipt.keeping(older) if older else receipt

    def committed(self, task: ShardTask, receipt: Receipt) -> None:
        """Count a shard that has just been committed."""
        self.left -= 1
        self._set_aside_in_a_row = 0
        self.finished_rows += len(task.shard)
        if self._output is None:  # Such a receipt is never published, and names no files.
            self.totals.add(receipt)
        else:
            self._counted.add(receipt, len(receipt.to_json()))
        self._has_news = True
        self.tell_if_due()

    def tell_if_due(self) -> None:
        """Tell of what was committed, every :data:`TELL_SECONDS` and at the end."""
        if self._has_news and (not self.left or self._now() - self._told >= TELL_SECONDS):
            self._try_to_tell()

    def set_aside(self, task: ShardTask, fault: Fault) -> None:
        """Count a shard that has failed for good.

        Raises:
            StorageError, VcfBatchError: :data:`MAX_SET_ASIDE` shards in a row have failed for good.
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
        """Raise if shards were set aside.

        Raises:
            StorageError, VcfBatchError: shards were set aside. The message has their names and the last reason.
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
        assert self._output is not None
        return Summary(
            output=self._output,
            rows=self._rows,
            counts={status: self.totals.counts[status] for status in STATUSES},
            resumed_rows=self.resumed_rows,
            seconds=seconds,
            truncated=self.totals.truncated,
        )

    def _tell(self) -> None:
        if self._output is not None:
            set_aside = {task.shard.name: why for task, why in self._set_aside}
            progress_file.publish(self._output, dataclasses.replace(self._counted, set_aside=set_aside))
        self._told, self._has_news = self._now(), False

    def _try_to_tell(self) -> None:
        # No byte of the output depends on the progress file, and commits report a storage that fails.
        with contextlib.suppress(StorageError):
            self._tell()
