"""The manifest: Parquet in, checked rows out, streamed.

manifests/README.md describes its contract for users.
"""

import dataclasses
import hashlib
import itertools
import posixpath
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vcf_batch import storage
from vcf_batch.errors import ManifestError, StorageError
from vcf_batch.manifest import contents, parquet
from vcf_batch.manifest.carried import carried_schema, changes, is_list, left_out
from vcf_batch.manifest.check import Census, check, large_texts
from vcf_batch.manifest.columns import LIMITS, MANIFEST_COLUMNS, OPTIONS, other_name_of, shown
from vcf_batch.manifest.contract import (
    check_schema,
    has_embedded_references,
    has_reference_lists,
    numbered_key,
    parse_rows,
)
from vcf_batch.manifest.parquet import ParquetFile
from vcf_batch.records import Row

_ROWS_PER_READ = 256
_TEXTS_PER_READ = 65_536
_FOOTER_THREADS = 16
_MOST_LISTED = 10_000
"""Most files that are looked at to tell what to name instead of a folder."""
_SHOWN = 3
_HASH_THREADS = 4
"""Number of files that are hashed at the same time. Drivers of object stores read tens of megabytes ahead of each."""


@dataclass(frozen=True, slots=True)
class FileVersion:
    """A file of a manifest with the hash of its contents, as the record of a run keeps it."""

    size: int
    stamp: str | None
    """See :attr:`vcf_batch.storage.Stamp.exact`."""
    groups: int
    """Number of row groups, from the first one, whose contents are hashed."""
    sha256: str
    """See :func:`vcf_batch.manifest.contents.sha256`."""


@dataclass(frozen=True, eq=False, slots=True)
class Manifest:
    """A manifest with its footers read and the types of its columns checked. Small and picklable.

    Rows are numbered from 0 through all files, in the order of the files' names.
    """

    url: str
    base: str
    """The folder that relative references resolve against."""
    num_rows: int
    """Number of rows in use: all, the first ``limit``, or those of a part."""
    first_row: int
    """Number of the first row in use, which is not 0 if a part is used."""
    identity: str
    """Hex SHA-256 over the files: their names, sizes, footers and the contents of rows in use, bytes of images aside.
    A copy elsewhere has the same one."""
    carried_schema: pa.Schema
    """The columns repeated in the outputs, with their types there."""
    reference_is_list: bool
    """Whether rows may have several references."""
    embeds: bool
    """Whether references may be embedded as bytes."""
    mapped: Mapping[str, str]
    """Name in the files of each column that has another one there, by its name among :data:`columns.OPTIONS`."""
    carry: tuple[str, ...]
    """Columns that are carried on purpose, see :meth:`open`."""
    left_out: Mapping[str, str]
    """Columns that are not carried, each with the reason."""
    remarks: Mapping[str, str]
    """Carried columns that are worth a word, each with it."""
    _files: tuple[ParquetFile, ...] = field(repr=False)
    _columns: tuple[str, ...] = field(repr=False)
    """The manifest's columns among :data:`columns.MANIFEST_COLUMNS`."""

    @classmethod
    def open(
        cls,
        url: str,
        limit: int | None = None,
        until: str | None = None,
        known: Mapping[str, FileVersion] = MappingProxyType({}),
        mapped: Mapping[str, str] = MappingProxyType({}),
        carry: Sequence[str] = (),
        part: range | None = None,
    ) -> "Manifest":
        """Open a Parquet file, or the ``.parquet`` files in a folder; local or any fsspec URL.

        The footers are read, and the contents are hashed without decoding them, bytes of images aside.

        Args:
            url: the file or folder.
            limit: use at most the first ``limit`` rows; None uses all.
            until: an identity; use only the first files if they have this identity together.
            known: files of this very manifest by name, opened before. Those of the same size and stamp, with the same
                row groups in use, are not hashed again.
            mapped: name of the column to read in place of each of these columns of the contract.
            carry: columns to carry through though their names suggest another meaning.
            part: use only the rows with these numbers, in place of ``limit``; None uses all.

        Raises:
            ManifestError: there is no such file, it is not Parquet, it has no rows, or not all rows of the part; or
                columns break the contract.
            StorageError: the storage failed.
        """
        url = storage.absolute(url)
        base, names = _discover(url)
        with ThreadPoolExecutor(_FOOTER_THREADS) as threads:
            footers = list(threads.map(lambda name: _footer(storage.join(base, name)), names))
        unhashed: list[tuple[ParquetFile, pa.Schema, bytes]] = []
        stop = limit if part is None else part.stop
        rows = 0
        for name, (stamp, size, footer) in zip(names, footers, strict=True):
            file, schema = parquet.parse_footer(storage.join(base, name), size, footer, rows)
            in_use = file.num_rows if stop is None else min(max(stop - rows, 0), file.num_rows)
            groups = int(np.searchsorted(file.group_stops, in_use, side="left")) + 1 if in_use else 0
            groups = len(file.group_stops) if in_use == file.num_rows else groups
            unhashed.append((dataclasses.replace(file, stamp=stamp, groups_used=groups), schema, footer))
            rows += file.num_rows
        digest = hashlib.sha256()
        files: list[ParquetFile] = []
        schemas: dict[str, pa.Schema] = {}
        for (name, file), (_, schema, _) in zip(_hashed(unhashed, known), unhashed, strict=True):
            digest.update(f"{name}\0{file.size}\0{file.sha256}\0".encode())
            files.append(file)
            schemas[name] = schema
            if digest.hexdigest() == until:
                break
        rows = sum(file.num_rows for file in files)
        if not rows:
            raise ManifestError(f"{url} has no rows; there is nothing to generate")
        if part is not None and part.stop > rows:
            raise ManifestError(
                f"rows is {part.start}:{part.stop}, and {url} has {rows:,} rows, numbered from 0: end at {rows} at most"
            )
        first_row = 0 if part is None else part.start
        for name, schema in schemas.items():
            check_schema(name, schema, names[0], schemas[names[0]], mapped, carry)
        meanings = {column: name for name, column in mapped.items()}
        shadowed = {
            name: f"{OPTIONS[name]} reads {shown(column)} in its place"
            for name, column in mapped.items()
            if name != column and any(name in schema.names for schema in schemas.values())
        }
        schemas = {
            file: pa.schema(
                [
                    field.with_name(meanings.get(field.name, field.name))
                    for field in schema
                    if field.name not in shadowed
                ]
            )
            for file, schema in schemas.items()
        }
        carried = carried_schema(schemas)
        return cls(
            url=url,
            base=base,
            num_rows=(rows if stop is None else min(rows, stop)) - first_row,
            first_row=first_row,
            identity=digest.hexdigest(),
            carried_schema=carried,
            reference_is_list=any(map(has_reference_lists, schemas.values())),
            embeds=any(map(has_embedded_references, schemas.values())),
            mapped=dict(mapped),
            carry=tuple(carry),
            left_out=left_out(schemas) | shadowed,
            remarks=_remarks(carried, schemas),
            _files=tuple(files),
            _columns=tuple(name for name in MANIFEST_COLUMNS if name in schemas[names[0]].names),
        )

    @property
    def reference_is_web(self) -> bool:
        """Whether relative references are on a web server, so that what follows a ``?`` may be secret."""
        return self.base.lower().startswith(("http://", "https://"))

    @property
    def has_limits(self) -> bool:
        """Whether there are columns that may limit where references act."""
        return not {*LIMITS}.isdisjoint(self._columns)

    @property
    def has_loras(self) -> bool:
        """Whether there is a column that may name LoRAs."""
        return "lora" in self._columns

    @property
    def stop(self) -> int:
        """Number behind the last row in use."""
        return self.first_row + self.num_rows

    @property
    def is_whole(self) -> bool:
        """Whether all rows of the files are in use."""
        return self.num_rows == sum(file.num_rows for file in self._files)

    @property
    def versions(self) -> dict[str, FileVersion]:
        """The files by name, for ``known`` of :meth:`open`."""
        return {
            storage.name(file.url): FileVersion(
                file.size, file.stamp.exact if file.stamp else None, file.groups_used, file.sha256
            )
            for file in self._files
        }

    def check(self) -> Census:
        """Read every row once, count what rows have, and refuse what :func:`vcf_batch.manifest.check.check` names.

        Raises:
            ManifestError: one error with each column, the number of wrong rows, and the places of the first ones.
            StorageError: the storage failed.
        """
        return check(self)

    def has_any(self, column: str) -> bool:
        """Whether any row in use has a value in this column. Reads up to the first such row.

        Raises:
            ManifestError, StorageError: see :meth:`iter_rows`.
        """
        if column not in self._columns:
            return False
        batches = self._batches([column], self.first_row, self.stop, _ROWS_PER_READ)
        return any(_holds_any(batch[column]) for _, batch in batches)

    def values(self, column: str, among: Collection[str | None]) -> set[str | None]:
        """Those of some texts that rows in use have in a column, or in its lists. Reads until all are found.

        None stands for no value, and for none in a list.

        Raises:
            ManifestError, StorageError: see :meth:`iter_rows`.
        """
        if column not in self._columns:
            return {value for value in among if value is None}
        found: set[str | None] = set()
        for _, batch in self._batches([column], self.first_row, self.stop, _TEXTS_PER_READ):
            has = column in batch.schema.names
            texts = batch[column] if has else pa.nulls(1, pa.string())
            texts = pc.list_flatten(texts) if is_list(texts.type) else texts
            found |= {*among}.intersection(pc.unique(large_texts(texts)).to_pylist())
            if len(found) == len(among):
                break
        return found

    def each(self, column: str) -> Iterator[Any]:
        """The value of each row in use in a column, as Python has it; None throughout where the column is absent.

        Raises:
            ManifestError, StorageError: see :meth:`iter_rows`.
        """
        if column not in self._columns:
            yield from itertools.repeat(None, self.num_rows)
            return
        for _, batch in self._batches([column], self.first_row, self.stop, _TEXTS_PER_READ):
            yield from batch[column].to_pylist() if column in batch.schema.names else [None] * batch.num_rows

    def keys(self) -> Iterator[str]:
        """The key of each row in use. No other column is read.

        Raises:
            ManifestError, RefusedError, StorageError: see :meth:`iter_rows`.
        """
        for number, key in enumerate(self.each("sample_id"), self.first_row):
            yield numbered_key(number) if key is None else key

    def rows(self, start: int, stop: int, run_seed: int) -> list[Row]:
        """Rows ``start`` to ``stop`` (excluded); see :meth:`iter_rows`."""
        return list(self.iter_rows(start, stop, run_seed))

    def iter_rows(self, start: int, stop: int, run_seed: int) -> Iterator[Row]:
        """Rows ``start`` to ``stop`` (excluded), streamed, reading only the row groups that hold them.

        A row that cannot be generated (an override out of range, unreadable text) says why in :attr:`Row.error`.

        Raises:
            ManifestError: a file is damaged.
            RefusedError: a file has changed since it was opened.
            StorageError: the storage failed.
        """
        if not self.first_row <= start <= stop <= self.stop:
            raise ValueError(f"rows {start} to {stop} were asked for; the manifest has {self.first_row} to {self.stop}")
        wanted = [*self._columns, *self.carried_schema.names]
        for first_row, batch in self._batches(wanted, start, stop, _ROWS_PER_READ):
            yield from parse_rows(batch, first_row, run_seed, self.carried_schema)

    def first_rows(self, count: int, run_seed: int) -> Iterator[Row]:
        """The first ``count`` rows in use, or all if they are fewer; see :meth:`iter_rows`."""
        return self.iter_rows(self.first_row, min(self.first_row + count, self.stop), run_seed)

    def prompts(self, count: int) -> list[str]:
        """The prompts of the first ``count`` rows in use, without those that cannot be used. No other column is read.

        Raises:
            ManifestError, RefusedError, StorageError: see :meth:`iter_rows`.
        """
        stop = min(self.first_row + count, self.stop)
        batches = self._batches(["prompt"], self.first_row, stop, _ROWS_PER_READ)
        rows = (row for first_row, batch in batches for row in parse_rows(batch, first_row, 0, pa.schema([])))
        return [row.prompt for row in rows if row.error is None]

    def locate(self, row: int) -> str:
        """Number of a row in its file, from 0, and the file's name, such as ``row 7 of part-2.parquet``."""
        file = next(file for file in reversed(self._files) if file.first_row <= row)
        return f"row {row - file.first_row} of {storage.name(file.url)}"

    def _batches(
        self, columns: Sequence[str], start: int, stop: int, most: int, counting: bool = False
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the rows ``start`` to ``stop - 1`` as (first row's number, batch); see :meth:`ParquetFile.batches`."""
        meanings = {column: name for name, column in self.mapped.items()}
        wanted = [self.mapped.get(name, name) for name in columns]
        for file in self._files:
            for first_row, batch in file.batches(start, stop, wanted, most, counting):
                if meanings:
                    batch = batch.rename_columns([meanings.get(name, name) for name in batch.schema.names])
                yield first_row, batch


def _remarks(carried: pa.Schema, schemas: Mapping[str, pa.Schema]) -> dict[str, str]:
    """See :attr:`Manifest.remarks`."""
    remarks = {}
    for name in carried.names:
        changed = next(filter(None, (changes(schema.field(name).type) for schema in schemas.values())), None)
        meant = other_name_of(name)
        if remark := changed or (meant and f"not read as {meant!r}"):
            remarks[name] = remark
    return remarks


_ALIKE = re.compile(r"\.(?!parquet$)(?!.*\.crc$)(?i:pq|parq|parquet(\.\w+)?)$")
"""Names that others give to Parquet files."""
_PATTERN = re.compile(r"[*?{\[]")


def _discover(url: str) -> tuple[str, list[str]]:
    """The manifest's folder, and the sorted names of its files."""
    rule = "a manifest is a Parquet file, or a folder with .parquet files directly in it"
    try:
        listed = storage.list_files(url)
        names = sorted(name for name in listed if name.endswith(".parquet") and not name.startswith((".", "_")))
        alike = sorted(name for name in listed if _ALIKE.search(name) and not name.startswith((".", "_")))
        if alike:
            places = f"{len(alike):,} files such as {alike[0]!r}"
            raise ManifestError(
                f"{url} holds {places}, which are not read: rename those that belong to the manifest so that they end "
                "in .parquet, and move the others away"
            )
        if names:
            return url, names
        storage.size(url)
        return storage.parent(url), [storage.name(url)]
    except FileNotFoundError as error:
        # On object stores a folder with nothing but folders is no more than a prefix.
        if advice := _layout(url):
            raise ManifestError(f"{url} holds no file named *.parquet; {advice}") from error
        if _PATTERN.search(storage.name(url)):
            raise ManifestError(f"{url} does not exist; patterns are not expanded: name the folder") from error
        raise ManifestError(f"{url} does not exist; {rule}") from error
    except PermissionError as error:
        raise ManifestError(f"{url} may not be read: {error}") from error
    except storage.NotAFileError as error:
        raise ManifestError(f"{url} holds no file named *.parquet; {_layout(url) or rule}") from error


def _layout(url: str) -> str | None:
    """What to name instead of a folder whose rows lie elsewhere in it, in words; None if there are none."""
    found = sorted(storage.list_some(url, _MOST_LISTED))
    if tables := [name for name in found if name.endswith(".arrow")]:
        folder = storage.join(url, posixpath.dirname(tables[0]))
        return (
            f"it has Arrow files, as datasets' save_to_disk writes them: write them as Parquet, with "
            f"datasets.load_from_disk({folder!r}).to_parquet('manifest.parquet')"
        )
    folders = [*dict.fromkeys(posixpath.dirname(name) for name in found if name.endswith(".parquet"))]
    folders = [each for each in folders if not any(part.startswith((".", "_")) for part in each.split("/"))]
    if not folders:
        return None
    places = " or ".join(storage.join(url, each) for each in folders[:_SHOWN]) + (" or ..." * (len(folders) > _SHOWN))
    if "=" in folders[0]:
        return f"folders such as {folders[0]} are partitions, whose names are not read as columns: name one, {places}"
    return f"its sub-folders do: name {places}"


def _footer(url: str) -> tuple[storage.Stamp | None, int, bytes]:
    """Version of a file, before its footer is read; its size; its footer."""
    try:
        stamp = storage.stamp(url)
    except (FileNotFoundError, PermissionError) as error:
        raise ManifestError(f"{url} cannot be read: {error}") from error
    return stamp, *parquet.read_footer(url)


def _hashed(
    files: Sequence[tuple[ParquetFile, pa.Schema, bytes]], known: Mapping[str, FileVersion]
) -> Iterator[tuple[str, ParquetFile]]:
    """Yield name and file with the hash of its contents, for each file with its schema and its footer."""
    stop = threading.Event()

    def hashed(opened: tuple[ParquetFile, pa.Schema, bytes]) -> tuple[str, ParquetFile]:
        file, schema, footer = opened
        name = storage.name(file.url)
        before, exact = known.get(name), file.stamp and file.stamp.exact
        if before and exact and (before.size, before.stamp, before.groups) == (file.size, exact, file.groups_used):
            return name, dataclasses.replace(file, sha256=before.sha256)

        def read() -> str:
            groups = len(file.group_stops)
            return contents.sha256(file.url, file.size, footer, schema, groups, file.groups_used, stop)

        try:
            sha256 = read()
            now = storage.stamp(file.url)
            # A web server may name one version by several ETags.
            same = (
                not (now and file.stamp)
                or now.text == file.stamp.text
                or (parquet.read_footer(file.url) == (file.size, footer) and read() == sha256)
            )
        except (FileNotFoundError, PermissionError, storage.NotAFileError) as error:
            raise StorageError(f"{file.url} can no longer be read: {error}") from error
        if not same:
            raise ManifestError(f"{file.url} was written while it was read; rerun this command when it is complete")
        return name, dataclasses.replace(file, sha256=sha256)

    with storage.reading_threads(_HASH_THREADS, "hashes") as threads:
        try:
            yield from threads.map(hashed, files)
        finally:
            stop.set()


def _holds_any(column: pa.Array) -> bool:
    """Whether any value is not null, also within lists and structs."""
    if pa.types.is_struct(column.type):
        return any(map(_holds_any, column.flatten()))
    return _holds_any(column.flatten()) if pa.types.is_nested(column.type) else column.null_count < len(column)
