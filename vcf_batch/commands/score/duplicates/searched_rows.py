"""The rows of a search, and what it finds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vcf_batch.commands.score.duplicates.comparison import Comparison
from vcf_batch.records import Shard


class Compared(NamedTuple):
    """The rows of a shard that take part in a comparison."""

    has: np.ndarray
    """``[n]`` bool: whether a row of the shard takes part."""
    values: Any
    """A value for each row that does, ``[m, ...]``."""


class SearchedShard(NamedTuple):
    """What the search reads of a shard."""

    keys: pa.Array
    """Keys of all rows."""
    images: Compared
    references: Compared
    without: int = 0
    """Number of rows with something that cannot be read."""
    reason: str | None = None
    """Why the first of them cannot."""


class SearchedRows:
    """The rows of a search, and what it has found.

    Args:
        comparisons: the comparison for each column, of images and of references, with the column's name.
    """

    def __init__(self, comparisons: dict[str, Comparison]) -> None:
        self.without = 0
        """Number of rows with something that cannot be read."""
        self.reason: str | None = None
        """Why the first of them cannot."""
        self.errors: dict[int, tuple[int, str | None]] = {}
        """The same for each shard with such a row, by its index."""
        self._comparisons = comparisons
        self._keys: list[pa.Array] = []
        self._places: dict[str, list[np.ndarray]] = {name: [np.empty(0, np.int32)] for name in comparisons}
        self._begins: dict[int, int] = {}
        self._rows = 0

    def add(self, shard: Shard, part: SearchedShard) -> None:
        """Add the rows of a shard, which comes behind those before it."""
        self._begins[shard.index] = self._rows
        self._keys.append(part.keys.cast(pa.large_string()))
        for (name, comparison), own in zip(self._comparisons.items(), (part.images, part.references), strict=True):
            self._places[name].append((self._rows + np.flatnonzero(own.has)).astype(np.int32))
            comparison.add(own.values)
        self._rows += len(part.keys)
        if part.without:
            self.without += part.without
            self.reason = self.reason or part.reason
            self.errors[shard.index] = part.without, part.reason

    def search(self) -> None:
        """Search all rows that were added.

        Raises:
            UsageError: see :meth:`vcf_batch.commands.score.duplicates.comparison.Comparison.firsts`.
        """
        self._all_keys = pa.concat_arrays(self._keys)
        self._keys.clear()
        self._firsts = {name: self._first_rows(name) for name in self._comparisons}

    def _first_rows(self, name: str) -> np.ndarray:
        """For each row the row that it is a duplicate of, ``[n]`` int32; -1 if it is none."""
        rows = np.concatenate(self._places.pop(name))
        firsts = rows[self._comparisons[name].firsts()]
        found = np.full(self._rows, -1, np.int32)
        found[rows] = np.where(firsts == rows, -1, firsts)
        return found

    def of(self, shard: Shard) -> tuple[list[str], dict[str, Sequence[str | None]]]:
        """The keys of a shard's rows, and the values of each column."""
        begin = self._begins[shard.index]
        values: dict[str, Sequence[str | None]] = {}
        for name, firsts in self._firsts.items():
            own = firsts[begin : begin + len(shard)]
            values[name] = self._all_keys.take(pa.array(own, mask=own < 0)).to_pylist()
        return self._all_keys.slice(begin, len(shard)).to_pylist(), values
