"""Search for repeated ids among very many, in bounded memory.

Ids are compared by 128 bits of hash: two different ids of a manifest have equal hashes with a probability below 1e-20.
The hashes are spread over files in local scratch, and then the files are read one by one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from vcf_batch.storage import scratch

ROWS_PER_PARTITION = 500_000
MAX_PARTITIONS = 256
_PENDING_ROWS = 500_000
_RECORD = np.dtype([("hash", np.uint64), ("check", np.uint64), ("row", np.int64)])
_WORD = 8
_WORD_MASKS = np.array([(1 << 8 * kept) - 1 for kept in range(_WORD + 1)], dtype=np.uint64)
"""Mask of a word for each number of its bytes that belong to the id."""
_HASH_FACTOR, _CHECK_FACTOR = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
"""Odd factors with many bits set throughout: the golden ratio's, and a prime of xxHash."""


@dataclass(frozen=True, slots=True, order=True)
class Repeat:
    """A repeated id: row ``row`` has the same id as the earlier row ``first``."""

    row: int
    first: int


class RepeatFinder:
    """Finder of repeated ids. It is a context manager: leaving it deletes its scratch folder.

    Memory is bounded by :data:`ROWS_PER_PARTITION` and :data:`MAX_PARTITIONS`, not by the number of repeats. Scratch
    takes 24 bytes for each id.

    Args:
        expected: approximate number of ids; it decides the number of partitions.
    """

    def __init__(self, expected: int) -> None:
        self._count = min(max(-(-expected // ROWS_PER_PARTITION), 1), MAX_PARTITIONS)
        self._scratch = scratch.temporary(f"the hashes of {expected:,} ids", expected * _RECORD.itemsize)
        self._pending: list[np.ndarray] = []
        self._pending_rows = 0

    def __enter__(self) -> Self:
        """Make the scratch folder.

        Raises:
            StorageError: it cannot be made. Within the block: its disk is full.
        """
        self._folder = Path(self._scratch.__enter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._scratch.__exit__(kind, error, trace)

    def add(self, ids: pa.Array, first_row: int) -> None:
        """Add the ids (binary, no nulls) of the rows from ``first_row`` on. Batches must come in row order."""
        records = np.empty(len(ids), _RECORD)
        records["hash"], records["check"] = hash_ids(ids.cast(pa.large_binary()))
        records["row"] = np.arange(first_row, first_row + len(ids))
        self._pending.append(records)
        self._pending_rows += len(ids)
        if self._pending_rows >= _PENDING_ROWS:
            self._spread()

    def repeats(self, most: int) -> tuple[int, list[Repeat]]:
        """Number of rows that repeat an earlier id, and the first ``most`` of them."""
        self._spread()
        total = 0
        found: list[Repeat] = []
        for partition in range(self._count):
            for count, some in self._repeats_in(partition, most):
                total += count
                found = sorted(found + some)[:most]
        return total, found

    def _path(self, partition: int) -> Path:
        return self._folder / f"{partition}.records"

    def _spread(self) -> None:
        """Append the pending records to the files of their partitions."""
        if not self._pending:
            return
        records = np.concatenate(self._pending)
        self._pending, self._pending_rows = [], 0
        partitions = (records["hash"] % np.uint64(self._count)).astype(np.int16)
        records = records[np.argsort(partitions, kind="stable")]
        stops = np.cumsum(np.bincount(partitions, minlength=self._count))
        for partition, part in enumerate(np.split(records, stops[:-1])):
            if len(part):
                with self._path(partition).open("ab") as file:
                    # Not tofile, which does not tell why it could not write.
                    file.write(part.view(np.uint8).data)

    def _repeats_in(self, partition: int, most: int) -> Iterator[tuple[int, list[Repeat]]]:
        """Yield the repeats of one partition by chunks. Memory holds its distinct ids and one chunk."""
        if not self._path(partition).exists():
            return
        seen = np.empty(0, _RECORD)
        with self._path(partition).open("rb") as file:
            while len(chunk := np.fromfile(file, _RECORD, ROWS_PER_PARTITION)):
                records = np.concatenate([seen, chunk])
                if not _equals_previous(np.sort(records["hash"])).any():
                    seen = records
                    continue
                # The sort is stable: of equal ids, the one seen first stays first.
                records = records[np.lexsort((records["check"], records["hash"]))]
                is_repeat = _equals_previous(records["hash"]) & _equals_previous(records["check"])
                seen = records[~is_repeat]
                firsts = seen["row"][np.cumsum(~is_repeat) - 1][is_repeat]
                rows = records["row"][is_repeat]
                shown = np.argsort(rows, kind="stable")[:most]
                yield len(rows), [Repeat(int(rows[at]), int(firsts[at])) for at in shown]


def hash_ids(ids: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Two independent hashes of each id's bytes, ``[n]`` uint64 each. The loop runs over the words of an id."""
    offsets = np.frombuffer(ids.buffers()[1], dtype=np.int64)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(ids.buffers()[2] or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
    padded = np.append(data, np.zeros(_WORD, np.uint8))
    words = np.ndarray(len(data) + 1, dtype="<u8", buffer=padded, strides=(1,))  # the word that begins at each byte
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    hashes = lengths.astype(np.uint64) * _HASH_FACTOR
    checks = lengths.astype(np.uint64) * _CHECK_FACTOR
    for begin in range(0, int(lengths.max(initial=0)), _WORD):
        alive = np.flatnonzero(lengths > begin)
        word = words[starts[alive] + begin] & _WORD_MASKS[np.minimum(lengths[alive] - begin, _WORD)]
        hashes[alive] = _mixed((hashes[alive] ^ word) * _HASH_FACTOR)
        checks[alive] = _mixed((checks[alive] + word) * _CHECK_FACTOR)
    return hashes, checks


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mix the high bits of products into their low bits, which are mixed badly."""
    return values ^ (values >> np.uint64(32))


def _equals_previous(values: np.ndarray) -> np.ndarray:
    """Boolean ``[n]``: whether each value equals the one before it."""
    return np.concatenate([[False], values[1:] == values[:-1]])
