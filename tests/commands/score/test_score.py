"""Scores are added beside an output: whole, once each, by what the receipt says; nothing of the output changes."""

import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from support import exports, runs, scorers
from vcf_batch.cli import main
from vcf_batch.commands.score import wanted as wants
from vcf_batch.errors import UsageError
from vcf_batch.output import lease
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.scores.store import ScoreStore

ROWS, FAILED = 10, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP, a DINOv2, the weights of LPIPS and an aesthetic head, all random."""
    folder = tmp_path_factory.mktemp("models")
    scorers.save_clip(folder / "clip")
    scorers.save_clip(folder / "other", seed=5)
    scorers.save_dino(folder / "dino")
    (folder / "lpips").mkdir()
    scorers.save_lpips(folder / "lpips")
    scorers.save_head(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows in three shards, one of them without an image, two without a reference, with triplets."""
    folder = tmp_path_factory.mktemp("source")
    manifest = runs.write_manifest(folder / "in", ROWS, {"Quality": [1.0] * ROWS})
    runs.write_output(manifest, folder / "out", 4, failed={FAILED}, triplets=True)
    return folder / "out"


@pytest.fixture
def output(made: Path, tmp_path: Path, restored_torch: None) -> Path:
    """A copy of the output that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def score(output: Path, *wanted: str) -> dict[str, Any]:
    """The document of a call that succeeds."""
    result = call("score", output, *itertools.chain.from_iterable(("--with", each) for each in wanted), "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def own_files(output: Path) -> dict[str, bytes]:
    """The files of an output itself."""
    return {name: data for name, data in exports.tree(output).items() if not name.startswith("_scores")}


def values(output: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a score, in order."""
    return [row for path in sorted(output.glob(f"_scores/{name}/*.parquet")) for row in pq.read_table(path).to_pylist()]


def parquets(output: Path) -> dict[str, bytes]:
    return {name: data for name, data in exports.tree(output / "_scores").items() if name.endswith(".parquet")}


def test_every_kind_is_added_and_nothing_else_changes(output: Path, models: Path) -> None:
    """Each score has a value for each image it applies to, in a parquet with the keys of the shard's rows, and a
    receipt that names the models and the shard's parquet. Tars, parquets, receipts and run.json keep every byte."""
    before = own_files(output)
    done = score(
        output,
        f"clip={models}/clip",
        f"clip:second={models}/other",
        f"dino={models}/dino",
        f"lpips-alex={models}/lpips",
        "texture",
    )
    assert done["scores"] == {
        "clip": ["clip_to_prompt", "clip_to_reference"],
        "second": ["second_to_prompt", "second_to_reference"],
        "dino": ["dino_to_reference", "dino_to_twin"],
        "lpips_alex": ["lpips_alex"],
        "texture": ["texture"],
    }
    assert (done["shards"], done["scored"], done["without"]) == (3, 3, 0)
    assert own_files(output) == before
    rows = runs.rows_of(output)
    for name, columns in done["scores"].items():
        found = values(output, name)
        assert [row["key"] for row in found] == [row["key"] for row in rows]
        for column in columns:
            applies = [
                row["status"] == "success" and (row["reference"] is not None or column.endswith(("prompt", "twin")))
                for row in rows
            ]
            assert [row[column] is not None for row in found] == applies, column
    receipt = json.loads((output / "_scores/dino/00001_stats.json").read_text())
    shard = json.loads((output / "00001_stats.json").read_text())
    assert receipt["of"] == shard["files"]["parquet"]["sha256"]
    assert len(receipt["fields"]["models"]["model"]) == 64
    assert receipt["device"]["dtype"] == "float32"
    assert values(output, "clip")[0]["clip_to_prompt"] != values(output, "second")[0]["second_to_prompt"]


def test_aesthetic_heads_take_their_own_clip(output: Path, models: Path) -> None:
    """The head and the CLIP that it was trained on are named apart, and both stand in the receipt."""
    head = f"aesthetic={models}/{scorers.AESTHETIC_FILE}"
    result = call("score", output, "--with", head, "--aesthetic-clip", models / "clip")
    assert result.exit_code == 0, result.output
    receipt = json.loads((output / "_scores/aesthetic/00000_stats.json").read_text())
    assert {*receipt["fields"]["models"]} == {"clip", "head"} and receipt["counts"] == {"aesthetic": 3}


def test_a_function_of_ones_own(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported by its path from the working directory, and sees rows with all of their columns."""
    code = (
        "def f(images, rows):\n    return {'own': [5 for r in rows if r['label']], 'width': [i.width for i in images]}"
    )
    (tmp_path / "my_own_scores.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    done = score(output, "python:own=my_own_scores:f")
    assert done["scores"] == {"own": ["own", "own_width"]}
    assert values(output, "own")[0] == {"key": "000000000", "own": 5.0, "own_width": 32.0}
    (tmp_path / "my_own_scores.py").write_text(code + "  # changed")
    assert call("score", output, "--with", "python:own=my_own_scores:f").exit_code == 4


def test_a_score_is_added_once(output: Path, models: Path) -> None:
    """Another call scores what is missing, and only that; the bytes are those of one call."""
    score(output, "texture", f"clip={models}/clip")
    before = exports.tree(output)
    assert score(output, "texture", f"clip={models}/clip")["scored"] == 0
    assert exports.tree(output) == before
    (output / "_scores/clip/00001_stats.json").unlink()
    (output / "_scores/texture/00002.parquet").write_bytes(b"short")
    assert score(output, "texture", f"clip={models}/clip")["scored"] == 2
    assert parquets(output) == {name[8:]: data for name, data in before.items() if name[8:] in parquets(output)}


@pytest.mark.parametrize("after", [False, True])
def test_killed_anywhere_and_rerun_it_ends_with_the_same_bytes(output: Path, models: Path, after: bool) -> None:
    """A score is there whole or not at all: whatever change a call dies at, before or after it."""
    wanted = ("texture", f"clip={models}/clip")
    score(output, *wanted)
    expected = parquets(output)
    steps = 0
    while True:
        shutil.rmtree(output / "_scores")
        if not runs.dies_in_scores(lambda: score(output, *wanted), steps, after):
            break
        opened, store = Output(str(output)), ScoreStore(str(output))
        for definition in store.definitions():
            for receipt in opened.examine():
                assert isinstance(receipt, Receipt)
                assert not isinstance(store.found(definition, receipt.shard, receipt.parquet_hash), Damaged)
        score(output, *wanted)
        assert parquets(output) == expected
        steps += 7
    assert steps > 14


def test_a_repaired_shard_is_scored_again(output: Path, models: Path) -> None:
    """The scores of a shard that was replaced count as absent, and those of the others stay."""
    score(output, "texture")
    files = runs.Files(output, "00001")
    files.edit(0, seed=77)
    files.write()
    assert score(output, "texture")["scored"] == 1


def test_other_settings_under_the_same_name_are_refused(output: Path, models: Path) -> None:
    """With both values and the remedy; what is there stays."""
    score(output, f"clip={models}/clip")
    before = exports.tree(output)
    result = call("score", output, "--with", f"clip={models}/other")
    assert result.exit_code == 4 and "models:" in result.output and "--with clip:NAME=" in result.output
    assert exports.tree(output) == before


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("clap=x", "did you mean 'clip'?"),
        ("zebra=x", "The kinds are clip, dino"),
        ("clip", "lacks its model"),
        ("texture=x", "takes no model"),
        ("python=module", "give module:function"),
        ("texture:Upper", "a name has small letters"),
        ("texture:calibration", "not 'calibration'"),
        ("texture:lpips", "is also one of"),
        ("texture:label", "is also one of"),
        ("texture:quality", "is also one of"),  # `Quality`, which is the same name in SQL
        ("clip=no/such/folder", "is not a folder here"),
        ("python=no_such_module_at_all:f", "there is no module"),
    ],
)
def test_what_cannot_be_had_is_refused(output: Path, wanted: str, message: str) -> None:
    """Before anything is written, with value, limit and remedy."""
    result = call("score", output, "--with", wanted)
    assert result.exit_code == 2 and message in result.output, result.output
    assert not (output / "_scores").exists()


def test_names_are_given_once(output: Path) -> None:
    """Two scores of one name, in one call, are refused; and so is a call for nothing."""
    with pytest.raises(UsageError, match="two scores have the name 'texture'"):
        wants.resolve([wants.parse("texture"), wants.parse("texture")], None, [])
    assert "--with is missing" in call("score", output).output


def test_a_clip_for_no_head_is_refused(output: Path) -> None:
    """Searches for duplicates have a CLIP of their own."""
    for wanted in ("texture", "duplicates"):
        result = call("score", output, "--with", wanted, "--aesthetic-clip", "x")
        assert result.exit_code == 2 and "--aesthetic-clip x is for an aesthetic head" in result.output


def test_a_run_at_work_is_not_disturbed(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output's lease is taken, so nothing is scored while a run owns the output."""
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.1)
    with lease.hold(str(output)):
        result = call("score", output, "--with", "texture")
    assert result.exit_code == 4 and "is held by another run" in result.output
    assert not (output / "_scores").exists()


def test_an_unfinished_output_is_scored_as_far_as_it_goes(output: Path) -> None:
    """Shards that are not generated yet are told with the exit code 6, damaged ones with 5; a later call goes on."""
    (output / "00002_stats.json").unlink()
    result = call("score", output, "--with", "texture")
    assert result.exit_code == 6 and "1 shard is left out" in result.output
    (output / "00001.tar").write_bytes(b"")
    assert call("score", output, "--with", "texture").exit_code == 5
    assert [path.stem for path in sorted(output.glob("_scores/texture/*.parquet"))] == ["00000", "00001"]


def test_a_reference_that_is_gone_costs_its_own_scores_alone(made: Path, tmp_path: Path, restored_torch: None) -> None:
    """The row has no value, and the receipt and the summary say why."""
    source = Path(shutil.copytree(made.parent, tmp_path / "source"))
    manifest = source / "in" / "manifest.parquet"
    (source / "in" / "reference1.png").unlink()
    result = call("score", source / "out", "--with", "texture", "--manifest", manifest)
    assert result.exit_code == 0 and "images could not be scored" in result.output
    receipt = json.loads((source / "out/_scores/texture/00000_stats.json").read_text())
    assert receipt["without"] == 1 and "reference1.png" in receipt["reason"]
    assert [row["texture"] is None for row in values(source / "out", "texture")][:4] == [False, True, False, True]


def test_the_manifest_is_needed_for_references_alone(made: Path, tmp_path: Path, models: Path) -> None:
    """Without it, a score of the images alone is added; one that needs references is refused with the remedy."""
    source = Path(shutil.copytree(made.parent, tmp_path / "source"))
    out = source / "out"
    shutil.move(made.parent / "in", made.parent / "away")
    try:
        result = call("score", out, "--with", "texture")
        assert result.exit_code == 2 and "--manifest" in result.output
        head = f"aesthetic={models}/{scorers.AESTHETIC_FILE}"
        assert call("score", out, "--with", head, "--aesthetic-clip", models / "clip").exit_code == 0
    finally:
        shutil.move(made.parent / "away", made.parent / "in")
