"""A shard without a successful sample has no tar: every command and reader of the project knows."""

import dataclasses
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from support import mixed, runs
from vcf_batch import storage
from vcf_batch.commands import verify
from vcf_batch.commands.push import push
from vcf_batch.output.kept_samples import KeptSamples
from vcf_batch.output.output import Output
from vcf_batch.report import page, status
from vcf_batch.report.contact_sheet import contact_sheet
from vcf_batch.setup.job import Job
from vcf_batch.training import data_files

WITHOUT = "00001"
TARS = ["00000.tar", "00002.tar", "00003.tar"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return mixed.write(tmp_path)


@pytest.fixture
def output(job: Job) -> Path:
    return Path(job.config.output)


def tars(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.tar"))


def damage(url: Path) -> list[str]:
    return [str(finding) for finding in verify.check(Output(str(url))) if finding.kind != "note"]


def write_empty_tar(output: Path) -> None:
    """What 0.1 wrote for such a shard."""
    tarfile.open(output / f"{WITHOUT}.tar", "w").close()
    receipt = json.loads((output / f"{WITHOUT}_stats.json").read_text())
    entry = dataclasses.asdict(storage.digest(str(output / f"{WITHOUT}.tar")))
    runs.Files(output, WITHOUT).edit_receipt(files={**receipt["files"], "tar": entry})


def test_the_receipt_lists_the_parquet_alone(output: Path) -> None:
    assert tars(output) == TARS
    assert [*runs.read_receipts(str(output))[1].files] == ["parquet"]


def test_commands_take_it_for_whole(output: Path) -> None:
    assert damage(output) == []
    told = status.read(str(output))
    assert (told.state, told.damaged, len(told.totals.done)) == ("finished", {}, 4)
    assert "no such file" not in page.render(Output(str(output)))
    assert contact_sheet(str(output)).height > 0


def test_loaders_are_given_the_tars_that_are_there(output: Path) -> None:
    assert [Path(tar).name for tar in Output(str(output)).tars()] == TARS
    found = data_files.find(str(output))
    assert ([Path(tar).name for tar in found.sizes], found.remarks) == (TARS, [])


def test_a_repair_adds_the_tar_and_takes_it_away_and_a_push_follows(job: Job, output: Path, tmp_path: Path) -> None:
    """What was pushed before is replaced, and a tar that its shard has no more is deleted there too."""
    there, shard = tmp_path / "there", job.shards[1]
    assert (push(Output(str(output)), str(there)).copied, tars(there)) == (4, TARS)
    for failed, expected in (({6}, sorted([*TARS, f"{WITHOUT}.tar"])), (mixed.FAILED, TARS)):
        runs.commit_pictures(job, shard, failed)
        assert (damage(output), tars(output)) == ([], expected)
        pushed = push(Output(str(output)), str(there))
        assert (pushed.copied, pushed.there, tars(there), damage(there)) == (1, 3, expected, [])


def test_the_rows_of_a_shard_without_a_tar_are_kept(job: Job) -> None:
    """A repair that redoes one of them keeps the reasons of the others."""
    shard = job.shards[1]
    kept = KeptSamples(job.config, job.manifest, shard, bytes([True, *[False] * 5]))
    assert [kept[row].error_message for row in range(7, 12)] == ["no"] * 5


def test_an_empty_tar_of_an_older_version_stays_valid(job: Job, output: Path, tmp_path: Path) -> None:
    """No reader is given it, and a repair takes it away."""
    write_empty_tar(output)
    assert damage(output) == []
    assert [Path(tar).name for tar in Output(str(output)).tars()] == TARS
    push(Output(str(output)), str(tmp_path / "there"))
    assert damage(tmp_path / "there") == []
    runs.commit_pictures(job, job.shards[1], mixed.FAILED)
    assert (damage(output), tars(output)) == ([], TARS)


def test_a_tar_that_no_receipt_names_is_damage(output: Path) -> None:
    """Loaders that take every tar would read it."""
    shutil.copy(output / "00000.tar", output / f"{WITHOUT}.tar")
    told = f"{WITHOUT}.tar is there, and {WITHOUT}_stats.json does not name it"
    assert damage(output) == [f"{WITHOUT}: {told}"]
    assert status.read(str(output)).damaged == {WITHOUT: told}


def test_a_receipt_with_images_names_a_tar(output: Path) -> None:
    files = runs.Files(output, "00000")
    receipt = json.loads(files.receipt.read_text())
    files.edit_receipt(files={"parquet": receipt["files"]["parquet"]})
    assert damage(output) == ["00000: 00000_stats.json describes ['parquet']; a shard has ['parquet', 'tar']"]
