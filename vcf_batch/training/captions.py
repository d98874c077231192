"""Captioned images for training: WebDataset tars or Parquet files at any URL, streamed, never held as a whole.

A data set is a sequence of *pairs* in the order of its files' names; a pair is an image and its captions. In a tar, a
pair is a group of consecutive members with one key: ``KEY.jpg|jpeg|png|webp`` with ``KEY.txt`` or ``KEY.json`` or both.
This is the layout of img2dataset and of this project's own outputs. In a Parquet file, a pair is a row with an image
(``struct<bytes, path>`` or binary) and captions (a string or a list of strings). COCO and Flickr have this layout on
the Hugging Face Hub.
"""

import contextlib
import fnmatch
import hashlib
import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from vcf_batch import storage
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.manifest.references import MAX_REFERENCE_BYTES

CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentences", "sentences_raw", "sentence", "txt", "prompt")
"""Column names of captions. The first existing one is used; without any, ``caption_0``, ``caption_1`` ... together."""

_KINDS = ((".tar", ".tar.gz", ".tgz"), (".parquet",))
"""File name endings of tars and of Parquet files. In a folder with both, only the tars are read: img2dataset writes
Parquet files as their index."""
_IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
_NUMBERED = re.compile(r"caption_?\d+")
_TEXT_FIELDS = ("raw", *CAPTION_COLUMNS)
_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)")
_THREADS = 8
_ROWS_PER_READ = 16
_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image file's bytes and its captions, which may be empty."""

    name: str
    """Place of the image, for messages."""
    image: bytes
    captions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Pairs ``start`` to ``stop`` (excluded) of one file."""

    url: str
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


def cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """Pairs ``start`` to ``stop`` (excluded) of the sequence that consists of ``pieces``."""
    result, first = [], 0
    for piece in pieces:
        low, high = max(start - first, 0), min(stop - first, len(piece))
        if low < high:
            result.append(Piece(piece.url, piece.start + low, piece.start + high))
        first += len(piece)
    return result


@dataclass(frozen=True)
class CaptionedData:
    """A data set with the number of its pairs. It is small and picklable, and every worker reads its own part."""

    url: str
    files: tuple[Piece, ...]
    identity: str
    """Hex SHA-256 over the files' names, sizes and numbers of pairs."""
    image_column: str | None = None
    caption_column: str | None = None

    def __len__(self) -> int:
        return sum(map(len, self.files))

    @classmethod
    def open(cls, url: str, image_column: str | None = None, caption_column: str | None = None) -> "CaptionedData":
        """Find a data set's files and count their pairs. Only the members' headers of a tar are read.

        Args:
            url: a tar, a Parquet file, a folder of them at any depth, or a pattern of file names such as
                ``s3://bucket/data/train-*.parquet``.
            image_column, caption_column: columns of Parquet files; None finds them by type and name.

        Raises:
            UsageError: there are no such files, or a file is damaged or lacks images or captions.
            StorageError: the storage failed.
        """
        url = storage.absolute(url)
        sizes = _find(url)
        empty = cls(url, (), "", image_column, caption_column)
        with ThreadPoolExecutor(_THREADS) as threads:
            counts = list(threads.map(empty._count, sizes))
        if not sum(counts):
            raise UsageError(f"{url} holds no image with a caption; {_LAYOUTS}")
        names = [[storage.name(file), size, count] for (file, size), count in zip(sizes.items(), counts, strict=True)]
        identity = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        files = tuple(Piece(file, 0, count) for file, count in zip(sizes, counts, strict=True))
        return cls(url, files, identity, image_column, caption_column)

    def read(self, pieces: Sequence[Piece]) -> Iterator[CaptionedImage]:
        """Yield the pairs of some pieces, one after the other.

        Raises:
            UsageError: a file is damaged.
            StorageError: the storage failed.
        """
        for piece in pieces:
            with _reading(piece.url):
                if piece.url.endswith(_KINDS[0]):
                    yield from _read_tar(piece)
                else:
                    yield from self._read_parquet(piece)

    def _count(self, url: str) -> int:
        with _reading(url):
            if url.endswith(_KINDS[0]):
                return sum(1 for _ in _tar_pairs(url, lambda _: False))
            with storage.open_read(url) as source:
                file = pq.ParquetFile(source)
                self._columns(url, file.schema_arrow)
                return file.metadata.num_rows

    def _read_parquet(self, piece: Piece) -> Iterator[CaptionedImage]:
        with storage.open_read(piece.url) as source:
            # Without a buffer size, Arrow would hold whole column chunks: gigabytes of images.
            file = pq.ParquetFile(source, pre_buffer=False, buffer_size=_BUFFER_BYTES)
            image, captions = self._columns(piece.url, file.schema_arrow)
            first = 0
            for group in range(file.num_row_groups):
                stop = first + file.metadata.row_group(group).num_rows
                if first < piece.stop and stop > piece.start:
                    number = first
                    for batch in file.iter_batches(_ROWS_PER_READ, [group], [image, *captions], use_threads=False):
                        for row in batch.to_pylist():
                            if piece.start <= number < piece.stop:
                                value = row[image]
                                data = value.get("bytes") if isinstance(value, dict) else value
                                texts = _captions([row[column] for column in captions])
                                yield CaptionedImage(f"{piece.url} row {number}", data or b"", texts)
                            number += 1
                first = stop

    def _columns(self, url: str, schema: pa.Schema) -> tuple[str, list[str]]:
        """The column of images, and the column or columns of captions."""
        typed = [field.name for field in schema if _holds_images(field.type)]
        named = [name for name in CAPTION_COLUMNS if name in schema.names][:1]
        numbered = [name for name in schema.names if _NUMBERED.fullmatch(name)]
        images = [self.image_column] if self.image_column else typed
        captions = [self.caption_column] if self.caption_column else named or numbered
        for what, option, found in (("images", "image", images), ("captions", "caption", captions)):
            if not found or found[0] not in schema.names:
                raise UsageError(
                    f"{url} has no column of {what}{f' named {found[0]!r}' if found else ''}; name it "
                    f"with --{option}-column. Its columns: {', '.join(schema.names)}"
                )
        return images[0], captions


_LAYOUTS = (
    "training data is WebDataset tars (KEY.jpg|png|webp with KEY.txt or KEY.json) or Parquet files (a column of images "
    "and one of captions)"
)


def _find(url: str) -> dict[str, int]:
    """The data set's files in the order of their names: URL to size in bytes."""
    with _reading(url):
        if url.endswith(sum(_KINDS, ())):
            if "*" not in storage.name(url):
                return {url: storage.size(url)}
            folder, pattern = storage.parent(url), storage.name(url)
            listed = {name: size for name, size in storage.list_files(folder).items() if fnmatch.fnmatch(name, pattern)}
        else:
            folder, listed = url, storage.list_tree(url)
    for kind in _KINDS:
        names = sorted(name for name in listed if name.endswith(kind) and not name.startswith((".", "_")))
        if names:
            return {storage.join(folder, name): listed[name] for name in names}
    raise UsageError(f"{url} holds no .tar or .parquet file; {_LAYOUTS}")


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    """Raise UsageError for a damaged file. A failure of the storage stays a StorageError."""
    try:
        yield
    except (UsageError, StorageError):
        raise
    except (tarfile.TarError, EOFError, zlib.error, pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{url} cannot be read: {error}. Training data has to be whole: get the file again, or leave it out"
        ) from error


def _read_tar(piece: Piece) -> Iterator[CaptionedImage]:
    for number, (key, members) in enumerate(_tar_pairs(piece.url, lambda n: piece.start <= n < piece.stop)):
        if number >= piece.stop:
            return
        if number >= piece.start:
            image = next(data for kind, data in members.items() if kind in _IMAGES)
            texts = [members["txt"].decode(errors="replace")] if "txt" in members else _json_captions(members["json"])
            yield CaptionedImage(f"{piece.url} {key}", image, _captions(texts))


def _tar_pairs(url: str, wanted: Callable[[int], bool]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield key and members by kind of every pair in a tar. Members have content only if ``wanted(number)`` is true."""
    number = 0
    with storage.open_read(url) as source, tarfile.open(fileobj=source, mode=_mode(source)) as tar:
        named = ((_MEMBER.fullmatch(member.name), member) for member in tar if member.isreg())
        keyed = ((match[1], match[2].lower(), member) for match, member in named if match)
        for key, group in groupby(keyed, key=lambda entry: entry[0]):
            # Each member is read immediately, because a stream cannot go back.
            members = {
                kind: _content(tar, member) if wanted(number) else b""
                for _, kind, member in group
                if kind in _IMAGES or kind in ("txt", "json")
            }
            if _IMAGES & members.keys() and {"txt", "json"} & members.keys():
                yield key, members
                number += 1


def _mode(source: BinaryIO) -> Literal["r:*", "r|*"]:
    return "r:*" if source.seekable() else "r|*"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, "a regular member has content"
    data = file.read(MAX_REFERENCE_BYTES)
    if len(data) < min(member.size, MAX_REFERENCE_BYTES):
        raise tarfile.ReadError(f"{member.name} is cut short")
    return data


def _json_captions(data: bytes) -> Any:
    try:
        record = json.loads(data)
    except ValueError:
        return None
    return (
        next((record[name] for name in CAPTION_COLUMNS if name in record), None) if isinstance(record, dict) else None
    )


def _captions(value: Any) -> tuple[str, ...]:
    """The captions in a value, which is a string, a struct with a string, or a list of these."""
    if isinstance(value, str):
        return (text,) if (text := value.strip()) else ()
    if isinstance(value, dict):
        return _captions(next((value[name] for name in _TEXT_FIELDS if name in value), None))
    return tuple(text for item in value for text in _captions(item)) if isinstance(value, list | tuple) else ()


def _holds_images(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):
        return any(field.name == "bytes" for field in kind)
    return pt.is_binary(kind) or pt.is_large_binary(kind)
