"""The column of the texture score: there where it is asked for, and nothing else of an output changes."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from support import runs
from support.runs import commit
from vcf_batch.commands.verify import check
from vcf_batch.images import to_unit
from vcf_batch.metrics.texture import texture_similarity
from vcf_batch.output import shards
from vcf_batch.output.kept_samples import KeptSamples
from vcf_batch.output.output import Output
from vcf_batch.records import TEXTURE
from vcf_batch.report import card
from vcf_batch.setup import claim
from vcf_batch.setup.job import Job
from vcf_batch.worker import worker
from vcf_batch.worker.worker import Worker

pytestmark = pytest.mark.usefixtures("restored_torch")

REFERENCES = [["reference0.png"], None, ["reference1.png"], ["gone.png"]]
PLACE = "style_similarity"
"""The column before it."""


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Job, Worker]]:
    """Committed runs without and with the score. Row 1 has no reference, and that of row 3 is gone."""
    folder = tmp_path_factory.mktemp("run")
    columns: dict[str, list[Any]] = {"reference": REFERENCES}
    manifest = runs.write_manifest(folder / "in", len(REFERENCES), columns)
    model = runs.save_model(folder / "model")
    made = {}
    for asked in (False, True):
        job = runs.settled(manifest, folder / str(asked), model, batch_size=2, shard_size=4, texture=asked)
        claim.claim(job)
        loaded = worker.load(job)
        commit(loaded)
        made[asked] = job, loaded
    return made


def test_a_run_without_the_score_has_no_column_of_it(both: dict[bool, tuple[Job, Worker]]) -> None:
    """Else its bytes would not be those of earlier versions. All other columns and all images are the same."""
    without, asked = (Path(both[key][0].config.output) for key in (False, True))
    tables = [pq.read_table(output / "00000.parquet") for output in (without, asked)]
    names = tables[1].schema.names
    assert names[names.index(PLACE) + 1] == TEXTURE
    assert tables[0].schema.names == [name for name in names if name != TEXTURE]
    assert tables[0].equals(tables[1].drop_columns([TEXTURE]))


def test_the_score_is_that_of_image_and_reference(both: dict[bool, tuple[Job, Worker]]) -> None:
    job, _ = both[True]
    made = {sample["__key__"]: sample for sample in shards.read_samples(f"{job.config.output}/00000.tar")}
    rows = runs.rows_of(Path(job.config.output))
    assert [row[TEXTURE] is None for row in rows] == [False, True, False, True]
    for row, names in zip(rows, REFERENCES, strict=True):
        if row[TEXTURE] is None or names is None:
            continue
        image = Image.open(io.BytesIO(made[row["key"]]["png"]))
        given = Image.open(Path(job.config.manifest).parent / names[0]).convert("RGB")
        shown = [image, given.resize(image.size, Image.Resampling.BILINEAR)]
        a, b = (torch.from_numpy(np.ascontiguousarray(to_unit(each))).permute(2, 0, 1)[None] for each in shown)
        assert row[TEXTURE] == pytest.approx(texture_similarity(a, b).item(), abs=1e-4)
        assert made[row["key"]]["json"][TEXTURE] == row[TEXTURE]


def test_an_output_with_the_score_is_kept_verified_and_told_of(
    both: dict[bool, tuple[Job, Worker]], tmp_path: Path
) -> None:
    """A repair keeps the scores of what it does not redo, and makes the same bytes."""
    job, loaded = both[True]
    opened = Output(job.config.output)
    assert list(check(opened)) == []
    assert f"| `{TEXTURE}` | `double` | How alike image and reference are drawn" in card.render(opened)
    components = dataclasses.replace(loaded.components, config=job.config.replace(output=str(tmp_path / "out")))
    again = KeptSamples(job.config, job.manifest, job.shards[0], bytes([1, 0, 0, 0]))
    commit(Worker(components, job.manifest, job.fingerprint), existing=again)
    assert runs.data_files(tmp_path / "out") == runs.data_files(Path(job.config.output))


def test_a_run_without_the_score_is_the_run_of_versions_that_did_not_know_it(
    both: dict[bool, tuple[Job, Worker]],
) -> None:
    assert both[False][0].fingerprint != both[True][0].fingerprint
    assert "texture" not in Output(both[False][0].config.output).record.fields
