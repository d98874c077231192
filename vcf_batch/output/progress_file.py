"""``_progress.json``: the driver's counts, so that commands which look at a run need not read every receipt.

The receipts are the truth; this file only saves time. The driver writes it before its first commit, so that it never
counts a shard that is being replaced, and then from time to time. Readers add the receipts that are newer.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

from vcf_batch import storage
from vcf_batch.output import receipts
from vcf_batch.output.receipts import Damaged
from vcf_batch.output.sums import RunSums

PROGRESS_NAME = "_progress.json"
MAX_PROGRESS_BYTES = 64 << 20


@dataclass(frozen=True)
class Told:
    """A driver's counts of a run."""

    fingerprint: str
    totals: RunSums
    set_aside: Mapping[str, str] = field(default_factory=dict)
    """Names of the first shards that failed for good, each with the reason."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Names of the shards that have a receipt and do not exist, each with the reason. Never written to the file."""

    @property
    def counted(self) -> tuple[Any, ...]:
        """The values by which two counts are compared; the sums follow from them."""
        return self.fingerprint, self.totals.done, self.set_aside

    def to_json(self) -> bytes:
        told = {"fingerprint": self.fingerprint, "totals": self.totals.to_dict(), "set_aside": self.set_aside}
        return json.dumps(told).encode()


def publish(output: str, told: Told) -> None:
    """Write the file unless it already covers the same shards.

    The sums of floats may then differ by the order in which they were added, which does not matter.

    Raises:
        StorageError: the storage failed.
    """
    there = read(output)
    if there is None or there.counted != told.counted:
        storage.publish_bytes(storage.join(output, PROGRESS_NAME), told.to_json())


def read(output: str) -> Told | None:
    """The last driver's counts; None if the file is missing or cannot be read.

    Raises:
        StorageError: the storage failed.
    """
    try:
        with storage.refusals_as_storage_errors():
            record = json.loads(storage.read_bytes(storage.join(output, PROGRESS_NAME), limit=MAX_PROGRESS_BYTES))
        set_aside = {str(name): str(reason) for name, reason in record["set_aside"].items()}
        return Told(record["fingerprint"], RunSums.from_dict(record["totals"]), set_aside)
    except (FileNotFoundError, storage.NotAFileError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def look(output: str, fingerprints: Set[str]) -> Told:
    """Count a run: its driver's counts, and the receipts that are newer.

    The driver's counts are used only if the files of its shards have as many bytes in all as it counted. Else every
    receipt is read, and compared with the sizes of its files.

    Args:
        output: folder or URL of the run's output.
        fingerprints: the fingerprints that its receipts may have.

    Raises:
        StorageError: the storage failed.
    """
    told = read(output)  # Read before listing, so that the listing has at least the shards counted here.
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output)
    if told is None or told.fingerprint not in fingerprints or not _is_there(told.totals, receipts.complete(sizes)):
        told = Told("", RunSums())
    damaged: dict[str, str] = {}
    for found in receipts.examine(output, sizes, told.totals.done):
        if isinstance(found, Damaged):
            damaged[found.name] = found.reason
        elif found.fingerprint in fingerprints:
            told.totals.add(found)
        else:
            damaged[found.shard.name] = receipts.of_another_run(found).reason
    return replace(told, damaged=damaged)


def _is_there(totals: RunSums, complete: Mapping[int, int]) -> bool:
    """Whether the shards that are counted have all of their files, with as many bytes as were counted."""
    return totals.done <= complete.keys() and sum(complete[index] for index in totals.done) == totals.bytes
