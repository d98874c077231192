"""Tars, read strictly: the same members as Python's tarfile finds in whole ones, and no fewer without a word."""

import gzip
import io
import random
import re
import tarfile
from collections.abc import Callable
from typing import BinaryIO, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcf_batch.storage import tar

MEMBERS = {
    "0.jpg": b"\xff\xd8" + bytes(700),
    "0.txt": b"zero",
    "1.jpg": b"",
    "1.txt": b"one" * 200,
    "2.txt": b"2" * 512,
}


def written(members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


class Stream(io.RawIOBase):
    """A file that cannot seek, and returns less than it is asked for."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        return self._file.read(min(size, 300))


def found(file: object) -> dict[str, bytes]:
    return {member.name: member.read() for member in tar.members(cast(BinaryIO, file))}


def names(file: object) -> list[str]:
    return [member.name for member in tar.members(cast(BinaryIO, file))]


OPENED: list[Callable[[bytes], object]] = [io.BytesIO, Stream]


@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=300).filter(
            lambda name: len(name.encode()) < 900
        ),
        st.binary(max_size=1500),
        max_size=5,
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_a_whole_tar_is_read_as_it_was_written(members: dict[str, bytes], form: int) -> None:
    """Names of any length and alphabet, in both formats, with and without seeking, read or skipped."""
    data = written(members, form)
    for opened in OPENED:
        assert found(opened(data)) == members
        assert names(opened(data)) == [*members]
    assert found(gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data)))) == members


@pytest.mark.parametrize("opened", OPENED)
@pytest.mark.parametrize("read", [found, names])
def test_every_cut_is_told(read: Callable[[object], object], opened: Callable[[bytes], object]) -> None:
    """A tar that is cut anywhere within its members or end blocks is refused, with the byte where it ends."""
    data = written(MEMBERS)
    end = -(-len(data.rstrip(b"\0")) // 512) * 512 + 1024
    rng = random.Random(0)
    for cut in (*range(0, end, 512), *(rng.randrange(end) for _ in range(200))):
        with pytest.raises(tarfile.ReadError, match=f"it ends at byte {cut:,}, .*cut short" if cut else "it is empty"):
            read(opened(data[:cut]))
    assert read(opened(data[:end])) == read(opened(data))


def test_a_flipped_bit_changes_contents_only_or_is_told() -> None:
    """Whatever bit is flipped: no member goes missing, and none gets another name or size."""
    data = written(MEMBERS)
    sizes = [(name, len(content)) for name, content in MEMBERS.items()]
    rng, told = random.Random(0), []
    for bit in (rng.randrange(8 * len(data)) for _ in range(400)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            members = [(member.name, member.size) for member in tar.members(io.BytesIO(flipped))]
        except tarfile.ReadError as error:
            told.append(str(error))
        else:
            assert members == sizes
    reasons = re.compile("wrong sum|for a number|has the size|cut short|goes on|between members")
    assert len(told) > 100 and all(map(reasons.search, told))


def test_what_follows_the_end_is_told() -> None:
    """The second of two joined tars is not left out in silence; padding of zeros of any length is none of that."""
    data = written(MEMBERS)
    with pytest.raises(tarfile.ReadError, match=rf"goes on at byte {len(data):,}, behind the end .*a file of its own"):
        names(io.BytesIO(data + data))
    assert names(io.BytesIO(data + bytes(777))) == [*MEMBERS]


def test_a_damaged_gzip_is_told() -> None:
    """A compressed tar is read to its end, where its sum is."""
    data = gzip.compress(written(MEMBERS))
    for cut in (len(data) - 1, len(data) - 8, len(data) // 2):
        with pytest.raises(EOFError):
            names(gzip.GzipFile(fileobj=io.BytesIO(data[:cut])))
    wrong = data[:-8] + bytes([data[-8] ^ 1]) + data[-7:]
    with pytest.raises(gzip.BadGzipFile, match="CRC"):
        names(gzip.GzipFile(fileobj=io.BytesIO(wrong)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"something else" * 100, "it is no tar"),
        (written({"k" * 300: b""}).replace(b"path=", b"path:"), "extended header at byte 0 is damaged at its byte 0"),
        (written({"k" * 300: b""})[:1024] + bytes(1024), "an extended header at byte 1,024 belongs to no member"),
    ],
)
def test_what_is_no_tar_is_told(data: bytes, message: str) -> None:
    with pytest.raises(tarfile.ReadError, match=message.replace("byte 1,024", "byte .*")):
        names(io.BytesIO(data))


def test_links_and_folders_have_no_content() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, kind in (("a/", tarfile.DIRTYPE), ("a/b", tarfile.SYMTYPE), ("a/c", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "x"
            archive.addfile(member)
    members = list(tar.members(io.BytesIO(buffer.getvalue())))
    assert [(member.is_file, member.read()) for member in members] == [(False, b"")] * 3
