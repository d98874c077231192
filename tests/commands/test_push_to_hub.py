"""A push to the Hugging Face Hub makes few commits, its receipts last, and goes on where it was cut."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from support import hub_uploads, mixed, runs
from support.hub_uploads import UploadHub
from vcf_batch import storage
from vcf_batch.commands import verify
from vcf_batch.commands.push import push
from vcf_batch.errors import RefusedError, StorageError, UsageError
from vcf_batch.output import receipts
from vcf_batch.output.output import Output
from vcf_batch.output.receipts import Receipt
from vcf_batch.setup.job import Job
from vcf_batch.storage import hub_commits

TARGET = "hf://datasets/me/set"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[UploadHub]]:
    with hub_uploads.running(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return mixed.write(tmp_path)


def assert_same_files(output: Path, folder: Path) -> None:
    """The repository has the output's files, and no others."""
    names = {path.name for path in output.iterdir() if path.is_file()} - {"_progress.json"}
    assert {path.name for path in folder.iterdir()} == names
    for name in names:
        assert (folder / name).read_bytes() == (output / name).read_bytes()


def assert_receipts_fit(folder: Path) -> None:
    """Every receipt stands beside the files that it describes."""
    for path in folder.glob("*_stats.json"):
        receipt = Receipt.from_json(path.read_bytes())
        assert all(not (folder / name).exists() for name in receipts.surplus(receipt))
        for kind, entry in receipt.files.items():
            assert storage.digest(str(folder / f"{receipt.shard.name}.{kind}")) == entry


def push_all(job: Job) -> tuple[int, int]:
    """Shards copied, and shards that were there; none is left out."""
    pushed = push(Output(job.config.output), TARGET)
    assert pushed.left_out == []
    assert_same_files(Path(job.config.output), UploadHub.repositories["me/set"])
    assert not [finding for finding in verify.check(Output(TARGET)) if finding.is_damage]
    return pushed.copied, pushed.there


def test_a_small_output_is_one_commit(job: Job, hub: type[UploadHub]) -> None:
    """A second push makes none."""
    assert push_all(job) == (4, 0)
    assert len(hub.commits) == 1
    assert push_all(job) == (0, 4)
    assert len(hub.commits) == 1


@pytest.mark.parametrize("at_hand", [1, 1 << 30])
def test_commits_are_full_and_receipts_are_in_the_last(
    job: Job, hub: type[UploadHub], monkeypatch: pytest.MonkeyPatch, at_hand: int
) -> None:
    """However large the files are that wait to be uploaded together."""
    monkeypatch.setattr(hub_commits, "MAX_FILES", 4)
    monkeypatch.setattr(hub_commits, "MAX_AT_HAND_BYTES", at_hand)
    hub.after_commit.append(assert_receipts_fit)
    assert push_all(job) == (4, 0)
    # run.json, card and page; three tars and four parquets; four receipts
    assert [*map(len, hub.commits)] == [4, 4, 4, 2]
    paths = [path for commit in hub.commits for path in commit]
    assert all(path.endswith("_stats.json") for path in paths[-4:])


@pytest.mark.parametrize("taken", range(4))
def test_a_push_that_was_cut_goes_on(
    job: Job, hub: type[UploadHub], monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    """Whichever commit was the last: no receipt is there without its files, and no file is sent twice."""
    monkeypatch.setattr(hub_commits, "MAX_FILES", 4)
    hub.after_commit.append(assert_receipts_fit)
    hub.refused_after.append(taken)
    with pytest.raises(StorageError, match="NoMoreCommits"):
        push(Output(job.config.output), TARGET)
    hub.refused_after.clear()
    push_all(job)
    assert len(hub.commits) == 4 and len(hub.uploads) == len({*hub.uploads}) == 7


def test_a_repaired_shard_replaces_the_one_that_is_there(
    job: Job, hub: type[UploadHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its older receipt goes no later than its older files, and a tar that it has no more goes too."""
    push_all(job)
    monkeypatch.setattr(hub_commits, "MAX_FILES", 1)
    hub.after_commit.append(assert_receipts_fit)
    for failed, changed in (
        ({6}, ["README.md", "index.html", "-00001_stats.json", "00001.parquet", "00001.tar", "00001_stats.json"]),
        (
            mixed.FAILED,
            ["README.md", "index.html", "-00001_stats.json", "-00001.tar", "00001.parquet", "00001_stats.json"],
        ),
    ):
        hub.commits.clear()
        runs.commit_pictures(job, job.shards[1], failed)
        assert push_all(job) == (1, 3)
        assert hub.commits == [[path] for path in changed]


def test_a_shard_that_is_repaired_during_a_push_is_copied_again(
    job: Job, hub: type[UploadHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its receipt is read again when the receipts' turn comes."""
    monkeypatch.setattr(hub_commits, "MAX_FILES", 7)

    def repair(folder: Path) -> None:
        assert_receipts_fit(folder)
        if len(hub.commits) == 1:
            runs.commit_pictures(job, job.shards[1], {6})

    hub.after_commit.append(repair)
    pushed = push(Output(job.config.output), TARGET)
    assert (pushed.copied, pushed.left_out) == (4, [])
    assert (hub.repositories["me/set"] / "00001.tar").exists()
    assert not [finding for finding in verify.check(Output(TARGET)) if finding.is_damage]


@pytest.mark.parametrize("request_for", ["commit/main", "preupload/main", "objects/batch"])
def test_a_request_that_fails_once_is_repeated(job: Job, hub: type[UploadHub], request_for: str) -> None:
    hub.failing_once.append(request_for)
    assert push_all(job) == (4, 0)
    assert hub.failing_once == []


def test_nothing_of_another_run_is_replaced(job: Job, hub: type[UploadHub], tmp_path: Path) -> None:
    push_all(job)
    runs.write_output(runs.write_manifest(tmp_path / "in2", 5), tmp_path / "other", 4)
    with pytest.raises(RefusedError, match="holds another run"):
        push(Output(str(tmp_path / "other")), TARGET)
    assert len(hub.commits) == 1


def test_a_repository_that_is_not_there_is_refused(job: Job, hub: type[UploadHub]) -> None:
    with pytest.raises(UsageError, match=r"no repository hf://datasets/me/other .* make it on the Hub first"):
        push(Output(job.config.output), "hf://datasets/me/other")


@pytest.mark.slow
def test_commits_have_at_most_1000_files(hub: type[UploadHub], tmp_path: Path) -> None:
    """3,003 files are four commits."""
    job = runs.write_output(runs.write_manifest(tmp_path / "in", 1000), tmp_path / "out", 1)
    assert push(Output(job.config.output), TARGET).copied == 1000
    assert_same_files(tmp_path / "out", hub.repositories["me/set"])
    assert [*map(len, hub.commits)] == [1000, 1000, 1000, 3]
    assert all(path.endswith("_stats.json") for path in [path for commit in hub.commits for path in commit][-1000:])
