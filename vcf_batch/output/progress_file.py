"""``_progress.json``: the driver's counts, so that who goes on with a run, or looks at it, need not read every receipt.

The receipts are the truth; this file only saves time. The driver writes it before its first commit, so that it never
counts a shard that is being replaced, and then from time to time. Readers add the receipts that are newer.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Self

from vcf_batch import storage
from vcf_batch.output import receipts
from vcf_batch.output.receipts import RECEIPT_SUFFIX, SEVERAL, Damaged, Receipt, device_type
from vcf_batch.output.sums import RunSums
from vcf_batch.records import Shard

PROGRESS_NAME = "_progress.json"
MAX_PROGRESS_BYTES = 64 << 20


@dataclass
class Told:
    """A driver's counts of a run."""

    fingerprint: str
    """Empty in counts that no driver has told, for which every receipt was read."""
    totals: RunSums = field(default_factory=RunSums)
    files: int = 0
    """Sum of :func:`mark` over the shards that are counted, modulo 2**64."""
    devices: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """One device for each type of the receipts that are counted, by type, without shards of several types."""
    set_aside: Mapping[str, str] = field(default_factory=dict)
    """Names of the first shards that failed for good, each with the reason."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Names of the shards that have a receipt and do not exist, each with the reason. Never written to the file."""

    @property
    def counted(self) -> tuple[Any, ...]:
        """The values by which two counts are compared; the sums follow from them."""
        return self.fingerprint, self.totals.done, self.files, self.set_aside

    def to_json(self) -> bytes:
        told = {name: getattr(self, name) for name in ("fingerprint", "files", "devices", "set_aside")}
        return json.dumps({**told, "totals": self.totals.to_dict()}).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Read back :meth:`to_json`.

        Raises:
            ValueError: the bytes are something else.
        """
        try:
            record = json.loads(data)
            if not isinstance(record["fingerprint"], str):
                raise ValueError(f"its fingerprint is {record['fingerprint']!r}")
            devices = {device_type(device): device for device in record["devices"].values()}
            set_aside = {str(name): str(reason) for name, reason in record["set_aside"].items()}
            return cls(record["fingerprint"], RunSums.from_dict(record["totals"]), record["files"], devices, set_aside)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a driver's counts: {error}") from error

    def add(self, receipt: Receipt, size: int) -> None:
        """Count one more shard.

        Args:
            receipt: the receipt of the shard.
            size: its bytes as a file.
        """
        self.totals.add(receipt)
        sizes = {kind: entry.size for kind, entry in receipt.files.items()}
        self.files = (self.files + mark(receipt.shard.index, size, sizes.get("tar"), sizes["parquet"])) % 2**64
        note_device(self.devices, receipt)


def note_device(devices: dict[str, Mapping[str, Any]], receipt: Receipt) -> None:
    """Add the device of a receipt to those of the other types, unless it names several."""
    if receipt.device and SEVERAL not in receipt.device:
        devices.setdefault(device_type(receipt.device), receipt.device)


def mark(index: int, receipt: int, tar: int | None, parquet: int) -> int:
    """A hash of the sizes of a shard's files. The sum of those of some shards tells whether a file is another one.

    Args:
        index: number of the shard.
        receipt: bytes of its receipt.
        tar: bytes of its tar; None if it has none.
        parquet: bytes of its parquet.

    Returns:
        A number from 0 to 2**64 - 1.
    """
    return int.from_bytes(hashlib.blake2b(f"{index} {receipt} {tar} {parquet}".encode(), digest_size=8).digest())


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
            return Told.from_json(storage.read_bytes(storage.join(output, PROGRESS_NAME), limit=MAX_PROGRESS_BYTES))
    except (FileNotFoundError, storage.NotAFileError, ValueError):
        return None


def glance(output: str, fingerprints: Set[str], shards: Sequence[Shard]) -> Told | None:
    """A driver's counts as they are; None if there are none of this run. The files are not listed.

    For the arguments and errors see :func:`look`.
    """
    told = read(output)
    if told is None or told.fingerprint not in fingerprints or any(index >= len(shards) for index in told.totals.done):
        return None
    return told


def look(output: str, fingerprints: Set[str], shards: Sequence[Shard], leave_out: Collection[int] = ()) -> Told:
    """Count a run: its driver's counts, and the receipts that are newer.

    The driver's counts are used only if the receipts, tars and parquets that it counted are there, each with its size.
    Else every receipt is read, as :func:`count` does.

    Args:
        output: folder or URL of the run's output.
        fingerprints: the fingerprints that its receipts may have.
        shards: the shards of the run, by number. Receipts of others are not counted.
        leave_out: numbers of shards that are not counted.

    Raises:
        StorageError: the storage failed.
    """
    told = glance(output, fingerprints, shards)  # Before listing, so that the listing has the shards counted here.
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output)
    if told is None or not _is_there(told, sizes, leave_out):
        told = Told("")
    return _completed(told, output, sizes, fingerprints, shards, leave_out)


def count(output: str, fingerprints: Set[str], shards: Sequence[Shard]) -> Told:
    """Count a run by its receipts alone, which are read and compared with the sizes of their files.

    For the arguments and errors see :func:`look`.
    """
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output)
    return _completed(Told(""), output, sizes, fingerprints, shards, ())


def _completed(
    told: Told,
    output: str,
    sizes: Mapping[str, int],
    fingerprints: Set[str],
    shards: Sequence[Shard],
    leave_out: Collection[int],
) -> Told:
    """Some counts, and the receipts of a listing that are not among them."""
    damaged: dict[str, str] = {}
    known = told.totals.done.union(leave_out)
    for found in receipts.examine(output, sizes, lambda index: index not in known):
        if isinstance(found, Damaged):
            damaged[found.name] = found.reason
        elif foreign := receipts.foreign(found, fingerprints, shards):
            damaged[foreign.name] = foreign.reason
        elif found.shard.index < len(shards):
            told.add(found, sizes[found.shard.name + RECEIPT_SUFFIX])
    return replace(told, damaged=damaged)


def _is_there(told: Told, sizes: Mapping[str, int], leave_out: Collection[int]) -> bool:
    """Whether a driver's counts are of the files in a listing, and of shards that are wanted."""
    done, complete = told.totals.done, receipts.complete(sizes)
    if not done.isdisjoint(leave_out) or not done <= complete.keys():
        return False
    return sum(mark(index, *complete[index]) for index in done) % 2**64 == told.files
