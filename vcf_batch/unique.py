"""Repeated ids among very many, in bounded memory.

The ids are spread by hash over files in local scratch, which are then read back one by one.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

ROWS_PER_PARTITION = 500_000
MAX_PARTITIONS = 256
_PENDING_ROWS = 500_000
_SCHEMA = pa.schema([("id", pa.large_binary()), ("row", pa.int64())])


@dataclass(frozen=True, slots=True, order=True)
class Repeat:
    """Row ``row`` has the id that row ``first`` has already."""

    row: int
    first: int
    id: str


class RepeatFinder:
    """Finds repeated ids. A context manager: its scratch folder lives as long as the context.

    Memory is bounded by :data:`ROWS_PER_PARTITION` and :data:`MAX_PARTITIONS`, not by the number of repeats: about
    0.3 GB for 100 M ids. Scratch takes the ids' bytes and 16 more for each.

    Args:
        expected: about how many ids will come; decides the number of partitions.
    """

    def __init__(self, expected: int) -> None:
        self._count = min(max(-(-expected // ROWS_PER_PARTITION), 1), MAX_PARTITIONS)
        self._stack = contextlib.ExitStack()
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vcf-batch-ids-")))
        self._writers = [
            self._stack.enter_context(pa.ipc.new_stream(str(self._path(partition)), _SCHEMA))
            for partition in range(self._count)
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def add(self, ids: pa.Array, first_row: int) -> None:
        """Take the ids (binary, no nulls) of the rows from ``first_row`` on. Batches come in the order of the rows."""
        rows = pa.array(np.arange(first_row, first_row + len(ids)))
        self._pending.append(pa.RecordBatch.from_arrays([ids.cast(pa.large_binary()), rows], schema=_SCHEMA))
        self._pending_rows += len(ids)
        if self._pending_rows >= _PENDING_ROWS:
            self._spread()

    def repeats(self, most: int) -> tuple[int, list[Repeat]]:
        """How many rows repeat an earlier id, and the ``most`` first of them. Nothing can be added afterwards."""
        self._spread()
        for writer in self._writers:
            writer.close()
        total = 0
        found: list[Repeat] = []
        for partition in range(self._count):
            for count, batch_repeats in self._repeats_in(partition, most):
                total += count
                found = sorted(found + batch_repeats)[:most]
        return total, found

    def _path(self, partition: int) -> Path:
        return self._folder / f"{partition}.arrow"

    def _spread(self) -> None:
        if not self._pending:
            return
        table = pa.Table.from_batches(self._pending, _SCHEMA).combine_chunks()
        self._pending, self._pending_rows = [], 0
        batch = table.to_batches()[0]
        partitions = (hash_ids(batch["id"]) % np.uint64(self._count)).astype(np.int16)
        order = np.argsort(partitions, kind="stable")
        batch = batch.take(pa.array(order))
        stops = np.cumsum(np.bincount(partitions, minlength=self._count)).tolist()
        for writer, start, stop in zip(self._writers, [0, *stops], stops, strict=False):
            if stop > start:
                writer.write_batch(batch.slice(start, stop - start))

    def _repeats_in(self, partition: int, most: int) -> Iterator[tuple[int, list[Repeat]]]:
        """Repeats of one partition. Holds its distinct ids and one chunk: an id repeated without end stays cheap."""
        seen = _SCHEMA.empty_table()
        with pa.OSFile(str(self._path(partition))) as file, pa.ipc.open_stream(file) as reader:
            for chunk in _chunks(reader):
                table = pa.concat_tables([seen, chunk]).combine_chunks()
                encoded = table["id"].combine_chunks().dictionary_encode()
                if len(encoded.dictionary) == len(table):
                    seen = table
                    continue
                codes = encoded.indices.to_numpy()
                # The dictionary is in order of appearance; assigning backwards leaves each code its first position.
                first = np.empty(len(encoded.dictionary), dtype=np.int64)
                first[codes[::-1]] = np.arange(len(codes) - 1, -1, -1)
                is_repeat = np.ones(len(codes), dtype=bool)
                is_repeat[first] = False
                rows = table["row"].to_numpy()
                positions = np.flatnonzero(is_repeat)
                positions_shown = positions[np.argsort(rows[positions], kind="stable")[:most]]
                yield (
                    len(positions),
                    [
                        Repeat(int(rows[at]), int(rows[first[codes[at]]]), table["id"][int(at)].as_py().decode())
                        for at in positions_shown
                    ],
                )
                seen = table.take(pa.array(first))


def hash_ids(ids: pa.LargeBinaryArray) -> np.ndarray:
    """FNV-1a over each id's bytes, then mixed: ``[n]`` uint64. Steps over byte positions, not over rows."""
    offsets = np.frombuffer(ids.buffers()[1], dtype=np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(ids.buffers()[2] or b"", dtype=np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    hashes = np.full(len(ids), 0xCBF29CE484222325, dtype=np.uint64)
    for position in range(int(lengths.max(initial=0))):
        alive = np.flatnonzero(lengths > position)
        hashes[alive] = (hashes[alive] ^ data[starts[alive] + position]) * np.uint64(0x100000001B3)
    return hashes ^ (hashes >> np.uint64(32))


def _chunks(reader: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """The reader's batches, gathered into tables of about :data:`ROWS_PER_PARTITION` rows."""
    gathered: list[pa.RecordBatch] = []
    rows = 0
    for batch in reader:
        gathered.append(batch)
        rows += batch.num_rows
        if rows >= ROWS_PER_PARTITION:
            yield pa.Table.from_batches(gathered)
            gathered, rows = [], 0
    if gathered:
        yield pa.Table.from_batches(gathered)
