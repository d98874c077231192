"""Captioned data sets as they are found: tars of img2dataset, Parquet files of the Hub, and what is wrong with them."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import runs
from support.captioned import texts, write_captioned, write_tar
from vcf_batch import storage
from vcf_batch.errors import UsageError
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
        assert f"{name}: there is no such file or folder; training data is" in refusal(tmp_path / name)
    write_tar(tmp_path / "a" / "0.tar", {"0.txt": "no image"})
    assert "holds no image with a caption; training data is" in refusal(tmp_path / "a")
    pq.write_table(pa.table({"prompt": ["x"], "id": [1]}), tmp_path / "x.parquet")
    assert "no column of images; name it with --image-column. Its columns: prompt, id" in refusal(
        tmp_path / "x.parquet"
    )
    pq.write_table(pa.table({"image": [b"x"], "id": [1]}), tmp_path / "x.parquet")
    assert "no column of captions; name it with --caption-column" in refusal(tmp_path / "x.parquet")
    assert "no column of captions named 'alt'" in refusal(tmp_path / "x.parquet", caption_column="alt")


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.parquet"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pq.write_table(pa.table({"image": [runs.png(0)], "caption": ["x"]}), tmp_path / name)
    else:
        write_tar(tmp_path / name, {"0.jpg": runs.png(0), "0.txt": "x"}, "w:gz" if name.endswith("gz") else "w")
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) // 3])
    assert f"{name} cannot be read" in refusal(tmp_path)
    (tmp_path / name).write_bytes(b"something else" * 100)
    assert f"{name} cannot be read" in refusal(tmp_path)
