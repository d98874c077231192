"""The footer of a Parquet file, read field by field: what it says of encodings, and how far a few bytes may expand.

pyarrow's own accessors of columns end the process where a footer is damaged; this reader raises.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_SCHEMA, _GROUPS, _COLUMNS, _GROUP_ROWS, _METADATA = 2, 4, 1, 3, 3
_KIND, _ENCODINGS, _PATH, _VALUES, _BYTES = 1, 2, 3, 5, 6
_LENGTH, _NAME, _CONVERTED, _LOGICAL = 2, 4, 6, 10
"""Numbers of the fields that are used, in ``FileMetaData``, ``RowGroup``, ``ColumnChunk``, ``ColumnMetaData`` and
``SchemaElement``."""
_BYTE_ARRAY, _FIXED_BYTES = 6, 7
_DICTIONARIES, _DELTAS, _DELTA_BYTE_ARRAY = {2, 8}, {6, 7}, 7
"""Encodings by their numbers. With ``DELTA_BYTE_ARRAY`` a text names what it shares with the one before."""

_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, ZeroDivisionError)
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
"""Types of Thrift's compact protocol."""


@dataclass(frozen=True, slots=True)
class Encodings:
    """The leaves of a file's columns, by their paths, whose encodings need care."""

    delta: frozenset[str] = frozenset()
    """Leaves with a delta encoding. Arrow cannot read them as dictionaries."""
    expanding: Mapping[str, int] = field(default_factory=dict)
    """Leaves whose texts may take more memory than the file says, with the most bytes that a row may take. The leaves
    of flat columns with a dictionary are not among them: the dictionary itself tells."""


def encodings(footer: bytes) -> Encodings:
    """The encodings that a footer names; nothing of a footer that cannot be understood, which Arrow refuses itself.

    Args:
        footer: see :func:`vcf_batch.manifest.parquet.read_footer`.
    """
    delta: set[str] = set()
    expanding: dict[str, int] = {}
    try:
        for group in Compact(footer).struct()[_GROUPS]:
            for column in group[_COLUMNS]:
                about = column.get(_METADATA)
                if not about or about[_KIND] != _BYTE_ARRAY:
                    continue
                used, path = {*about[_ENCODINGS]}, b".".join(about[_PATH]).decode()
                if used & _DELTAS:
                    delta.add(path)
                has_dictionary = used & _DICTIONARIES and (used & _DELTAS or len(about[_PATH]) > 1)
                if _DELTA_BYTE_ARRAY in used or has_dictionary:
                    # No text is longer than all bytes of its column together.
                    most = about[_BYTES] * -(-about[_VALUES] // group[_GROUP_ROWS])
                    expanding[path] = max(expanding.get(path, 1), most)
    except _ERRORS:
        return Encodings()
    return Encodings(frozenset(delta), expanding)


def wide_integers(footer: bytes) -> list[str]:
    """Names of the columns, or fields of columns, that may be integers of 128 bits, as polars writes them."""
    try:
        return [
            element[_NAME].decode()
            for element in Compact(footer).struct()[_SCHEMA]
            if (element.get(_KIND), element.get(_LENGTH)) == (_FIXED_BYTES, 16)
            and not {_CONVERTED, _LOGICAL} & element.keys()
        ]
    except _ERRORS:
        return []


class Compact:
    """Reader of Thrift's compact protocol, in which footers are written.

    Args:
        data: begins with a struct.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self) -> dict[int, Any]:
        """The next struct: its values by the numbers of their fields.

        Raises:
            ValueError, IndexError, RecursionError: it is damaged.
        """
        return dict(self._fields())

    def _fields(self) -> Iterator[tuple[int, Any]]:
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._integer()
            kind = head & 15
            yield number, kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind)

    def _value(self, kind: int) -> Any:
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind == _STRUCT:
            return self.struct()
        if kind in _LISTS:
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15) for _ in range(count)]
        if kind == _MAP:
            count = self._varint()
            kinds = self._byte() if count else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(count)]
        if kind in (_TRUE, _FALSE, _BYTE):  # in a list or a map, where each takes a byte
            return self._byte()
        if kind == _DOUBLE:
            return self._take(8)
        raise ValueError(f"type {kind} at byte {self._at}")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError(f"a number of more than 64 bits at byte {self._at}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, count: int) -> bytes:
        data = self._data[self._at : self._at + count]
        if len(data) < count:
            raise ValueError(f"a text of {count} bytes at byte {self._at}")
        self._at += count
        return data
