"""Captioned data sets as they are found: tars of img2dataset, Parquet files of the Hub, and what is wrong with them."""

import contextlib
import gzip
import io
import json
import random
import re
import tarfile
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as pt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import runs
from support.captioned import texts, write_captioned, write_tar
from vcf_batch import storage
from vcf_batch.errors import RowError, UsageError
from vcf_batch.storage import tar as tar_reading
from vcf_batch.training import tar_samples
from vcf_batch.training.captions import CaptionedData, Piece, cut
from vcf_batch.training.tar_samples import CaptionedImage


def read(url: object, **columns: Any) -> list[CaptionedImage]:
    data = CaptionedData.open(str(url), **columns)
    pairs = list(data.read(data.files))
    assert len(pairs) == len(data)
    return pairs


# Pieces


@given(st.lists(st.integers(0, 7), max_size=6), st.integers(-3, 40), st.integers(-3, 40))
def test_cut_is_a_slice_of_the_sequence(lengths: list[int], start: int, stop: int) -> None:
    """Pairs start to stop of the pieces are those of the sequence that the pieces make up."""
    pieces = [Piece(str(number), 5, 5 + length) for number, length in enumerate(lengths)]

    def sequence(some: Iterable[Piece]) -> list[tuple[str, int]]:
        return [(piece.url, number) for piece in some for number in range(piece.start, piece.stop)]

    assert sequence(cut(pieces, max(start, 0), max(stop, 0))) == sequence(pieces)[max(start, 0) : max(stop, 0)]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_any_part_is_read_alone(kind: str, tmp_path: Path) -> None:
    data = CaptionedData.open(str(write_captioned(tmp_path, files=2, pairs=5, kind=kind)))
    whole = texts(data.read(data.files))
    assert whole == [f"{file}.{pair}" for file in range(2) for pair in range(5)]
    for start in range(11):
        for stop in range(start, 11):
            assert texts(data.read(cut(data.files, start, stop))) == whole[start:stop]


# Layouts


def test_img2dataset_tars(tmp_path: Path) -> None:
    """jpg, png and webp with txt, json or both; the index beside the tars and members of other kinds are left out."""
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000000.jpg": b"a", "000000000.json": '{"caption": "from json"}', "000000000.txt": "from txt\n",
            "000000001.json": '{"captions": ["one", " two "], "url": "x"}', "000000001.png": b"b",
            "000000002.webp": b"c", "000000002.txt": "three",
            "000000003.txt": "no image",
            "000000004.jpg": b"no caption",
            "./sub.dir/000000005.JPEG": b"d", "./sub.dir/000000005.txt": "in a folder", "./sub.dir/000000005.cls": "7",
            "000000006.jpg": b"e", "000000006.json": "not json",
        },
    )  # fmt: skip
    pq.write_table(pa.table({"key": ["000000000"], "caption": ["from json"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert [(pair.image, pair.captions) for pair in read(tmp_path)] == [
        (b"a", ("from txt",)),
        (b"b", ("one", "two")),
        (b"c", ("three",)),
        (b"d", ("in a folder",)),
        (b"e", ()),
    ]


def test_an_output_of_this_project_is_training_data(tmp_path: Path) -> None:
    row = json.dumps({"key": "000000000", "prompt": "a red star", "clip_score": 0.3})
    write_tar(tmp_path / "00000.tar", {"000000000.png": b"a", "000000000.txt": "a red star", "000000000.json": row})
    assert texts(read(tmp_path)) == ["a red star"]


def test_compressed_tars(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar.gz", {"0.jpg": b"a", "0.txt": "zero", "1.jpg": b"b", "1.txt": "one"}, "w:gz")
    assert texts(read(tmp_path)) == ["zero", "one"]


def test_a_stream_that_does_not_seek(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot seek is read from its beginning to its end."""

    class Stream(io.BytesIO):
        def seekable(self) -> bool:
            return False

        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation("seek")

    write_captioned(tmp_path, files=1)
    content = (tmp_path / "00000.tar").read_bytes()
    monkeypatch.setattr(storage, "open_read", lambda url: Stream(content))
    assert texts(read(tmp_path)) == ["0.0", "0.1", "0.2"]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2"])
@pytest.mark.parametrize("how", ["ranges", "streams", "chunked", "x-gzip", "gzip"])
def test_a_web_server_that_streams(how: str, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tars, packed or not, are read from servers without ranges, which fsspec says can seek and which cannot."""
    monkeypatch.setenv("no_proxy", "*")
    mode = "w" if suffix == "tar" else f"w:{suffix[4:]}"
    members: dict[str, bytes | str] = {f"{n}.{k}": f"{k} {n} " * 900 for n in range(4) for k in ("jpg", "txt")}
    content = write_tar(tmp_path / f"x.{suffix}", members, mode).read_bytes()
    handler = type("Handler", (Streaming,), {"how": how, "content": content})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        assert len(read(f"http://127.0.0.1:{site.server_port}/x.{suffix}")) == 4
        with storage.open_read(f"http://127.0.0.1:{site.server_port}/x.{suffix}") as file:
            if suffix == "tar":
                assert [member.name for member in tar_reading.members(file)] == list(members)
        site.shutdown()


class Streaming(BaseHTTPRequestHandler):
    """One file, sent as ``how`` says, whatever is asked for."""

    protocol_version = "HTTP/1.1"
    how: str
    content: bytes

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        body = gzip.compress(self.content) if self.how == "gzip" else self.content
        self.send_response(200)
        if "gzip" in self.how:
            self.send_header("Content-Encoding", self.how)
        if self.how == "streams":
            self.send_header("Accept-Ranges", "none")
        if self.how == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:700], body[700:]) if part)
            body += b"0\r\n\r\n"
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(OSError):
                self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


IMAGES = [{"bytes": b"a", "path": "a.jpg"}, {"bytes": b"b", "path": None}]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"image": IMAGES, "caption": [["one", "two"], ["three"]], "url": ["x", "y"]}, [("one", "two"), ("three",)]),
        ({"image": IMAGES, "text": ["one", "two"]}, [("one",), ("two",)]),
        ({"jpg": [b"a", b"b"], "sentences": [[{"raw": "one", "sentid": 1}], []]}, [("one",), ()]),
        ({"image": IMAGES, "caption_0": ["one", "a"], "caption_1": ["two", "b"]}, [("one", "two"), ("a", "b")]),
        ({"image": IMAGES, "captions": ["one", None]}, [("one",), ()]),
    ],
)
def test_parquet_layouts_of_the_hub(columns: dict[str, Any], expected: list[tuple[str, ...]], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "data" / "train-00000-of-00001.parquet")
    pairs = read(tmp_path)
    assert [pair.captions for pair in pairs] == expected
    assert [pair.image for pair in pairs] == [b"a", b"b"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    table = pa.table({"thumbnail": [b"t"], "photo": [b"p"], "caption": ["short"], "alt": ["long"]})
    pq.write_table(table, tmp_path / "x.parquet")
    (pair,) = read(tmp_path / "x.parquet", image_column="photo", caption_column="alt")
    assert (pair.image, pair.captions) == (b"p", ("long",))


def test_files_by_pattern(tmp_path: Path) -> None:
    """One split of a data set is named by a pattern, since a folder holds all of them."""
    for split in ("train", "validation"):
        table = pa.table({"image": IMAGES[:1], "caption": [split]})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    assert texts(read(tmp_path / "train-*.parquet")) == ["train"]
    assert texts(read(tmp_path)) == ["train", "validation"]


def test_data_at_a_url() -> None:
    with fsspec.open("memory://captions/00000.tar", "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("0.jpg", "0.txt"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    assert texts(read("memory://captions")) == ["abc"]
    assert texts(read("memory://captions/*.tar")) == ["abc"]


def test_identity_changes_with_the_data(tmp_path: Path) -> None:
    one = CaptionedData.open(str(write_captioned(tmp_path / "one")))
    assert CaptionedData.open(str(write_captioned(tmp_path / "two"))).identity == one.identity
    assert CaptionedData.open(str(write_captioned(tmp_path / "three", pairs=4))).identity != one.identity


# What is wrong


def refusal(url: object, **columns: Any) -> str:
    with pytest.raises(UsageError) as caught:
        read(url, **columns)
    return str(caught.value)


def test_what_is_no_captioned_data_is_refused(tmp_path: Path) -> None:
    for name in ("nowhere", "nowhere.tar"):
        assert f"{name}: there is no such file or folder; training data are" in refusal(tmp_path / name)
    write_tar(tmp_path / "a" / "0.tar", {"0.txt": "no image"})
    assert "holds no image with a caption; training data are" in refusal(tmp_path / "a")
    pq.write_table(pa.table({"prompt": ["x"], "id": [1]}), tmp_path / "x.parquet")
    assert "no column of images; name it with --image-column. Its columns: prompt, id" in refusal(
        tmp_path / "x.parquet"
    )
    pq.write_table(pa.table({"image": [b"x"], "id": [1]}), tmp_path / "x.parquet")
    assert "no column of captions; name it with --caption-column" in refusal(tmp_path / "x.parquet")
    assert "no column of captions named 'alt'" in refusal(tmp_path / "x.parquet", caption_column="alt")


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "x.parquet"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table({"image": [runs.png(0)], "caption": ["x"]}), tmp_path / name)
    else:
        mode = "w" if name.endswith("tar") else f"w:{name[6:]}"
        write_tar(tmp_path / name, {"0.jpg": runs.png(0), "0.txt": "x"}, mode)
        assert texts(read(tmp_path)) == ["x"]
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 3])
    assert f"{name} cannot be read" in refusal(tmp_path)
    (tmp_path / name).write_bytes(b"something else" * 100)
    assert f"{name} cannot be read" in refusal(tmp_path)


def all_or_told(path: Path, whole: list[str]) -> bool:
    """Whether a tar is refused by name; if it is not, it gives all its pairs, or tells what it leaves out."""
    try:
        data = CaptionedData.open(str(path))
        captions = [pair.captions[0] if pair.captions else pair.problem for pair in data.read(data.files)]
    except UsageError as error:
        return path.name in str(error)
    assert len(captions) == len(whole) or data.remarks
    return False


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_a_damaged_tar_is_never_read_as_a_shorter_one(suffix: str, tmp_path: Path) -> None:
    """Cut at any border of blocks or elsewhere, or with any bit flipped: all pairs are there, or the damage is told."""
    path, rng = tmp_path / f"x{suffix}", random.Random(0)
    members = {f"{n}.{kind}": f"{kind} {n}" for n in range(8) for kind in ("jpg", "txt")}
    content = write_tar(path, members, "w:gz" if suffix.endswith("gz") else "w").read_bytes()
    whole = texts(read(path))
    end = 33 * 512 + 512 if suffix == ".tar" else len(content)
    for cut_at in (*range(0, end, 512), *(rng.randrange(end) for _ in range(100))):
        path.write_bytes(content[:cut_at])
        assert all_or_told(path, whole), cut_at
    told = 0
    for bit in (rng.randrange(8 * len(content)) for _ in range(200)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        told += all_or_told(path, whole)
    assert told > 50


def test_all_damaged_files_are_named_before_the_training(tmp_path: Path) -> None:
    """One list of them, so that a corpus is mended once; what two joined tars hold is not halved in silence."""
    for name in ("0", "1", "2", "3", "4"):
        write_tar(tmp_path / f"{name}.tar", {"0.jpg": b"a", "0.txt": "x"})
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole + whole)
    (tmp_path / "3.tar").write_bytes(whole[:1024])
    told = refusal(tmp_path)
    assert re.search(r"1\.tar cannot be read: it goes on at byte 10,240, behind the end .*a file of its own", told)
    assert "3.tar cannot be read: it ends at byte 1,024, where a header or the end" in told
    assert told.startswith("2 of 5 files cannot be used, among them\n")


def test_a_file_that_loses_pairs_during_a_training_ends_it(tmp_path: Path) -> None:
    """What was counted is there when it is read, or the file is named."""
    for kind in ("tar", "parquet"):
        folder = write_captioned(tmp_path / kind, files=1, pairs=6, kind=kind)
        data = CaptionedData.open(str(folder))
        write_captioned(folder, files=1, pairs=4, kind=kind)
        with pytest.raises(UsageError, match=rf"00000.{kind} has 4 pairs, and had 6 or more .*: it has changed"):
            list(data.read(data.files))


# Odd members


def test_odd_members_leave_out_their_pair_alone(tmp_path: Path) -> None:
    """Each unusable caption is a pair with the reason; the others are read as they are."""
    members: dict[str, bytes | str] = {
        "surrogate.json": '{"caption": "half a \\ud83d"}',
        "nested.json": '{"caption": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "deep.json": '{"caption": ' + "[" * 900 + '"x"' + "]" * 900 + "}",
        "list.json": "[1]",
        "broken.json": "{",
        "empty.txt": " \n",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "utf16.txt": "no mark".encode("utf-16-le"),
        "large.txt": b"x" * (tar_samples.MAX_CAPTION_BYTES + 1),
        "long.txt": "x" * 100_001,
        "good.txt": "good",
    }
    paired = {name: content for text, body in members.items() for name, content in ((text, body), (jpg(text), b"a"))}
    found = {pair.name.rpartition(" ")[2]: pair for pair in read(write_tar(tmp_path / "x.tar", paired))}
    assert found["good"].captions == ("good",) and not found["good"].problem
    assert len(found) == len(members)
    reasons = {
        "surrogate": "half of a surrogate pair", "nested": "nested too deeply", "list": "no object",
        "broken": "no JSON", "empty": "is empty", "latin": "not utf-8 at byte 3; write texts as UTF-8",
        "utf16": "not UTF-8 text at byte 1", "long": "100,001 bytes, more than 100,000",
        "large": "16,777,217 bytes, more than",
    }  # fmt: skip
    for key, reason in reasons.items():
        assert not found[key].captions and reason in found[key].problem, key


def jpg(name: str) -> str:
    return name.partition(".")[0] + ".jpg"


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", pytest.param("utf-16-be", id="utf-16-be with a mark")]
)
def test_encodings_are_detected(encoding: str, tmp_path: Path) -> None:
    """A byte order mark tells the encoding, and is no part of the caption; JSON may have any of them too."""
    text = "ein süßer Stern ★"
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    record = json.dumps({"caption": text}, ensure_ascii=False)
    members: dict[str, bytes | str] = {"0.jpg": b"a", "0.txt": (mark + text).encode(encoding)}
    members |= {"1.jpg": b"b", "1.json": (mark + record).encode(encoding)}
    assert texts(read(write_tar(tmp_path / "x.tar", members))) == [text, text]


def test_a_text_without_caption_leaves_it_to_the_json(tmp_path: Path) -> None:
    """An empty or unreadable KEY.txt does not beat a good KEY.json, nor an empty field the next one."""
    members: dict[str, bytes | str] = {
        "0.jpg": b"a", "0.txt": "", "0.json": '{"caption": "from json"}',
        "1.jpg": b"a", "1.txt": b"\xff", "1.json": '{"caption": null, "text": "from the next field"}',
    }  # fmt: skip
    assert texts(read(write_tar(tmp_path / "x.tar", members))) == ["from json", "from the next field"]


def test_a_name_that_is_no_text_can_be_told(tmp_path: Path) -> None:
    """The name of a member or a file may be any bytes: it can be printed, and begin a random generator."""
    write_tar(tmp_path / "x.tar", {"\udcff.jpg": b"a", "\udcff.txt": "x"})
    pq.write_table(pa.table({"image": [b"a"], "caption": ["x"]}), buffer := io.BytesIO())
    (tmp_path / "\udcff.parquet").write_bytes(buffer.getvalue())
    for file in ("x.tar", "\udcff.parquet"):
        (pair,) = read(tmp_path / file)
        assert pair.name.encode() and pair.captions == ("x",)


def test_what_is_left_out_of_tars_is_counted_and_named(tmp_path: Path) -> None:
    """Images without text, texts without image, keys that occur twice; a repeated member replaces no other."""
    names = ["0.jpg", "0.txt", "1.jpg", "2.txt", "0.jpg", "0.txt", "0.jpg", "0.txt"]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(str(number).encode()))
    data = CaptionedData.open(str(tmp_path))
    assert texts(data.read(data.files)) == ["1", "5", "7"]
    lines = [re.sub(r" in \S*x.tar$", "", remark) for remark in data.remarks]
    assert lines == [
        "left out: 1 image without KEY.txt or KEY.json beside it; the first is 1",
        "left out: 1 text without an image beside it; the first is 2",
        "2 pairs with a key that occurs before in its tar; each occurrence is used; the first is 0",
    ]


def test_members_that_are_not_read_are_counted_and_named(tmp_path: Path) -> None:
    """A key ends at the first dot, as in WebDataset, so a.v1.png is of the kind v1.png; hidden files are nobody's."""
    members: dict[str, bytes | str] = {"x/\udcff.v1.png": b"a", "x/\udcff.v1.txt": "a", "._c.jpg": b"", "README": "r"}
    data = CaptionedData.open(str(write_tar(tmp_path / "x.tar", members | {"d.jpg": b"d", "d.txt": "d"})))
    (told,) = data.remarks
    assert told.startswith("left out: 3 members of a kind that is not read: KEY is what stands before the first dot")
    assert re.search(r"; the first is x/\\udcff.v1.png in \S*x.tar$", told)
    told = refusal(write_tar(tmp_path / "y.tar", {"a.v1.png": b"a", "a.v1.txt": "a"}))
    assert "holds no image with a caption" in told and "2 members of a kind" in told and "a.v1.png" in told


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_counted_and_named_with_the_remedy(kind: bytes, tmp_path: Path) -> None:
    """A link has no content of its own: its pair is told, and so is how to pack the file itself."""
    write_tar(tmp_path / "x.tar", {"a.jpg": b"a", "a.txt": "a"})
    with tarfile.open(tmp_path / "x.tar", "a") as tar:
        for name in ("b.jpg", "b.txt"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a" + name[1:]
            tar.addfile(link)
    data = CaptionedData.open(str(tmp_path / "x.tar"))
    assert len(data) == 1
    (told,) = data.remarks
    assert told.startswith("left out: 2 links in the place of a file; ") and "--hard-dereference" in told
    assert re.search(r"; the first is b.jpg in \S*x.tar$", told)


def test_tars_sorted_by_type_are_told_so(tmp_path: Path) -> None:
    """All images first and then all texts is no sample at all; the remedy is named."""
    write_tar(tmp_path / "x.tar", {f"{n}.{kind}": "x" for kind in ("jpg", "txt") for n in range(3)})
    told = refusal(tmp_path)
    assert "holds no image with a caption" in told
    assert "3 have their image and their text in different places of the tar" in told and "--sort=name" in told


def test_odd_rows_of_parquet_are_left_out_alone(tmp_path: Path) -> None:
    """A text that is no UTF-8, an image that is named and not there, none at all: the row is told, and no other."""
    texts_ = pa.array([b"good", b"\xff\xfe", b"named", b"none"], pa.binary()).view(pa.string())
    images = [{"bytes": b"a", "path": "a.jpg"}, {"bytes": b"b", "path": None}, {"bytes": None, "path": "c.jpg"}, None]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array(images, kind), "caption": texts_}), tmp_path / "x.parquet")
    good, *odd = read(tmp_path)
    assert good.captions == ("good",) and not good.problem
    assert [pair.name.rpartition("/")[2] for pair in odd] == [f"x.parquet row {row}" for row in (1, 2, 3)]
    for pair, reason in zip(odd, ("cannot be read", "its image 'c.jpg' is not in ", "no image"), strict=True):
        with pytest.raises(RowError, match=reason):
            pair.read()


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.string()), pa.large_list(pa.large_string()), pa.list_(pa.string(), 2), pa.list_view(pa.string()),
        pa.large_list_view(pa.string_view()), pa.list_(pa.dictionary(pa.int32(), pa.string())),
        pa.list_view(pa.struct({"raw": pa.string()})),
    ],
    ids=str,
)  # fmt: skip
def test_lists_of_texts_may_be_of_any_kind(kind: pa.DataType, tmp_path: Path) -> None:
    """Every list of Arrow; a hash beside the image, of bytes of one length, is no image."""
    pairs = [("one", "two"), ("three", "four")]
    structs = pt.is_struct(kind.value_type)
    column = pa.array([[{"raw": text} if structs else text for text in pair] for pair in pairs], kind)
    hashes = pa.array([b"0" * 16] * 2, pa.binary(16))
    pq.write_table(pa.table({"hash": hashes, "image": [b"a", b"b"], "captions": column}), tmp_path / "x.parquet")
    assert [(pair.image, pair.captions) for pair in read(tmp_path)] == list(zip((b"a", b"b"), pairs, strict=True))


@pytest.mark.parametrize("option", ["image_column", "caption_column"])
def test_a_column_of_another_type_is_refused(option: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "caption": ["x"], "id": [1]}), tmp_path / "x.parquet")
    told = refusal(tmp_path, **{option: "id"})
    assert re.search(
        rf"the column 'id' is int64, which holds no .*; name another with --{option.replace('_', '-')}", told
    )


def test_identity_covers_contents(tmp_path: Path) -> None:
    """Files of equal names, sizes and numbers of pairs but other contents are other data: a resume is refused."""
    ids = set()
    for folder, text in (("a/x", "abc"), ("b/y", "abd"), ("c/z", "abc")):
        write_tar(tmp_path / folder / "0.tar", {"0.jpg": b"image", "0.txt": text})
        ids.add(CaptionedData.open(str(tmp_path / folder)).identity)
    assert len(ids) == 2
    for kind in (b"one", b"two"):
        pq.write_table(pa.table({"image": [kind], "caption": ["x"]}), tmp_path / "0.parquet", compression="none")
        ids.add(CaptionedData.open(str(tmp_path / "0.parquet")).identity)
    assert len(ids) == 4


def test_identity_of_objects_is_their_etag(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects whose storage names their contents are not read for it."""
    ids = set()
    monkeypatch.setattr(storage, "digest", lambda url: pytest.fail(f"{url} was hashed"))
    for text in ("abc", "abd", "abc"):
        storage.upload(str(write_tar(tmp_path / "0.tar", {"0.jpg": b"image", "0.txt": text})), f"{s3}/ids/0.tar")
        ids.add(CaptionedData.open(f"{s3}/ids").identity)
    assert len(ids) == 2
