"""Prompts out of a file: a text with one prompt a line, or one column of CSV, JSON Lines or Parquet, streamed.

Only a line feed ends a line, with or without a carriage return before it. Unicode knows further line separators, and
captions of the web contain them.
"""

import codecs
import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.types as pt

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.manifest import parquet
from vcf_batch.manifest.carried import is_text

DEFAULT_COLUMN = "prompt"
"""Column of the prompts, if none is named."""

MAX_LINE = 16 << 20
"""Most characters of a line. What has longer ones is no text, and would fill the memory."""

_DELIMITERS = {"csv": ",", "tsv": "\t"}
_JSON = ("jsonl", "ndjson", "json")
_PARQUET_START = b"PAR1"
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16: it begins with the same two bytes
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
"""Byte order marks, which tell an encoding other than UTF-8."""

_PACKED = {
    b"\x1f\x8b": "compressed with gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; unpack it first",
    b"PK\x03\x04": "a zip archive or an Office document; unpack it, or save it as CSV in UTF-8",
}
_CHUNK_BYTES = 1 << 20
_BATCH_ROWS = 8192
_COLUMNS_SHOWN = 20


def read(url: str, column: str | None = None) -> Iterator[str]:
    """Yield the texts of a file's lines or column, in order, as they are; an empty one for a null.

    A file that begins as Parquet does is Parquet. Else the suffix decides: ``.csv`` (commas) and ``.tsv`` (tabs) with a
    header, ``.jsonl``, ``.ndjson`` and ``.json`` with one object a line, and any other a text. Texts are UTF-8, or
    UTF-16 or UTF-32 with a byte order mark. A byte order mark is no part of a prompt.

    Args:
        url: a path or any fsspec URL.
        column: column of the prompts; None is :data:`DEFAULT_COLUMN`. A text has none.

    Raises:
        UsageError: the file cannot be read, is no text in these encodings, or has no such column of texts.
        StorageError: the storage failed.
    """
    suffix = os.path.splitext(storage.name(url))[1].removeprefix(".").lower()
    try:
        with storage.open_read(url) as file:
            start = file.read(4)
        if start == _PARQUET_START or suffix == "parquet":
            yield from _of_parquet(url, column or DEFAULT_COLUMN)
        elif suffix in _DELIMITERS:
            yield from _of_csv(url, column or DEFAULT_COLUMN, _DELIMITERS[suffix])
        elif suffix in _JSON:
            yield from _of_json(url, column or DEFAULT_COLUMN)
        elif column is not None:
            raise UsageError(
                f"{url} is read as a text, which has no column {column!r}; the names of tables end in .csv, .tsv, "
                ".jsonl or .parquet"
            )
        else:
            yield from (line.removesuffix("\n").removesuffix("\r") for line in _lines(url))
    except (FileNotFoundError, PermissionError, storage.NotAFileError) as error:
        raise UsageError(f"cannot read prompts from {url}: {error}") from error


def _lines(url: str) -> Iterator[str]:
    """Yield the lines of a text with their ends; without a byte order mark, also where files were joined."""
    rest, count = "", 0
    for text in _decoded(url):
        *lines, rest = (rest + text).split("\n")
        for number, line in enumerate(lines, count + 1):
            _check_length(url, number, line)
            yield line.removeprefix("\ufeff") + "\n"
        count += len(lines)
        _check_length(url, count + 1, rest)
    if rest := rest.removeprefix("\ufeff"):
        yield rest


def _check_length(url: str, number: int, line: str) -> None:
    if len(line) > MAX_LINE:
        raise UsageError(f"line {number} of {url} has more than {MAX_LINE:,} characters; is it a text?")


def _decoded(url: str) -> Iterator[str]:
    """Yield a text piece by piece."""
    with storage.open_read(url) as file:
        chunk = file.read(_CHUNK_BYTES)
        for mark, what in _PACKED.items():
            if chunk.startswith(mark):
                raise UsageError(f"{url} is {what}")
        encoding = next((name for mark, name in _MARKS if chunk.startswith(mark)), "utf-8")
        decoder = codecs.getincrementaldecoder(encoding)()
        read, line = 0, 1
        while True:
            read += len(chunk)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].decode(encoding).count("\n")
                raise UsageError(
                    f"{url} is not {encoding.upper()}: byte 0x{error.object[error.start]:02X} at offset "
                    f"{read - len(error.object) + error.start:,}, in line {line:,}. Save it as UTF-8, as with: "
                    "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
                ) from error
            if "\0" in text:
                line += text.partition("\0")[0].count("\n")
                raise UsageError(
                    f"line {line:,} of {url} has a NUL character; it is no text, or UTF-16 without a byte order mark. "
                    "Save it as UTF-8, as with: iconv -f UTF-16LE -t UTF-8 FILE > NEW"
                )
            yield text
            line += text.count("\n")
            if not chunk:
                return
            chunk = file.read(_CHUNK_BYTES)


def _of_csv(url: str, column: str, delimiter: str) -> Iterator[str]:
    reader = csv.reader(_lines(url), delimiter=delimiter, strict=True)
    try:
        rows = (row for row in reader if row)  # A blank line has no fields.
        header = next(rows, [])
        at = _place(url, column, header)
        for row in rows:
            if len(row) != len(header):
                raise UsageError(
                    f"line {reader.line_num:,} of {url} has {len(row)} fields, and the header {len(header)}; put texts "
                    f"that contain {'commas' if delimiter == ',' else 'tabs'} in double quotes"
                )
            yield row[at]
    except csv.Error as error:
        raise UsageError(
            f"line {reader.line_num:,} of {url} is not CSV: {error}. Put texts with quotation marks or line breaks in "
            "double quotes, and write a double quote in them twice"
        ) from error


def _of_json(url: str, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(url), 1):
        if not line.strip():
            continue
        place = f"line {number:,} of {url}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{place} is not JSON: {error}. Each line must be one object") from error
        if not isinstance(record, dict):
            raise UsageError(f"{place} is no JSON object; each line must be one, as {{{json.dumps(column)}: ...}}")
        _place(place, column, [*record])
        yield _text(record[column], place, column)


def _of_parquet(url: str, column: str) -> Iterator[str]:
    size, footer = parquet.read_footer(url)
    file, schema = parquet.parse_footer(url, size, footer, first_row=0)
    kind = schema.field(_place(url, column, schema.names)).type
    if pt.is_dictionary(kind):
        kind = kind.value_type
    if not is_text(kind):
        raise UsageError(f"column {column!r} of {url} is {kind}; prompts must be strings")
    for first, batch in file.batches(0, file.num_rows, [column], _BATCH_ROWS):
        for number, value in enumerate(batch.column(0), first):
            yield _text(_plain(value, url, number), f"row {number:,} of {url}", column)


def _plain(value: pa.Scalar, url: str, number: int) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt in row {number:,} of {url} is not UTF-8; write the file anew") from error


def _text(value: object, place: str, column: str) -> str:
    """The value of a column as a prompt; an empty one for a null."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(f"{place} has no text in {column!r} but {type(value).__name__}; prompts must be texts")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{place} has half a character in {column!r} (U+{ord(value[error.start]):04X}), which UTF-8 does not "
            "know; write the text anew"
        ) from error
    if "\0" in value:
        raise UsageError(f"{place} has a NUL character in {column!r}; remove it")
    return value


def _place(place: str, column: str, columns: Iterable[str]) -> int:
    """The number of a column, which must be there exactly once."""
    columns = list(columns)
    if columns.count(column) == 1:
        return columns.index(column)
    if column in columns:
        raise UsageError(f"{place} has {columns.count(column)} columns {column!r}; rename all but one")
    more = ", ..." if len(columns) > _COLUMNS_SHOWN else ""
    there = ", ".join(map(repr, itertools.islice(columns, _COLUMNS_SHOWN))) + more
    raise UsageError(f"{place} has no column {column!r}; it has {there or 'none'}. Name one with --prompt-column NAME")
