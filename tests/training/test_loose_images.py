"""Captioned images that are files of their own: tables of paths, COCO's captions, folders of images and texts."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vcf_batch.errors import RowError, StorageError, UsageError
from vcf_batch.training import loose_images
from vcf_batch.training.captions import CaptionedData, cut


def write(folder: Path, *files: str) -> Path:
    """Files whose contents are their own names."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(file)
    return folder


def table(path: Path, records: list[dict[str, Any]]) -> Path:
    """The records in the form that the ending of the path tells."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    elif path.suffix in (".csv", ".tsv"):
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, [*records[0]], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(url: object, **columns: Any) -> list[tuple[str, tuple[str, ...]]]:
    """The content of each pair's image, and its captions."""
    data = CaptionedData.open(str(url), **columns)
    pairs = list(data.read(data.files))
    assert len(pairs) == len(data)
    return [(pair.read().decode(), pair.captions) for pair in pairs]


RECORDS = [{"file_name": "a/0.jpg", "text": "zero"}, {"file_name": "1.jpg", "text": "one, and a comma"}]
PAIRS = [("a/0.jpg", ("zero",)), ("1.jpg", ("one, and a comma",))]


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_an_image_folder_with_metadata(name: str, tmp_path: Path) -> None:
    """Named by the folder, with a table in each of its splits; paths start at the folder of their table."""
    for split in ("test", "train"):
        table(write(tmp_path, f"{split}/a/0.jpg", f"{split}/1.jpg") / split / name, RECORDS)
    expected = [(f"{split}/{file}", captions) for split in ("test", "train") for file, captions in PAIRS]
    assert read(tmp_path) == expected
    assert read(tmp_path / "train") == expected[2:]
    assert read(tmp_path / "train" / name) == expected[2:]


@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "csv", "tsv", "json", "parquet"])
@pytest.mark.parametrize(
    "names", [("file_name", "text"), ("image", "caption"), ("IMAGE_PATH", "TEXT"), ("path", "Prompt")]
)
def test_a_table_of_paths(ending: str, names: tuple[str, str], tmp_path: Path) -> None:
    """Every form of table, with names of columns as people write them, in capitals too."""
    renamed = [dict(zip(names, record.values(), strict=True)) for record in RECORDS]
    path = table(write(tmp_path, "a/0.jpg", "1.jpg") / f"pairs.{ending}", renamed)
    assert read(path) == PAIRS
    assert read(tmp_path / f"p*.{ending}") == PAIRS


def test_captions_of_coco(tmp_path: Path) -> None:
    """The annotations lie in another folder than the images, which --image-folder names; each image has its own."""
    write(tmp_path, "train/0.jpg", "train/1.jpg", "train/2.jpg")
    document = {
        "info": {},
        "images": [{"id": 7, "file_name": "0.jpg"}, {"id": 3, "file_name": "1.jpg"}, {"id": 9, "file_name": "2.jpg"}],
        "annotations": [{"image_id": 3, "id": 1, "caption": "one"}, {"image_id": 7, "id": 2, "caption": "zero"},
                        {"image_id": 3, "id": 4, "caption": "uno"}],
    }  # fmt: skip
    path = write(tmp_path, "annotations/x") / "annotations" / "captions_train.json"
    path.write_text(json.dumps(document))
    data = CaptionedData.open(str(path), image_folder=str(tmp_path / "train"))
    *pairs, without = data.read(data.files)
    found = [(pair.read(), pair.captions) for pair in pairs]
    assert found == [(b"train/0.jpg", ("zero",)), (b"train/1.jpg", ("one", "uno"))]
    assert "has no caption" in without.problem
    document["annotations"] = [{"image_id": 3, "bbox": []}]
    path.write_text(json.dumps(document))
    with pytest.raises(UsageError, match=r"has no annotations with a caption; of COCO, captions_\*\.json has them"):
        read(path)


def test_images_with_a_text_beside_each(tmp_path: Path) -> None:
    """As trainers of LoRAs take them: a key ends at the last dot; images and texts alone are told."""
    write(tmp_path, "a/0.v1.jpg", "a/0.v1.txt", "1.PNG", "1.txt", "2.webp", "2.json", "lonely.jpg", "left.txt", "b.gif")
    (tmp_path / "2.json").write_text('{"caption": "two", "looks": "as ink"}')
    write(tmp_path, ".cache/3.jpg", ".cache/3.txt")
    expected = [("1.PNG", ("1.txt",)), ("2.webp", ("two",)), ("a/0.v1.jpg", ("a/0.v1.txt",))]
    assert read(tmp_path) == expected
    data = CaptionedData.open(str(tmp_path))
    assert [line.partition("; the first")[0] for line in data.remarks] == [
        "left out: 1 image without KEY.txt or KEY.json beside it", "left out: 1 text without an image beside it",
    ]  # fmt: skip
    for start in range(4):
        for stop in range(start, 4):
            some = [(pair.read().decode(), pair.captions) for pair in data.read(cut(data.files, start, stop))]
            assert some == expected[start:stop]
    assert CaptionedData.open(str(tmp_path)).identity == data.identity
    write(tmp_path, "4.jpg", "4.txt")
    assert CaptionedData.open(str(tmp_path)).identity != data.identity
    for name in ("4.txt", "1.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(UsageError, match="it has changed"):
        list(data.read(data.files))


def test_images_that_parquet_files_name(tmp_path: Path) -> None:
    """As datasets writes images that it does not embed: a struct without bytes, whether it has their type or not."""
    write(tmp_path, "0.jpg", "1.jpg")
    structs = [{"bytes": None, "path": "0.jpg"}, {"bytes": None, "path": "1.jpg"}]
    typed = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for images in (pa.array(structs), pa.array(structs, typed), pa.array(["0.jpg", "1.jpg"]).dictionary_encode()):
        pq.write_table(pa.table({"image": images, "caption": ["zero", "one"]}), tmp_path / "x.parquet")
        assert read(tmp_path / "x.parquet") == [("0.jpg", ("zero",)), ("1.jpg", ("one",))]
    mixed = pa.array([{"bytes": b"own", "path": "0.jpg"}, structs[1]], typed)
    pq.write_table(pa.table({"image": mixed, "TEXT": ["zero", "one"]}), tmp_path / "x.parquet")
    assert read(tmp_path / "x.parquet") == [("own", ("zero",)), ("1.jpg", ("one",))]


def test_a_column_of_captions_that_describe_looks(tmp_path: Path) -> None:
    """--caption-column names a column of a table or a field of JSON, and no other caption stands in for it."""
    write(tmp_path, "p/0.jpg", "p/0.txt", "p/1.jpg", "p/1.txt")
    (tmp_path / "p" / "0.json").write_text('{"caption": "a star", "looks": "blue, as ink"}')
    data = CaptionedData.open(str(tmp_path / "p"), caption_column="looks")
    first, second = data.read(data.files)
    assert first.captions == ("blue, as ink",)
    assert not second.captions and "there is no KEY.json with the field 'looks'" in second.problem
    path = table(tmp_path / "p" / "x.jsonl", [{"image": "0.jpg", "text": "a star", "looks": "blue"}])
    assert read(path, caption_column="looks") == [("p/0.jpg", ("blue",))]


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("../out.jpg", "lies outside"),
        ("link.jpg", "lies outside"),
        ("missing.jpg", "is not in .*name the folder that holds all of them with --image-folder"),
        ("folder", "is a folder, pipe or device"),
        ("https://example.com/0.jpg", "is at a web address: download the images first, as img2dataset does"),
        ("", "has no image in a column of a path"),
    ],
)
def test_a_path_leads_nowhere_else(path: str, reason: str, tmp_path: Path) -> None:
    """What a data set names is read from its folder alone, whatever links and dots lead to; else the pair is told."""
    write(tmp_path, "out.jpg", "in/0.jpg", "in/folder/x")
    os.symlink(tmp_path / "out.jpg", tmp_path / "in" / "link.jpg")
    data = CaptionedData.open(str(table(tmp_path / "in" / "x.jsonl", [{"image": path, "text": "x"}])))
    (pair,) = data.read(data.files)
    with pytest.raises(RowError, match=reason):
        pair.read()


def test_absolute_paths_lie_in_the_named_folder(tmp_path: Path) -> None:
    """An absolute path is read where --image-folder holds it; a folder that is not there is no fault of the pair."""
    write(tmp_path, "images/0.jpg")
    path = table(tmp_path / "x.csv", [{"image": str(tmp_path / "images" / "0.jpg"), "text": "zero"}])
    assert read(path, image_folder=str(tmp_path / "images")) == [("images/0.jpg", ("zero",))]
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="which holds the images, is not there on this machine"):
        read(path, image_folder=str(tmp_path / "images"))


def test_images_in_a_bucket() -> None:
    for name in ("0.jpg", "0.txt"):
        with fsspec.open(f"memory://loose/{name}", "w") as file:
            file.write(name)
    assert read("memory://loose") == [("0.jpg", ("0.txt",))]
    with fsspec.open("memory://loose/metadata.jsonl", "w") as file:
        file.write('{"file_name": "0.jpg", "text": "zero"}')
    assert read("memory://loose") == [("0.jpg", ("zero",))]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", b"{", "line 1 is no JSON"),
        ("x.jsonl", b'{"image": "0.jpg", "text": "x"}\n[1]', "line 2 is no object"),
        ("x.json", b"{", "is no JSON"),
        ("x.json", b'{"a": 1}', "is neither a list of objects with a path and a caption, nor COCO's captions"),
        ("x.json", b"[" * 100_000, "is no JSON"),
        ("x.csv", b"image,text\n\xff,x\n", "is not UTF-8"),
        ("x.jsonl", b"", "holds no image with a caption"),
    ],
)
def test_a_damaged_table_is_refused(name: str, content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        read(tmp_path / name)


def test_known_names_of_columns() -> None:
    """What a record calls its image, and which of several captions is used, does not depend on its order."""
    columns = loose_images.Columns()
    record = {"url": "https://x/0.jpg", "text": "second", "path": "1.jpg", "Image": "0.jpg", "caption": "first"}
    pair = columns.pair(record, "here", "/data/x.jsonl")
    assert (pair.path, pair.folder, pair.captions) == ("0.jpg", "/data", ("first",))
