"""Scores are handed on with their shards, each receipt behind its file, and a push that was cut goes on."""

import itertools
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from support import exports, hub_uploads, runs, scored_here
from support.hub_uploads import UploadHub
from vcf_batch import storage
from vcf_batch.cli import main
from vcf_batch.commands.push import push
from vcf_batch.commands.score.check import check_scores
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Damaged, Receipt
from vcf_batch.output.scores.calibration import Calibration
from vcf_batch.output.scores.store import ScoreStore
from vcf_batch.pool import scoring


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, restored_torch: None) -> Path:
    """Ten rows in three shards, one without an image, with a score of numbers, one of keys, and a calibration."""
    folder = tmp_path_factory.mktemp("source")
    runs.write_output(runs.write_manifest(folder / "in", 10), folder / "out", 4, failed={3})
    for path in sorted((folder / "out").glob("0*.parquet")):
        files = runs.Files(folder / "out", path.stem)
        for row in range(files.table.num_rows):
            files.edit(row, phash="0" * 16)
        files.write()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", scored_here.score)
        assert call("score", folder / "out", "--with", "texture", "--with", "duplicates").exit_code == 0
    (folder / "out/_scores/calibration.json").write_bytes(Calibration("f" * 64, 0).to_json())
    return folder / "out"


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[UploadHub]]:
    with hub_uploads.running(tmp_path / "hub") as running:
        yield running


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def scores(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in exports.tree(folder).items() if name.startswith("_scores")}


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_scores_are_handed_on_with_their_shards(
    output: Path, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Definitions, files, receipts and calibration have the same bytes; a second push copies none, and back again."""
    there = str(tmp_path / "there") if kind == "local" else request.getfixturevalue("s3")
    assert push(Output(output), there).scores.copied == 6
    names = [name for name in storage.list_tree(there) if name.startswith("_scores")]
    assert {name: storage.read_bytes(storage.join(there, name)) for name in names} == scores(output)
    assert [*check_scores(Output(there))] == []
    assert push(Output(output), there).scores.copied == 0
    assert push(Output(there), str(tmp_path / "back")).scores.copied == 6
    assert scores(tmp_path / "back") == scores(output)


def test_a_push_to_the_hub_has_scores_too(made: Path, hub: type[UploadHub]) -> None:
    assert push(Output(made), "hf://datasets/me/set").scores.copied == 6
    folder = hub.repositories["me/set"]
    assert scores(folder) == scores(made)
    assert push(Output(made), "hf://datasets/me/set").scores.copied == 0


@pytest.mark.parametrize("after", [False, True])
def test_a_push_that_was_cut_goes_on(made: Path, tmp_path: Path, after: bool) -> None:
    """Whatever change of a score it dies at: there is no receipt without its file, and another push ends it."""
    steps = 0
    while True:
        there = tmp_path / f"there-{steps}"
        if not _dies(made, there, steps, after):
            break
        _assert_whole_or_absent(there)
        push(Output(made), str(there))
        assert scores(there) == scores(made)
        steps += 3
    assert steps > 9


def _dies(output: Path, target: Path, steps: int, after: bool) -> bool:
    left = itertools.count()

    def dying(change: Any, place: int) -> Any:
        def run(*given: Any, **more: Any) -> Any:
            is_last = "_scores" in given[place] and next(left) == steps
            if is_last and not after:
                raise runs.Killed
            result = change(*given, **more)
            if is_last:
                raise runs.Killed
            return result

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, place in (("publish_bytes", 0), ("upload", 1), ("remove", 0)):
            patch.setattr(storage, name, dying(getattr(storage, name), place))
        try:
            push(Output(output), str(target))
        except runs.Killed:
            return True
    return False


def _assert_whole_or_absent(there: Path) -> None:
    opened, store = Output(there), ScoreStore(str(there))
    for definition in store.definitions():
        for receipt in opened.examine():
            assert isinstance(receipt, Receipt)
            assert not isinstance(store.found(definition, receipt.shard, receipt.parquet_hash), Damaged)


def test_another_score_of_a_name_replaces_the_one_that_is_there(output: Path, tmp_path: Path) -> None:
    """Its receipts go before its definition, so that no value is taken for one of the other."""
    there = tmp_path / "there"
    push(Output(output), str(there))
    shutil.rmtree(output / "_scores")
    assert call("score", output, "--with", "duplicates", "--threshold", 0).exit_code == 0
    assert push(Output(output), str(there)).scores.copied == 3
    assert json.loads((there / "_scores/duplicates.json").read_text())["fields"]["distance"] == 0
    assert {name: data for name, data in scores(there).items() if "duplicates" in name} == scores(output)
    assert "texture" in " ".join(scores(there))


def test_damaged_scores_are_left_out_and_named(output: Path, tmp_path: Path) -> None:
    """With exit code 5; the shards themselves are copied. ``--partial`` is content with it."""
    path = output / "_scores/texture/00001.parquet"
    value = struct.pack("<d", pq.read_table(path)["texture"][1].as_py())
    data = path.read_bytes()
    assert value in data
    path.write_bytes(data.replace(value, struct.pack("<d", 0.5)))
    result = call("push", output, tmp_path / "there")
    assert result.exit_code == 5
    assert "_scores/texture/00001 is left out, as it is damaged" in result.output
    assert not (tmp_path / "there/_scores/texture/00001_stats.json").exists()
    assert (tmp_path / "there/_scores/texture/00002_stats.json").exists()
    assert call("push", output, tmp_path / "there", "--partial").exit_code == 0


def test_scores_that_cannot_be_read_stop_a_push(output: Path, tmp_path: Path) -> None:
    """As the report, which goes along, cannot be drawn: before anything is copied, with the remedy."""
    (output / "_scores/texture/00001.parquet").unlink()
    result = call("push", output, tmp_path / "there")
    assert result.exit_code == 5 and "delete it, and score again" in result.output
    assert not (tmp_path / "there").exists()
