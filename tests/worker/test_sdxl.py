"""Runs of a Stable Diffusion XL: checks, rows of all kinds, and identical bytes after a stop."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support import runs, sd_layouts
from vcf_batch.cli import main
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.output import commits
from vcf_batch.setup import claim
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.worker import worker

pytestmark = pytest.mark.usefixtures("restored_torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion XL with a random aligner and a judge beside it."""
    return sd_layouts.save_vcf_sdxl(tmp_path_factory.mktemp("models"))


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


def test_a_run_is_planned_by_a_measurement_and_its_samples_are_drawn_again(model: Path, tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 3)
    places = [str(manifest), str(tmp_path / "out")]
    sizes = ["--model", str(model), "--batch-size", "2", "--height", "32", "--width", "64"]
    planned = CliRunner().invoke(main, ["plan", *places, *sizes, "--gpus-per-worker", "0", "--calibrate", "--json"])
    assert planned.exit_code == 0, planned.output
    record = json.loads(planned.output[planned.output.index("{") :])
    assert record["measurement"]["seconds_per_row"] > 0 and record["bytes"] > 0
    runs.generate(manifest, tmp_path / "out", model, batch_size=2, shard_size=2)
    told = CliRunner().invoke(main, ["verify", places[1], "--regenerate", "3"])
    assert told.exit_code == 0 and "3 drawn again, 3 with the same bytes" in told.output, told.output


@pytest.mark.parametrize(("zeros", "told"), [(True, "zeros"), (False, "encoded")])
def test_run_json_says_what_stands_for_an_empty_negative_prompt(
    model: Path, tmp_path: Path, zeros: bool, told: str
) -> None:
    index = json.loads((model / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    own = shutil.copytree(model, tmp_path / "model")
    (own / "model_index.json").write_text(json.dumps(index))
    claim.claim(runs.settled(runs.write_manifest(tmp_path / "in", 1), tmp_path / "out", own, batch_size=1))
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["models"]["model"]["empty_negative"] == told


def test_a_model_without_the_words_of_its_second_tokenizer_is_refused(model: Path, tmp_path: Path) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(own / "tokenizer_2")
    with pytest.raises(ModelError, match="has no vocabulary: its folder tokenizer_2 is missing, empty or cut short"):
        runs.settled(runs.write_manifest(tmp_path / "in", 1), tmp_path / "out", own, batch_size=1)


@pytest.mark.slow  # the test above draws its samples again, in this process
def test_a_run_of_the_command_is_repaired_to_what_it_would_have_been(model: Path, tmp_path: Path) -> None:
    references = ["reference0.png", "gone.png", "reference1.png", "reference2.png"]
    manifest = runs.write_manifest(tmp_path / "in", 4, {"reference": references})
    settings = ["--model", str(model), "--batch-size", "2", "--shard-size", "2", "--num-workers", "1"]
    environment = {"OMP_NUM_THREADS": "1"}
    begun = CliRunner(env=environment).invoke(
        main, ["generate", str(manifest), str(tmp_path / "out"), *settings, "--address", "local"]
    )
    assert begun.exit_code == 3, begun.output
    shutil.copy(tmp_path / "in" / "reference1.png", tmp_path / "in" / "gone.png")
    repaired = CliRunner(env=environment).invoke(main, ["repair", str(tmp_path / "out"), "--address", "local"])
    assert repaired.exit_code == 0, repaired.output
    assert [row["status"] for row in runs.rows_of(tmp_path / "out")] == ["success"] * 4
    told = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), "--regenerate", "4"])
    assert told.exit_code == 0 and "4 drawn again, 4 with the same bytes" in told.output, told.output
