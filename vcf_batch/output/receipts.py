"""The receipts of an output. Each describes one shard; one listing finds them all, and they say which shards exist.

A shard without a successful sample has no tar, because readers fail at an empty one. Versions before 0.2.0 wrote it.

A shard does not exist if it has no receipt, or if its files are not those that its receipt names, with their sizes. The
first is unfinished: the run has not generated it yet. The second is damaged. A file that has a receipt's name and is
not a receipt counts as absent. :mod:`vcf_batch.output.progress_file` says which receipts need not be read.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

from vcf_batch import storage
from vcf_batch.records import STATUSES, FileEntry, Shard, Status

FILE_SUFFIXES: Mapping[str, str] = {"tar": ".tar", "parquet": ".parquet"}
"""Endings of the file names of a shard, by the kind of file as in :attr:`Receipt.files`."""
RECEIPT_SUFFIX = "_stats.json"
"""End of a receipt's file name, after the shard's name."""

SEVERAL = "several"
"""Name in a receipt, and among device types, for the device types of a shard that were several."""

SCORE_STEP = 0.05
"""Width of the bins of a receipt's histograms."""

SHARD_FILE = re.compile(rf"(\d{{5,}})({'|'.join(map(re.escape, [*FILE_SUFFIXES.values(), RECEIPT_SUFFIX]))})")
"""Name of a file of a shard: the name of the shard, and the ending."""

_MOST_SECONDS = 1e9
"""Greatest timing, 31 years."""
_SHOWN = reprlib.Repr()
_READERS = 32
_RECEIPTS_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Receipt:
    """``00000_stats.json``: written last, so its existence means that the shard's files are whole.

    Timings, host names and dates live only here, never in the tar or the parquet.
    """

    shard: Shard
    fingerprint: str
    attempt: int
    counts: Mapping[Status, int]
    files: Mapping[str, FileEntry]
    """Size and hash of the files ``tar`` and ``parquet``; of the second alone if no sample succeeded."""
    device: Mapping[str, Any]
    """The device type that the bytes depend on, as :func:`vcf_batch.worker.device_type.describe` tells it. If a repair
    kept samples of another device, ``several`` lists all of them."""
    timings: Mapping[str, Any]
    """Seconds per phase, start and end date, host name."""
    means: Mapping[str, float | None] = field(default_factory=dict)
    """Mean of each score over the successful samples."""
    histograms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Histogram of each score over the successful samples: their number by the upper end of their bin of
    :data:`SCORE_STEP`."""
    sampled: int = 0
    """Number of rows that an image was sampled for, whether it passed the gates or not."""
    truncated: int = 0
    """Number of rows whose prompt was cut off at the length of the text encoder."""
    sampled_at_once: int | None = None
    """Number of rows sampled at once, if memory was too small for the run's batches; else None. Such a shard is outside
    of the promise of identical bytes."""

    @property
    def parquet_hash(self) -> str:
        """Hex SHA-256 of the shard's parquet."""
        return self.files["parquet"].sha256

    @property
    def worker_seconds(self) -> float:
        """Seconds that the shard took of its worker, without the wait for its turn, in which another shard was
        sampled."""
        return max(0.0, self.timings.get("total", 0.0) - self.timings.get("wait_for_turn", 0.0))

    def keeping(self, older: "Receipt") -> "Receipt":
        """Copy of the receipt for a shard that keeps samples of an older one. It has the marks of both."""
        devices = list(older.device.get(SEVERAL, [older.device]))
        if self.device not in devices:
            devices.append(self.device)
        return dataclasses.replace(
            self,
            device=devices[0] if len(devices) == 1 else {SEVERAL: devices},
            sampled_at_once=min(filter(None, (self.sampled_at_once, older.sampled_at_once)), default=None),
        )

    def to_json(self) -> bytes:
        """The receipt as indented UTF-8 JSON with sorted keys."""
        return json.dumps(dataclasses.asdict(self), indent=2, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "Receipt":
        """Read back :meth:`to_json`.

        Raises:
            ValueError: the bytes are not a receipt, or a value in it is not what readers may count with.
        """
        try:
            record = json.loads(data)
            record["shard"] = Shard(**record["shard"])
            record["files"] = {name: FileEntry(**entry) for name, entry in record["files"].items()}
            receipt = cls(**record)
            _check_values(receipt)
            return receipt
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, OSError, RecursionError) as error:
            raise ValueError(f"not a receipt: {error}") from error


def device_type(device: Mapping[str, Any]) -> str:
    """Name of a device type: the GPU model or CPU instruction set, and a hash of what else the ``device`` says."""
    if SEVERAL in device:
        return SEVERAL
    name = str(device.get("type", "unknown"))
    rest = {field: value for field, value in device.items() if field != "type"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    return f"{name} #{digest[:8]}" if rest else name


def _check_values(receipt: Receipt) -> None:
    """Compare every value that readers count with, or show, with its type and range.

    Raises:
        ValueError, TypeError, AttributeError, OverflowError, OSError: a value is something else.
    """
    shard = receipt.shard
    _check(all(map(_is_count, (shard.index, shard.start, shard.stop, receipt.attempt))), "shard", shard)
    _check(re.fullmatch(r"\d{5,}", shard.name) is not None and shard.start <= shard.stop, "shard", shard)
    _check(isinstance(receipt.fingerprint, str), "fingerprint", receipt.fingerprint)
    counts = receipt.counts
    _check(counts.keys() == {*STATUSES} and all(map(_is_count, counts.values())), "counts", counts)
    _check(sum(counts.values()) == len(shard), f"counts of {len(shard)} rows", counts)
    for kind, entry in receipt.files.items():
        _check(_is_count(entry.size) and isinstance(entry.sha256, str), kind, entry)
    devices = receipt.device.get(SEVERAL, [receipt.device])
    _check(isinstance(devices, list) and len(devices) > 0, "device", receipt.device)
    for device in (receipt.device, *devices):
        _check(isinstance(device, dict) and isinstance(device.get("type", ""), str), "device", device)
    for name, mean in receipt.means.items():
        _check(mean is None or _is_number(mean), f"mean of {name}", mean)
    for name, bins in receipt.histograms.items():
        _check(all(map(_is_count, bins.values())), f"histogram of {name}", bins)
        _check(sum(bins.values()) <= len(shard) and all(math.isfinite(float(end)) for end in bins), name, bins)
    _check(
        _is_count(receipt.sampled) and receipt.sampled <= len(shard), f"sampled of {len(shard)} rows", receipt.sampled
    )
    _check(
        _is_count(receipt.truncated) and receipt.truncated <= len(shard),
        f"truncated of {len(shard)} rows",
        receipt.truncated,
    )
    at_once = receipt.sampled_at_once
    _check(at_once is None or (_is_count(at_once) and at_once > 0), "sampled_at_once", at_once)
    _check_timings(receipt.timings)


def _check_timings(timings: Mapping[str, Any]) -> None:
    _check(not timings or timings.keys() >= {"total", "worker", "ended"}, "timings", sorted(timings))
    for name, value in timings.items():
        if name == "worker":
            _check(isinstance(value, str), name, value)
        elif name in ("started", "ended"):
            _check(datetime.fromisoformat(value).timestamp() >= 0, name, value)
        else:
            _check(_is_number(value) and 0 <= value <= _MOST_SECONDS, name, value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check(holds: bool, what: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{what} is {_SHOWN.repr(value)}")


class Damaged(NamedTuple):
    """A shard that does not exist although it has a receipt."""

    name: str
    reason: str
    """What is wrong with its receipt, or which of its files is missing or has another size."""


def files_found(output_url: str) -> dict[str, dict[str, int]]:
    """The files of all shards in the output, finished or not: shard name to suffix to size.

    Raises:
        StorageError: the output cannot be read.
    """
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output_url)
    found: dict[str, dict[str, int]] = {}
    for match in filter(None, map(SHARD_FILE.fullmatch, sizes)):
        found.setdefault(match[1], {})[match[2]] = sizes[match[0]]
    return found


def read_one(output_url: str, shard: Shard) -> Receipt | None:
    """The receipt that a shard has, whatever became of its files; None if it has none, or a file that is no receipt.

    Raises:
        StorageError: the output cannot be read.
    """
    try:
        with storage.refusals_as_storage_errors():
            receipt = Receipt.from_json(storage.read_bytes(storage.join(output_url, shard.name + RECEIPT_SUFFIX)))
    except (FileNotFoundError, storage.NotAFileError, ValueError):
        return None
    return receipt if receipt.shard == shard else None


def _every(index: int) -> bool:
    return True


def read(output_url: str, wanted: Callable[[int], bool] = _every) -> Iterator[Receipt]:
    """Yield the receipts of the shards that exist, in order of shard index, without holding all of them.

    One listing finds the receipts and checks the sizes of their files. Several receipts are read at the same time. A
    file that is not a receipt, or a receipt of another shard than its name says, counts as absent.

    Args:
        output_url: the output.
        wanted: whether the receipt of the shard with a number is read.

    Raises:
        StorageError: the output cannot be read.
    """
    with storage.refusals_as_storage_errors():
        sizes = storage.list_files(output_url)
    return (found for found in examine(output_url, sizes, wanted) if isinstance(found, Receipt))


class Sizes(NamedTuple):
    """Bytes of a shard's files."""

    receipt: int
    tar: int | None
    """None if there is no tar."""
    parquet: int


def complete(sizes: Mapping[str, int]) -> dict[int, Sizes]:
    """Index to the sizes of the files, of each shard whose receipt and parquet are in a listing and not empty.

    Args:
        sizes: bytes of the output's files, by name. Whether a shard has to have a tar is told by its receipt alone.
    """
    found: dict[int, Sizes] = {}
    parquet, tar = FILE_SUFFIXES["parquet"], FILE_SUFFIXES["tar"]
    for name, size in sizes.items():
        if size and name.endswith(RECEIPT_SUFFIX) and (match := SHARD_FILE.fullmatch(name)):
            stem = match[1]
            if rows := sizes.get(stem + parquet):
                found[int(stem)] = Sizes(size, sizes.get(stem + tar), rows)
    return found


def examine(
    output_url: str, sizes: Mapping[str, int], wanted: Callable[[int], bool] = _every
) -> Iterator[Receipt | Damaged]:
    """Yield the receipts of a listing, in order of shard index, and each shard whose receipt does not fit its files.

    A driver may replace the shard between the listing and the reading of its receipt. So what does not fit is looked at
    once more, receipt and files, before it counts as damaged.

    Args:
        output_url: the output.
        sizes: bytes of the output's files, by name.
        wanted: whether the receipt of the shard with a number is read.

    Raises:
        StorageError: the output cannot be read.
    """
    found = filter(None, map(SHARD_FILE.fullmatch, sizes))
    stems = sorted((match[1] for match in found if match[2] == RECEIPT_SUFFIX and wanted(int(match[1]))), key=int)

    def look(stem: str, data: bytes | None) -> Receipt | Damaged | None:
        # An empty one is just being written, or its writer died: see vcf_batch.storage.publish_bytes.
        receipt = _receipt_in(data, stem) if data else None
        if isinstance(receipt, Receipt) and misfit(receipt, sizes) is None:
            return receipt
        again = content(output_url, stem)
        receipt = _receipt_in(again, stem) if again else None
        if isinstance(receipt, Receipt) and (reason := misfit(receipt, sizes_now(output_url, stem))):
            return Damaged(stem, reason)
        return receipt

    # Threads only wait for the storage. Parsing in threads would gain nothing, because only one runs Python at a time.
    with storage.reading_threads(_READERS, "receipts") as threads:
        for begin in range(0, len(stems), _RECEIPTS_AT_ONCE):
            batch = stems[begin : begin + _RECEIPTS_AT_ONCE]
            # Each thread gets one piece: handing over a single receipt takes longer than reading it from a disk.
            step = math.ceil(len(batch) / _READERS)
            pieces = [batch[first : first + step] for first in range(0, len(batch), step)]
            contents = itertools.chain.from_iterable(
                threads.map(lambda piece: [content(output_url, stem) for stem in piece], pieces)
            )
            yield from filter(None, map(look, batch, contents))


def content(output_url: str, stem: str) -> bytes | None:
    """The bytes of a shard's receipt; None if it has none.

    Raises:
        StorageError: the output cannot be read.
    """
    try:
        with storage.refusals_as_storage_errors():
            return storage.read_bytes(storage.join(output_url, stem + RECEIPT_SUFFIX))
    except FileNotFoundError:
        return None


def sizes_now(output_url: str, stem: str) -> dict[str, int]:
    """Bytes of a shard's files as they are now, receipt included, by name; without those that are missing.

    Raises:
        StorageError: the output cannot be read.
    """
    sizes = {}
    for suffix in (RECEIPT_SUFFIX, *FILE_SUFFIXES.values()):
        name = stem + suffix
        with contextlib.suppress(FileNotFoundError, storage.NotAFileError), storage.refusals_as_storage_errors():
            sizes[name] = storage.size(storage.join(output_url, name))
    return sizes


def is_whole(output_url: str, receipt: Receipt, shard: Shard) -> bool:
    """Whether a receipt is that of a shard, and fits its files as they are now.

    Raises:
        StorageError: the output cannot be read.
    """
    return receipt.shard == shard and misfit(receipt, sizes_now(output_url, shard.name)) is None


def misfit(receipt: Receipt, sizes: Mapping[str, int]) -> str | None:
    """The first way in which a receipt does not fit the sizes of its shard's files; None if it fits."""
    name = receipt.shard.name + RECEIPT_SUFFIX
    expected = {*FILE_SUFFIXES} if receipt.counts["success"] else {*FILE_SUFFIXES} - {"tar"}
    if receipt.files.keys() not in (expected, FILE_SUFFIXES.keys()):
        return f"{name} describes {sorted(receipt.files)}; a shard has {sorted(expected)}"
    for kind, entry in receipt.files.items():
        file = receipt.shard.name + FILE_SUFFIXES[kind]
        if file not in sizes:
            return f"{file} is missing"
        if sizes[file] != entry.size:
            return f"{file} has {sizes[file]} bytes, its receipt says {entry.size}"
    return next((f"{file} is there, and {name} does not name it" for file in surplus(receipt) if file in sizes), None)


def surplus(receipt: Receipt) -> list[str]:
    """Names of the files that a shard may have, and that this one does not have by its receipt."""
    return [receipt.shard.name + suffix for kind, suffix in FILE_SUFFIXES.items() if kind not in receipt.files]


def of_another_run(receipt: Receipt) -> Damaged:
    """The shard of a receipt whose fingerprint is none of its output's."""
    name = receipt.shard.name
    return Damaged(name, f"{name}{RECEIPT_SUFFIX} has the fingerprint {receipt.fingerprint} of another run")


def foreign(receipt: Receipt, fingerprints: Set[str], shards: Sequence[Shard]) -> Damaged | None:
    """The shard of a receipt that is none of a run; None for a sound one, and for one beyond the run's shards.

    Args:
        receipt: the receipt.
        fingerprints: the fingerprints that the run's receipts may have.
        shards: the shards of the run, by number.
    """
    own = receipt.shard
    if receipt.fingerprint not in fingerprints:
        return of_another_run(receipt)
    if own.index >= len(shards) or own == shards[own.index]:
        return None
    shard = shards[own.index]
    return Damaged(
        own.name,
        f"{own.name}{RECEIPT_SUFFIX} is the receipt of rows {own.start} to {own.stop - 1}; here belongs shard "
        f"{shard.name} with rows {shard.start} to {shard.stop - 1}",
    )


def _receipt_in(data: bytes, stem: str) -> Receipt | Damaged:
    try:
        receipt = Receipt.from_json(data)
    except ValueError as error:
        return Damaged(stem, f"{stem}{RECEIPT_SUFFIX} is damaged: {error}")
    if receipt.shard.name != stem or receipt.shard.index != int(stem):
        return Damaged(stem, f"{stem}{RECEIPT_SUFFIX} is that of shard {receipt.shard.name}")
    return receipt
