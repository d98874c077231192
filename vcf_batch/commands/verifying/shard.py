"""The check of one shard: its receipt, parquet and tar against each other, the manifest and the run's settings.

Only the first fault is told: mending it takes generating the shard again, whatever else is wrong.
"""

import contextlib
import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, cast

import pyarrow as pa

from vcf_batch import images, sharding, storage
from vcf_batch.config.limits import MAX_PIXELS
from vcf_batch.config.row_settings import checked, settings_of
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import DamageFound, RowError, Unfinished
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.output import receipts, sample_records, shards
from vcf_batch.output.output import ManifestLost, Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.output.row_json import json_text, json_value, json_values
from vcf_batch.output.sums import ShardSums
from vcf_batch.output_columns import COLUMNS
from vcf_batch.records import STATUSES, TRIPLET, FileEntry, Row, Shard
from vcf_batch.setup.job import schema_of


def check_shard(output: Output, shard: Shard, sizes: Mapping[str, int]) -> pa.Array:
    """Read one shard again and compare its files.

    Args:
        output: the output that the shard belongs to.
        shard: one of its plan.
        sizes: bytes of the output's files, by name.

    Returns:
        The keys of the shard's rows, binary, in order.

    Raises:
        Unfinished: the shard has no receipt.
        DamageFound: something is wrong; the first fault is named.
        StorageError: the storage failed.
    """
    receipt = _receipt(output, shard, sizes)
    try:
        with storage.refusals_as_storage_errors():
            try:
                return _check_files(output, shard, receipt)
            except ManifestLost:  # from now on the rows of the output are not compared with it
                return _check_files(output, shard, receipt)
    except FileNotFoundError as error:
        raise DamageFound(f"a file went away while it was read: {error}") from error


def _check_files(output: Output, shard: Shard, receipt: Receipt) -> pa.Array:
    names = {kind: shards.file_name(shard, kind) for kind in receipts.FILE_SUFFIXES}
    urls = {kind: storage.join(output.url, name) for kind, name in names.items()}
    keys: list[str] = []
    tally = ShardSums()
    # First, as nothing should be parsed that is known to be damaged.
    _check_hash(names["parquet"], storage.digest(urls["parquet"]).sha256, receipt.files["parquet"])
    with contextlib.ExitStack() as stack:
        tar: _Hashing | None = None
        members: Iterator[tuple[str, bytes]] = iter(())
        if "tar" in receipt.files:  # A shard without a successful sample has none.
            tar = _Hashing(stack.enter_context(storage.open_read(urls["tar"])))
            members = _members(cast(BinaryIO, tar), names["tar"])
        for number, (record, text) in enumerate(_records(output, shard, urls["parquet"]), shard.start):
            status = record["status"]
            if status not in STATUSES or (status == "success") != (not record["error_message"]):
                raise DamageFound(f"row {number}: status {status!r} with error_message {record['error_message']!r}")
            if status == "success":
                _check_sample(record, text, members, names["tar"], output.config)
            keys.append(record["key"])
            tally.add(status, record)
        if extra := next(members, None):
            raise DamageFound(f"{names['tar']} has a member {extra[0]!r} that no row of the parquet accounts for")
        if tar:
            _check_hash(names["tar"], tar.finish(), receipt.files["tar"])
    for what, found, said in (
        ("counts", tally.counts, receipt.counts),
        ("means", tally.means, receipt.means),
        ("truncated prompts", tally.truncated, receipt.truncated),
    ):
        if found != said:
            raise DamageFound(f"its rows have {what} {found}, its receipt says {said}")
    return pa.array(keys).cast(pa.binary())


def _check_hash(name: str, found: str, entry: FileEntry) -> None:
    if found != entry.sha256:
        raise DamageFound(f"{name} has the sha256 {found}, its receipt says {entry.sha256}")


def _receipt(output: Output, shard: Shard, sizes: Mapping[str, int]) -> Receipt:
    """Read the shard's receipt, and check that it is of this shard and run, and that its files have its sizes."""
    name = shard.name + receipts.RECEIPT_SUFFIX
    if not sizes.get(name):
        raise Unfinished("it has no receipt: it is not generated yet")
    try:
        with storage.refusals_as_storage_errors():
            receipt = Receipt.from_json(storage.read_bytes(storage.join(output.url, name)))
    except (FileNotFoundError, ValueError) as error:
        raise DamageFound(f"{name} is damaged: {error}") from error
    if receipt.shard != shard:
        raise DamageFound(f"{name} is that of {_rows(receipt.shard)}; here belong {_rows(shard)}")
    if receipt.fingerprint not in output.fingerprints:
        raise DamageFound(receipts.of_another_run(receipt).reason)
    if reason := receipts.misfit(receipt, sizes):
        raise DamageFound(reason)
    return receipt


def _rows(shard: Shard) -> str:
    return f"shard {shard.name} (rows {shard.start} to {shard.stop - 1})"


def _records(output: Output, shard: Shard, url: str) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the rows of a shard's parquet, compared with the manifest, each as its JSON values and as its JSON text."""
    name = storage.name(url)
    manifest = output.manifest
    given = output.manifest_rows(shard.start, shard.stop) if manifest else None
    try:
        with shards.open_parquet(url) as parquet:
            if parquet.metadata.num_rows != len(shard):
                raise DamageFound(f"{name} has {parquet.metadata.num_rows} rows; {_rows(shard)} has {len(shard)}")
            _check_columns(output.config, manifest, name, parquet.schema_arrow)
            for batch in parquet.iter_batches(shards.ROWS_AT_ONCE, use_threads=False):
                for at in range(batch.num_rows):
                    record = json_values(batch.slice(at, 1))
                    if manifest and given:
                        _check_row(output.config, manifest, next(given), record, batch.schema)
                    yield record, json_text(record)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise DamageFound(f"{name} cannot be read: {str(error).splitlines()[0]}") from error


def _check_columns(config: RunConfig, manifest: Manifest | None, name: str, found: pa.Schema) -> None:
    if manifest:
        expected = schema_of(config, manifest)
    else:
        carried = pa.schema([field for field in found if field.name not in COLUMNS])
        is_list = "reference" in found.names and pa.types.is_list(found.field("reference").type)
        extras = {COLUMNS[name].extra for name in found.names if name in COLUMNS}
        expected = sample_records.schema(carried, is_list, extras)
    if not found.equals(expected):
        # Not compared as text: what a list calls its items is another name once it has been in a file.
        different = [
            str(field)
            for these, others in ((found, expected), (expected, found))
            for field in these
            if field.name not in others.names or not field.equals(others.field(field.name))
        ]
        raise DamageFound(f"{name} has other columns than a run writes: {', '.join(different) or 'another order'}")


def _check_row(config: RunConfig, manifest: Manifest, row: Row, record: Mapping[str, Any], schema: pa.Schema) -> None:
    """Compare a row of the parquet with what the manifest and the run's settings say."""
    said = sample_records.of_manifest(
        row, manifest.carried_schema.names, manifest.reference_is_list, manifest.reference_is_web
    )
    said |= settings_of(checked(row, config), config)
    attempts = record["attempts"] or [{"seed": row.seed}]
    if [each["seed"] for each in attempts] != [sharding.draw_seed(row.seed, number) for number in range(len(attempts))]:
        raise DamageFound(f"row {row.number}: attempts have other seeds than those that follow from {row.seed}")
    said["seed"] = record["seed"] if record["seed"] in [each["seed"] for each in attempts] else row.seed
    for column in [name for name in said if name in schema.names]:
        value = said[column]
        if record[column] != (value := json_value(pa.scalar(value, schema.field(column).type))):
            raise DamageFound(f"row {row.number}: {column} is {record[column]!r}, the run has {value!r} there")


def _check_sample(
    record: Mapping[str, Any], text: bytes, members: Iterator[tuple[str, bytes]], tar: str, config: RunConfig
) -> None:
    """Compare the next members of a tar with their row."""
    key, parts = record["key"], {}
    beside = [f"{name}.{config.image_format}" for name in TRIPLET if config.triplets]
    for extension in (config.image_format, *beside, "txt", "json"):
        name, parts[extension] = next(members, ("", b""))
        if name != f"{key}.{extension}":
            ends = f"{tar} has a member {name!r}" if name else f"{tar} ends"
            raise DamageFound(f"{ends} where {key}.{extension} belongs")
    if parts["txt"] != record["prompt"].encode():
        raise DamageFound(f"{key}.txt in {tar} is not the prompt of its row")
    if parts["json"] != text:
        raise DamageFound(f"{key}.json in {tar} is not the row of the parquet")
    if hashlib.sha256(parts[config.image_format]).hexdigest() != record["sha256"]:
        raise DamageFound(f"{key}.{config.image_format} in {tar} has another sha256 than its row says")
    for extension in (config.image_format, *beside):
        name = f"{key}.{extension}"
        try:
            size = images.decode(parts[extension], MAX_PIXELS).size
        except RowError as error:
            raise DamageFound(f"{name} in {tar} cannot be decoded: {error}") from error
        if not size == (record["width"], record["height"]) == (config.width, config.height):
            raise DamageFound(
                f"{name} in {tar} has {size[0]} x {size[1]} pixels, its row says {record['width']} x "
                f"{record['height']}, the run {config.width} x {config.height}"
            )


def _members(tar: BinaryIO, name: str) -> Iterator[tuple[str, bytes]]:
    try:
        yield from shards.read_members(tar)
    # A damaged header may hold anything.
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DamageFound(f"{name} cannot be read: {error}") from error


class _Hashing(io.RawIOBase):
    """A file that is hashed while it is read."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        return data

    def finish(self) -> str:
        """Read what is left, and return the hex SHA-256 of the whole file."""
        while self.read(1 << 20):
            pass
        return self._hash.hexdigest()
