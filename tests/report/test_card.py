"""The dataset card: what it says is so, its snippets run, and nobody's own words are lost."""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from support import runs
from vcf_batch.cli import main
from vcf_batch.errors import DamageFound, UsageError
from vcf_batch.output import receipts
from vcf_batch.output.output import Output
from vcf_batch.output_columns import columns_of
from vcf_batch.report import card


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows in three shards, one failed, with a column that is named to break a table."""
    folder = tmp_path_factory.mktemp("card")
    manifest = runs.write_manifest(folder / "in", 10, {"a|b`<i>": list(range(10))})
    runs.write_output(manifest, folder / "out", 4, failed={1})
    return folder / "out"


@pytest.fixture
def text(output: Path) -> str:
    return card.render(Output(str(output)), "cc-by-4.0")


def test_hugging_face_reads_the_header(text: str, output: Path) -> None:
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "cc-by-4.0"
    assert header["size_categories"] == ["n<1K"]
    assert header["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "*.tar"}]}]
    assert "license" not in yaml.safe_load(card.render(Output(str(output))).split("---\n")[1])


def test_every_column_is_told(text: str) -> None:
    shown = re.findall(r"^\| `(.*?)` \| `.*?` \| (.*?) \|$", text, re.MULTILINE)
    told = [(column.name, column.meaning) for column in columns_of().values()]
    assert shown[: len(told)] == told
    assert "| `label` | `string` | from the manifest |" in text
    assert "| `a b <i>` | `int64` | from the manifest |" in text


def test_counts_and_scores_are_those_of_the_run(text: str) -> None:
    assert "| rows asked for | 10 |\n| samples | 9 |" in text
    assert "Without an image: 1 rows that failed, 0 that were rejected." in text
    mean = sum({*range(10)} - {1}) / 16 / 9
    assert f"| `clip_score` | 9 | {mean:.3f} | " in text
    assert "| `lpips` | 0 | - | - | - | - |" in text


def test_the_settings_are_those_that_were_used(text: str) -> None:
    """Strength included, which most runs leave to the model."""
    assert "fusion `concat`, strength `1.0`, " in text
    assert "guidance_scale `5.0`, " in text


def test_images_of_the_embedded_model_are_called_so(text: str, tmp_path: Path) -> None:
    """Whoever finds such a dataset on the Hub reads that its images show shapes, whatever the prompts say."""
    assert "embedded test model" not in text
    runs.write_output(runs.write_manifest(tmp_path / "in", 4), tmp_path / "out", 4, model="tiny")
    told = card.render(Output(str(tmp_path / "out")))
    assert "Made by an embedded test model, which draws circle, square, triangle, " in told
    assert "| model | `tiny` | " in told


def test_a_selection_is_called_one(text: str, output: Path) -> None:
    """Scores of samples that passed gates are not those of the model."""
    assert "Selected" not in text
    selected = Output(str(output), {"min_clip_score": 0.3, "max_lpips": 0.2, "attempts": 5})
    assert (
        "Selected: the first of up to 5 attempts at each row with clip_score >= 0.3 and lpips <= 0.2."
        in card.render(selected)
    )


def test_a_card_is_replaced_only_as_long_as_nobody_changed_it(output: Path) -> None:
    def call(*arguments: str) -> int:
        return CliRunner().invoke(main, ["card", str(output), *arguments]).exit_code

    path = output / "README.md"
    path.unlink(missing_ok=True)
    assert (call(), call("--license", "mit")) == (0, 0)
    mine = path.read_text().replace("Bias", "My bias")
    path.write_text(mine)
    assert call() == 2
    assert path.read_text() == mine
    assert call("--force") == 0
    path.write_text("# My own\n")
    assert call() == 2
    assert path.read_text() == "# My own\n"


def test_rows_of_damaged_shards_are_told_from_those_that_are_not_generated_yet(output: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(output, tmp_path / "copy")
    (copy / "00001.tar").write_bytes(b"short")
    (copy / "00002_stats.json").unlink()
    text = card.render(Output(str(copy)))
    assert "that were rejected. 4 more are in damaged shards. 2 more are not generated yet." in text
    (copy / "00000.parquet").unlink()
    with pytest.raises(DamageFound, match=r"no shard that is whole; of shard 00000, 00000\.parquet is missing"):
        card.render(Output(str(copy)))


def test_the_only_shard_may_be_replaced_while_a_card_is_written(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repair takes its receipt away for a moment."""
    monkeypatch.setattr(receipts, "read", lambda url: iter(()))
    with pytest.raises(UsageError, match="no finished shard to describe; try again"):
        card.render(Output(str(output)))
