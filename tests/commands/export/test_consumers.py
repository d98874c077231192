"""What reads datasets reads an export: each form is loaded by its own reader, with the images that were handed on."""

import importlib
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from PIL import Image

from support import exports, runs

FORMS = ("webdataset", "parquet", "energon")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export in each form, of 20 rows with triplets, in several shards."""
    folder = tmp_path_factory.mktemp("made")
    runs.write_output(runs.write_manifest(folder / "in", 20), folder / "out", 20, failed={2}, triplets=True)
    given: dict[str, Any] = {"images": ("content", "style"), "shard_bytes": 50_000, "split": "train=0.7,val=0.3"}
    for form in FORMS:
        exports.make(folder / form, folder / "out", format=form, **given)
    return folder


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    module = importlib.import_module("datasets")
    monkeypatch.setattr(module.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return module


def pixels(data: bytes | Image.Image) -> bytes:
    return (Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data).convert("RGB").tobytes()


def said(made: Path, split: str) -> dict[str, bytes]:
    """Pixels of the images of a split, by key."""
    pictures = exports.images(made / "out")
    return {row["key"]: pixels(pictures[f"{row['key']}.png"]) for row in exports.rows(made / "parquet", split)}


def test_webdataset_reads_it(made: Path) -> None:
    for split in ("train", "val"):
        tars = sorted(map(str, (made / "webdataset" / split).glob("*.tar")))
        samples = [*wds.WebDataset(tars, shardshuffle=False).decode("pil")]
        assert {sample["__key__"]: pixels(sample["png"]) for sample in samples} == said(made, split)
        for sample in samples:
            assert sample["json"]["key"] == sample["__key__"] and sample["txt"] == sample["json"]["prompt"]
            assert sample["content.png"].size == sample["style.png"].size == (32, 32)


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_datasets_reads_it(made: Path, tmp_path: Path, datasets: ModuleType, form: str) -> None:
    """With its splits and types, in full and streaming; columns of images are images."""
    loaded = datasets.load_dataset(str(made / form), cache_dir=str(tmp_path))
    assert {*loaded} == {"train", "val"}
    image, key = ("image", "key") if form == "parquet" else ("png", "__key__")
    for split in loaded:
        assert {row[key]: pixels(row[image]) for row in loaded[split]} == said(made, split)
    features = loaded["train"].features
    images = ("image", "content", "style") if form == "parquet" else ("png", "content.png", "style.png")
    assert all(isinstance(features[name], datasets.Image) for name in images)
    row = loaded["train"][0] if form == "parquet" else loaded["train"][0]["json"]
    assert row["lpips"] is None and row["pno_objective"].keys() == {"first", "best", "steps", "stopped"}
    streamed = datasets.load_dataset(str(made / form), split="val", streaming=True, cache_dir=str(tmp_path))
    assert [row[key] for row in streamed] == [row["key"] for row in exports.rows(made / "parquet", "val")]


def test_tables_read_it(made: Path) -> None:
    """pyarrow and DuckDB, by a pattern: every row of all splits, whatever the form."""
    for form in FORMS:
        found = duckdb.sql(f"SELECT count(*), count(DISTINCT sha256) FROM '{made / form}/*/*.parquet'")
        assert found and found.fetchall() == [(19, 19)]
    schema = pq.read_schema(made / "parquet/train/00000.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {name: {"_type": "Image"} for name in ("image", "content", "style")}


def test_croissant_describes_the_columns(made: Path) -> None:
    """Every column but those of objects has a field, and names of files and fields fit one another."""
    for form in FORMS:
        told = json.loads((made / form / "croissant.json").read_text())
        assert told["@type"] == "sc:Dataset" and told["conformsTo"] == "http://mlcommons.org/croissant/1.0"
        sets = {each["@id"]: each["includes"] for each in told["distribution"]}
        assert sets["rows"] == ["train/*.parquet", "val/*.parquet"]
        (records,) = told["recordSet"]
        names = [field["name"] for field in records["field"]]
        schema = pq.read_schema(made / form / "train/00000.parquet")
        assert {*schema.names} - {*names} == {"pno_objective", "attempts"} and names[0] == "split"
        assert all(field["source"]["fileSet"]["@id"] in sets for field in records["field"])


def test_croissant_has_one_field_of_a_name(tmp_path: Path) -> None:
    """The split of the export is there, rather than a column of that name that the manifest carries."""
    runs.write_output(runs.write_manifest(tmp_path / "in", 3, {"split": ["old"] * 3}), tmp_path / "out", 3)
    exports.make(tmp_path / "t", tmp_path / "out", split="train=1")
    told = json.loads((tmp_path / "t/croissant.json").read_text())
    (field,) = [each for each in told["recordSet"][0]["field"] if each["name"] == "split"]
    assert "transform" in field["source"]


@pytest.mark.slow
def test_mlcroissant_reads_it(made: Path) -> None:
    """MLCommons' own library finds no error, and gives every row with its images."""
    mlcroissant = pytest.importorskip("mlcroissant")
    for form in FORMS:
        dataset = mlcroissant.Dataset(jsonld=str(made / form / "croissant.json"))
        assert not dataset.metadata.ctx.issues.errors
        records = [*dataset.records("samples")]
        keys = {record["samples/key"].decode(): record["samples/split"].decode() for record in records}
        assert keys == {key: split for split in ("train", "val") for key in said(made, split)}
        if form == "parquet":
            pictures = said(made, "train") | said(made, "val")
            assert all(pixels(each["samples/image"]) == pictures[each["samples/key"].decode()] for each in records)


@pytest.mark.slow
def test_energon_reads_it(made: Path) -> None:
    """Megatron-Energon needs no preparation: splits, captions and images are there."""
    energon: Any = pytest.importorskip("megatron.energon")
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    prompts = {row["key"]: row["prompt"] for row in exports.rows(made / "energon")}
    for split in ("train", "val"):
        dataset = energon.get_val_dataset(str(made / "energon"), split_part=split, worker_config=workers, batch_size=1)
        found = [(each.__key__[0].split("/")[-1], each.caption[0], each.image) for each in energon.get_loader(dataset)]
        assert {key for key, _, _ in found} == {*said(made, split)} and len(found) == len(said(made, split))
        for key, caption, image in found:
            assert caption == prompts[key]
            data = (image[0].permute(1, 2, 0) * 255).round().byte().numpy().tobytes()
            assert data == said(made, split)[key]
