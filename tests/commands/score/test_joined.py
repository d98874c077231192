"""Scores are further columns of an output's rows, for every command that looks at rows; damage to them is named."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import vcf_batch
from support import exports, runs
from vcf_batch import storage
from vcf_batch.cli import main
from vcf_batch.commands.repair import Repair
from vcf_batch.errors import DamageFound, Unfinished, UsageError
from vcf_batch.output.output import Output
from vcf_batch.output.scores.store import ScoreStore


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, restored_torch: None) -> Path:
    """Ten rows in three shards, one without an image and two without a reference, with a score."""
    folder = tmp_path_factory.mktemp("source")
    manifest = runs.write_manifest(folder / "in", 10)
    runs.write_output(manifest, folder / "out", 4, failed={3})
    assert call("score", folder / "out", "--with", "texture").exit_code == 0
    return folder / "out"


@pytest.fixture
def output(scored: Path, tmp_path: Path) -> Path:
    """A copy of the output that a test may change."""
    return Path(shutil.copytree(scored, tmp_path / "out"))


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def values(output: Path) -> dict[str, float | None]:
    """The score of each row, by key."""
    tables = [pq.read_table(path) for path in sorted(output.glob("_scores/texture/*.parquet"))]
    return {row["key"]: row["texture"] for table in tables for row in table.to_pylist()}


def middle(output: Path) -> float:
    there = sorted(value for value in values(output).values() if value is not None)
    return there[len(there) // 2]


def test_an_export_selects_by_a_score_and_hands_it_on(output: Path, tmp_path: Path) -> None:
    """The condition knows the column, and rows of the new dataset have it, as an output has its own columns."""
    limit = middle(output)
    exports.make(tmp_path / "t", output, split="train=1", where=f"texture >= {limit}")
    found = {row["key"]: row["texture"] for row in exports.rows(tmp_path / "t")}
    assert found == {key: value for key, value in values(output).items() if value is not None and value >= limit}
    assert 0 < len(found) < 7
    assert call("verify", tmp_path / "t").exit_code == 0


def test_croissant_says_what_columns_of_scores_hold(output: Path, tmp_path: Path) -> None:
    """Each column that the manifest does not have is described by what has added it."""
    exports.make(tmp_path / "t", output, split="train=1")
    (records,) = json.loads((tmp_path / "t/croissant.json").read_text())["recordSet"]
    told = {field["name"]: field["description"] for field in records["field"]}
    score = json.loads((output / "_scores/texture.json").read_text())
    assert told["texture"] == score["columns"][0]["meaning"]
    assert told["run_fingerprint"] == "The fingerprint of the run that has made the row."
    assert [name for name, meaning in told.items() if meaning == "From the manifest."] == ["label"]


def test_outputs_with_different_scores_of_one_name_are_not_merged(output: Path, tmp_path: Path) -> None:
    """One column would hold values of two kinds."""
    manifest = runs.write_manifest(tmp_path / "in", 3, {"sample_id": ["x", "y", "z"]})
    runs.write_output(manifest, tmp_path / "other", 3)
    assert call("score", tmp_path / "other", "--with", "texture").exit_code == 0
    (there,) = ScoreStore(str(output)).definitions()
    definition = tmp_path / "other/_scores/texture.json"
    definition.write_bytes(dataclasses.replace(there, fields={**there.fields, "size": 512}).to_json())
    with pytest.raises(UsageError, match=r"the score 'texture' of .*other is another than that of .*out: size is 512"):
        exports.make(tmp_path / "t", output, tmp_path / "other", split="train=1", partial=True)
    # What the message asks for. A definition alone is no obstacle.
    shutil.rmtree(tmp_path / "other/_scores/texture")
    exports.make(tmp_path / "t", output, tmp_path / "other", split="train=1", partial=True)
    exports.make(tmp_path / "u", tmp_path / "other", output, split="train=1", partial=True)
    croissant = json.loads((tmp_path / "u/croissant.json").read_text())
    assert any(field["name"] == "texture" for field in croissant["recordSet"][0]["field"])


def test_an_output_without_scores_is_exported_as_before(output: Path, tmp_path: Path) -> None:
    """Another score makes another export, which is refused in the same folder; columns of other outputs are null."""
    exports.make(tmp_path / "t", output, split="train=1")
    shutil.rmtree(output / "_scores")
    result = call("export", output, tmp_path / "t", "--split", "train=1")
    assert result.exit_code == 4 and "others there, or they have changed since" in result.output


def test_shards_without_a_score_are_not_exported_in_silence(output: Path, tmp_path: Path) -> None:
    """A row of a shard that lacks a score would be left out by a condition on it, without a word."""
    (output / "_scores/texture/00001_stats.json").unlink()
    with pytest.raises(Unfinished, match=r"1 finished shard of .* without the score 'texture'"):
        exports.make(tmp_path / "t", output, split="train=1")
    done = exports.make(tmp_path / "t", output, split="train=1", partial=True)
    assert "without the score" in done.lines[0]
    found = {row["key"]: row["texture"] for row in exports.rows(tmp_path / "t")}
    assert found["000000005"] is None and found["000000000"] == values(output)["000000000"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_repair_selects_by_a_score(output: Path, processes: int) -> None:
    """``repair --where`` knows the column."""
    limit = middle(output)
    redo = Repair(Output(str(output)), f"texture < {limit}", processes=processes).rows(lambda line: None)
    chosen = {f"{index * 4 + at:09d}" for index, mask in redo.items() for at, is_chosen in enumerate(mask) if is_chosen}
    assert chosen == {key for key, value in values(output).items() if value is not None and value < limit}


def test_rows_in_python_have_the_scores(output: Path) -> None:
    """``Output.rows`` has the column, in its rows and its condition."""
    opened = vcf_batch.Output(output)
    assert {row["key"]: row["texture"] for row in opened.rows()} == values(output)
    assert [row["key"] for row in opened.rows("texture IS NULL")] == [
        key for key, value in values(output).items() if value is None
    ]


def test_status_and_report_show_scores(output: Path) -> None:
    """``status`` has the number of shards; the report has distribution, mean and values."""
    assert "texture of 3 shards" in call("status", output).output
    assert json.loads(call("status", output, "--json").stdout)["scores"] == {"texture": {"shards": 3}}
    assert call("report", output).exit_code == 0
    text = (output / "index.html").read_text()
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    (score,) = [each for each in data["scores"] if each["added"]]
    there = [value for value in values(output).values() if value is not None]
    assert (score["name"], score["count"]) == ("texture", len(there))
    assert score["mean"] == pytest.approx(sum(there) / len(there), abs=1e-4)
    assert all("texture" in sample["scores"] for sample in data["samples"])


def _other_value(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(1, "texture", pa.array([0.5] * table.num_rows)), path)


def _other_key(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(0, "key", pa.array([f"x{row}" for row in range(table.num_rows)])), path)
    _match(path)


def _no_rows(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    _match(path)


def _match(path: Path) -> None:
    """Let the receipt match the file, as someone does who knows how."""
    receipt = path.with_name(f"{path.stem}_stats.json")
    entry = storage.digest(str(path))
    there = json.loads(receipt.read_text()) | {"parquet": {"size": entry.size, "sha256": entry.sha256}}
    receipt.write_text(json.dumps(there))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "00001.parquet is missing"),
        (lambda path: path.write_bytes(b"PAR1"), "has 4 bytes, its receipt says"),
        (_other_value, "its receipt says"),
        (_other_key, "other keys than the shard"),
        (_no_rows, "has 1 rows of key, texture; the shard has 4"),
        (lambda path: path.with_name("00001_stats.json").write_text("{"), "is damaged"),
        (lambda path: path.parent.with_name("texture.json").write_text("{}"), "texture.json is damaged"),
    ],
    ids=["missing", "short", "value", "keys", "rows", "receipt", "definition"],
)
def test_damage_to_scores_is_named(output: Path, damage: Any, message: str) -> None:
    """``verify`` names it with the remedy and exit code 5, and a rerun of ``score`` after it mends it."""
    damage(output / "_scores/texture/00001.parquet")
    result = call("verify", output)
    assert result.exit_code == 5 and message in result.output
    assert "nothing else" in result.output
    shutil.rmtree(output / "_scores")
    assert call("score", output, "--with", "texture").exit_code == 0
    assert call("verify", output).exit_code == 0


def test_scores_of_other_rows_are_never_joined(output: Path) -> None:
    """Keys are compared, so that no score is given to another row."""
    _other_key(output / "_scores/texture/00001.parquet")
    with pytest.raises(DamageFound, match="other keys"):
        [*vcf_batch.Output(output).rows()]


def test_a_repaired_shard_has_no_scores(output: Path) -> None:
    """A shard that was replaced has null, and ``verify`` notes that it is to be scored again."""
    files = runs.Files(output, "00001")
    files.edit_everywhere(1, clip_score=0.25)
    files.write()
    found = {row["key"]: row["texture"] for row in vcf_batch.Output(output).rows()}
    assert [found[f"{row:09d}"] for row in range(4, 8)] == [None] * 4 and found["000000000"] is not None
    assert "1 finished shard without it, or replaced since" in call("verify", output).output
