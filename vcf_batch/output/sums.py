"""Sums over a run's receipts, and over a shard's rows. Each receipt adds only its shard's number to the memory used."""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Self

from vcf_batch.output.receipts import SCORE_STEP, SEVERAL, Receipt, device_type
from vcf_batch.records import SCORES, STATUSES, Status

MAX_FAILING = 64
"""Number of shards with failed or rejected rows that are named."""
MAX_WORKERS = 1024
"""Number of workers that are counted one by one. Beyond it, workers that have ended are forgotten."""

NOT_PHASES = frozenset({"started", "ended", "total", "worker", "model_loads", "generated"})
"""Names in a receipt's timings that are not seconds of a phase."""


class Latest(NamedTuple):
    """A worker's last shard."""

    ended: float
    """End of the shard, in seconds since 1970."""
    rows: int
    """Rows that were generated, without those kept from before."""
    seconds: float


@dataclass
class RunSums:
    """Sums over some shards of a run."""

    done: set[int] = field(default_factory=set)
    """Indices of the shards."""
    counts: Counter[Status] = field(default_factory=Counter)
    sampled: int = 0
    """Rows for which an image was sampled."""
    truncated: int = 0
    """Rows whose prompt was cut off at the length of the text encoder."""
    retried: int = 0
    """Shards that took more than one attempt."""
    bytes: int = 0
    """Bytes of all tars and parquets."""
    generated: int = 0
    """Rows on which :attr:`worker_seconds` were spent: all rows except those that a repair kept."""
    worker_seconds: float = 0.0
    phases: Counter[str] = field(default_factory=Counter)
    """Worker seconds by phase, without the time spent waiting for another shard. Phases overlap."""
    devices: Counter[str] = field(default_factory=Counter)
    """Rows by device type."""
    device_seconds: Counter[str] = field(default_factory=Counter)
    """Worker seconds by device type."""
    score_sums: Counter[str] = field(default_factory=Counter)
    score_counts: Counter[str] = field(default_factory=Counter)
    failing: list[int] = field(default_factory=list)
    """Indices of the first shards with failed or rejected rows, at most :data:`MAX_FAILING`."""
    workers: dict[str, Latest] = field(default_factory=dict)

    def add(self, receipt: Receipt) -> None:
        """Add one receipt."""
        timings, device = receipt.timings, device_type(receipt.device)
        seconds = receipt.worker_seconds
        generated = timings.get("generated", len(receipt.shard))
        self.done.add(receipt.shard.index)
        self.counts.update(receipt.counts)
        self.sampled += receipt.sampled
        self.truncated += receipt.truncated
        self.retried += receipt.attempt > 1
        self.bytes += sum(entry.size for entry in receipt.files.values())
        self.generated += generated if seconds else 0
        self.worker_seconds += seconds
        phases = timings.keys() - NOT_PHASES - {"wait_for_turn"}
        self.phases.update({name: timings[name] for name in phases})
        self.devices[device] += generated
        self.device_seconds[device] += seconds  # type: ignore[assignment]
        for name, mean in receipt.means.items():
            if mean is not None:
                self.score_sums[name] += mean * receipt.counts["success"]  # type: ignore[assignment]
                self.score_counts[name] += receipt.counts["success"]
        if receipt.counts["success"] < len(receipt.shard) and len(self.failing) < MAX_FAILING:
            self.failing.append(receipt.shard.index)
        if "ended" in timings:
            self._add_worker(
                timings["worker"], Latest(datetime.fromisoformat(timings["ended"]).timestamp(), generated, seconds)
            )

    def _add_worker(self, name: str, shard: Latest) -> None:
        if name not in self.workers or self.workers[name].ended < shard.ended:
            self.workers[name] = shard
        if len(self.workers) > MAX_WORKERS:
            self.workers = self.at_work or self.workers

    @property
    def means(self) -> dict[str, float]:
        """Mean of each score. A shard's mean counts once per sample, even for samples without a reference."""
        return {name: self.score_sums[name] / count for name, count in self.score_counts.items() if count}

    @property
    def device_types(self) -> int:
        """Number of device types; at least two if one shard had several."""
        named = len(self.devices.keys() - {SEVERAL})
        return max(named, 2) if SEVERAL in self.devices else named

    @property
    def latest(self) -> float | None:
        """End of the shard that ended last, in seconds since 1970; None if unknown."""
        return max((shard.ended for shard in self.workers.values()), default=None)

    @property
    def at_work(self) -> dict[str, Latest]:
        """The workers that were still expected to finish another shard when the last shard ended."""
        latest = self.latest or 0.0
        return {name: shard for name, shard in self.workers.items() if latest - shard.ended <= 2 * shard.seconds + 60}

    @property
    def rate(self) -> float | None:
        """Rows per second of all workers at work, from the last shard of each worker; None if unknown."""
        return sum(shard.rows / shard.seconds for shard in self.at_work.values() if shard.seconds) or None

    def to_dict(self) -> dict[str, Any]:
        """The sums as plain JSON types."""
        return vars(self) | {"done": _ranges(self.done)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Read back :meth:`to_dict`.

        Raises:
            TypeError, ValueError, AttributeError: ``record`` is something else.
        """
        found = cls(**record)
        found.done = {index for start, stop in record["done"] for index in range(start, stop)}
        for name, value in vars(cls()).items():
            if isinstance(value, Counter):
                setattr(found, name, Counter(record[name]))
        found.workers = {name: Latest(*shard) for name, shard in record["workers"].items()}
        if not found.done.issuperset(found.failing):
            raise ValueError(f"shards {found.failing} have failed rows, but not all of them are done")
        return found


def _ranges(numbers: set[int]) -> list[tuple[int, int]]:
    """The numbers as the fewest ranges ``(start, stop)``, ``stop`` excluded."""
    ordered = sorted(numbers)
    starts = [number for number in ordered if number - 1 not in numbers]
    stops = [number + 1 for number in ordered if number + 1 not in numbers]
    return list(zip(starts, stops, strict=True))


class ShardSums:
    """A shard's counts by status, and means and histograms of its scores, in the form of the receipt."""

    def __init__(self) -> None:
        self._counts: Counter[Status] = Counter()
        self._scores: dict[str, list[float]] = {name: [] for name in SCORES}
        self.sampled = 0
        """See :attr:`vcf_batch.output.receipts.Receipt.sampled`."""
        self.truncated = 0
        """See :attr:`vcf_batch.output.receipts.Receipt.truncated`."""

    def add(self, status: Status, record: Mapping[str, Any]) -> None:
        """Add one row, given as column name to value."""
        self._counts[status] += 1
        # The list of attempts is empty if a row was rejected before sampling.
        self.sampled += status == "success" or (status == "rejected" and bool(record["attempts"]))
        self.truncated += bool(record["prompt_truncated"])
        if status == "success":
            for name, found in self._scores.items():
                if record[name] is not None:
                    found.append(record[name])

    @property
    def counts(self) -> dict[Status, int]:
        return {status: self._counts[status] for status in STATUSES}

    @property
    def means(self) -> dict[str, float | None]:
        """Mean of each score over the successful samples that have it; None if no sample has it."""
        return {name: math.fsum(found) / len(found) if found else None for name, found in self._scores.items()}

    @property
    def histograms(self) -> dict[str, dict[str, int]]:
        """See :attr:`vcf_batch.output.receipts.Receipt.histograms`."""
        return {
            name: dict(Counter(f"{math.ceil(score / SCORE_STEP) * SCORE_STEP:.2f}" for score in sorted(found)))
            for name, found in self._scores.items()
        }
