"""Committed samples are read back so that the same bytes are written again."""

import dataclasses
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from support import runs
from vcf_batch.errors import StorageError
from vcf_batch.output import sample_records, shards
from vcf_batch.output.kept_samples import KeptSamples
from vcf_batch.setup.job import Job

ROWS = 8


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """One committed shard; rows 2 and 5 failed, and row 3 is generated anew."""
    columns = {"weight": [float("nan"), 0.1, *range(2, ROWS)], "tags": [["a", None], None] * (ROWS // 2)}
    manifest = runs.write_manifest(tmp_path / "in", ROWS, columns)
    job = runs.write_output(manifest, tmp_path / "out", ROWS, failed={2, 5})
    return dataclasses.replace(job, redo={0: bytes(number == 3 for number in range(ROWS))})


def test_the_rows_that_stay_are_there(job: Job) -> None:
    kept = KeptSamples(job.config, job.manifest, job.shards[0], job.redo[0])
    assert list(kept) == [0, 1, 2, 4, 5, 6, 7]
    assert len(kept) == 7
    assert 3 not in kept
    with pytest.raises(KeyError):
        kept[3]


def test_nothing_stays_of_a_shard_that_is_generated_whole(job: Job) -> None:
    assert not KeptSamples(job.config, job.manifest, job.shards[0], None)


def test_what_is_read_is_what_was_written(job: Job, tmp_path: Path) -> None:
    """Committed samples are reused byte for byte."""
    before = runs.data_files(tmp_path / "out")
    shard, manifest = job.shards[0], job.manifest
    kept = KeptSamples(job.config, job.manifest, shard, bytes(ROWS))
    carried, is_list = manifest.carried_schema, manifest.reference_is_list
    with shards.ShardWriter(str(tmp_path / "again"), shard, "png", sample_records.schema(carried, is_list)) as writer:
        for number in range(ROWS):
            writer.add(kept[number])
        writer.finish()
    assert runs.data_files(tmp_path / "again") == before


def test_samples_are_read_when_they_are_asked_for(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the shard."""
    read: list[str] = []
    read_members = shards.read_members

    def noted(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
        for name, data in read_members(file):
            read.append(name)
            yield name, data

    monkeypatch.setattr(shards, "read_members", noted)
    progress: list[int] = []
    kept = KeptSamples(job.config, job.manifest, job.shards[0], job.redo[0], lambda: progress.append(1))
    assert not read
    assert kept[1].image == runs.png(1, 32)
    assert len(read) <= 7
    assert len(progress) == 2, "each sample that is read is progress, kept or not"


def test_a_sample_that_was_damaged_meanwhile_is_not_kept(job: Job) -> None:
    tar = Path(job.config.output) / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[data.index(b"\x89PNG") + 60] ^= 1
    tar.write_bytes(data)
    with pytest.raises(StorageError, match="00000 is damaged"):
        KeptSamples(job.config, job.manifest, job.shards[0], job.redo[0])[0]


@pytest.mark.parametrize(
    ("name", "left"),
    [("tar", 0), ("tar", 300), ("tar", 5 * 512), ("tar", 8 * 512), ("parquet", 0), ("parquet", 700), ("tar", None)],
)
def test_a_shard_that_cannot_be_read_any_more_is_trouble_of_the_storage(job: Job, name: str, left: int | None) -> None:
    """Damage is never taken for a worker that crashes, which would cost rows their samples."""
    path = Path(job.config.output) / f"00000.{name}"
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    kept = KeptSamples(job.config, job.manifest, job.shards[0], job.redo[0])
    with pytest.raises(StorageError, match="00000 is damaged"):
        list(kept.values())


def test_a_tar_with_fewer_samples_than_the_parquet_is_trouble_of_the_storage(job: Job) -> None:
    path = Path(job.config.output) / "00000.tar"
    with tarfile.open(path) as tar:
        second = sorted(member.offset for member in tar)[3]
    path.write_bytes(path.read_bytes()[:second] + bytes(1024))
    with pytest.raises(StorageError, match=r"00000 is damaged.*its tar ends before row 1"):
        list(KeptSamples(job.config, job.manifest, job.shards[0], job.redo[0]).values())
