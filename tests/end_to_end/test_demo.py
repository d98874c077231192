"""The first impression: the demo manifest through the real command on the embedded model, read as users read it."""

import io
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
from datasets import load_dataset
from PIL import Image

from support import imported
from vcf_batch.models import resolution
from vcf_batch.tiny import world
from vcf_batch.tiny.pairs import HELD_OUT
from vcf_batch.tiny.probe import Probe, agreement
from vcf_batch.vcf.pipeline import VCFPipeline

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "manifests" / "demo.parquet"
ROWS = 8
SIZE = ("--limit", str(ROWS), "--shard-size", "4", "--steps", "8", "--num-workers", "1")
MEBIBYTE = 1 << 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Eight demo rows in two shards and the contact sheet; and the modules that the driver of their run imported."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    modules = imported.by("generate", str(DEMO), str(folder), *SIZE)
    sheet = ["report", str(folder), "--png", str(folder / "contact_sheet.png")]
    subprocess.run([sys.executable, "-m", "vcf_batch", *sheet], check=True)
    return folder, modules


@pytest.fixture(scope="module")
def output(run: tuple[Path, set[str]]) -> Path:
    return run[0]


def test_the_driver_of_a_run_imports_nothing_that_workers_need(run: tuple[Path, set[str]]) -> None:
    """No torch and no library of models, which take seconds; nor any other large library."""
    _, modules = run
    assert {"ray", "pyarrow", "vcf_batch.pool.ray_cluster"} <= modules
    unused = {"torch", "transformers", "tokenizers", "diffusers", "pandas", "pyarrow.dataset", "ray.data", "duckdb"}
    assert not modules & unused


def test_every_demo_row_has_an_image_a_prompt_and_three_scores(output: Path) -> None:
    rows = pq.read_table(DEMO).to_pylist()[:ROWS]
    shards = sorted(output.glob("*.tar"))
    samples = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False).decode("pil"))
    assert len(shards) == 2
    assert [sample["__key__"] for sample in samples] == [row["sample_id"] for row in rows]
    for row, sample in zip(rows, samples, strict=True):
        assert sample["txt"] == row["prompt"]
        assert sample["png"].size == (world.SIZE, world.SIZE)
        assert all(isinstance(sample["json"][score], float) for score in ("clip_score", "clip_reference", "lpips"))


def test_the_demo_needs_no_model_and_says_which_one_it_used(output: Path) -> None:
    """Without --model, the embedded one draws what it knows, and whoever looks at the output is told."""
    told = subprocess.run([sys.executable, "-m", "vcf_batch", "status", output], capture_output=True, text=True)
    assert "  model     tiny (embedded test model)\n" in told.stdout
    assert json.loads((output / "run.json").read_text())["config"]["model"] == "tiny"


def test_the_references_change_the_picture(output: Path) -> None:
    """The first four rows share prompt and noise: text only, then three references."""
    samples = list(webdataset.WebDataset(str(output / "00000.tar"), shardshuffle=False))
    assert len({sample["png"] for sample in samples}) == 4
    assert json.loads(samples[0]["json"])["strength"] == 0.0


def test_hugging_face_datasets_reads_the_output(output: Path) -> None:
    files = [str(shard) for shard in sorted(output.glob("*.tar"))]
    dataset = load_dataset("webdataset", data_files=files, split="train", cache_dir=str(output.parent / "cache"))
    assert len(dataset) == ROWS
    assert dataset[0]["png"].size == (world.SIZE, world.SIZE)
    assert dataset[0]["json"]["clip_score"] is not None


def test_duckdb_reads_the_scores(output: Path) -> None:
    query = f"SELECT count(*), count(clip_score), count(lpips) FROM '{output}/*.parquet' WHERE status = 'success'"
    assert duckdb.connect().execute(query).fetchone() == (ROWS, ROWS, ROWS)


def test_the_contact_sheet_is_a_picture(output: Path) -> None:
    sheet = Image.open(io.BytesIO((output / "contact_sheet.png").read_bytes()))
    colors = sheet.convert("RGB").getcolors(sheet.width * sheet.height)
    assert sheet.width > 1000
    assert colors is not None
    assert len(colors) > 1000


def test_the_demo_manifest_uses_every_reference_equally() -> None:
    rows = pq.read_table(DEMO).to_pylist()
    uses = Counter(row["reference"] for row in rows)
    assert len(rows) == 64
    assert len({row["prompt"] for row in rows}) == 16
    assert set(uses.values()) == {8}
    assert all((DEMO.parent / reference).is_file() for reference in uses)


def test_the_embedded_weights_stay_small() -> None:
    sizes = [path.stat().st_size for path in Path(resolution.tiny_folder()).rglob("*") if path.is_file()]
    assert sum(sizes) <= 32 * MEBIBYTE
    assert max(sizes) <= 15 * MEBIBYTE


def test_the_embedded_models_draw_what_captions_say() -> None:
    """A small version of what ``python -m vcf_batch.tiny.goals`` measures, read by the family's own probe."""
    folder = Path(resolution.tiny_folder())
    probe = Probe.from_pretrained(folder / "probe", dtype=torch.float32)
    real = world.sample_scenes(256, HELD_OUT + 7)
    assert all(right.float().mean() > 0.9 for right in agreement(probe, world.render(real), real).values())

    pipeline = VCFPipeline.from_pretrained(folder, dtype=torch.float32)
    scenes = world.sample_scenes(24, HELD_OUT)
    prompts = world.captions(scenes, random.Random(HELD_OUT), full=1.0)
    drawn = agreement(probe, pipeline.generate(prompts, seeds=range(24), steps=8), scenes)
    chance = {name: 1 / len(values) for name, values in world.VALUES.items()}
    for name in ("style", "pattern", "color", "shape", "position"):
        assert drawn[name].float().mean() > 2 * chance[name]


def test_the_model_card_shows_the_measurement() -> None:
    card = (Path(resolution.tiny_folder()) / "README.md").read_text()
    assert "text only, all named" in card
    assert "python -m vcf_batch.tiny.goals" in card
