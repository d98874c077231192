"""A push to the Hugging Face Hub makes few commits, its receipts last, and goes on where it was cut."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import hub_uploads, mixed, runs
from support.hub_uploads import UploadHub
from vcf_batch.commands import hub_commits, verify
from vcf_batch.commands.push import push
from vcf_batch.errors import RefusedError, StorageError
from vcf_batch.output.output import Output
from vcf_batch.setup.job import Job

TARGET = "hf://datasets/me/set"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[UploadHub]]:
    with hub_uploads.running(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return mixed.write(tmp_path)


def files_of(output: Path, folder: Path) -> None:
    """The repository has the output's files, and no others."""
    names = {path.name for path in output.iterdir() if path.is_file()} - {"_progress.json"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (output / name).read_bytes()


def test_a_small_output_is_one_commit(job: Job, hub: type[UploadHub]) -> None:
    output = Path(job.config.output)
    assert push(Output(str(output)), TARGET).copied == 4
    files_of(output, hub.repositories["me/set"])
    assert len(hub.commits) == 1
    assert not [finding for finding in verify.check(Output(TARGET)) if finding.is_damage]
    pushed = push(Output(str(output)), TARGET)
    assert (pushed.copied, pushed.there, len(hub.commits)) == (0, 4, 1), "nothing has changed"
