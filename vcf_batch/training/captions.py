"""Captioned images for training: tars, Parquet files, tables or folders at any URL, streamed, never held as a whole.

A data set is a sequence of *pairs* in the order of its files; a pair is an image and its captions. Tars are read by
:mod:`vcf_batch.training.tar_samples`: they have the layout of img2dataset and of this project's own outputs. In a
Parquet file, a pair is a row with an image (``struct<bytes, path>``, binary, or the path of a file) and captions (a
string or a list of strings). COCO and Flickr have this layout on the Hugging Face Hub. Tables of paths, and folders of
images and texts, are read by :mod:`vcf_batch.training.loose_images`.
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
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt

from vcf_batch import storage
from vcf_batch.driver.progress import plural
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.manifest.carried import is_binary, is_list, is_text
from vcf_batch.training import data_files, loose_images, tar_samples
from vcf_batch.training.data_files import LAYOUTS
from vcf_batch.training.loose_images import PATH_COLUMNS, Columns
from vcf_batch.training.tar_samples import CAPTION_COLUMNS, CaptionedImage, TarContents, named

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
    columns: Columns = field(default_factory=Columns)
    remarks: tuple[str, ...] = ()
    """What is left out of the data set, or is not what it seems; a line each."""

    def __len__(self) -> int:
        return sum(map(len, self.files))

    @classmethod
    def open(
        cls,
        url: str,
        image_column: str | None = None,
        caption_column: str | None = None,
        image_folder: str | None = None,
    ) -> "CaptionedData":
        """Find a data set's files, count their pairs, and check that each tar is whole.

        Of a tar, only headers are looked at; a file whose storage keeps no checksum is also read once for its SHA-256.
        Images that are files of their own are not read.

        Args:
            url: a tar, a Parquet file, a table, a folder of them at any depth or of images and texts, or several of
                them by braces or a pattern, such as ``s3://bucket/data/train-*.parquet``.
            image_column: column of Parquet files and tables with the images or their paths; None finds it by type and
                name.
            caption_column: column of Parquet files and tables, or field of JSON beside an image, with the captions;
                None finds it by name.
            image_folder: folder or URL that paths of images start at; None is the folder of the file that names them.

        Raises:
            UsageError: there are no such files, or files are damaged or lack images or captions.
            RefusedError, DamageFound: an output below the folder cannot be read.
            StorageError: the storage failed.
        """
        with _reading(url):
            found = data_files.find(url)
        columns = Columns(image_column, caption_column, image_folder and storage.absolute(image_folder))
        empty = cls(url, (), "", columns)
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
        return cls(url, files, identity, columns, remarks)

    def read(self, pieces: Sequence[Piece]) -> Iterator[CaptionedImage]:
        """Yield the pairs of some pieces, one after the other.

        Raises:
            UsageError: a file is damaged, or has fewer pairs than when they were counted.
            StorageError: the storage failed.
        """
        for piece in pieces:
            number = 0
            with _reading(piece.url):
                for pair in self._read(piece):
                    number += 1
                    yield pair
            if number != len(piece):
                raise UsageError(
                    f"{piece.url} has {piece.start + number:,} pairs, and had {piece.stop:,} or more when the training "
                    "began: it has changed. Rerun the command to train on what it holds now, with another --out"
                )

    def _read(self, piece: Piece) -> Iterator[CaptionedImage]:
        match data_files.kind_of(piece.url):
            case "tar":
                return tar_samples.read(piece.url, piece.start, piece.stop, self.columns.caption)
            case "parquet":
                return self._read_parquet(piece)
            case "table":
                return islice(loose_images.read_table(piece.url, self.columns), piece.start, piece.stop)
            case _:
                return loose_images.read_folder(piece.url, piece.start, piece.stop, self.columns.caption)

    def _look(self, url: str) -> tuple[str, TarContents, str]:
        """What is wrong with a file, if anything is; what it holds; and a checksum of its content."""
        try:
            with _reading(url):
                match data_files.kind_of(url):
                    case "tar":
                        contents = tar_samples.count(url)
                    case "parquet":
                        contents = TarContents(self._rows(url))
                    case "table":
                        contents = TarContents(loose_images.count_table(url, self.columns))
                    case _:
                        # The texts and images themselves are not read: names and sizes stand for them.
                        listed = loose_images.visible_files(url)
                        identity = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
                        return "", loose_images.count_pairs([*listed]), identity
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
                                yield _row(batch, row, name, image, captions, self._folder(piece.url))
                            number += 1
                first = stop

    def _folder(self, url: str) -> str:
        return self.columns.folder or storage.parent(url)

    def _columns(self, url: str, schema: pa.Schema) -> tuple[str, list[str]]:
        """The column of images, and the column or columns of captions."""
        typed = [each.name for each in schema if _holds_images(each.type)]
        paths = [name for name in named(schema.names, PATH_COLUMNS) if _names_images(schema.field(name).type)]
        known = named(schema.names, CAPTION_COLUMNS)[:1]
        numbered = [name for name in schema.names if _NUMBERED.fullmatch(name.lower())]
        images = [self.columns.image] if self.columns.image else (typed or paths)[:1]
        captions = [self.columns.caption] if self.columns.caption else known or numbered
        for what, option, found, fits, needed in (
            ("images", "image", images, _names_images, "struct<bytes, path>, binary, or a string with a path"),
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


def _row(batch: pa.RecordBatch, row: int, name: str, image: str, captions: list[str], folder: str) -> CaptionedImage:
    try:
        value = batch.column(image)[row].as_py()
        texts = [batch.column(column)[row].as_py() for column in captions]
    except ValueError as error:  # a text that is no UTF-8
        return CaptionedImage(name, b"", (), f"its row cannot be read: {error}")
    fields = value if isinstance(value, dict) else {"path" if isinstance(value, str) else "bytes": value}
    data, path = fields.get("bytes") or b"", fields.get("path") or ""
    found, why = tar_samples.usable(texts)
    problem = "" if data or path else "it has no image"
    problem = problem or ("" if found else f"it has no caption: {why}")
    return CaptionedImage(name, data, found, problem, "" if data else path, folder)


def _names_images(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind):
        return _names_images(kind.value_type)
    return _holds_images(kind) or is_text(kind)


def _holds_images(kind: pa.DataType) -> bool:
    if pt.is_struct(kind):
        fields = {each.name: each.type for each in kind}
        # Where no row has bytes, the writer may not know their type.
        has_paths = "path" in fields and is_text(fields["path"]) and pt.is_null(fields.get("bytes", pa.string()))
        return has_paths or ("bytes" in fields and _holds_images(fields["bytes"]))
    # Bytes of one length are hashes or UUIDs.
    return is_binary(kind) and not pt.is_fixed_size_binary(kind)


def _holds_texts(kind: pa.DataType) -> bool:
    if pt.is_dictionary(kind) or is_list(kind):
        return _holds_texts(kind.value_type)
    if pt.is_struct(kind):
        return any(each.name in tar_samples.TEXT_FIELDS and _holds_texts(each.type) for each in kind)
    return is_text(kind)
