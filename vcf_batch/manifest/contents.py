"""The hash of a Parquet file's contents: every byte of it, or, without decoding, of the parts that a run can depend on.
And what its footer says of encodings: how far a few bytes may expand.

Bytes of images may be hundreds of gigabytes and are not read. Nor are row groups behind the rows in use. The places of
the parts come from the footer, read field by field: pyarrow's own accessors of columns end the process where a
footer is damaged.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.types as pt

from vcf_batch import storage
from vcf_batch.errors import ManifestError
from vcf_batch.manifest.carried import is_binary

_CHUNK_BYTES = 4 << 20
_ROW_GROUPS, _COLUMNS, _METADATA, _BYTES, _FIRST_PAGE, _DICTIONARY = 4, 1, 3, 7, 9, 11
_SCHEMA, _GROUP_ROWS = 2, 3
_KIND, _ENCODINGS, _PATH, _VALUES, _UNPACKED = 1, 2, 3, 5, 6
_LENGTH, _NAME, _CONVERTED, _LOGICAL = 2, 4, 6, 10
"""Numbers of the fields that are used, in ``FileMetaData``, ``RowGroup``, ``ColumnChunk``, ``ColumnMetaData`` and
``SchemaElement``."""
_BYTE_ARRAY, _FIXED_BYTES = 6, 7
_DICTIONARIES, _DELTAS, _DELTA_BYTE_ARRAY = {2, 8}, {6, 7}, 7
"""Encodings by their numbers. With ``DELTA_BYTE_ARRAY`` a text names what it shares with the one before."""

_ERRORS = (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, ZeroDivisionError)
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
"""Types of Thrift's compact protocol."""


def sha256(
    url: str, size: int, footer: bytes, schema: pa.Schema, groups: int, used: int, stop: threading.Event | None = None
) -> str:
    """Hex SHA-256 over a file's footer and the contents in use.

    Args:
        url: the file.
        size: its bytes.
        footer: see :func:`vcf_batch.manifest.parquet.read_footer`.
        schema: its columns.
        groups: number of its row groups.
        used: number of row groups, from the first one, with rows in use.
        stop: gives up once it is set, which another thread may do; None never does.

    Raises:
        ManifestError: the file is damaged, or is cut while it is read.
        FileNotFoundError, PermissionError, NotAFileError, StorageError: see :mod:`vcf_batch.storage`.
    """
    digest = hashlib.sha256(footer)
    left_out = _image_bytes(schema)
    if not used:
        return digest.hexdigest()
    ranges = [(0, size)] if used == groups and not any(left_out) else _ranges(url, size, footer, used, left_out)
    with storage.open_read(url) as source:
        for start, end in ranges:
            source.seek(start)
            while start < end and not (stop and stop.is_set()):
                data = source.read(min(end - start, _CHUNK_BYTES))
                if not data:
                    raise ManifestError(f"{url} is cut short: it ends at byte {start} of {size}")
                digest.update(data)
                start += len(data)
    return digest.hexdigest()


def _image_bytes(schema: pa.Schema) -> list[bool]:
    """Whether each leaf of the columns holds bytes, in the order of the file."""
    return [leaf for kind in schema.types for leaf in _leaves(kind)]


def _leaves(kind: pa.DataType) -> list[bool]:
    if pt.is_dictionary(kind):
        return _leaves(kind.value_type)
    if isinstance(kind, pa.UuidType):
        return [False]  # it is carried, as text
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    if pt.is_nested(kind):
        return [leaf for index in range(kind.num_fields) for leaf in _leaves(kind.field(index).type)]
    return [is_binary(kind)]


def _ranges(url: str, size: int, footer: bytes, used: int, left_out: Sequence[bool]) -> list[tuple[int, int]]:
    """First byte and end of each part that is hashed, in the order of the row groups and columns.

    Raises:
        ManifestError: the footer is damaged. Parts lie within the file and are together no longer than it, so a false
            footer makes nobody read more than the file.
    """
    ranges: list[tuple[int, int]] = []
    try:
        for group in Compact(footer).struct()[_ROW_GROUPS][:used]:
            columns = group[_COLUMNS]
            if len(columns) != len(left_out):
                raise ValueError(f"{len(columns)} columns in a row group, and {len(left_out)} in the schema")
            for column, is_left_out in zip(columns, left_out, strict=True):
                about = column[_METADATA]
                # As Arrow does: the dictionary, if there is one, stands before the first page of data.
                start = about[_FIRST_PAGE]
                if 0 < about.get(_DICTIONARY, 0) < start:
                    start = about[_DICTIONARY]
                end = start + about[_BYTES]
                if not 0 <= start <= end <= size:
                    raise ValueError(f"a column at the bytes {start} to {end} of {size}")
                if is_left_out:
                    continue
                if ranges and ranges[-1][1] == start:
                    start = ranges.pop()[0]
                ranges.append((start, end))
        if sum(end - start for start, end in ranges) > size:
            raise ValueError("columns that overlap")
    except _ERRORS as error:
        raise ManifestError(f"{url} has a damaged footer: {error or type(error).__name__}") from error
    return ranges


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
        for group in Compact(footer).struct()[_ROW_GROUPS]:
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
                    most = about[_UNPACKED] * -(-about[_VALUES] // group[_GROUP_ROWS])
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
