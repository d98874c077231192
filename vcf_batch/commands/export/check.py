"""Check an export: read every file again and report what does not match its receipt, its rows or the record.

Images are compared with the hashes in their rows. They are not decoded, which ``verify`` of the outputs has done.
Several shards are read at the same time, and each is streamed.
"""

import functools
import hashlib
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa

from vcf_batch import storage
from vcf_batch.commands.export import described
from vcf_batch.commands.export.record import ExportReceipt, misfit, read, shard_stem
from vcf_batch.commands.export.references import FOLDER, listed
from vcf_batch.commands.export.shard_files import IMAGE, SUFFIXES
from vcf_batch.commands.export.sources import REFERENCE_HASH
from vcf_batch.commands.verify import Finding
from vcf_batch.driver.progress import steps
from vcf_batch.errors import DamageFound
from vcf_batch.manifest.check import RepeatFinder
from vcf_batch.output import shards
from vcf_batch.output.output import EXPORT_NAME
from vcf_batch.output.receipts import RECEIPT_SUFFIX
from vcf_batch.output.row_json import row_json
from vcf_batch.output.shards import side_by_side

_PICTURES_AT_ONCE = 16
"""Rows with their images that are held at once, for each thread."""


class ExportCheck:
    """The check of an export. After :meth:`findings`, it knows what it has read.

    Args:
        url: the export.

    Raises:
        RefusedError: its record is damaged, or that of another version.
        DamageFound: it has no record.
        StorageError: the storage failed.
    """

    def __init__(self, url: str) -> None:
        self.url = storage.absolute(url)
        record = read(self.url)
        if record is None:
            raise DamageFound(f"{EXPORT_NAME}: it is missing, so nothing tells what {url} holds")
        self.record = record
        self.shards = self.rows = 0
        """Number of shards with a receipt, and of the rows of those without a fault."""
        self._references: Mapping[str, int] = {}

    def findings(self) -> Iterator[Finding]:
        """What is wrong. Of each shard, only the first fault is reported.

        Raises:
            StorageError: the storage failed.
        """
        copies = self.record.fields["references"] == "copy"
        if copies:
            with storage.refusals_as_storage_errors():
                self._references = storage.list_tree(storage.join(self.url, FOLDER))
            yield from self._check_references()
        is_whole = True
        with RepeatFinder(self.record.rows) as finder:
            for split in self.record.splits:
                for finding in self._check_split(split, finder):
                    is_whole = is_whole and finding.kind == "note"
                    yield finding
            count, repeats = finder.repeats(1)
        if repeats:
            yield Finding("keys", f"{count:,} rows have a key that an earlier row has")
        if is_whole:
            yield from self._check_described()

    def _check_split(self, split: str, finder: RepeatFinder) -> Iterator[Finding]:
        """Findings about one split, whose keys are added to those that were read before."""
        with storage.refusals_as_storage_errors():
            sizes = storage.list_files(storage.join(self.url, split))
        count = sum(name.endswith(RECEIPT_SUFFIX) for name in sizes)
        names = [shard_stem(index) for index in range(count)]
        rows, is_sound = 0, True
        read = side_by_side(functools.partial(self._keys_or_fault, split, sizes), names)
        for name, result in steps(read, f"reading {split}", count, "shard"):
            if isinstance(result, DamageFound):
                is_sound = False
                yield Finding(f"{split}/{name}", str(result))
            else:
                finder.add(result, self.rows)
                self.rows, rows = self.rows + len(result), rows + len(result)
        self.shards += count
        said = self.record.splits[split]
        if is_sound and rows != said:
            cause = f"it has {rows:,} rows, {EXPORT_NAME} says {said:,}"
            yield Finding(split, cause, kind="unfinished" if rows < said else "damage")
        known = {name + suffix for name in names for suffix in (RECEIPT_SUFFIX, *SUFFIXES.values())}
        for name in sorted({*sizes} - known):
            yield Finding(f"{split}/{name}", "no receipt stands for it: it is no part of the dataset", kind="note")

    def _keys_or_fault(self, split: str, sizes: Mapping[str, int], name: str) -> pa.Array | DamageFound:
        try:
            with storage.refusals_as_storage_errors():
                return self._check_shard(split, name, sizes)
        except DamageFound as fault:
            return fault
        # A damaged file may hold anything.
        except (pa.ArrowException, tarfile.TarError, OSError, ValueError, LookupError, OverflowError) as error:
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            return DamageFound(f"it cannot be read: {told}")

    def _check_shard(self, split: str, name: str, sizes: Mapping[str, int]) -> pa.Array:
        base = storage.join(self.url, split, name)
        if name + RECEIPT_SUFFIX not in sizes:
            raise DamageFound("it has no receipt, and a later shard has one")
        receipt = ExportReceipt.from_json(storage.read_bytes(base + RECEIPT_SUFFIX))
        if reason := misfit(self.record, split, name, receipt, sizes):
            raise DamageFound(reason)
        for kind, entry in receipt.files.items():
            if (found := storage.digest(base + SUFFIXES[kind]).sha256) != entry.sha256:
                raise DamageFound(f"{name}{SUFFIXES[kind]} has the sha256 {found}, its receipt says {entry.sha256}")
        keys: list[str] = []
        with shards.open_parquet(base + SUFFIXES["parquet"]) as parquet:
            if parquet.metadata.num_rows != receipt.rows:
                raise DamageFound(f"its parquet has {parquet.metadata.num_rows} rows, its receipt says {receipt.rows}")
            if "tar" not in receipt.files:
                for batch in parquet.iter_batches(_PICTURES_AT_ONCE, use_threads=False):
                    for row in batch.to_pylist():
                        keys.append(self._checked(row, row[IMAGE]["bytes"]))
            else:
                with storage.open_read(base + SUFFIXES["tar"]) as file:
                    members = shards.read_members(file)
                    for batch in parquet.iter_batches(shards.ROWS_AT_ONCE, use_threads=False):
                        for at, row in enumerate(batch.to_pylist()):
                            parts = self._parts(row["key"], members)
                            if parts["txt"] != row["prompt"].encode() or parts["json"] != row_json(batch.slice(at, 1)):
                                raise DamageFound(
                                    f"prompt or row of {row['key']!r} in its tar is not that of its parquet"
                                )
                            keys.append(self._checked(row, parts[self.record.image_format]))
                    if extra := next(members, None):
                        raise DamageFound(f"its tar has a member {extra[0]!r} that no row accounts for")
        return pa.array(keys, pa.string()).cast(pa.binary())

    def _parts(self, key: str, members: Iterator[tuple[str, bytes]]) -> dict[str, bytes]:
        ending, parts = self.record.image_format, {}
        for part in (ending, *(f"{name}.{ending}" for name in self.record.fields["images"]), "txt", "json"):
            name, parts[part] = next(members, ("", b""))
            if name != f"{key}.{part}":
                raise DamageFound(f"its tar has {name!r} where {key}.{part} belongs")
        return parts

    def _checked(self, row: Mapping[str, Any], image: bytes) -> str:
        """The key of a row whose image and references are those that it names."""
        key = str(row["key"])
        if hashlib.sha256(image).hexdigest() != row["sha256"]:
            raise DamageFound(f"the image of row {key!r} has another sha256 than the row says")
        if self.record.fields["references"] == "copy":
            wanted = [*zip(listed(row["reference"]), listed(row[REFERENCE_HASH]), strict=True)]
            # The hash of a negative reference stands in its name alone.
            wanted += ((name, "") for name in listed(row.get("negative_reference")))
            for name, sha256 in wanted:
                if name.removeprefix(FOLDER + "/") not in self._references or sha256 not in name:
                    raise DamageFound(f"row {key!r} names {name}, which is not there, or not the image of its hash")
        return key

    def _check_references(self) -> Iterator[Finding]:
        for name in sorted(self._references):
            place = storage.join(FOLDER, name)
            with storage.refusals_as_storage_errors():
                found = storage.digest(storage.join(self.url, place)).sha256
            if found != storage.name(name).partition(".")[0]:
                yield Finding(place, f"it has the sha256 {found}")

    def _check_described(self) -> Iterator[Finding]:
        """Findings about what describes the export. The card may have been changed."""
        for name, data in described.files(self.url, self.record):
            try:
                with storage.refusals_as_storage_errors():
                    there = storage.read_bytes(storage.join(self.url, name))
            except FileNotFoundError:
                yield Finding(name, "it is not written yet", kind="unfinished")
                continue
            if there != data:
                yield Finding(name, "it is not what export wrote", kind="note" if name == described.CARD else "damage")
