"""What is compared in a search: values of rows come in, in order, and each row's first like it comes out."""

from typing import Any, Protocol

import numpy as np

from vcf_batch.commands.score.duplicates import near_hashes


class Comparison(Protocol):
    """Comparison of values, in the order of the rows."""

    def add(self, values: Any) -> None:
        """Take the values of further rows.

        Args:
            values: ``[m, ...]``, one for each row.
        """

    def firsts(self) -> np.ndarray:
        """The place of the row that each row is a duplicate of, its own if it stays: ``[n]`` int32.

        Raises:
            UsageError: there are more rows than can be compared.
        """


class HashComparison:
    """Comparison of hashes by the bits in which they differ.

    Args:
        distance: largest number of bits in which duplicates differ.
    """

    def __init__(self, distance: int) -> None:
        self._distance = distance
        self._parts: list[np.ndarray] = [np.empty(0, np.uint64)]

    def add(self, values: np.ndarray) -> None:
        """Take ``[m]`` uint64."""
        self._parts.append(values)

    def firsts(self) -> np.ndarray:
        """See :class:`Comparison`. All are compared now."""
        hashes = np.concatenate(self._parts)
        self._parts.clear()
        return near_hashes.first_alike(hashes, self._distance)


class TokenComparison:
    """Comparison of texts of bytes: the same ones alone are alike."""

    def __init__(self) -> None:
        self._places: dict[bytes, int] = {}
        self._parts: list[np.ndarray] = [np.empty(0, np.int32)]
        self._rows = 0

    def add(self, values: list[bytes]) -> None:
        """Take the values of further rows."""
        places = (self._places.setdefault(value, place) for place, value in enumerate(values, self._rows))
        self._parts.append(np.fromiter(places, np.int32, len(values)))
        self._rows += len(values)

    def firsts(self) -> np.ndarray:
        """See :class:`Comparison`."""
        return np.concatenate(self._parts)
