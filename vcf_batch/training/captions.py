"""Captioned images for training: WebDataset tars or Parquet files at any URL, streamed, never held as a whole.

A data set is a sequence of *pairs* in the order of its files; a pair is an image and its captions. Tars are read by
:mod:`vcf_batch.training.tar_samples`: they have the layout of img2dataset and of this project's own outputs. In a
Parquet file, a pair is a row with an image (``struct<bytes, path>`` or binary) and captions (a string or a list of
strings). COCO and Flickr have this layout on the Hugging Face Hub.
"""

import contextlib
import hashlib
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from vcf_batch import storage
from vcf_batch.driver.progress import plural
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.manifest.carried import is_binary, is_list, is_text
from vcf_batch.training import data_files, tar_samples
from vcf_batch.training.data_files import LAYOUTS
from vcf_batch.training.tar_samples import CAPTION_COLUMNS, CaptionedImage, TarContents

_NUMBERED = re.compile(r"caption_?\d+")
_THREADS = 8
_ROWS_PER_READ = 16
_BUFFER_BYTES = 1 << 20
_NAMED = 3
_LINKS = "in the place of a file; pack the files themselves, as 'tar -h --hard-dereference' does"
_UNREAD = (
    "of a kind that is not read: KEY is what stands before the first dot of a name, and the kind is what follows it"
)


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
    """Hex SHA-256 over the files' names, sizes, numbers of pairs, and contents: the storage's checksum or ETag of each,
    or else the file's own SHA-256."""
    image_column: str | None = None
    caption_column: str | None = None
    remarks: tuple[str, ...] = ()
    """What is left out of the data set, or is not what it seems; a line each."""

    def __len__(self) -> int:
        return sum(map(len, self.files))

    @classmethod
    def open(cls, url: str, image_column: str | None = None, caption_column: str | None = None) -> "CaptionedData":
        """Find a data set's files, count their pairs, and check that each tar is whole.

        Of a tar, only headers are looked at; a file whose storage keeps no checksum is also read once for its SHA-256.

        Args:
            url: a tar, a Parquet file, a folder of them at any depth, or several of them by braces or a pattern, such
                as ``s3://bucket/data/train-*.parquet``.
            image_column, caption_column: columns of Parquet files; None finds them by type and name.

        Raises:
            UsageError: there are no such files, or files are damaged or lack images or captions.
            RefusedError, DamageFound: an output below the folder cannot be read.
            StorageError: the storage failed.
        """
        with _reading(url):
            found = data_files.find(url)
        empty = cls(url, (), "", image_column, caption_column)
        with ThreadPoolExecutor(_THREADS) as threads:
            looked = list(threads.map(empty._look, found.sizes))
        broken = [error for error, _, _ in looked if error]
        if broken:
            many = f"{len(broken):,} of {len(looked):,} files cannot be used, among them" if len(broken) > 1 else ""
            raise UsageError("\n".join(filter(None, (many, *broken[:_NAMED]))))
        contents = [content for _, content, _ in looked]
        remarks = (*found.remarks, *_remarks(dict(zip(found.sizes, contents, strict=True))))
        counts = [content.pairs for content in contents]
        if not sum(counts):
            raise UsageError("\n".join((f"{url} holds no image with a caption; {LAYOUTS}", *remarks)))
        names = [
            [data_files.file_name(file), size, content.pairs, checksum]
            for (file, size), (_, content, checksum) in zip(found.sizes.items(), looked, strict=True)
        ]
        identity = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        files = tuple(Piece(file, 0, count) for file, count in zip(found.sizes, counts, strict=True))
        return cls(url, files, identity, image_column, caption_column, remarks)

    def read(self, pieces: Sequence[Piece]) -> Iterator[CaptionedImage]:
        """Yield the pairs of some pieces, one after the other.

        Raises:
            UsageError: a file is damaged, or has fewer pairs than when they were counted.
            StorageError: the storage failed.
        """
        for piece in pieces:
            number = 0
            with _reading(piece.url):
                if data_files.is_tar(piece.url):
                    pairs = tar_samples.read(piece.url, piece.start, piece.stop)
                else:
                    pairs = self._read_parquet(piece)
                for pair in pairs:
                    number += 1
                    yield pair
            if number != len(piece):
                raise UsageError(
                    f"{piece.url} has {piece.start + number:,} pairs, and had {piece.stop:,} or more when the training "
                    "began: it has changed. Rerun the command to train on what it holds now, with another --out"
                )

    def _look(self, url: str) -> tuple[str, TarContents, str]:
        """What is wrong with a file, if anything is; what it holds; and a checksum of its content."""
        try:
            with _reading(url):
                contents = tar_samples.count(url) if data_files.is_tar(url) else TarContents(self._rows(url))
                return "", contents, storage.remote_checksum(url) or storage.digest(url).sha256
        except UsageError as error:
            return str(error), TarContents(), ""

    def _rows(self, url: str) -> int:
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
                        for row in range(batch.num_rows):
                            if piece.start <= number < piece.stop:
                                name = tar_samples.place(piece.url, f"row {number}")
                                yield _row(batch, row, name, image, captions)
                            number += 1
                first = stop

    def _columns(self, url: str, schema: pa.Schema) -> tuple[str, list[str]]:
        """The column of images, and the column or columns of captions."""
        typed = [field.name for field in schema if _holds_images(field.type)]
        named = [name for name in CAPTION_COLUMNS if name in schema.names][:1]
        numbered = [name for name in schema.names if _NUMBERED.fullmatch(name)]
        images = [self.image_column] if self.image_column else typed[:1]
        captions = [self.caption_column] if self.caption_column else named or numbered
        for what, option, found, fits, needed in (
            ("images", "image", images, _holds_images, "struct<bytes, path> or binary"),
            ("captions", "caption", captions, _holds_texts, "a string, a struct with one, or a list of these"),
        ):
            if not found or found[0] not in schema.names:
                raise UsageError(
                    f"{url} has no column of {what}{f' named {found[0]!r}' if found else ''}; name it "
                    f"with --{option}-column. Its columns: {', '.join(schema.names)}"
                )
            if not fits(kind := schema.field(found[0]).type):
                raise UsageError(
                    f"{url}: the column {found[0]!r} is {kind}, which holds no {what}: they are {needed}; name another "
                    f"with --{option}-column. Its columns: {', '.join(schema.names)}"
                )
        return images[0], captions


def _remarks(contents: dict[str, TarContents]) -> Iterator[str]:
    """What has to be told about the samples of tars, in a line for each kind."""
    for number, name, begin, noun, rest in (
        ("lonely_images", "first_image", "left out: ", "image", "without KEY.txt or KEY.json beside it"),
        ("lonely_texts", "first_text", "left out: ", "text", "without an image beside it"),
        ("repeated", "first_repeated", "", "pair", "with a key that occurs before in its tar; each occurrence is used"),
        ("unread", "first_unread", "left out: ", "member", _UNREAD),
        ("links", "first_link", "left out: ", "link", _LINKS),
    ):
        having = [(file, getattr(content, name)) for file, content in contents.items() if getattr(content, number)]
        if having:
            total = sum(getattr(content, number) for content in contents.values())
            file, key = having[0]
            line = f"{begin}{plural(total, noun)} {rest}; the first is {key} in {file}"
            yield line.encode(errors="backslashreplace").decode()
    apart = sum(content.apart for content in contents.values())
    if apart:
        yield (
            f"of these, {apart:,} have their image and their text in different places of the tar; members of one key "
            "have to stand side by side, as 'tar --sort=name' packs them"
        )


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    """Raise UsageError for a damaged file. A failure of the storage stays a StorageError."""
    try:
        yield
    except (UsageError, StorageError):
        raise
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError) as error:
        raise UsageError(
            f"{url} cannot be read: {error}. Training data has to be whole: get the file again, or leave it out"
        ) from error


def _row(batch: pa.RecordBatch, row: int, name: str, image: str, captions: list[str]) -> CaptionedImage:
    try:
        value = batch.column(image)[row].as_py()
        texts = [batch.column(column)[row].as_py() for column in captions]
    except ValueError as error:  # a text that is no UTF-8
        return CaptionedImage(name, b"", (), f"its row cannot be read: {error}")
    data = value.get("bytes") if isinstance(value, dict) else value
    problem = ""
    if not data:
        path = value.get("path") if isinstance(value, dict) else None
        problem = f"its image is not in the file, which names {path!r}" if path else "it has no image"
    found, why = tar_samples.usable(texts)
    return CaptionedImage(name, data or b"", found, problem or ("" if found else f"it has no caption: {why}"))


def _holds_images(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    # Bytes of one length are hashes or UUIDs.
    return is_binary(kind) and not pt.is_fixed_size_binary(kind)


def _holds_texts(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind) or is_list(kind):
        return _holds_texts(kind.value_type)
    if pt.is_struct(kind):
        return any(field.name in tar_samples.TEXT_FIELDS and _holds_texts(field.type) for field in kind)
    return is_text(kind)
