"""Captioned images that are files of their own: named in a table, or with a text beside each in a folder.

A table is JSON Lines, CSV or JSON: the metadata of Hugging Face's ``imagefolder``, records with a path and a caption,
or the captions of COCO. The images are read one by one, by the threads that prepare them.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.training.tar_samples import (
    CAPTION_COLUMNS,
    CAPTION_KINDS,
    IMAGE_KINDS,
    MAX_CAPTION_BYTES,
    CaptionedImage,
    TarContents,
    captions_of,
    named,
    place,
    usable,
)

PATH_COLUMNS = ("file_name", "image", "image_path", "image_file", "file_path", "filepath", "filename", "path", "file")
"""Names of columns with the paths of images, in letters of any case. The first one that is there is used."""

_THREADS = 16
"""Texts beside images that are read at a time."""
_TEXTS_AHEAD = 256


@dataclass(frozen=True)
class Columns:
    """Where a record has its image and its captions; None finds them by known names."""

    image: str | None = None
    caption: str | None = None
    folder: str | None = None
    """Folder or URL that paths start at; None is the folder of the table."""

    def pair(self, record: dict[str, Any], name: str, table: str) -> CaptionedImage:
        """The pair of a record.

        Args:
            record: a row's or object's values.
            name: place of the record, for messages.
            table: URL of the file that it is from.
        """
        columns = [self.image] if self.image else named(record, PATH_COLUMNS)
        path = next((record[each] for each in columns if isinstance(record.get(each), str)), "")
        texts = [record[each] for each in ([self.caption] if self.caption else named(record, CAPTION_COLUMNS))
                 if each in record]  # fmt: skip
        captions, problem = usable(*texts)
        problem = f"it has no caption: {problem}" if problem else ""
        if not path:
            what = f"the column {self.image!r}" if self.image else f"a column of a path ({', '.join(PATH_COLUMNS)})"
            problem = f"it has no image in {what}; name one with --image-column"
        return CaptionedImage(name, b"", captions, problem, path, self.folder or storage.parent(table))


def read_table(url: str, columns: Columns) -> Iterator[CaptionedImage]:
    """Yield the pairs of a table, in its order.

    Args:
        url: ``.jsonl`` or ``.ndjson`` with one object a line, ``.csv`` or ``.tsv`` with a header, or ``.json`` with a
            list of objects or COCO's ``images`` and ``annotations``.
        columns: names in its records.

    Raises:
        UsageError: the file is damaged, or of another form.
        OSError, StorageError: the storage failed.
    """
    ending = os.path.splitext(storage.name(url))[1].lower()
    with storage.open_read(url) as file:
        if ending == ".json":
            records = _of_json(url, file)
        elif ending in (".csv", ".tsv"):
            records = _of_csv(url, file, "\t" if ending == ".tsv" else ",")
        else:
            records = _of_lines(url, file)
        for where, record in records:
            yield columns.pair(record, place(url, where), url)


def count_table(url: str, columns: Columns) -> int:
    """Number of pairs of a table, whether they can be used or not.

    Raises:
        The errors of :func:`read_table`.
    """
    return sum(1 for _ in read_table(url, columns))


def _of_lines(url: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(_decoded(url, lines), 1):
            if line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UsageError(f"{url}: line {number:,} is no JSON: {error}") from error
                if not isinstance(record, dict):
                    raise UsageError(f"{url}: line {number:,} is no object with a path and a caption")
                yield f"line {number}", record


def _of_csv(url: str, file: BinaryIO, delimiter: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
        try:
            for number, record in enumerate(csv.DictReader(_decoded(url, lines), delimiter=delimiter), 1):
                yield f"row {number}", record
        except csv.Error as error:
            raise UsageError(f"{url} is no table of CSV: {error}") from error


def _decoded(url: str, lines: io.TextIOWrapper) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise UsageError(f"{url} is not UTF-8: {error}") from error


def _of_json(url: str, file: BinaryIO) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        document = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{url} is no JSON: {error}") from error
    records = document
    if isinstance(document, dict) and isinstance(document.get("images"), list):
        records = document["images"]
        texts: dict[Any, list[Any]] = {}
        for each in document.get("annotations") or ():
            if isinstance(each, dict) and "caption" in each:
                texts.setdefault(each.get("image_id"), []).append(each["caption"])
        if not texts:
            raise UsageError(f"{url} has no annotations with a caption; of COCO, captions_*.json has them")
        records = [each | {"caption": texts.get(each.get("id"))} for each in records if isinstance(each, dict)]
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise UsageError(f"{url} is neither a list of objects with a path and a caption, nor COCO's captions")
    for number, record in enumerate(records, 1):
        yield f"record {number}", record


@dataclass
class _Grouped:
    """The files of a folder by their keys: what stands before the last dot."""

    pairs: list[tuple[str, list[str]]]
    """Image, and the texts beside it."""
    contents: TarContents


def _grouped(names: Sequence[str]) -> _Grouped:
    images: dict[str, list[str]] = {}
    texts: dict[str, list[str]] = {}
    for name in sorted(names):
        key, ending = os.path.splitext(name)
        kind = ending[1:].lower()
        if kind in IMAGE_KINDS | CAPTION_KINDS:
            (images if kind in IMAGE_KINDS else texts).setdefault(key, []).append(name)
    pairs = [(name, texts[key]) for key in images if key in texts for name in images[key]]
    lonely = [name for key in images if key not in texts for name in images[key]]
    unread = [name for key in texts if key not in images for name in texts[key]]
    found = TarContents(len(pairs), len(lonely), (*lonely, "")[0], len(unread), (*unread, "")[0])
    return _Grouped(sorted(pairs), found)


def holds_pairs(names: Sequence[str]) -> bool:
    """Whether there is an image with a text beside it among the files of a folder."""
    return bool(_grouped(names).pairs)


def visible_files(folder: str) -> dict[str, int]:
    """Relative path and size of the files of a folder, hidden ones aside.

    Raises:
        OSError, StorageError: the storage failed.
    """
    tree = storage.list_tree(folder)
    return {name: tree[name] for name in sorted(tree) if not any(part[:1] in "._" for part in name.split("/"))}


def count_pairs(names: Sequence[str]) -> TarContents:
    """What a folder of images and texts holds, by the names of its files."""
    return _grouped(names).contents


def read_folder(folder: str, start: int, stop: int, field: str | None) -> Iterator[CaptionedImage]:
    """Yield pairs ``start`` to ``stop`` (excluded) of a folder, in the order of their names.

    Args:
        folder: the folder.
        start, stop: numbers of pairs.
        field: field of ``KEY.json`` with the captions; None takes ``KEY.txt``, or else a field of a known name.

    Raises:
        OSError, StorageError: the storage failed.
    """
    pairs = iter(_grouped([*visible_files(folder)]).pairs[start:stop])

    def read(pair: tuple[str, list[str]]) -> CaptionedImage:
        image, texts = pair
        members = {}
        for text in texts:
            data = storage.read_bytes(storage.join(folder, text), MAX_CAPTION_BYTES + 1)
            members[os.path.splitext(text)[1][1:].lower()] = len(data), data
        captions, problem = captions_of(members, field)
        return CaptionedImage(place(storage.join(folder, image), "").rstrip(), b"", captions, problem, image, folder)

    with storage.reading_threads(_THREADS, "texts") as threads:
        while some := list(islice(pairs, _TEXTS_AHEAD)):
            yield from threads.map(read, some)
