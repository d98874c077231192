"""Runs of a Stable Diffusion XL: checks, rows of all kinds, and identical bytes after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from support import runs, sd_layouts
from support.scorers import save_clip
from vcf_batch.config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.output import commits
from vcf_batch.setup import claim
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.worker import worker

pytestmark = pytest.mark.usefixtures("restored_torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL with a random aligner and a judge beside it."""
    folder = tmp_path_factory.mktemp("models")
    sd_layouts.save_sdxl(folder / "base")
    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 16, "projection_dim": 16},
    )
    VCFPipeline.from_pretrained(
        str(folder / "base"),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        aligner=ImageAligner(32, 64).eval(),
        default_steps=2,
    ).save_pretrained(folder / "vcf")
    save_clip(folder / "vcf" / "judge")
    return folder / "vcf"


def test_rows_do_not_depend_on_their_batch_or_on_a_stop(model: Path, tmp_path: Path) -> None:
    """Triplets, roles, long and negative prompts and prompt-noise optimisation in one run, shard by shard."""
    columns: dict[str, list[Any]] = {
        "negative_prompt": [None, "blue", "a", "", None, "a wall"],
        "reference_roles": [["layout"], None, None, None, None, ["layout"]],
        "pno_steps": [0, 0, 0, 1, 0, 0],
        "reference": [f"reference{row % 3}.png" for row in range(6)],
        "prompt": ["a red disc", "a blue star", "two rings", "a", "green", "a red star on a wall " * 6],
    }
    manifest = runs.write_manifest(tmp_path / "in", 6, columns)
    options = {"batch_size": 2, "shard_size": 3, "triplets": True, "long_prompts": "chunk"}
    whole = runs.generate(manifest, tmp_path / "whole", model, **options)
    rows = runs.rows_of(whole)
    assert [row["status"] for row in rows] == ["success"] * 6, [row["error_message"] for row in rows]
    job = runs.settled(manifest, tmp_path / "stopped", model, **options)
    for shards in (job.shards[:1], job.shards[1:]):
        claim.claim(job)
        loaded = worker.load(job)
        for shard in shards:
            commits.commit(job.config.output, *runs.stage(loaded, ShardTask(shard), f"{shard.name}-again"))
    assert runs.data_files(tmp_path / "stopped") == runs.data_files(whole)


def test_told_sizes_change_a_run_and_its_fingerprint_only_if_given(model: Path, tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 1)
    plain = runs.settled(manifest, tmp_path / "plain", model)
    told = runs.settled(manifest, tmp_path / "told", model, original_height=16, crop_left=8)
    assert told.fields == plain.fields | {"original_height": 16, "crop_left": 8}
    pixels = [
        runs.generate(manifest, tmp_path / name, model, **settings)
        for name, settings in (
            ("a", {}),
            ("b", {"original_height": 16, "crop_left": 8}),
        )
    ]
    assert runs.rows_of(pixels[0])[0]["sha256"] != runs.rows_of(pixels[1])[0]["sha256"]


def test_told_sizes_are_refused_for_other_models(tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 1)
    config = RunConfig(
        manifest=str(manifest), output=str(tmp_path / "out"), model="tiny", target_width=64, batch_size=1
    )
    with pytest.raises(UsageError, match="target_width is given, and tiny is not told sizes"):
        runs.settle(config)
