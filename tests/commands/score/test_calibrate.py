"""Scores are calibrated on an output's own rows, and gates take their limits from it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from support import exports, runs, scorers
from vcf_batch.cli import main
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import UsageError
from vcf_batch.output.scores import calibration

ROWS = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, restored_torch: None) -> Path:
    """A run of thirty rows over four prompts and three references, a fifth of them without a reference."""
    folder = tmp_path_factory.mktemp("calibrated")
    runs.save_model(folder / "model")
    scorers.save_clip(folder / "clip", seed=7)
    manifest = runs.write_manifest(folder / "in", ROWS)
    runs.generate(manifest, folder / "out", folder / "model", steps=1, shard_size=12)
    before = exports.tree(folder / "out")
    result = call("score", folder / "out", "--calibrate", "--with", f"clip={folder}/clip", "--with", "texture")
    assert result.exit_code == 0, result.output
    assert {name: data for name, data in exports.tree(folder / "out").items() if "_scores" not in name} == before
    (folder / "told.txt").write_text(result.output)
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_every_score_is_measured_on_both_kinds_of_pairs(place: Path) -> None:
    """Those of the run, by its own judge, and those that are added; pairs with the same prompt or reference first."""
    found = calibration.of_output(str(place / "out"))
    assert found and found.rows == ROWS
    assert {name: each.against for name, each in found.scores.items()} == {
        "clip_score": "prompt",
        "clip_reference": "reference",
        "clip_to_prompt": "prompt",
        "clip_to_reference": "reference",
        "texture": "reference",
    }
    references = 24  # of 30 rows, every fifth is text only
    for each in found.scores.values():
        images = ROWS if each.against == "prompt" else references
        assert (each.shared, each.other) == (images, 4 * images)
        assert each.low is not None and each.high is not None and each.low <= each.auc <= each.high
        assert each.thresholds["0.01"] is None or each.other >= 100
        assert each.thresholds["0.1"] is not None
    assert found.scores["clip_reference"].held > 0
    told = (place / "told.txt").read_text()
    assert "| clip_to_reference | reference |" in told


def test_the_values_are_those_of_the_rows(place: Path) -> None:
    """The share of images that a limit keeps is that of the column in the output."""
    found = calibration.of_output(str(place / "out"))
    assert found
    limit = found.scores["clip_reference"].thresholds["0.1"]
    assert limit
    values = [row["clip_reference"] for row in runs.rows_of(place / "out") if row["clip_reference"] is not None]
    kept = sum(value >= limit.limit for value in values) / len(values)
    assert kept == pytest.approx(limit.accepted, abs=1.5 / len(values))


def test_the_same_output_gives_the_same_file(place: Path, tmp_path: Path) -> None:
    """Byte for byte: pairs are chosen by hashes, not by chance. The report shows the table."""
    out = Path(shutil.copytree(place / "out", tmp_path / "out"))
    before = (out / "_scores/calibration.json").read_bytes()
    wanted = ("--with", f"clip={place}/clip", "--with", "texture")
    assert call("score", out, "--calibrate", *wanted, "--manifest", place / "in" / "manifest.parquet").exit_code == 0
    assert (out / "_scores/calibration.json").read_bytes() == before
    assert call("report", out, "--manifest", place / "in" / "manifest.parquet").exit_code == 0
    data = json.loads((out / "index.html").read_text().partition('id="data">')[2].partition("</script>")[0])
    assert len(data["calibration"]) == 6 and data["calibration"][1][0] == "clip_score"
    assert call("verify", out, "--manifest", place / "in" / "manifest.parquet").exit_code == 0


def settled(place: Path, output: Path, **options: Any) -> Any:
    return runs.settled(place / "in" / "manifest.parquet", output, place / "model", steps=1, **options)


def test_a_gate_takes_its_limit_from_a_calibration(place: Path, tmp_path: Path) -> None:
    """The number is settled before the run, and is the number that the fingerprint covers."""
    url = calibration.place(str(place / "out"))
    job = settled(place, tmp_path / "a", min_clip_reference="far=0.1", calibration=url)
    limit = calibration.read(url).scores["clip_reference"].thresholds["0.1"]
    assert limit and job.config.min_clip_reference == limit.limit and job.config.calibration is None
    plain = settled(place, tmp_path / "a", min_clip_reference=limit.limit)
    assert job.fingerprint == plain.fingerprint and job.fields["min_clip_reference"] == limit.limit


def test_limits_that_a_calibration_does_not_have_are_refused(place: Path, tmp_path: Path) -> None:
    """With the value, the limit and the remedy."""
    url = calibration.place(str(place / "out"))
    scorers.save_clip(tmp_path / "judge", seed=9)
    refused: dict[str, dict[str, Any]] = {
        "has no lpips": {"max_lpips": "far=0.1"},
        "too few for: it takes 100": {"min_clip_reference": "far=0.01"},
        "by another model": {"min_clip_reference": "far=0.1", "judge": str(tmp_path / "judge")},
        "no gate names a share": {"min_clip_reference": 0.5},
    }
    for message, options in refused.items():
        lpips = {"lpips": "alex", "lpips_weights": str(_lpips(tmp_path))} if "lpips" in message else {}
        with pytest.raises(UsageError, match=message):
            settled(place, tmp_path / "b", calibration=url, **options, **lpips)
    with pytest.raises(UsageError, match="cannot be read"):
        settled(place, tmp_path / "b", calibration=str(tmp_path / "none.json"), min_clip_reference="far=0.1")


def _lpips(folder: Path) -> Path:
    (folder / "lpips").mkdir(exist_ok=True)
    return scorers.save_lpips(folder / "lpips")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_clip_score": "far=0.05"}, "name the file that"),
        ({"min_clip_score": "far=0.02", "calibration": "c"}, "one of far=0.01, far=0.05, far=0.1"),
        ({"min_clip_score": "0.3", "calibration": "c"}, "it must be a number"),
    ],
)
def test_a_share_is_one_that_is_calibrated(options: dict[str, Any], message: str) -> None:
    """Anything else is refused before a model is looked for."""
    with pytest.raises(UsageError, match=message):
        RunConfig(manifest="m", output="o", **options)
    assert call("generate", "m", "o", "--min-clip-score", "close").exit_code == 2
