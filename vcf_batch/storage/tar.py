"""Tars, read from front to back and strictly: a tar that is cut short or damaged is never read as a shorter one.

Python's ``tarfile`` ends without a word at a header that it cannot read, and at a file's end, as if no more members had
been written. Here every header's sum is checked, every size has to lie within the file, two blocks of zeros have to
follow the last member, and nothing but zeros may follow them. Contents have no sums in a tar.
"""

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from vcf_batch.errors import StorageError
from vcf_batch.storage.resilient_file import ResilientFile

BLOCK = 512
"""Bytes of a header, and unit of all sizes."""
MAX_EXTENSION_BYTES = 1 << 20
"""Largest extended header that is read. They hold long names."""

_ZEROS = bytes(BLOCK)
_CHUNK = 1 << 20
_FILES = b"0\x007"
_LINKS = b"12"
_WITHOUT_CONTENT = b"123456"
_LONG_NAME, _LONG_LINK, _OWN_HEADER, _GLOBAL_HEADER, _SPARSE = b"L", b"K", b"xX", b"g", b"S"
_RECORD = re.compile(rb"(\d{1,9}) ([^=]+)=")


class Member:
    """A member of a tar. Its content can be read once, before the next member is asked for."""

    def __init__(self, file: "_Position", name: str, size: int, kind: bytes) -> None:
        self._file, self.name, self.size = file, name, size
        self.is_file = kind in _FILES and not name.endswith("/")
        self.is_link = kind in _LINKS
        """Whether it only names a file, by a hard or symbolic link."""

    def read(self, limit: int | None = None) -> bytes:
        """The content, or its first ``limit`` bytes. A member that is no plain file has none.

        Raises:
            tarfile.ReadError: the tar ends within the content.
        """
        if not self.is_file:
            return b""
        return self._file.exactly(self.size if limit is None else min(limit, self.size), f"within {self.name}")


def members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of a tar that is not compressed. What is not asked for is skipped, by seeking if that works.

    Raises:
        tarfile.ReadError: it is no tar, is cut short or damaged, or goes on behind its end.
    """
    place = _Position(file)
    defaults: dict[str, str] = {}
    own: dict[str, str] = {}
    extended = False
    while True:
        begin = place.at
        header = place.block("where a header or the end of the archive should be")
        if header == _ZEROS:
            if extended:
                raise tarfile.ReadError(f"an extended header at byte {begin:,} belongs to no member")
            place.finish(begin)
            return
        _check_sum(header, begin)
        kind, size = header[156:157], _number(header[124:136], begin)
        if kind in _OWN_HEADER + _GLOBAL_HEADER + _LONG_NAME + _LONG_LINK:
            if size > MAX_EXTENSION_BYTES:
                raise tarfile.ReadError(f"the extended header at byte {begin:,} has {size:,} bytes")
            data = place.exactly(size, "within an extended header")
            if kind == _GLOBAL_HEADER:
                defaults |= _records(data, begin)
            elif kind in _OWN_HEADER:
                own |= _records(data, begin)
            elif kind == _LONG_NAME:
                own["path"] = _text(data)
            extended = kind != _GLOBAL_HEADER
            place.skip_to(begin + BLOCK + _padded(size), "within an extended header")
            continue
        named = defaults | own
        own, extended = {}, False
        if kind == _SPARSE or any(name.startswith("GNU.sparse.") for name in named):
            raise tarfile.ReadError(f"the member at byte {begin:,} is sparse, which is not supported: pack it anew")
        if "size" in named:
            size = _decimal(named["size"], begin)
        if kind in _WITHOUT_CONTENT:
            size = 0
        name = named.get("path") or _name(header)
        start = place.at
        yield Member(place, name, size, kind)
        place.skip_to(start + _padded(size), f"within {name}")


def seeks(file: BinaryIO) -> bool:
    """Whether a file of which nothing has been read can seek. It stays where it is."""
    if not file.seekable():
        return False
    # fsspec's file of a web server that streams says that it can seek, and cannot.
    if isinstance(file, ResilientFile):
        try:
            file.seek(1)
            file.seek(0)
        except StorageError:
            return False
    return True


class _Position:
    """A file with the number of bytes that were read or skipped."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.at = file, 0
        self._seekable = seeks(file)
        self._origin = file.tell() if self._seekable else 0

    def read(self, count: int) -> bytes:
        data = b""
        # A raw file may return less than asked for.
        while len(data) < count and (more := self.file.read(count - len(data))):
            data = data + more if data else more
        self.at += len(data)
        return data

    def exactly(self, count: int, where: str) -> bytes:
        data = self.read(count)
        if len(data) < count:
            raise self._short(where)
        return data

    def block(self, where: str) -> bytes:
        return self.exactly(BLOCK, where)

    def skip_to(self, place: int, where: str) -> None:
        """Go on to a place further on, which has to lie in the file."""
        if self._seekable and place - self.at > BLOCK:
            self.file.seek(self._origin + place - 1)
            self.at = place - 1
        while self.at < place:
            if not self.read(min(place - self.at, _CHUNK)):
                raise self._short(where)

    def finish(self, begin: int) -> None:
        """Check what follows the first block of zeros, to the end of the file."""
        if self.block("between the two blocks of zeros that end an archive") != _ZEROS:
            raise tarfile.ReadError(f"a block of zeros at byte {begin:,} lies between members: it is damaged there")
        while more := self.read(_CHUNK):
            if more.count(0) != len(more):
                where = self.at - len(more.lstrip(b"\0"))
                raise tarfile.ReadError(
                    f"it goes on at byte {where:,}, behind the end of its archive at byte {begin:,}, as tars do that "
                    "were joined: give each archive a file of its own"
                )

    def _short(self, where: str) -> tarfile.ReadError:
        if not self.at:
            return tarfile.ReadError("it is empty")
        size = self.at
        # A seek may have gone beyond the file's end. Compressed files do not tell their end.
        with contextlib.suppress(ValueError, OSError):
            size = self.file.seek(0, os.SEEK_END) - self._origin if self._seekable else size
        return tarfile.ReadError(f"it ends at byte {size:,}, {where}: it is cut short")


def _check_sum(header: bytes, begin: int) -> None:
    counted = header[:148] + b" " * 8 + header[156:]
    # Some old programs added the bytes up as signed numbers.
    sums = sum(counted), sum(counted) - 256 * sum(byte > 127 for byte in counted)
    if _number(header[148:156], begin) not in sums:
        what = "it is damaged there" if begin else "it is no tar, or it is damaged"
        raise tarfile.ReadError(f"the header at byte {begin:,} has a wrong sum: {what}")


def _number(field: bytes, begin: int) -> int:
    if field[0] in (0x80, 0xFF):
        value = int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
        if not 0 <= value < 1 << 62:
            raise tarfile.ReadError(f"the header at byte {begin:,} has the size {value}: it is damaged there")
        return value
    text = field.partition(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", text):
        what = "it is damaged there" if begin else "it is no tar, or it is damaged"
        raise tarfile.ReadError(f"the header at byte {begin:,} has {text!r} for a number: {what}")
    return int(text or b"0", 8)


def _decimal(text: str, begin: int) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise tarfile.ReadError(f"the header at byte {begin:,} has the size {text[:40]!r}: it is damaged there")
    return int(text)


def _records(data: bytes, begin: int) -> dict[str, str]:
    """The records ``LENGTH KEY=VALUE\\n`` of an extended header."""
    found: dict[str, str] = {}
    at = 0
    while at < len(data):
        match = _RECORD.match(data, at)
        stop = at + int(match[1]) if match else 0
        if not match or not match.end() < stop <= len(data) or data[stop - 1 : stop] != b"\n":
            raise tarfile.ReadError(f"the extended header at byte {begin:,} is damaged at its byte {at:,}")
        found[_text(match[2])] = _text(data[match.end() : stop - 1])
        at = stop
    return found


def _name(header: bytes) -> str:
    name, prefix = header[:100], header[345:500]
    # GNU tar and older formats have other things in the place of the prefix.
    has_prefix = header[257:263] == b"ustar\0" and prefix[0]
    return f"{_text(prefix)}/{_text(name)}" if has_prefix else _text(name)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
