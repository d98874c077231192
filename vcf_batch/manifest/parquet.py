"""One Parquet file of a manifest, read in bounded memory. Its footer is not trusted to describe the contents.

Statistics and sizes of columns are never read: damaged ones make pyarrow end the process.
"""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pyarrow.types as pt

from vcf_batch import storage
from vcf_batch.errors import ManifestError, RefusedError, StorageError
from vcf_batch.manifest import contents
from vcf_batch.manifest.contents import Encodings, encodings, wide_integers

MAX_COLUMNS = 1000
"""Most columns of a file, counting every field of a struct."""

BATCH_BYTES = 32 << 20
"""Approximate size of a batch, from the mean size of a row in its row groups. A batch has at least one row."""

_SMALL_DICTIONARY = 1 << 19
"""Bytes below which a dictionary holds every text of its column. Writers give up a larger one, and then write texts."""
_LONG_BYTES = 1 << 16
"""Longest text of a dictionary column that is decoded; a column with a longer text stays a dictionary."""
_MOST_ALIKE = 16
"""Largest size of a batch, in units of :data:`BATCH_BYTES`, if every text were the longest of its dictionary."""
_STEP_BYTES = 8 * BATCH_BYTES
"""Largest size of a step, if every text of an expanding encoding were as long as its column."""
_BUFFER_BYTES = 4 << 20
_TAIL_BYTES = 1 << 16
_OTHERS = {".csv": "CSV", ".tsv": "TSV", ".json": "JSON", ".jsonl": "JSON Lines", ".arrow": "Arrow file", ".orc": "ORC"}
_UNSUPPORTED = re.compile(r"not (yet )?implemented|not supported|unsupported|not built|unknown encoding", re.IGNORECASE)


@dataclass(frozen=True, eq=False, slots=True)
class ParquetFile:
    """A Parquet file described by its footer. Small and picklable."""

    url: str
    size: int
    first_row: int
    """Number of the file's first row in the manifest."""
    group_stops: np.ndarray = field(repr=False)
    """Number of rows up to the end of each row group, ``[groups]`` int64."""
    groups_used: int = 0
    """Number of row groups, from the first one, with rows in use."""
    stamp: storage.Stamp | None = None
    """Version of the file when it was opened; None if the storage keeps none."""
    sha256: str = ""
    """See :func:`vcf_batch.manifest.contents.sha256`."""
    encodings: Encodings = field(default=Encodings(), repr=False)

    @property
    def num_rows(self) -> int:
        return int(self.group_stops[-1]) if len(self.group_stops) else 0

    def batches(
        self, start: int, stop: int, columns: Sequence[str], most_rows: int, counting: bool = False
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the manifest's rows ``start`` to ``stop - 1`` that lie in this file, as (first row's number, batch).

        A dictionary column with very long texts stays a dictionary: a few bytes of indices could become a column of
        any size. Delta encodings are read in steps so small that no such column fills the memory.

        Args:
            columns: names of columns.
            most_rows: most rows of a batch.
            counting: leave out fields that hold bytes, and columns of nothing else; keep small dictionaries as such.

        Raises:
            ManifestError: the file is damaged, or Arrow cannot read it.
            RefusedError: the file has changed since it was opened. It is looked at before and after reading.
            StorageError: the storage failed.
        """
        start, stop = max(start - self.first_row, 0), min(stop - self.first_row, self.num_rows)
        if start >= stop:
            return
        first_group = int(np.searchsorted(self.group_stops, start, side="right"))
        groups = range(first_group, int(np.searchsorted(self.group_stops, stop, side="left")) + 1)
        position = int(self.group_stops[first_group - 1]) if first_group else 0
        try:
            with storage.open_read(self.url) as source:
                if (size := source.seek(0, 2)) != self.size:
                    raise RefusedError(
                        f"{self.url} has {size} bytes, and had {self.size} when the run began; a manifest must not "
                        "change during a run"
                    )
                self._check_stays()
                for batch in _read(source, groups, columns, most_rows, self.encodings, counting):
                    low, high = max(start - position, 0), min(stop - position, batch.num_rows)
                    if low < high:
                        yield self.first_row + position + low, batch.slice(low, high - low)
                    position += batch.num_rows
                    if position >= stop:
                        self._check_stays()
                        return
        except (FileNotFoundError, PermissionError, storage.NotAFileError) as error:
            raise StorageError(f"this node cannot read the manifest's file {self.url}: {error}") from error
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(self.url, error, "is damaged", self._first_unreadable(groups, columns)) from error
        raise ManifestError(f"{self.url} is damaged: it ends after {position} of {self.num_rows} rows")

    def _first_unreadable(self, groups: Sequence[int], columns: Sequence[str]) -> str | None:
        """The first of the columns that cannot be read; None if each can be read alone."""
        with storage.open_read(self.url) as source:
            for column in columns:
                try:
                    for _ in _read(source, groups, [column], 1, self.encodings):
                        break
                except (pa.ArrowException, OSError):
                    return column
        return None

    def _check_stays(self) -> None:
        """Check that the file is the one that was opened. It is hashed again only if its version is another one."""
        now = storage.stamp(self.url)
        if self.stamp is None or now is None or now.text == self.stamp.text:
            return
        found = _sha256_now(self.url, self.groups_used, now.text)
        if found != self.sha256:
            raise RefusedError(
                f"{self.url} has changed: its contents have the hash {found[:12]}, and had {self.sha256[:12]} when the "
                "run began; a manifest must not change during a run. Restore the file and rerun this command, or use "
                "another output"
            )


@functools.lru_cache(maxsize=4096)
def _sha256_now(url: str, groups_used: int, _: str) -> str:
    """The hash of a file's contents now. It is kept for the file's version, the last argument.

    Raises:
        ManifestError, StorageError: see :func:`read_footer`.
    """
    size, footer = read_footer(url)
    file, schema = parse_footer(url, size, footer, 0)
    return contents.sha256(url, size, footer, schema, len(file.group_stops), groups_used)


def read_footer(url: str) -> tuple[int, bytes]:
    """Size of a Parquet file, and its footer with the last 8 bytes of the file.

    Raises:
        ManifestError: there is no such file, or it is not a readable Parquet file.
        StorageError: the storage failed.
    """
    try:
        with storage.open_read(url) as source:
            size = source.seek(0, 2)
            source.seek(max(size - _TAIL_BYTES, 0))
            tail = source.read(_TAIL_BYTES)
            needed = int.from_bytes(tail[-8:-4], "little") + 8
            if tail[-4:] == b"PARE":
                raise ManifestError(f"{url} is encrypted; write it without Parquet encryption")
            if tail[-4:] != b"PAR1" or needed > size:
                kind = next((kind for suffix, kind in _OTHERS.items() if url.lower().endswith(suffix)), None)
                hint = f"; write the {kind} as Parquet, with pandas or DuckDB for example" if kind else ""
                raise ManifestError(f"{url} is not a Parquet file, or is cut short ({size} bytes){hint}")
            if needed > len(tail):
                source.seek(size - needed)
                tail = source.read(needed)
            return size, tail[-needed:]
    except (FileNotFoundError, PermissionError, storage.NotAFileError) as error:
        raise ManifestError(f"{url} cannot be read: {_first_line(error)}") from error


def parse_footer(url: str, size: int, footer: bytes, first_row: int) -> tuple[ParquetFile, pa.Schema]:
    """The file that a footer describes, and its columns.

    Raises:
        ManifestError: the footer is damaged, or names more than :data:`MAX_COLUMNS` columns.
    """
    try:
        parsed = pq.ParquetFile(pa.BufferReader(footer))
        metadata = parsed.metadata
        if metadata.num_columns > MAX_COLUMNS:
            raise ManifestError(
                f"{url} has {metadata.num_columns:,} columns, fields of structs among them; the limit is "
                f"{MAX_COLUMNS:,}: leave out what the outputs do not need"
            )
        rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if min(rows, default=0) < 0:
            raise ManifestError(f"{url} has a damaged footer: a row group of {min(rows)} rows")
        _ = parsed.schema_arrow.names  # fails if a name is not UTF-8
        stops, found = np.cumsum(rows, dtype=np.int64), encodings(footer)
        return ParquetFile(url, size, first_row, stops, encodings=found), parsed.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if "more than 64 bits" in str(error) and (wide := wide_integers(footer)):
            raise ManifestError(
                f"{url} cannot be read because column {' or '.join(map(repr, wide))} has integers of more than 64 "
                "bits, which pyarrow does not support; convert it to a 64-bit integer, a decimal or a string"
            ) from error
        raise _unreadable(url, error, "has a damaged footer") from error


def _read(
    source: BinaryIO,
    groups: Sequence[int],
    columns: Sequence[str],
    most_rows: int,
    encoded: Encodings,
    counting: bool = False,
) -> Iterator[pa.RecordBatch]:
    metadata = pq.read_metadata(source)

    def read(groups: Sequence[int], rows: int, dictionaries: list[str]) -> Iterator[pa.RecordBatch]:
        # Without a buffer size Arrow would hold whole column chunks: gigabytes if images are embedded.
        parquet = pq.ParquetFile(
            source,
            metadata=metadata,
            read_dictionary=dictionaries,
            pre_buffer=False,
            buffer_size=_BUFFER_BYTES,
            page_checksum_verification=True,
        )
        return parquet.iter_batches(batch_size=rows, row_groups=groups, columns=[*columns], use_threads=False)

    leaves = [metadata.schema.column(n) for n in range(metadata.num_columns)]
    flat = [leaf.path for leaf in leaves if leaf.path in columns and leaf.path not in encoded.delta]
    if counting:
        columns = [leaf.path for leaf in leaves if _belongs(leaf.path, columns) and not _is_bytes(leaf)]
    longest, small = dict.fromkeys(flat, 0), {*flat}
    width = 1.0
    for group in groups:
        described = metadata.row_group(group)
        width = max(width, described.total_byte_size / max(described.num_rows, 1))
        # Reading a group's first row reads its whole dictionary.
        for first in itertools.islice(read([group], 1, flat), 1):
            longest = {name: max(length, _longest_text(first[name])) for name, length in longest.items()}
            small &= {name for name in small if _has_small_dictionary(first[name])}
    dictionaries = [name for name, length in longest.items() if length > _LONG_BYTES or (counting and name in small)]
    width = max(width, sum(length for length in longest.values() if length <= _LONG_BYTES) / _MOST_ALIKE)
    rows = int(min(max(BATCH_BYTES / width, 1), most_rows))
    of_a_row = sum(most for path, most in encoded.expanding.items() if _belongs(path, columns))
    step = max(min(rows, _STEP_BYTES // max(of_a_row, 1)), 1)
    batches = map(_within_dictionaries, read(groups, step, dictionaries))
    yield from _resized(batches, rows) if step < rows else batches


def _within_dictionaries(batch: pa.RecordBatch) -> pa.RecordBatch:
    """A batch whose dictionary columns refer to values that are there. Arrow does not check it.

    Raises:
        pa.ArrowInvalid: one refers to others, as in a damaged page.
    """
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pt.is_dictionary(column.type) and len(column) > column.null_count:
            least, most = pc.min_max(column.indices).values()
            if least.as_py() < 0 or most.as_py() >= len(column.dictionary):
                raise pa.ArrowInvalid(
                    f"column {name!r} has the dictionary index {most}, and its dictionary has {len(column.dictionary)} "
                    "values"
                )
    return batch


def _resized(batches: Iterator[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield batches of at most ``rows`` rows and about :data:`BATCH_BYTES` that hold the rows of ``batches``."""
    held: list[pa.RecordBatch] = []
    held_rows = held_bytes = 0
    for batch in batches:
        size = batch.nbytes
        if held and (held_rows + len(batch) > rows or held_bytes + size > BATCH_BYTES):
            yield pa.concat_batches(held)
            held, held_rows, held_bytes = [], 0, 0
        if size > BATCH_BYTES:
            part = max(len(batch) * BATCH_BYTES // size, 1)
            yield from (batch.slice(at, part) for at in range(0, len(batch), part))
        else:
            held.append(batch)
            held_rows, held_bytes = held_rows + len(batch), held_bytes + size
    if held:
        yield pa.concat_batches(held)


def _is_bytes(leaf: pq.ColumnSchema) -> bool:
    return leaf.physical_type.endswith("BYTE_ARRAY") and leaf.logical_type.type == "NONE"


def _belongs(path: str, columns: Sequence[str]) -> bool:
    """Whether a leaf belongs to one of the columns."""
    return any(path == column or path.startswith(f"{column}.") for column in columns)


def _longest_text(column: pa.Array) -> int:
    """Bytes of the longest text in a dictionary column; 0 for every other column."""
    if not pt.is_dictionary(column.type) or not pt.is_string(column.type.value_type):
        return 0
    return pc.max(pc.binary_length(column.dictionary)).as_py() or 0


def _has_small_dictionary(column: pa.Array) -> bool:
    """Whether a column, of which one row is read, has a dictionary so small that all its texts are in it."""
    return pt.is_dictionary(column.type) and len(column.dictionary) > 1 and column.dictionary.nbytes < _SMALL_DICTIONARY


def _unreadable(url: str, error: BaseException, otherwise: str, column: str | None = None) -> ManifestError:
    """The refusal of a file that Arrow fails to read: for a part that Arrow lacks, or else as damaged."""
    line = _first_line(error)
    if not (isinstance(error, pa.ArrowNotImplementedError) or _UNSUPPORTED.search(line)):
        return ManifestError(f"{url} {otherwise}: {line}")
    what = f"column {column!r} of {url}" if column else url
    return ManifestError(
        f"{what} cannot be read because pyarrow {pa.__version__} does not support it ({line}); convert it with the "
        "tool that wrote it to another type, encoding or compression, such as snappy"
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
