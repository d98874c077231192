"""Pairs of image and captions in a tar, as WebDataset groups them: consecutive members with one key.

``KEY.jpg|jpeg|png|webp`` is the image; ``KEY.txt``, or ``KEY.json`` where the text is none, has the captions. What
stands in the way of one pair is told with it, and never ends the reading of the others.
"""

import bz2
import codecs
import contextlib
import gzip
import itertools
import json
import lzma
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from vcf_batch import storage
from vcf_batch.errors import RowError
from vcf_batch.manifest.contract import MAX_TEXT_BYTES
from vcf_batch.manifest.references import MAX_REFERENCE_BYTES, read_under
from vcf_batch.storage import tar
from vcf_batch.storage.tar import Member

CAPTION_COLUMNS = ("caption", "captions", "text", "texts", "sentences", "sentences_raw", "sentence", "txt", "prompt")
"""Names of captions in tables and JSON, in letters of any case. The first one that has any is used."""
TEXT_FIELDS = ("raw", *CAPTION_COLUMNS)
"""Names of the text in a struct."""
MAX_CAPTION_BYTES = 1 << 24
"""Largest text or JSON member that is read."""

IMAGE_KINDS = frozenset({"jpg", "jpeg", "png", "webp"})
CAPTION_KINDS = frozenset({"txt", "json"})
"""Endings of the names of images and of their captions."""

_MEMBER = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
_COMPRESSIONS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open))
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

Caption = tuple[tuple[str, ...], str]
"""The captions of a pair, and the reason if there is none."""


@dataclass(frozen=True, slots=True)
class CaptionedImage:
    """An image file's bytes, or its path, and its captions, which may be empty."""

    name: str
    """Place of the image, for messages."""
    image: bytes
    captions: tuple[str, ...]
    problem: str = ""
    """Reason why the pair cannot be used, where that is known."""
    path: str = ""
    """Path of an image that is a file of its own; empty where ``image`` has its bytes."""
    folder: str = ""
    """Folder or URL that ``path`` starts at, and must lie in."""

    def read(self) -> bytes:
        """The image file's bytes. Those of a file of its own are read now.

        Raises:
            RowError: the pair cannot be used, or its image is missing or lies elsewhere.
            StorageError: the storage failed.
        """
        if self.problem or not self.captions:
            raise RowError(self.problem or "there is no caption")
        return read_under(self.folder, self.path) if self.path else self.image


@dataclass
class TarContents:
    """What a tar holds, by the names of its members."""

    pairs: int = 0
    lonely_images: int = 0
    """Number of images without a text."""
    first_image: str = ""
    lonely_texts: int = 0
    first_text: str = ""
    repeated: int = 0
    """Number of pairs whose key occurs earlier in the tar."""
    first_repeated: str = ""
    apart: int = 0
    """Number of images and texts with one key that do not stand side by side."""
    unread: int = 0
    """Number of files of kinds that are not read, hidden ones aside."""
    first_unread: str = ""
    links: int = 0
    """Number of hard and symbolic links."""
    first_link: str = ""


def count(url: str) -> TarContents:
    """Read the headers of a tar to its end.

    Raises:
        tarfile.ReadError, EOFError, zlib.error, lzma.LZMAError, OSError: the tar is damaged.
        StorageError: the storage failed.
    """
    contents = TarContents()
    seen: dict[int, int] = {}

    def passed_over(member: Member) -> None:
        if member.is_file and not member.name.rpartition("/")[2].startswith("."):
            contents.unread += 1
            contents.first_unread = contents.first_unread or member.name
        elif member.is_link:
            contents.links += 1
            contents.first_link = contents.first_link or member.name

    with _opened(url) as file:
        for key, kinds in _groups(file, passed_over=passed_over):
            has = bool(IMAGE_KINDS & kinds.keys()) + 2 * bool(CAPTION_KINDS & kinds.keys())
            before = seen.get(hash(key), 0)
            seen[hash(key)] = before | has
            if has == 3:
                contents.pairs += 1
                contents.repeated += before == 3
                contents.first_repeated = contents.first_repeated or (key if before == 3 else "")
            elif has:
                contents.apart += before in (1, 2) and before | has == 3
                if has == 1:
                    contents.lonely_images += 1
                    contents.first_image = contents.first_image or key
                else:
                    contents.lonely_texts += 1
                    contents.first_text = contents.first_text or key
    return contents


def read(url: str, start: int, stop: int, field: str | None = None) -> Iterator[CaptionedImage]:
    """Yield pairs ``start`` to ``stop`` (excluded), in the order of :func:`count`; fewer if the tar has fewer.

    Args:
        url: the tar.
        start, stop: numbers of pairs.
        field: field of ``KEY.json`` with the captions; None takes ``KEY.txt``, or else a field of a known name.

    Raises:
        The errors of :func:`count`.
    """
    with _opened(url) as file:
        samples = _groups(file, lambda number: start <= number < stop)
        pairs = ((key, members) for key, members in samples if _is_pair(members))
        for number, (key, members) in enumerate(itertools.islice(pairs, stop)):
            if number >= start:
                yield _pair(place(url, key), members, field)


def place(url: str, where: str) -> str:
    """The name of a pair, for messages. Names of files and members may be any bytes; what is no text is escaped."""
    return f"{url} {where}".encode(errors="backslashreplace").decode()


def _is_pair(kinds: Collection[str]) -> bool:
    return not IMAGE_KINDS.isdisjoint(kinds) and not CAPTION_KINDS.isdisjoint(kinds)


def _pair(name: str, members: dict[str, tuple[int, bytes]], field: str | None) -> CaptionedImage:
    size, image = next(content for kind, content in members.items() if kind in IMAGE_KINDS)
    if size > MAX_REFERENCE_BYTES:
        return CaptionedImage(name, b"", (), f"its image has {size:,} bytes, more than {MAX_REFERENCE_BYTES:,}")
    texts, problem = captions_of(members, field)
    return CaptionedImage(name, image, texts, problem)


def captions_of(members: Mapping[str, tuple[int, bytes]], field: str | None) -> Caption:
    """The captions beside an image.

    Args:
        members: size and content of ``txt`` and ``json``, where they are.
        field: as in :func:`read`.
    """
    problem = ""
    for kind in ("txt", "json"):
        if kind not in members or (kind == "txt" and field):
            continue
        size, data = members[kind]
        texts, found = _of_text(data) if kind == "txt" else _of_json(data, field)
        if size > MAX_CAPTION_BYTES:
            texts, found = (), f"it has {size:,} bytes, more than {MAX_CAPTION_BYTES:,}"
        if texts:
            return texts, ""
        problem = problem or f"KEY.{kind} has no caption: {found}"
    return (), problem or f"there is no KEY.json with the field {field!r}"


@contextlib.contextmanager
def _opened(url: str) -> Iterator[BinaryIO]:
    """Open a tar, and decompress it if its first bytes say that it is compressed."""
    with storage.open_read(url) as source:
        seeks = tar.seeks(source)
        head = source.read(6)
        if seeks:
            source.seek(0)
            whole = source
        else:
            whole = cast(BinaryIO, _Rejoined(head, source))
        for magic, opened in _COMPRESSIONS:
            if head.startswith(magic):
                with cast(Any, opened)(whole) as file:
                    yield cast(BinaryIO, file)
                return
        yield whole


class _Rejoined:
    """A stream that cannot seek, of which the first bytes have been read."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head, self._rest = head, rest

    def seekable(self) -> bool:
        return False

    def read(self, size: int = -1) -> bytes:
        if not self._head:
            return self._rest.read(size)
        data, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
        return data if size >= 0 else data + self._rest.read()


def _groups(
    file: BinaryIO,
    wanted: Callable[[int], bool] = lambda number: False,
    passed_over: Callable[[Member], None] = lambda member: None,
) -> Iterator[tuple[str, dict[str, tuple[int, bytes]]]]:
    """Yield key and members of each sample: kind to size and content.

    A second member of one kind begins a new sample, so that no member replaces another.

    Args:
        wanted: tells whether the contents of a pair are read, by its number.
        passed_over: called with each member that is no part of a sample.
    """
    key: str | None = None
    group: dict[str, tuple[int, bytes]] = {}
    number = 0
    for member in tar.members(file):
        match = _MEMBER.fullmatch(member.name) if member.is_file else None
        if match is None or (kind := match[2].lower()) not in IMAGE_KINDS | CAPTION_KINDS:
            passed_over(member)
            continue
        if key is not None and (match[1] != key or kind in group):
            yield key, group
            number += _is_pair(group)
            group = {}
        key = match[1]
        # Each member is read immediately, because a stream cannot go back.
        group[kind] = (member.size, _content(member, kind) if wanted(number) else b"")
    if key is not None:
        yield key, group


def _content(member: Member, kind: str) -> bytes:
    limit = MAX_REFERENCE_BYTES if kind in IMAGE_KINDS else MAX_CAPTION_BYTES
    return b"" if member.size > limit else member.read()


def _of_text(data: bytes) -> Caption:
    try:
        return usable(_decoded(data))
    except UnicodeDecodeError as error:
        return (
            (),
            f"it is not {error.encoding} at byte {error.start:,}; write texts as UTF-8, or as UTF-16 with its mark",
        )


def _decoded(data: bytes) -> str:
    """A text without its byte order mark.

    Raises:
        UnicodeDecodeError: it is neither UTF-8, nor UTF-16 or UTF-32 with a mark.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data[len(mark) :].decode(encoding)
    if (place := data.find(0)) >= 0:  # as in UTF-16 without its mark
        raise UnicodeDecodeError("UTF-8 text", data, place, place + 1, "a byte of zero")
    return data.decode()


def _of_json(data: bytes, field: str | None) -> Caption:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        how = "it is nested too deeply" if isinstance(error, RecursionError) else f"it is no JSON: {error}"
        return (), how
    if not isinstance(record, dict):
        return (), "it is no object"
    if field and field not in record:
        return (), f"it has no field {field!r}"
    return usable(*(record[name] for name in ([field] if field else named(record, CAPTION_COLUMNS))))


def named(there: Collection[str], known: Sequence[str]) -> list[str]:
    """The names that are among the known ones, in the order of these, whatever the case of their letters."""
    return sorted((name for name in there if name.lower() in known), key=lambda name: known.index(name.lower()))


def usable(*values: Any) -> Caption:
    """The captions of the first value that has any. A value is a string, a struct with a string, or a list of these."""
    problem = "it is empty" if values else "there is none"
    for value in values:
        try:
            texts = tuple(_texts(value))
        except RecursionError:
            problem = "it is nested too deeply"
            continue
        whole = tuple(text for text in texts if not _flaw(text))
        if whole:
            return whole, ""
        if texts:
            problem = _flaw(texts[0])
    return (), problem


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if text := value.strip():
            yield text
    elif isinstance(value, dict):
        yield from _texts(next((value[name] for name in TEXT_FIELDS if name in value), None))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _flaw(text: str) -> str:
    """The reason why a text can be no caption; empty if it can."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return f"{text[:40]!r} has half of a surrogate pair, which is no text"
    return f"it has {size:,} bytes, more than {MAX_TEXT_BYTES:,}" if size > MAX_TEXT_BYTES else ""
