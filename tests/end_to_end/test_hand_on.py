"""After a run, from the output to what a training reads: scored, calibrated, deduplicated, split, exported, loaded."""

import importlib
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset as wds
from click.testing import CliRunner, Result
from PIL import Image

from support import exports, runs, scored_here, scorers
from vcf_batch.cli import main
from vcf_batch.pool import scoring

DEMO = Path(__file__).parent.parent.parent / "manifests" / "demo.parquet"
ROWS, AGAIN = 16, (3, 9)
"""Rows of the demo, and those of them that the manifest has a second time."""
SPLITS = ("train", "val")

Pixels = dict[str, bytes]
"""Pixels of images, by key."""


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, restored_torch: None) -> Path:
    """The demo's output with two rows twice, scored, calibrated and searched for duplicates."""
    folder = tmp_path_factory.mktemp("demo")
    shutil.copytree(DEMO.parent / "references", folder / "references")
    table = pq.read_table(DEMO).slice(0, ROWS)
    rows = [row | {"seed": number} for number, row in enumerate(table.to_pylist())]
    rows += [rows[number] | {"sample_id": f"again-{number}"} for number in AGAIN]
    pq.write_table(pa.Table.from_pylist(rows, table.schema), folder / "manifest.parquet")
    runs.generate(folder / "manifest.parquet", folder / "out", Path("tiny"), steps=2, shard_size=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", scored_here.score)
        result = call("score", folder / "out", "--with", "texture", "--with", "duplicates", "--calibrate")
    assert result.exit_code == 0, result.output
    return folder / "out"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def pixels(data: bytes | Image.Image) -> bytes:
    return (Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data).convert("RGB").tobytes()


def by_webdataset(target: Path, split: str, cache: Path) -> Pixels:
    tars = sorted(map(str, (target / split).glob("*.tar")))
    samples = wds.WebDataset(tars, shardshuffle=False).decode("pil")
    return {sample["__key__"]: pixels(sample["png"]) for sample in samples}


def by_pyarrow(target: Path, split: str, cache: Path) -> Pixels:
    table = pa.concat_tables(pq.read_table(path) for path in sorted((target / split).glob("*.parquet")))
    return {row["key"]: pixels(row["image"]["bytes"]) for row in table.to_pylist()}


def by_datasets(target: Path, split: str, cache: Path) -> Pixels:
    datasets = importlib.import_module("datasets")
    loaded = datasets.load_dataset(str(target), split=split, cache_dir=str(cache))
    return {row["key"]: pixels(row["image"]) for row in loaded}


def by_mlcroissant(target: Path, split: str, cache: Path) -> Pixels:
    dataset = pytest.importorskip("mlcroissant").Dataset(jsonld=str(target / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    records = [each for each in dataset.records("samples") if each["samples/split"] == split.encode()]
    return {each["samples/key"].decode(): pixels(each["samples/image"]) for each in records}


def by_energon(target: Path, split: str, cache: Path) -> Pixels:
    energon: Any = pytest.importorskip("megatron.energon")
    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=0)
    dataset = energon.get_val_dataset(str(target), split_part=split, worker_config=workers, batch_size=1)
    return {
        each.__key__[0].split("/")[-1]: (each.image[0].permute(1, 2, 0) * 255).round().byte().numpy().tobytes()
        for each in energon.get_loader(dataset)
    }


CONSUMERS: Mapping[str, tuple[str, Callable[[Path, str, Path], Pixels]]] = {
    "webdataset": ("webdataset", by_webdataset),
    "pyarrow": ("parquet", by_pyarrow),
    "datasets": ("parquet", by_datasets),
    "mlcroissant": ("parquet", by_mlcroissant),
    "energon": ("energon", by_energon),
}
"""What reads a dataset, with the form of export that it reads."""


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_the_demo_is_handed_on_to_each_consumer(
    scored: Path, consumer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every row but the duplicates is in one split, no reference is in two, and the consumer has the very pixels that
    the run has made."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    form, load = CONSUMERS[consumer]
    given = ("--where", "duplicate_of IS NULL", "--split", "train=0.6,val=0.4", "--split-by", "reference")
    target = tmp_path / "made" / "set"
    for made in (target, tmp_path / "again" / "set"):
        result = call("export", scored, made, *given, "--format", form)
        assert result.exit_code == 0, result.output
    assert exports.tree(tmp_path / "made") == exports.tree(tmp_path / "again")
    assert call("verify", target).exit_code == 0
    found = {split: load(target, split, tmp_path / "cache") for split in SPLITS}
    images = {name.removesuffix(".png"): pixels(data) for name, data in exports.images(scored).items()}
    rows = {row["key"]: row for row in runs.rows_of(scored)}
    kept = {key for key in rows if not key.startswith("again-")}
    assert len(kept) == ROWS and {*found["train"]} | {*found["val"]} == kept and all(found.values())
    for split in SPLITS:
        assert found[split] == {key: images[key] for key in found[split]}
    references = [{rows[key]["reference"] for key in found[split]} - {None} for split in SPLITS]
    assert references[0].isdisjoint(references[1])


def test_a_calibrated_limit_selects(scored: Path, tmp_path: Path) -> None:
    """The table of thresholds is there, and rows can be selected by the scores that were added."""
    assert (scored / "_scores/calibration.json").exists()
    result = call("export", scored, tmp_path / "t", "--where", "texture IS NOT NULL AND reference_duplicate_of IS NULL")
    assert result.exit_code == 0, result.output
    rows = {row["reference"] for row in exports.rows(tmp_path / "t")}
    assert len(rows) == len(exports.rows(tmp_path / "t"))


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "vcf_batch", *map(str, arguments)]


def _killed_until_done(command: Sequence[str], place: Path, draw: random.Random, kills: int) -> int:
    """Kill a command at random moments after it has begun to write, and then let it end; how often it was killed."""
    killed = 0
    while killed < kills:
        before = len([*place.rglob("*")]) if place.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len([*place.rglob("*")]) <= before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        killed += 1
    subprocess.run(command, check=True, capture_output=True)
    return killed


@pytest.mark.slow
def test_killed_at_random_and_rerun_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """``score`` and ``export`` as processes, each ended by SIGKILL again and again while it writes."""
    draw, rows = random.Random(0), 60
    manifest = runs.write_manifest(tmp_path / "in", rows)
    runs.write_output(manifest, tmp_path / "out", 1)
    for path in sorted((tmp_path / "out").glob("0*.parquet")):
        files = runs.Files(tmp_path / "out", path.stem)
        files.edit(0, phash=f"{int(path.stem) % 7 << 20:016x}")
        files.write()
    search = _command("score", tmp_path / "out", "--with", "duplicates")
    assert _killed_until_done(search, tmp_path / "out/_scores", draw, 2) > 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "out/_scores/duplicates").glob("*.parquet")}
    shutil.rmtree(tmp_path / "out/_scores")
    subprocess.run(search, check=True, capture_output=True)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out/_scores/duplicates").glob("*.parquet")}
    assert found == expected and len(found) == rows
    target = tmp_path / "t" / "set"
    given = ("--split", "train=0.7,val=0.3", "--shard-bytes", "20KB", "--format", "energon")
    command = _command("export", tmp_path / "out", target, *given)
    assert _killed_until_done(command, target, draw, 2) > 0
    found = exports.tree(target)
    os.rename(target, tmp_path / "killed")
    subprocess.run(command, check=True, capture_output=True)
    assert found == exports.tree(target)
    assert call("verify", target).exit_code == 0


@pytest.mark.slow
def test_scores_of_a_pool_that_is_killed_at_random_end_with_the_same_bytes(tmp_path: Path) -> None:
    """``score`` with a network on Ray workers, whose driver is ended by SIGKILL again and again while it commits."""
    draw, rows = random.Random(0), 60
    runs.write_output(runs.write_manifest(tmp_path / "in", rows), tmp_path / "out", 2)
    clip = scorers.save_clip(tmp_path / "clip")
    command = _command("score", tmp_path / "out", "--with", f"clip={clip}", "--address", "local", "--num-workers", 2)
    assert _killed_until_done(command, tmp_path / "out/_scores", draw, 2) > 0
    found = {path.name: path.read_bytes() for path in (tmp_path / "out/_scores/clip").glob("*.parquet")}
    assert call("verify", tmp_path / "out").exit_code == 0
    shutil.rmtree(tmp_path / "out/_scores")
    subprocess.run(command, check=True, capture_output=True)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out/_scores/clip").glob("*.parquet")}
    assert found == expected and len(found) == rows // 2
