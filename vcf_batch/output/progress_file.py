"""``_progress.json``: what the driver has counted, so that whoever looks at a run need not read every receipt.

It is a help, never the truth: receipts are. The driver writes it before it commits anything, so that it never counts a
shard that is being replaced, and now and then from there on; receipts that are newer are read beside it.
"""

import json
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from vcf_batch import storage
from vcf_batch.output import receipts
from vcf_batch.output.sums import RunSums

NAME = "_progress.json"
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Told:
    """What a driver has told of a run."""

    fingerprint: str
    totals: RunSums
    set_aside: Mapping[str, str] = field(default_factory=dict)
    """The first shards that failed for good, by name, and why."""

    @property
    def counted(self) -> tuple[Any, ...]:
        """What is told of."""
        return self.fingerprint, self.totals.done, self.set_aside

    def to_json(self) -> bytes:
        return json.dumps(vars(self) | {"totals": self.totals.to_dict()}).encode()


def publish(output: str, told: Told) -> None:
    """Write the file, unless it says so already: sums of the same shards differ in the order they were added in only.

    Raises:
        StorageError: the storage failed.
    """
    there = read(output)
    if there is None or there.counted != told.counted:
        storage.publish_bytes(storage.join(output, NAME), told.to_json())


def read(output: str) -> Told | None:
    """What the last driver has told; None if there is nothing, or nothing that can be read.

    Raises:
        StorageError: the storage failed.
    """
    try:
        with storage.refusals_as_storage_errors():
            record = json.loads(storage.read_bytes(storage.join(output, NAME), limit=MAX_BYTES))
        set_aside = {str(name): str(reason) for name, reason in record["set_aside"].items()}
        return Told(record["fingerprint"], RunSums.from_dict(record["totals"]), set_aside)
    except (FileNotFoundError, storage.NotAFileError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def look(output: str, fingerprints: Set[str]) -> Told:
    """What there is of a run: what its driver has told, and the receipts that are newer.

    Args:
        output: of the run.
        fingerprints: those that its receipts may have.

    Raises:
        StorageError: the storage failed.
    """
    told = read(output)  # before the listing, which then has at least the shards that it counts
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output)
    if told is None or told.fingerprint not in fingerprints or not told.totals.done <= receipts.complete(sizes):
        told = Told("", RunSums())
    for receipt in receipts.read_listed(output, sizes, told.totals.done):
        if receipt.fingerprint in fingerprints:
            told.totals.add(receipt)
    return told
