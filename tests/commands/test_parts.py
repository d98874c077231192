"""Runs of the parts of a manifest, which several clusters generate, and the one dataset that is made of them."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from support import exports, runs
from vcf_batch.cli import main
from vcf_batch.commands import plan
from vcf_batch.commands.verify import check
from vcf_batch.config.run_config import RunConfig
from vcf_batch.errors import RefusedError
from vcf_batch.output.output import Output
from vcf_batch.report.open_output import OpenOutput
from vcf_batch.setup import claim

ROWS, SHARD_SIZE = 10, 2
PARTS = ("0:4", "4:8", "8:10")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a whole manifest, and those of its parts, by a tiny model. They are not changed."""
    folder = tmp_path_factory.mktemp("parts")
    model, manifest = runs.save_model(folder / "model"), runs.write_manifest(folder / "in", ROWS)
    given = {"shard_size": SHARD_SIZE, "batch_size": 2, "steps": 2}
    runs.generate(manifest, folder / "whole", model, **given)
    for number, part in enumerate(PARTS):
        runs.generate(manifest, folder / f"part{number}", model, rows=part, **given)
    return folder


def parts(folder: Path) -> list[Path]:
    return [folder / f"part{number}" for number in range(len(PARTS))]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_parts_have_the_rows_of_the_whole(folder: Path) -> None:
    """Byte for byte, where a part begins with a shard of the whole run. Keys, seeds and settings are so anyway."""
    for part in parts(folder):
        assert [str(finding) for finding in check(Output(part))] == []
    assert [row for part in parts(folder) for row in runs.rows_of(part)] == runs.rows_of(folder / "whole")
    pictures = {name: data for part in parts(folder) for name, data in exports.images(part).items()}
    assert exports.hashes(pictures) == exports.hashes(exports.images(folder / "whole"))


def test_each_part_is_a_run_of_its_own(folder: Path) -> None:
    """The first one is the run with a limit. Another part is refused where one is."""
    opened = [Output(part) for part in parts(folder)]
    assert len({output.record.fingerprint for output in opened}) == len(opened)
    assert [output.record.fields.get("rows") for output in opened] == [None, "4:8", "8:10"]
    assert [output.record.fields["limit"] for output in opened] == [4, None, None]
    assert [[shard.start for shard in output.plan] for output in opened] == [[0, 2], [4, 6], [8]]
    config = opened[1].config
    for rows, told in (("8:10", '"4:8" there, "8:10" now'), (None, '"4:8" there, nothing now')):
        with pytest.raises(RefusedError, match=f"differ in:\n  rows: {told}\nUse another"):
            claim.claim(runs.settle(config.replace(rows=rows)))


def test_an_export_of_parts_is_that_of_the_whole(folder: Path, tmp_path: Path) -> None:
    """Each row names the run of its part. Parts that overlap are refused, by the first key that is in both."""
    exports.make(tmp_path / "whole", folder / "whole")
    exports.make(tmp_path / "merged", *parts(folder))
    rows = exports.rows(tmp_path / "merged")
    assert [row | {"run_fingerprint": ""} for row in rows] == [
        row | {"run_fingerprint": ""} for row in exports.rows(tmp_path / "whole")
    ]
    fingerprints = [Output(part).record.fingerprint for part in parts(folder)]
    for row in rows:
        part = next(number for number, text in enumerate(PARTS) if int(row["key"]) < int(text.partition(":")[2]))
        assert row["run_fingerprint"] == fingerprints[part]
    assert exports.images(tmp_path / "merged") == exports.images(tmp_path / "whole")
    result = call("export", folder / "part1", folder / "whole", tmp_path / "double")
    assert result.exit_code == 2
    assert f"the key '000000004' is in {folder / 'part1'} and in {folder / 'whole'}, and 3 more rows" in result.output


def test_commands_read_a_part(folder: Path, tmp_path: Path) -> None:
    """Status, report, and what finds the shard of a row."""
    opened = OpenOutput(folder / "part1")
    assert opened.image("000000006").size == (32, 32)
    assert [row["key"] for row in opened.rows()] == [f"{number:09d}" for number in range(4, 8)]
    status = json.loads(call("status", folder / "part1", "--json").stdout)
    assert (status["rows"]["total"], status["state"]) == (4, "finished")
    output = shutil.copytree(folder / "part1", tmp_path / "out")
    for command in (("report", output, "--out", tmp_path / "page.html"), ("card", output)):
        assert call(*command).exit_code == 0
    assert "000000007" in (tmp_path / "page.html").read_text()


def test_a_plan_tells_the_part(folder: Path, tmp_path: Path) -> None:
    """And counts and checks its rows alone."""
    manifest = runs.write_manifest(tmp_path / "in", ROWS, {"strength": [None] * 9 + [-1.0]})
    given = {"manifest": str(manifest), "model": str(folder / "model"), "gpus_per_worker": 0, **runs.SIZE}
    found = plan.look(RunConfig(output=str(tmp_path / "out"), rows="3:9", shard_size=2, **given), calibrate=True)
    assert found.rows_having and found.rows_having["reference"] == 5 and found.doomed == []
    assert (found.figures(None)["rows"], found.figures(None)["shards"]) == (6, 3)
    assert "6 (from 3 to 8 of the manifest), 0 of them done" in found.told(None)
    beyond = plan.look(RunConfig(output=str(tmp_path / "out"), rows="3:11", **given), calibrate=False)
    assert "rows is 3:11, and" in str(beyond.problems[0]) and "end at 10 at most" in str(beyond.problems[0])


def test_a_repair_generates_rows_of_a_part(folder: Path, tmp_path: Path) -> None:
    """A damaged shard of a part is generated whole, with the bytes that it had."""
    calm = runs.data_files(folder / "part1")
    output = runs.generate(
        folder / "in/manifest.parquet",
        tmp_path / "out",
        folder / "model",
        **{"shard_size": SHARD_SIZE, "batch_size": 2, "steps": 2, "rows": "4:8"},
    )
    assert runs.data_files(output) == calm
    (output / "00001.tar").write_bytes(b"")
    findings = [*check(Output(output))]
    assert [(finding.place, finding.shard and finding.shard.start) for finding in findings] == [("00001", 6)]


def test_a_run_into_an_export_is_refused(folder: Path, tmp_path: Path) -> None:
    exports.make(tmp_path / "t", folder / "whole")
    before = exports.tree(tmp_path / "t")
    result = call("generate", folder / "in/manifest.parquet", tmp_path / "t", "--model", folder / "model")
    assert result.exit_code == 4 and f"output {tmp_path / 't'} is an export" in result.output
    assert exports.tree(tmp_path / "t") == before
