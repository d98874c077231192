"""What a receipt tells of a shard's rows in sum."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vcf_batch.records import SCORE_STEP, SCORES, STATUSES, Status


class Tally:
    """Counts of a shard's rows by status, means and histograms of its scores, as the receipt tells them."""

    def __init__(self) -> None:
        self._counts: Counter[Status] = Counter()
        self._scores: dict[str, list[float]] = {name: [] for name in SCORES}
        self.sampled = 0
        """See :attr:`vcf_batch.records.Receipt.sampled`."""

    def add(self, status: Status, record: Mapping[str, Any]) -> None:
        """Take one row, by its columns."""
        self._counts[status] += 1
        # A row that is rejected before it is sampled has had no attempt.
        self.sampled += status == "success" or (status == "rejected" and bool(record["attempts"]))
        if status == "success":
            for name, found in self._scores.items():
                if record[name] is not None:
                    found.append(record[name])

    @property
    def counts(self) -> dict[Status, int]:
        return {status: self._counts[status] for status in STATUSES}

    @property
    def means(self) -> dict[str, float | None]:
        """Of each score over the successful samples that have it; None if none has."""
        return {name: math.fsum(found) / len(found) if found else None for name, found in self._scores.items()}

    @property
    def histograms(self) -> dict[str, dict[str, int]]:
        """See :attr:`vcf_batch.records.Receipt.histograms`."""
        return {
            name: dict(Counter(f"{math.ceil(score / SCORE_STEP) * SCORE_STEP:.2f}" for score in sorted(found)))
            for name, found in self._scores.items()
        }
