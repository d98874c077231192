"""What a run will take, and what is in its way: measured or not said, all reasons at once, nothing touched."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from support import runs
from vcf_batch.cli import main
from vcf_batch.commands import plan
from vcf_batch.commands.plan import Forecast, Measurement
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import ManifestError
from vcf_batch.output import lease
from vcf_batch.setup import claim, lora_batches, manifest_check


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("forecast") / "model")


def config(folder: Path, model: Path, **options: Any) -> RunConfig:
    settings = {**runs.SIZE, "batch_size": 2, "shard_size": 4, "gpus_per_worker": 0.0} | options
    return RunConfig(
        manifest=str(folder / "manifest.parquet"), output=str(folder / "out"), model=str(model), **settings
    )


def tree(folder: Path) -> Mapping[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def call(folder: Path, model: Path, *options: str) -> Result:
    words = ["plan", str(folder / "manifest.parquet"), str(folder / "out"), "--model", str(model), *options]
    return CliRunner().invoke(main, [*words, "--height", "32", "--width", "32", "--gpus-per-worker", "0"])


def test_without_a_measurement_nothing_is_said_of_time(tmp_path: Path, model: Path) -> None:
    runs.write_manifest(tmp_path, 10)
    before = tree(tmp_path)
    found = plan.look(config(tmp_path, model), calibrate=False)
    assert tree(tmp_path) == before
    assert not found.problems
    figures = found.figures(price=2.0)
    assert (figures["rows"], figures["shards"], figures["rows_done"]) == (10, 3, 0)
    assert (figures["bytes"], figures["seconds"], figures["device_hours"], figures["cost"]) == (None,) * 4
    assert "not known before something is measured" in found.told(2.0)


def test_a_calibration_measures_in_this_process_and_touches_nothing(tmp_path: Path, model: Path) -> None:
    runs.write_manifest(tmp_path, 10)
    before = tree(tmp_path)
    told = call(tmp_path, model, "--calibrate", "--price-per-gpu-hour", "3", "--num-workers", "2", "--json")
    assert tree(tmp_path) == before
    assert told.exit_code == 0, told.output
    record = json.loads(told.output[told.output.index("{") :])
    assert record["measurement"]["seconds_per_row"] > 0
    assert record["bytes"] > 0
    assert record["workers"] == 2
    assert record["cost"] == pytest.approx(3 * record["device_hours"])


def test_rows_that_fail_are_not_timed(tmp_path: Path, model: Path) -> None:
    """Where no row can be generated, there is nothing to tell of the time and the cost."""
    runs.write_manifest(tmp_path, 4, {"reference": ["gone.png"] * 4})
    told = call(tmp_path, model, "--calibrate")
    assert told.exit_code == 2
    assert "each of the first 4 rows fails; the first: reference 'gone.png' does not exist" in told.output


def test_finished_shards_tell_without_a_calibration(tmp_path: Path, model: Path) -> None:
    """And only what is left takes time."""
    runs.write_manifest(tmp_path, 10)
    job = runs.settled(tmp_path / "manifest.parquet", tmp_path / "out", model, batch_size=2, shard_size=4)
    claim.claim(job)
    runs.write_output(tmp_path / "manifest.parquet", tmp_path / "other", 4)
    timings = {"total": 8.0, "ended": "2026-01-01T00:00:00+00:00", "worker": "a:1"}
    for receipt in [*runs.read_receipts(str(tmp_path / "other")).values()][:2]:
        for suffix in (".tar", ".parquet"):
            shutil.copy(tmp_path / "other" / f"{receipt.shard.name}{suffix}", tmp_path / "out")
        told = dataclasses.replace(receipt, fingerprint=job.fingerprint, timings=timings)
        (tmp_path / "out" / f"{receipt.shard.name}_stats.json").write_bytes(told.to_json())
    found = plan.look(config(tmp_path, model), calibrate=True)
    assert not found.problems
    assert found.measurement
    assert found.measurement.seconds_per_row == 2
    figures = found.figures(price=None)
    assert (figures["rows_done"], figures["shards_done"]) == (8, 2)
    assert figures["seconds"] == 2 * 2


def test_time_counts_whole_shards_and_cost_counts_gpus(tmp_path: Path, model: Path) -> None:
    """A worker that waits for the others to finish does not shorten the run."""
    runs.write_manifest(tmp_path, 40)
    job = plan.look(config(tmp_path, model, num_workers=4, gpus_per_worker=2.0), calibrate=False).job
    found = Forecast("out", job=job, measurement=Measurement("", "gpu", 3.0, 100.0, 30.0))
    figures = found.figures(price=5.0)
    assert figures["seconds"] == 3 * 4 * 3 + 30
    assert figures["bytes"] == 4000
    assert figures["device_hours"] == pytest.approx((40 * 3 + 4 * 30) / 3600 * 2)
    assert figures["cost"] == pytest.approx(5 * figures["device_hours"])


def test_all_that_would_refuse_the_run_is_told_at_once(tmp_path: Path, model: Path) -> None:
    references = [f"../elsewhere/{number}.png" for number in range(10)]
    runs.write_manifest(tmp_path, 10, {"reference": references, "sample_id": ["a", "a", *"bcdefghi"]})
    before = tree(tmp_path)
    with lease.hold(str(tmp_path / "out")):
        told = call(tmp_path, model, "--pno-guide", str(tmp_path / "nowhere"))
    (tmp_path / "out").rmdir()
    assert tree(tmp_path).keys() == before.keys()
    assert told.exit_code == 4
    for reason in ("is held by another run", "may not be read", "nowhere", "sample_id"):
        assert reason in told.output, told.output
    assert told.output.count("refused: ") == 4


def test_another_run_in_the_output_is_told_with_its_differences(tmp_path: Path, model: Path) -> None:
    manifest = runs.write_manifest(tmp_path, 10)
    runs.write_output(manifest, tmp_path / "out", 4)
    told = call(tmp_path, model, "--shard-size", "4", "--steps", "3")
    assert told.exit_code == 4
    assert "steps: 4 there, 3 now" in told.output


def test_a_refusal_is_told_once(tmp_path: Path, model: Path) -> None:
    """A run.json that this version does not read is looked at twice and told once."""
    manifest = runs.write_manifest(tmp_path, 10)
    runs.write_output(manifest, tmp_path / "out", 4)
    record = tmp_path / "out" / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"layout": 2}))
    told = call(tmp_path, model, "--shard-size", "4", "--steps", "4")
    assert told.exit_code == 4 and told.output.count("has layout 2") == 1


def test_rows_that_would_fail_are_named_and_refuse_nothing(tmp_path: Path, model: Path) -> None:
    references = ["reference0.png", "../elsewhere.png", *["reference1.png"] * 8]
    runs.write_manifest(tmp_path, 10, {"reference": references, "strength": [1.0, 1.0, -1.0, *[1.0] * 7]})
    found = plan.look(config(tmp_path, model), calibrate=False)
    assert not found.problems
    assert [row.split(":")[0] for row in found.doomed] == ["000000001", "000000002"]


def test_long_prompts_are_counted_before_the_run(tmp_path: Path, model: Path) -> None:
    runs.write_manifest(tmp_path, 4, {"prompt": ["a", "b", "c", "a b " * 100]})
    found = plan.look(config(tmp_path, model), calibrate=False)
    assert found.long_prompts == 1
    assert found.to_dict(None)["long_prompts"] == {"max_tokens": found.max_tokens, "rows": 1}
    told = f"1 of the first 4 rows have prompts of more than {found.max_tokens} tokens, which are cut off there"
    assert told in found.told(None)
    assert f"the prompt has {202} tokens" in call(tmp_path, model, "--long-prompts", "refuse").output
    told = "tokens, which are encoded in windows of that length (--long-prompts)"
    assert told in call(tmp_path, model, "--long-prompts", "chunk").output


def test_an_output_in_the_manifests_folder_is_told(tmp_path: Path, model: Path) -> None:
    runs.write_manifest(tmp_path, 4)
    found = plan.look(config(tmp_path, model).replace(output=str(tmp_path)), calibrate=False)
    assert "is the manifest's own folder" in str(found.problems[0])


def test_unsafe_ids_are_told_alike_by_plan_and_generate(tmp_path: Path, model: Path) -> None:
    """All of them are counted, with the rule, and told once."""
    ids = ["a b", "ok", "../c", *(f"id {number}" for number in range(7))]
    manifest = runs.write_manifest(tmp_path, 10, {"sample_id": ids})
    with pytest.raises(ManifestError) as refused:
        manifest_check.open_checked(config(tmp_path, model), None)
    planned = call(tmp_path, model)
    assert planned.exit_code == 2
    assert str(refused.value) in planned.output and planned.output.count("refused: ") == 1
    assert "9 rows are unsafe (an id is 1 to 128 of the characters A-Z a-z 0-9 _ -)" in planned.output
    assert "rows      10" in planned.output, "what is known is planned all the same"
    assert str(manifest.parent) in planned.output


def test_a_plan_tells_what_is_read_and_what_is_carried(tmp_path: Path, model: Path) -> None:
    runs.write_manifest(tmp_path, 10, {"image": [b"1"] * 10, "seed": [1] * 10})
    planned = call(tmp_path, model)
    assert "  columns   10 rows, all with prompt, seed; 8 with reference; none with sample_id" in planned.output
    assert "  carried   label\n" in planned.output
    assert "  left out  image (it holds bytes)\n" in planned.output
    found = json.loads(call(tmp_path, model, "--json").stdout)
    assert found["rows_having"] == {"prompt": 10, "reference": 8, "sample_id": 0, "seed": 10}
    assert found["columns"]["carried"] == "label"


def test_a_plan_that_counts_no_rows_is_a_document_all_the_same(tmp_path: Path, model: Path) -> None:
    """Of a manifest that is not there; the exit code is that of `generate`."""
    planned = call(tmp_path, model, "--json")
    assert planned.exit_code == 2
    found = json.loads(planned.stdout)
    assert found["rows_having"] is None and "manifest.parquet" in found["problems"][0]


def test_batches_and_switches_between_loras_are_told_with_the_order_that_is_better(tmp_path: Path, model: Path) -> None:
    """Twelve rows of three LoRAs by turns, in shards of four rows and batches of two."""
    values = [f"lora{row % 3}.safetensors:0.5" for row in range(12)]
    runs.write_manifest(tmp_path, 12, {"lora": values})
    found = plan.look(config(tmp_path, model), calibrate=False)
    by_turns = {"loras": 3, "batches": 9, "switches": 9, "padding": 6}
    in_order = {"loras": 3, "batches": 6, "switches": 3, "padding": 0}
    assert found.to_dict(None)["loras"] == {"as_it_is": by_turns, "sorted": in_order}
    told = found.told(None)
    assert "3 different choices of LoRAs; batches: 9, empty places in them: 6, switches: 9" in told
    better = "the manifest would have batches: 6, empty places in them: 0, switches: 3"
    assert f"Sorted by the column 'lora' (ORDER BY lora), {better}" in told


def test_an_order_that_is_good_is_not_advised_against(tmp_path: Path, model: Path) -> None:
    """Nulls and lists have groups of their own; a list's order makes no other one."""
    values = [None] * 4 + [["b.safetensors", "a.safetensors"], ["a.safetensors", "b.safetensors"]] * 2
    runs.write_manifest(tmp_path, 8, {"lora": values})
    found = plan.look(config(tmp_path, model), calibrate=False)
    assert found.to_dict(None)["loras"]["as_it_is"] == {"loras": 2, "batches": 4, "switches": 2, "padding": 0}
    assert "ORDER BY" not in found.told(None)


def test_a_lora_in_other_words_is_the_same_lora(tmp_path: Path, model: Path) -> None:
    """A row may name a LoRA of the run, give its scale or the default one, or leave it to the run."""
    values = [None, ["ink"], ["ink:0.5"], ["ink:0.50"], [""], [], ["a.safetensors"], None]
    runs.write_manifest(tmp_path, 8, {"lora": values})
    job = plan.look(config(tmp_path, model), calibrate=False).job
    assert job
    named = dataclasses.replace(job.config, lora=("ink=ink.safetensors:0.5",))
    found = lora_batches.counted(dataclasses.replace(job, config=named))
    assert found
    assert vars(found[0]) == {"loras": 3, "batches": 5, "switches": 4, "padding": 2}


def test_without_a_column_of_loras_nothing_is_said_of_them(tmp_path: Path, model: Path) -> None:
    runs.write_manifest(tmp_path, 8)
    found = plan.look(config(tmp_path, model), calibrate=False)
    assert found.to_dict(None)["loras"] is None and "LoRA" not in found.told(None)


def test_a_lora_that_may_not_be_read_is_told_before_the_run(tmp_path: Path, model: Path) -> None:
    """Among the first rows; where most of them have one, the run is refused."""
    runs.write_manifest(tmp_path, 4, {"lora": ["/etc/a.safetensors", None, None, "a.bin"]})
    found = plan.look(config(tmp_path, model), calibrate=False)
    assert not found.problems and len(found.doomed) == 2
    assert "LoRA '/etc/a.safetensors' lies outside the places that LoRAs may come from" in found.doomed[0]
    assert "lora is 'a.bin', which is no .safetensors file" in found.doomed[1]
    runs.write_manifest(tmp_path, 4, {"lora": ["/etc/a.safetensors"] * 4})
    (problem,) = plan.look(config(tmp_path, model), calibrate=False).problems
    assert "4 of the first 4 rows have references or LoRAs that may not be read" in str(problem)
