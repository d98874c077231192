"""Triplets: the text-only twin and the reference beside each image, and what they are scored by."""

import dataclasses
import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from support import runs
from support.runs import another, commit
from vcf_batch.commands.verify import check
from vcf_batch.metrics.clip_score import content_alignment
from vcf_batch.metrics.lpips import PerceptualDistance
from vcf_batch.output import shards
from vcf_batch.output.kept_samples import KeptSamples
from vcf_batch.output.output import Output
from vcf_batch.report import card
from vcf_batch.setup import claim
from vcf_batch.setup.job import Job
from vcf_batch.worker import worker
from vcf_batch.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("restored_torch")

ROWS = 6
PAIR = ["reference0.png", "reference1.png"]
REFERENCES = [["reference0.png"], None, ["reference1.png"], PAIR, ["reference0.png"], ["gone.png"]]
WEIGHTS = [None, None, None, [1.0, 3.0], None, None]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Worker]:
    """A committed run with triplets. Row 1 has no reference, row 3 two, and row 5 one that is gone."""
    folder = tmp_path_factory.mktemp("run")
    columns: dict[str, list[Any]] = {
        "reference": REFERENCES,
        "reference_weights": WEIGHTS,
        "pno_steps": [0, 0, 0, 0, 1, 0],
    }
    manifest = runs.write_manifest(folder / "in", ROWS, columns)
    model = runs.save_model(folder / "model")
    job = runs.settled(manifest, folder / "out", model, batch_size=3, shard_size=ROWS, triplets=True)
    claim.claim(job)
    loaded = worker.load(job)
    features = [torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(3, 2, 5)]
    perceptual = PerceptualDistance(lambda images: [layer(images).relu() for layer in features])
    loaded.components.scorer.perceptual = perceptual
    commit(loaded)
    return job, loaded


def members(output: Path) -> dict[str, dict[str, Any]]:
    return {sample["__key__"]: sample for sample in shards.read_samples(str(output / "00000.tar"))}


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_every_sample_of_a_shard_has_the_same_members(run: tuple[Job, Worker]) -> None:
    """As WebDataset readers group them; a row without a reference is rejected, and one that cannot be read fails."""
    output = Path(run[0].config.output)
    rows = runs.rows_of(output)
    statuses = ["success", "rejected", "success", "success", "success", "failed"]
    assert [row["status"] for row in rows] == statuses
    assert rows[1]["error_message"] == worker.NO_REFERENCE
    assert runs.read_receipts(str(output))[0].sampled == 4
    samples = list(webdataset.WebDataset(str(output / "00000.tar"), shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows if row["status"] == "success"]
    for sample in samples:
        assert [name for name in sample if not name.startswith("__")] == [
            "png", "content.png", "style.png", "txt", "json",
        ]  # fmt: skip
        assert sample["png"].size == sample["content.png"].size == sample["style.png"].size == (32, 32)


def test_an_image_has_the_bytes_that_it_has_without_its_twin(run: tuple[Job, Worker], tmp_path: Path) -> None:
    """And the twin those of the same row without its reference: the noise is the same."""
    job, loaded = run
    manifest = Path(job.config.manifest)
    commit(another(loaded, manifest, tmp_path / "plain", batch_size=3, triplets=False))
    made, plain = members(Path(job.config.output)), members(tmp_path / "plain")
    rows = runs.rows_of(Path(job.config.output))
    columns = {"seed": [row["seed"] for row in rows], "reference": [None] * ROWS}
    alone = runs.write_manifest(tmp_path / "alone", ROWS, columns)
    commit(another(loaded, alone, tmp_path / "text", batch_size=3, triplets=False))
    text_only = members(tmp_path / "text")
    for key, sample in made.items():
        assert sample["png"] == plain[key]["png"]
        difference = np.abs(pixels(sample["content.png"]) - pixels(text_only[key]["png"]).astype(float))
        assert difference.max() <= 1, "a batch of another size may round otherwise"


def test_the_style_is_the_reference_that_counts_most(run: tuple[Job, Worker]) -> None:
    """As the perceptual distance sees it: the whole image, squashed to the size of the output."""
    job, _ = run
    made = members(Path(job.config.output))
    for key, name in (("000000000", "reference0.png"), ("000000003", "reference1.png")):
        given = Image.open(Path(job.config.manifest).parent / name).convert("RGB")
        squashed = np.asarray(given.resize((32, 32), Image.Resampling.BILINEAR))
        assert np.array_equal(pixels(made[key]["style.png"]), squashed)


def test_the_scores_are_those_of_the_images_that_are_there(run: tuple[Job, Worker]) -> None:
    job, loaded = run
    made = members(Path(job.config.output))
    judge = loaded.components.scorer.judge
    for row in runs.rows_of(Path(job.config.output)):
        if row["status"] != "success":
            assert row["content_alignment"] is row["style_similarity"] is row["phash"] is None
            continue
        sample = made[row["key"]]
        layouts = judge.embed_layouts([pixels(sample["png"]), pixels(sample["content.png"])])
        assert row["content_alignment"] == pytest.approx(float(content_alignment(layouts[:1], layouts[1:])), abs=1e-5)
        assert 0 < row["style_similarity"] < 1
        assert sample["json"]["content_alignment"] == row["content_alignment"]


def test_triplets_are_kept_verified_and_told_of(run: tuple[Job, Worker], tmp_path: Path) -> None:
    """A repair keeps all members of a sample, verify accepts them, and the card names them."""
    job, loaded = run
    opened = Output(job.config.output)
    assert list(check(opened)) == []
    assert "`KEY.content.png` is what the prompt alone makes of the same noise" in card.render(opened)
    components = dataclasses.replace(loaded.components, config=job.config.replace(output=str(tmp_path / "out")))
    again = KeptSamples(job.config, job.manifest, job.shards[0], bytes([0, 0, 1, 0, 0, 0]))
    commit(Worker(components, job.manifest, job.fingerprint), existing=again)
    assert runs.data_files(tmp_path / "out") == runs.data_files(Path(job.config.output))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not an image", "000000002.content.png in 00000.tar cannot be decoded"),
        (runs.png(1, 40), "000000002.content.png in 00000.tar has 40 x 40 pixels"),
    ],
)
def test_a_twin_that_is_none_is_found(run: tuple[Job, Worker], tmp_path: Path, data: bytes, message: str) -> None:
    output = shutil.copytree(run[0].config.output, tmp_path / "out")
    files = runs.Files(output, "00000")
    files.replace("000000002.content.png", data)
    files.write()
    (finding,) = check(Output(str(output)))
    assert message in str(finding)


# The scores


def test_style_statistics_do_not_show_in_content_alignment() -> None:
    """Tokens are normalised per channel: another scale and offset of each channel change nothing."""
    tokens = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))

    def normalised(tokens: torch.Tensor) -> torch.Tensor:
        deviation, mean = torch.std_mean(tokens, dim=1, correction=0, keepdim=True)
        return (tokens - mean) / deviation

    restyled = tokens * torch.tensor([1.0, 2.0, 5.0, 0.5, 3.0]) + torch.arange(5.0)
    assert torch.allclose(content_alignment(normalised(tokens), normalised(restyled)), torch.ones(2), atol=1e-5)
    assert torch.allclose(content_alignment(normalised(tokens), normalised(-tokens)), -torch.ones(2), atol=1e-5)


def test_where_things_are_does_not_show_in_style_similarity() -> None:
    """Channel statistics know no place: a shifted image is as similar as the image itself."""
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    compared = PerceptualDistance(lambda images: [images, images[:, :2].square()]).compare
    shifted = pictures.roll((3, 5), dims=(2, 3))
    assert torch.allclose(compared(pictures, shifted)[1], torch.ones(3), atol=1e-5)
    others = compared(pictures, pictures.flip(0) * 0.5 + 0.5)[1]
    assert ((others > 0) & (others < 0.95)).all()
