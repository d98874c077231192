"""The hash of a Parquet file's contents: every byte of it, or, without decoding, of the parts that a run can depend on.

Bytes of images may be hundreds of gigabytes and are not read. Nor are row groups behind the rows in use. The places of
the parts come from the footer, read field by field: pyarrow's own accessors of columns end the process where a
footer is damaged.
"""

import hashlib
import threading
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.types as pt

from vcf_batch import storage
from vcf_batch.errors import ManifestError
from vcf_batch.manifest.footer import Compact

_CHUNK_BYTES = 4 << 20
_ROW_GROUPS, _COLUMNS, _METADATA, _BYTES, _FIRST_PAGE, _DICTIONARY = 4, 1, 3, 7, 9, 11
"""Numbers of the fields that are used, in ``FileMetaData``, ``RowGroup``, ``ColumnChunk`` and ``ColumnMetaData``."""


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
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(kind.storage_type)
    if pt.is_nested(kind):
        return [leaf for index in range(kind.num_fields) for leaf in _leaves(kind.field(index).type)]
    checks = (pt.is_binary, pt.is_large_binary, pt.is_fixed_size_binary, pt.is_binary_view)
    return [any(check(kind) for check in checks)]


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
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(f"{url} has a damaged footer: {error or type(error).__name__}") from error
    return ranges
