"""Rows of two outputs that wait for their partners, in bounded memory."""

import contextlib
import pickle
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_WAITING = 200_000
"""Rows that wait in memory, about 1 KB each. Beyond, they go to files."""


@dataclass(frozen=True, slots=True)
class PairedRow:
    """A row of one of the outputs."""

    number: int
    record: Mapping[str, Any]


RowPair = tuple[PairedRow, PairedRow]
"""A row of the first output and the one of the second with the same key."""


class UnpairedRows:
    """Rows that have no partner yet.

    Beyond :data:`MOST_WAITING` they go to files, by hashes of their keys: both rows of a key go to the same one. At the
    end each file is read and its rows are paired.

    Args:
        folder: an empty folder for the files.
        rows: number of rows of both outputs; it decides the number of files.
    """

    def __init__(self, folder: str, rows: int) -> None:
        self.alone = [0, 0]
        """Number of rows of each output without a partner, once :meth:`pairs` is through."""
        self._folder = Path(folder)
        self._files = max(1, rows // MOST_WAITING)
        self._waiting: tuple[dict[str, PairedRow], dict[str, PairedRow]] = {}, {}
        self._is_last = False
        """Whether all rows have come, so that those of one file have to stay."""

    def meet(self, at: int, row: PairedRow) -> RowPair | None:
        """The pair of a row of the output ``at``, 0 or 1, if its partner waits in memory; else the row waits.

        Raises:
            OSError: the disk failed or is full.
        """
        key = row.record["key"]
        other = self._waiting[1 - at].pop(key, None)
        if other is not None:
            return (other, row) if at else (row, other)
        self._waiting[at][key] = row
        if not self._is_last and sum(map(len, self._waiting)) > MOST_WAITING:
            self._put_away()
        return None

    def pairs(self) -> Iterator[RowPair]:
        """The pairs among the rows that are left. Call it once, at the end.

        Raises:
            OSError: the disk failed or is full.
        """
        if any(self._folder.iterdir()):
            self._put_away()
            self._is_last = True
            for path in sorted(self._folder.iterdir()):
                for at, row in _read(path):
                    if pair := self.meet(at, row):
                        yield pair
                self._count_alone()
        self._count_alone()

    def _count_alone(self) -> None:
        for at, rows in enumerate(self._waiting):
            self.alone[at] += len(rows)
            rows.clear()

    def _put_away(self) -> None:
        parts: dict[int, list[tuple[int, PairedRow]]] = defaultdict(list)
        for at, rows in enumerate(self._waiting):
            for key, row in rows.items():
                parts[zlib.crc32(key.encode()) % self._files].append((at, row))
            rows.clear()
        for number, part in parts.items():
            with open(self._folder / f"{number:09d}", "ab") as file:
                pickle.dump(part, file)


def _read(path: Path) -> Iterator[tuple[int, PairedRow]]:
    with open(path, "rb") as file, contextlib.suppress(EOFError):
        while True:
            yield from pickle.load(file)  # written by this process
