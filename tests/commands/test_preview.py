"""A preview shows what a run would make, in several ways, and leaves nothing but a picture."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
from PIL import Image

import vcf_batch
from support import runs
from vcf_batch.commands import preview
from vcf_batch.commands.preview import parsed, variants
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.report import contact_sheet
from vcf_batch.worker.worker import Worker

CONFIG = RunConfig(manifest="m", output="o")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("preview") / "model")


def test_sweeps_are_multiplied() -> None:
    assert variants(parsed(["strength=0,0.5", "fusion=naive, concat"]), CONFIG) == [
        {"strength": 0.0, "fusion": "naive"},
        {"strength": 0.0, "fusion": "concat"},
        {"strength": 0.5, "fusion": "naive"},
        {"strength": 0.5, "fusion": "concat"},
    ]
    assert variants(parsed([]), CONFIG) == [{}]
    assert variants(parsed(["role=all,layout"]), CONFIG) == [{"role": "all"}, {"role": "layout"}]


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ("strength", "its values"),
        ("steps=1,2", "give one of"),
        ("strength=much", "could not convert"),
        ("strength=-1", "strength is -1"),
        ("fusion=glue", "fusion is 'glue'"),
        ("role=shape", "role is 'shape'"),
    ],
)
def test_what_cannot_be_swept_is_refused(sweep: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        variants(parsed([sweep]), CONFIG)


def test_the_command_writes_the_picture_and_nothing_else(tmp_path: Path, model: Path) -> None:
    """Rows down, reference, text only and the variants across; a row that fails says why, and costs no other one.

    In a process of its own, as what loads a model may warn and draw bars on its first use only.
    """
    strengths = [1.0, -1.0, 1.0, 1.0]
    manifest = runs.write_manifest(tmp_path / "in", 4, {"strength": strengths})
    before = set(tmp_path.rglob("*"))
    options: list[Any] = ["--height", 32, "--width", 32, "--gpus-per-worker", 0, "--rows", 3]
    sweeps = ["--sweep", "strength=0,1", "--sweep", "fusion=naive,concat", "--out", tmp_path / "sheet.png"]
    words = ["preview", manifest, "--model", model, *options, *sweeps]
    command = [sys.executable, "-m", "vcf_batch", *map(str, words)]
    told = subprocess.run(command, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, f"{tmp_path / 'sheet.png'}\n")
    said = [line.partition(" ")[0] for line in told.stderr.splitlines()]
    assert said == ["reading", "columns:", "carried:", "loading"], told.stderr
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "sheet.png"}
    sheet = Image.open(io.BytesIO((tmp_path / "sheet.png").read_bytes()))
    assert sheet.width == (2 + 4) * (contact_sheet.TILE + 8) + 8
    assert sheet.height > 3 * contact_sheet.TILE


def test_what_comes_out_alike_is_generated_once(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without strength it does not matter how the reference would have joined."""
    runs.write_manifest(tmp_path, 1)
    loaded: Worker = runs.load(tmp_path / "manifest.parquet", tmp_path / "out", model)
    row = loaded.manifest.rows(0, 1, 0)[0]
    drawn: list[int] = []
    generate = preview.Generation

    def count(components: Any, rows: Any, *others: Any, **how: Any) -> Any:
        drawn.append(len(rows.rows))
        return generate(components, rows, *others, **how)

    monkeypatch.setattr(preview, "Generation", count)
    columns = [preview.TEXT_ONLY_COLUMN, *variants(parsed(["strength=0,1", "fusion=naive,concat"]), CONFIG)]
    samples = preview._generated(loaded.components, [preview._changed(row, column) for column in columns])
    assert drawn == [3]
    images = [sample.image for sample in samples]
    assert images[0] == images[1] == images[2]
    assert len(set(images)) == 3
    roles = [preview._changed(row, column) for column in variants(parsed(["role=all,layout"]), CONFIG)]
    assert [sample.settings["reference_roles"] for sample in preview._generated(loaded.components, roles)] == [
        None,
        ["layout"],
    ]


def test_python_gets_the_picture_of_the_command_and_its_process_back(tmp_path: Path, model: Path) -> None:
    """From a table, with nothing written; threads, environment, and torch's and the libraries' settings stay."""

    def state() -> tuple[Any, ...]:
        return (
            dict(os.environ),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.benchmark,
            transformers.utils.logging.get_verbosity(),
            transformers.utils.logging.is_progress_bar_enabled(),
        )

    manifest = runs.write_manifest(tmp_path / "in", 2)
    settings: dict[str, Any] = {"model": str(model), "steps": 2, "lpips": "none", **runs.SIZE}
    before, files = state(), {*tmp_path.rglob("*")}
    picture = vcf_batch.preview(manifest, 1, {"strength": [0.5, 1], "fusion": ["naive"]}, **settings)
    assert picture.width == 4 * (contact_sheet.TILE + 8) + 8
    config = RunConfig(manifest=str(manifest), output="o", **settings)
    assert vcf_batch.preview(config, 1, {"strength": (0.5, 1.0), "fusion": ("naive",)}).tobytes() == picture.tobytes()
    table = pq.read_table(manifest).drop(["reference"])
    assert vcf_batch.preview(table, 1, **settings).width == 3 * (contact_sheet.TILE + 8) + 8
    assert state() == before and {*tmp_path.rglob("*")} == files


@pytest.mark.parametrize(
    ("sweep", "reason"),
    [
        ({"steps": [1]}, "sweep 'steps': .*; give one of strength, fusion"),
        ({"strength": "0,1"}, "and a list of its values"),
        ({"strength": ["much"]}, "strength is 'much'; it must be a number or null"),
        ({"pno_steps": [1.5]}, "pno_steps is 1.5; it must be a whole number"),
        ({"strength": [-1]}, "strength is -1.0; it must be between 0"),
    ],
)
def test_python_is_told_what_cannot_be_swept(sweep: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        variants(sweep, CONFIG)
