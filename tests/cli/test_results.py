"""What commands print when they end well: words, or one JSON document; and the files that a report writes."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from support import runs
from vcf_batch.cli import main
from vcf_batch.models.cache import CACHE_VARIABLE
from vcf_batch.models.names import ADAPTERS, ADAPTERS_ID, PRESETS
from vcf_batch.models.resolution import TINY
from vcf_batch.training import ray_training
from vcf_batch.training.ray_training import TrainingSummary


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def document(*arguments: object, code: int = 0) -> dict[str, Any]:
    """What a command prints with --json: one document, and nothing else on standard output."""
    result = call(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Ten rows in three shards."""
    runs.write_output(runs.write_manifest(tmp_path / "in", 10), tmp_path / "out", 4)
    return tmp_path / "out"


def test_a_report_writes_the_files_that_are_named(output: Path, tmp_path: Path) -> None:
    """Without a name the page in OUTPUT; with --png the picture instead; with --out and --png both."""
    page, picture = tmp_path / "page.html", tmp_path / "sheet.png"
    assert call("report", output, "--png", picture).stdout == f"{picture}\n"
    assert Image.open(picture).format == "PNG"
    assert not (output / "index.html").exists()
    assert call("report", output, "--png", picture, "--out", page).stdout == f"{page}\n{picture}\n"
    assert page.read_text().startswith("<!doctype html>")
    assert not (output / "index.html").exists()
    assert document("report", output) == {"page": str(output / "index.html")}
    assert document("report", output, "--png", picture) == {"picture": str(picture)}


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("report", "{}", "--png", "sheet.jpg"), ".png"),
        (("report", "{}", "--out", "page.png"), ".html"),
        (("report", "{}", "--out", "page.html.gz"), ".html"),
        (("contact-sheet", "{}", "--out", "sheet.webp"), ".png"),
        (("preview", "no.parquet", "--out", "sheet.JPG"), ".png"),
    ],
)
def test_no_file_is_written_under_the_name_of_another_kind(
    arguments: tuple[str, ...], wanted: str, output: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A PNG is not written as x.jpg, nor a page as x.png: exit code 2 with the ending to use, before any work."""
    monkeypatch.chdir(tmp_path)
    result = call(*(argument.format(output) for argument in arguments))
    assert result.exit_code == 2 and f"give it a name that ends in {wanted}" in result.stderr
    assert not (tmp_path / arguments[-1]).exists()


def test_the_picture_of_a_report_takes_a_manifest_that_has_moved(output: Path, tmp_path: Path) -> None:
    (tmp_path / "in").rename(tmp_path / "moved")
    picture = tmp_path / "sheet.png"
    assert call("report", output, "--png", picture).exit_code == 2
    assert call("report", output, "--png", picture, "--manifest", tmp_path / "moved/manifest.parquet").exit_code == 0
    assert picture.exists()


def test_rows_of_a_report_are_those_of_the_picture(output: Path) -> None:
    result = call("report", output, "--rows", 2)
    assert (result.exit_code, "--rows 2 is the number of samples in the picture" in result.stderr) == (2, True)


def test_models_are_listed_with_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every name of the one table, its licence, how a preset becomes a model, and that the cache has none of them."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    words = call("model", "list").stdout
    models = {model["name"]: model for model in document("model", "list")["models"]}
    assert models.keys() == {TINY, *PRESETS, *ADAPTERS}
    assert models[TINY]["needs"] is None
    assert {name for name, model in models.items() if model["cached"]} == {TINY}
    for name, (base, encoder, licence, gigabytes, adapter) in PRESETS.items():
        assert (models[name]["base"], models[name]["image_encoder"]) == (base, encoder)
        assert (models[name]["licence"], models[name]["gigabytes"]) == (licence, gigabytes)
        assert adapter is None or f"--fusion ip_adapter --ip-adapter {adapter})" in models[name]["needs"]
        assert f"model train --model {name}" in models[name]["needs"]
        assert f"model assemble --base {name}" in models[name]["needs"]
    for name, known in ADAPTERS.items():
        assert models[name]["image_encoder"] == f"{ADAPTERS_ID}:{known.encoder}"
        assert models[name]["gigabytes"] == known.gigabytes
        assert models[name]["needs"].endswith(f"--model {known.base} --fusion ip_adapter --ip-adapter {name}")
    for model in models.values():
        assert f"{model['name']}: {model['what']}\n  licence {model['licence']}; " in words


def test_a_manifest_is_a_document(tmp_path: Path) -> None:
    """With the counts that the command tells people, and the first names of files that are left out."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n\na cat\n")
    (tmp_path / "a").write_bytes(runs.png(0))
    target = tmp_path / "m.parquet"
    made = document("manifest", target, "--prompts", tmp_path / "prompts.txt", "--references", tmp_path)
    assert made == {
        "manifest": str(target),
        "rows": 2,
        "prompts": 2,
        "duplicates": 1,
        "blank": 1,
        "seeds": None,
        "references": 1,
        "skipped": {"no image": {"files": 1, "first": ["prompts.txt"]}},
    }


def test_what_verify_finds_is_a_document(output: Path) -> None:
    """With the exit code and the message of the same command without --json."""
    whole = document("verify", output)
    counts = {"rows": 10, "shards": 3, "rows_read": 10, "shards_read": 3}
    assert whole == {"output": str(output), **counts, "damaged": False, "unfinished": 0, "findings": []}
    (output / "00001.tar").unlink()
    damaged = document("verify", output, code=5)
    [finding] = damaged["findings"]
    assert damaged["damaged"] and finding["is_damage"] and finding["place"] == "00001"
    words, result = call("verify", output), call("verify", output, "--json")
    assert words.stdout == f"00001: {finding['cause']}\n"
    assert words.stderr == result.stderr and "is damaged. To mend it" in words.stderr


def test_what_is_handed_on_is_a_document(output: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    whole = {"target": str(there), "damaged": {}, "unfinished": 0, "scores": {"copied": 0, "damaged": {}}}
    assert document("push", output, there) == {**whole, "copied": 3, "there": 0}
    assert document("push", output, there) == {**whole, "copied": 0, "there": 3}
    (output / "00001.tar").unlink()
    left_out = document("push", output, there, code=5)
    assert left_out == {**whole, "copied": 0, "there": 2, "damaged": {"00001": "00001.tar is missing"}}
    assert document("push", output, there, "--partial") == left_out
    assert document("card", output) == {"card": str(output / "README.md")}


def test_a_training_is_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    best = {"step": 2, "validation_loss": 1.0, "recall_at_1": 0.5, "recall_at_5": 1.0, "validation_pairs": 4}
    monkeypatch.setattr(ray_training, "run", lambda config: TrainingSummary(config.out, 2, 8, best, best, 1.0))
    found = document(
        "model", "train", "--model", "tiny", "--data", "captions", "--out", "s3://me:secret@bucket/aligner"
    )
    assert found == {
        "out": "s3://bucket/aligner",
        "steps": 2,
        "pairs": 8,
        "before": best,
        "best": best,
        "seconds": 1.0,
    }
