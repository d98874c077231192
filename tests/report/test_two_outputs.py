"""Two outputs are compared key by key: what improved, what got worse, and what only one of them has."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result

from support import exports, runs
from vcf_batch.cli import main
from vcf_batch.report.two_outputs import unpaired

ROWS = 10


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two outputs of a manifest with shards of other sizes; the second has other scores, and other failed rows."""
    folder = tmp_path_factory.mktemp("two")
    prompts = ["<b>evil</b>" if row == 2 else f"prompt {row}" for row in range(ROWS)]
    kinds = pa.array(["a", "b"] * 5, pa.large_string())  # as pandas and polars write texts
    manifest = runs.write_manifest(folder / "in", ROWS, {"prompt": prompts, "kind": kinds})  # type: ignore[dict-item]
    runs.write_output(manifest, folder / "first", 4, failed={3}, rejected={4})
    runs.write_output(manifest, folder / "second", 3, failed={5})
    files = runs.Files(folder / "second", "00000")
    files.edit_everywhere(1, clip_score=0.5)  # 0.0625 before
    files.edit_everywhere(2, clip_score=0.0)  # 0.125 before
    files.write()
    return folder / "first", folder / "second"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_rows_are_paired_by_their_keys(outputs: tuple[Path, Path]) -> None:
    """Whatever the shards; means are over the rows that both have, and changes are named by key."""
    result = call("report", *outputs, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["both"], told["first_alone"], told["second_alone"]) == (10, 0, 0)
    assert (told["same_image"], told["image_gained"], told["image_lost"]) == (7, 2, 1)
    score = told["scores"]["clip_score"]
    assert (score["rows"], score["better"], score["worse"]) == (7, 1, 1)
    assert score["improved"] == [{"key": "000000001", "first": 0.0625, "second": 0.5}]
    assert score["worsened"] == [{"key": "000000002", "first": 0.125, "second": 0.0}]
    first = [row / 16 for row in (0, 1, 2, 6, 7, 8, 9)]
    assert score["means"] == pytest.approx([sum(first) / 7, (sum(first) + 0.4375 - 0.125) / 7])


def test_a_page_shows_what_changed_most(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    """It is one file with pictures and no script; texts of the outputs are shown as text."""
    before = [exports.tree(output) for output in outputs]
    result = call("report", *outputs, "--out", tmp_path / "page.html")
    assert result.exit_code == 0 and "| clip_score (higher is better) | 7 |" in result.output
    text = (tmp_path / "page.html").read_text()
    assert "&lt;b&gt;evil" in text and "<b>evil" not in text and "<script" not in text
    assert text.count("data:image/webp") == 6
    assert [exports.tree(output) for output in outputs] == before


def test_rows_that_one_output_has(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    """They are counted; outputs without a common key are refused, and so is a contact sheet of two."""
    keys = {"sample_id": ["000000001", "x"]}
    runs.write_output(runs.write_manifest(tmp_path / "in", 2, keys), tmp_path / "some", 2)
    told = json.loads(call("report", outputs[0], tmp_path / "some", "--json").stdout)
    assert (told["both"], told["first_alone"], told["second_alone"]) == (1, 9, 1)
    keys = {"sample_id": ["x", "y"]}
    runs.write_output(runs.write_manifest(tmp_path / "in2", 2, keys), tmp_path / "none", 2)
    result = call("report", outputs[0], tmp_path / "none")
    assert result.exit_code == 2 and "have no key in common" in result.output
    assert call("report", *outputs, "--png", "x.png").exit_code == 2


def test_keys_of_other_prompts_are_counted(outputs: tuple[Path, Path], tmp_path: Path) -> None:
    """They are paired all the same, as keys alone decide; a reader is told that this says little."""
    assert json.loads(call("report", *outputs, "--json").stdout)["unlike"] == 0
    prompts = ["<b>evil</b>" if row == 2 else f"prompt {row}" for row in range(ROWS - 1)] + ["another"]
    runs.write_output(runs.write_manifest(tmp_path / "in", ROWS, {"prompt": prompts}), tmp_path / "other", 4)
    result = call("report", outputs[0], tmp_path / "other")
    assert result.exit_code == 0 and "; 1 of the keys in both are of other prompts or references" in result.output


def test_a_report_counts_rows_by_category(outputs: tuple[Path, Path]) -> None:
    """Before gates and after them, by each carried column of few values: ``label`` differs in each row."""
    assert call("report", outputs[0]).exit_code == 0
    text = (outputs[0] / "index.html").read_text()
    data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert data["categories"] == [{"name": "kind", "lines": [["a", 5, 1, 0, 4], ["b", 5, 0, 1, 4]]}]


def test_rows_that_wait_in_scratch_are_paired_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two outputs in opposite orders, each with keys of its own: nearly all rows wait, few of them in memory."""
    rows = 40
    for name, keys in (("first", range(rows)), ("second", reversed(range(5, rows + 5)))):
        own = [f"k{key}" for key in keys]
        runs.write_output(runs.write_manifest(tmp_path / f"{name}-in", rows, {"sample_id": own}), tmp_path / name, 7)
    told = []
    for most in (1000, 6, 1):
        monkeypatch.setattr(unpaired, "MOST_WAITING", most)
        told.append(json.loads(call("report", tmp_path / "first", tmp_path / "second", "--json").stdout))
        assert (told[-1]["both"], told[-1]["first_alone"], told[-1]["second_alone"]) == (35, 5, 5)
    means = [[mean for score in each["scores"].values() for mean in score.pop("means")] for each in told]
    assert told[0] == told[1] == told[2]
    assert means[1] == pytest.approx(means[0]) and means[2] == pytest.approx(means[0])


def test_few_rows_are_in_memory_while_they_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many have no partner, those of one file come back together."""
    monkeypatch.setattr(unpaired, "MOST_WAITING", 50)
    waiting = unpaired.UnpairedRows(str(tmp_path), 2000)
    most = 0
    for number in range(1000):
        for at, name in enumerate("ab"):
            assert waiting.meet(at, unpaired.PairedRow(number, {"key": f"{name}{number}"})) is None
            most = max(most, sum(map(len, waiting._waiting)))
    assert most <= 50
    assert [*waiting.pairs()] == [] and waiting.alone == [1000, 1000]
    sizes = [len([*unpaired._read(path)]) for path in tmp_path.iterdir()]
    assert len(sizes) == 40 and sum(sizes) == 2000 and max(sizes) < 100
