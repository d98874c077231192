"""The contact sheet is drawn from what a run left behind."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import ImageDraw

from support import runs
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import DamageFound, RefusedError, UsageError
from vcf_batch.manifest.manifest import Manifest
from vcf_batch.models.resolution import ResolvedModel
from vcf_batch.output import commits, sample_records, shards
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.records import Sample
from vcf_batch.report import contact_sheet
from vcf_batch.setup import claim
from vcf_batch.setup.job import Job
from vcf_batch.setup.run_models import Models

SETTINGS = {"fusion": "concat", "strength": 0.1, "pno_steps": 0}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished shard of six rows; the second and the last one failed."""
    path = runs.write_manifest(tmp_path / "in", 6)
    manifest = Manifest.open(str(path))
    config = RunConfig(manifest=str(path), output=str(tmp_path / "out"), shard_size=6)
    model = ResolvedModel("m", "hub", "m", "0" * 40)
    fields = {"manifest_id": manifest.identity, "limit": None, "shard_size": 6}
    job = Job(config, manifest, Models(model, None, "none", "none"), fields)
    claim.claim(job)
    shard = job.shards[0]
    with shards.ShardWriter(
        str(tmp_path / "scratch"), shard, "png", sample_records.schema(manifest.carried_schema, False)
    ) as writer:
        for row in manifest.rows(0, 6, 0):
            if row.number in (1, 5):
                writer.add(Sample(row, "failed", {}, error_message="no"))
            else:
                writer.add(Sample(row, "success", SETTINGS, image=runs.png(row.number), width=24, height=24))
        files = writer.finish()
    receipt = Receipt(shard, job.fingerprint, 1, files.counts, files.entries, {}, {}, files.means)
    commits.commit(config.output, receipt, commits.stage(files, config.output, shard, "attempt"))
    return tmp_path / "out"


def test_rows_of_one_prompt_stand_together(tmp_path: Path) -> None:
    """In whatever order the manifest has them: the pairings `random` and `balanced` mix them."""
    heights = []
    for name, prompts in (("mixed", ["a", "b"] * 4), ("sorted", ["a"] * 4 + ["b"] * 4)):
        runs.write_output(runs.write_manifest(tmp_path / f"in-{name}", 8, {"prompt": prompts}), tmp_path / name, 8)
        heights.append(contact_sheet.contact_sheet(str(tmp_path / name)).size)
    assert heights[0] == heights[1]


def test_every_row_has_a_card_and_failed_ones_are_told(output: Path) -> None:
    cards = list(contact_sheet._cards(Output(str(output)), [runs.read_receipts(str(output))[0]]))
    assert [card.output is None for card in cards] == [False, True, False, False, False, True]
    assert [card.reference is None for card in cards] == [False, False, False, False, True, False]
    assert [card.notes[0] for card in cards if card.output] == ["concat 0.1", "concat 0.1", "concat 0.1", "text only"]
    assert contact_sheet.contact_sheet(str(output)).width > 2 * contact_sheet.TILE


def test_the_sheet_reads_no_further_than_it_shows(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the shard: a tar is streamed, and only as far as needed."""
    read: list[str] = []
    read_samples = shards.read_samples

    def noted(url: str) -> Iterator[dict[str, Any]]:
        for sample in read_samples(url):
            read.append(sample["__key__"])
            yield sample

    monkeypatch.setattr(shards, "read_samples", noted)
    contact_sheet.contact_sheet(str(output), limit=2)
    assert len(read) <= 2


@pytest.mark.parametrize(("model", "title"), [("m", "Model: m"), ("tiny", "Model: tiny (embedded test model)")])
def test_the_first_line_names_the_model_and_the_embedded_one_by_what_it_is(
    model: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, *_: drawn.append(text))
    runs.write_output(runs.write_manifest(tmp_path / "in", 4), tmp_path / "out", 4, model=model)
    contact_sheet.contact_sheet(str(tmp_path / "out"))
    assert drawn[0] == title


def test_an_output_without_a_shard_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        contact_sheet.contact_sheet(str(tmp_path))


def test_a_manifest_that_has_changed_is_refused(output: Path) -> None:
    """Its prompts and references are not those of the images."""
    runs.write_manifest(output.parent / "in", 6, {"prompt": [f"another {row}" for row in range(6)]})
    with pytest.raises(RefusedError, match="has changed since the run"):
        contact_sheet.contact_sheet(str(output))


def test_a_damaged_tar_is_told_and_not_shown_as_failures(output: Path) -> None:
    """Rows behind a damaged header did not fail: the sheet is refused as damage, with the command that looks closer."""
    tar = output / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"000000003.png")] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DamageFound, match=r"00000\.tar cannot be read: the header at byte .*'vcf-batch verify'"):
        contact_sheet.contact_sheet(str(output))
