"""One shard's files, written and read back. :mod:`vcf_batch.output.commits` moves them to their place in between.

A shard is ``NAME.tar`` (the successful samples, for WebDataset readers), ``NAME.parquet`` (one row for every manifest
row) and ``NAME_stats.json``, the receipt (:mod:`vcf_batch.output.receipts`). A worker writes the first two in local
scratch (:class:`ShardWriter`). Without a successful sample there is no tar.

The bytes of tar and parquet depend on the samples alone: no times, owners or host names, fixed encoder settings, and
groups of :data:`ROWS_PER_GROUP` rows in manifest order. (The parquet names the pyarrow version that wrote it.)
"""

import contextlib
import io
import itertools
import json
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Self, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.types import is_list

from vcf_batch import storage
from vcf_batch.errors import StorageError
from vcf_batch.output import sample_records
from vcf_batch.output.receipts import FILE_SUFFIXES
from vcf_batch.output.row_json import row_json
from vcf_batch.output.sums import ShardSums
from vcf_batch.output_columns import COLUMNS
from vcf_batch.records import FileEntry, Sample, Shard, Status
from vcf_batch.storage import room, tar

ROWS_PER_GROUP = 1024
"""Rows of a row group of the parquet."""
ROWS_AT_ONCE = 256
"""Rows that are held at once while a committed shard is read."""


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """A finished shard in local scratch, and what its receipt says about it."""

    tar: str
    """Local path of the tar. There is no such file if no sample succeeded."""
    parquet: str
    """Local path of the parquet."""
    counts: Mapping[Status, int]
    """Number of rows by status."""
    entries: Mapping[str, FileEntry]
    """Size and hash of ``tar`` and ``parquet``; of the second alone if no sample succeeded."""
    means: Mapping[str, float | None]
    """The mean of each score over the successful samples that have it; None if no sample has it."""
    histograms: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """See :attr:`vcf_batch.output.receipts.Receipt.histograms`."""
    sampled: int = 0
    """See :attr:`vcf_batch.output.receipts.Receipt.sampled`."""
    truncated: int = 0
    """See :attr:`vcf_batch.output.receipts.Receipt.truncated`."""


class ShardWriter:
    """Writes one shard's tar and parquet in local scratch; use it with ``with``.

    Leaving the ``with`` block without :meth:`finish` deletes both files, so that nothing of an abandoned shard looks
    whole.

    Args:
        scratch_dir: a local folder that no other attempt uses; made if there is none.
        shard: the rows to be written.
        image_format: extension of the images in the tar: ``png``, ``webp`` or ``jpg``.
        schema: that of the parquet, made by :func:`vcf_batch.output.sample_records.schema`.
        reference_is_web: see :func:`vcf_batch.output.sample_records.of_manifest`.

    Raises:
        StorageError: the scratch cannot be written.
    """

    def __init__(
        self,
        scratch_dir: str,
        shard: Shard,
        image_format: str,
        schema: pa.Schema,
        reference_is_web: bool = False,
    ) -> None:
        self._shard = shard
        self._image_format = image_format
        self._schema = schema
        self._reference_is_list, self._reference_is_web = is_list(schema.field("reference").type), reference_is_web
        self._carried = [name for name in schema.names if name not in COLUMNS]
        self._pending: list[dict[str, Any]] = []
        self._added = 0
        self._sums = ShardSums()
        self._finished = False
        self._scratch_dir = scratch_dir
        self._paths = {kind: os.path.join(scratch_dir, shard.name + suffix) for kind, suffix in FILE_SUFFIXES.items()}
        with self._writing():
            self._open()

    def _open(self) -> None:
        os.makedirs(self._scratch_dir, exist_ok=True)
        # PAX equals USTAR but for names over 100 characters, which keys may have.
        self._tar = tarfile.open(self._paths["tar"], "w", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self._parquet = pq.ParquetWriter(
            self._paths["parquet"],
            self._schema,
            version="2.6",
            data_page_version="1.0",
            compression="zstd",
            compression_level=3,
            use_dictionary=True,
            write_statistics=True,
            store_schema=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if not self._finished:
            with contextlib.suppress(OSError):
                self._close()
            for path in self._paths.values():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)

    def add(self, sample: Sample) -> None:
        """Append the next row of the shard, in manifest order.

        Args:
            sample: with an image if and only if it succeeded, else with an ``error_message``. Scores that are not
                finite are recorded as null.

        Raises:
            ValueError: the sample is out of order, or breaks the rules above.
            StorageError: the scratch cannot be written.
        """
        expected = self._shard.start + self._added
        if sample.row.number != expected or expected >= self._shard.stop:
            raise ValueError(
                f"shard {self._shard.name} has rows {self._shard.start} to {self._shard.stop - 1} in order: "
                f"expected row {expected}, got {sample.row.number}"
            )
        if (sample.status == "success") != (sample.image is not None):
            raise ValueError(f"sample {sample.row.key}: status {sample.status} with image {sample.image is not None}")
        if sample.status != "success" and not sample.error_message:
            raise ValueError(f"sample {sample.row.key} is {sample.status} without an error_message")
        record = sample_records.record_of(sample, self._carried, self._reference_is_list, self._reference_is_web)
        self._sums.add(sample.status, record)
        self._added += 1
        self._pending.append(record)
        with self._writing():
            if sample.image is not None:
                self._add_member(sample.row.key, self._image_format, sample.image)
                for name, image in sample.triplet.items():
                    self._add_member(sample.row.key, f"{name}.{self._image_format}", image)
                self._add_member(sample.row.key, "txt", sample.row.prompt.encode())
                self._add_member(sample.row.key, "json", row_json(self._batch([record])))
            if len(self._pending) == ROWS_PER_GROUP:
                self._flush()

    def finish(self) -> ShardFiles:
        """Close both files.

        Returns:
            The files, and what the receipt says about them.

        Raises:
            ValueError: rows of the shard are missing.
            StorageError: the scratch cannot be written or read back.
        """
        if self._added != len(self._shard):
            raise ValueError(f"shard {self._shard.name} has {self._added} of its {len(self._shard)} rows")
        with self._writing():
            self._flush()
            self._close()
            if not self._sums.counts["success"]:
                os.unlink(self._paths.pop("tar"))
        self._finished = True
        return ShardFiles(
            tar=os.path.join(self._scratch_dir, file_name(self._shard, "tar")),
            parquet=self._paths["parquet"],
            counts=self._sums.counts,
            entries={kind: storage.digest(path) for kind, path in self._paths.items()},
            means=self._sums.means,
            histograms=self._sums.histograms,
            sampled=self._sums.sampled,
            truncated=self._sums.truncated,
        )

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = room.is_full(error)
            reason = room.told(self._scratch_dir, self._estimated_bytes()) if full else error
            raise StorageError(
                f"cannot write the scratch files of shard {self._shard.name}: {reason}. "
                "Check that there is room, or set TMPDIR to a larger disk."
            ) from error

    def _estimated_bytes(self) -> int:
        """Number of bytes of the whole shard, if the rows to come are as large as those that were written."""
        done = sum(os.path.getsize(path) for path in self._paths.values() if os.path.exists(path))
        return done * len(self._shard) // max(self._added, 1)

    def _add_member(self, key: str, extension: str, data: bytes) -> None:
        member = tarfile.TarInfo(f"{key}.{extension}")
        member.size = len(data)
        self._tar.addfile(member, io.BytesIO(data))
        # tarfile remembers every member, which a large shard feels.
        self._tar.getmembers().clear()

    def _flush(self) -> None:
        if self._pending:
            self._parquet.write_batch(self._batch(self._pending))
            self._pending = []

    def _batch(self, records: list[dict[str, Any]]) -> pa.RecordBatch:
        # Made of values: pyarrow joins batches with nested dictionary columns to invalid ones.
        columns = [pa.array([record[field.name] for record in records], field.type) for field in self._schema]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)

    def _close(self) -> None:
        self._tar.close()
        self._parquet.close()


def file_name(shard: Shard, kind: str) -> str:
    """Name of one file of a shard; ``kind`` is a key of :data:`FILE_SUFFIXES`."""
    return shard.name + FILE_SUFFIXES[kind]


def file_url(output: str, shard: Shard, kind: str) -> str:
    """URL of one file of a shard in an output; ``kind`` is a key of :data:`FILE_SUFFIXES`."""
    return storage.join(output, file_name(shard, kind))


@contextlib.contextmanager
def open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """Open the parquet of a shard for reading. Its columns are read when they are asked for, but for a small file.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError: the storage failed, or refuses.
        pyarrow.ArrowException, OSError: the file is damaged.
    """
    with storage.refusals_as_storage_errors(), storage.open_read(url) as file:
        size = file.seek(0, os.SEEK_END)
        if size <= _SMALL_BYTES:
            file.seek(0)
            yield pq.ParquetFile(pa.BufferReader(file.read()), pre_buffer=False)
        else:
            yield pq.ParquetFile(file, pre_buffer=False)


def read_samples(tar_url: str) -> Iterator[dict[str, Any]]:
    """The samples of a shard's tar, streamed, as WebDataset readers give them.

    Yields:
        ``{"__key__": key, "png" | "webp" | "jpg": bytes, "txt": prompt, "json": the parquet row without its nulls}``,
        and with triplets ``"content.png"`` and ``"style.png"``.

    Raises:
        tarfile.ReadError: the file is not a tar, is cut short or damaged, or goes on behind its end.
        FileNotFoundError, PermissionError, StorageError: the file cannot be read.
    """
    with storage.open_read(tar_url) as file:
        for key, parts in itertools.groupby(read_members(file), key=lambda part: part[0].partition(".")[0]):
            sample = {name.partition(".")[2]: data for name, data in parts}
            yield {"__key__": key, **sample, "txt": sample["txt"].decode(), "json": json.loads(sample["json"])}


def read_members(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Name and content of each member of a tar, streamed. A member that is no plain file has empty content.

    Raises:
        tarfile.ReadError: the file is not a tar, is cut short or damaged, or goes on behind its end.
    """
    for member in tar.members(file):
        yield member.name, member.read()


_SMALL_BYTES = 1 << 18
"""Bytes of a parquet up to which it is read whole: that takes one request in place of some, and less of a processor."""

SHARD_READERS = 8
"""Threads that read shards side by side."""

ReadShard = TypeVar("ReadShard")
ReadResult = TypeVar("ReadResult")


def side_by_side(
    read: Callable[[ReadShard], ReadResult], some: Iterable[ReadShard]
) -> Iterator[tuple[ReadShard, ReadResult]]:
    """Each shard, in order, with the result of ``read``, which runs in threads a few shards ahead."""
    with storage.reading_threads(SHARD_READERS, "shards") as threads:
        begun = ((shard, threads.submit(read, shard)) for shard in some)
        window = deque(itertools.islice(begun, 2 * SHARD_READERS))
        while window:
            shard, result = window.popleft()
            yield shard, result.result()
            window.extend(itertools.islice(begun, 1))
