"""A full disk is told with the folder, the bytes that are needed and free, and the remedy, wherever it is met."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from vcf_batch import storage
from vcf_batch.errors import StorageError, UsageError
from vcf_batch.manifest.check import RepeatFinder
from vcf_batch.output import sample_records, shards
from vcf_batch.output_columns import SETTINGS
from vcf_batch.records import Row, Sample, Shard
from vcf_batch.storage import local, room, scratch

FULL = Path("/dev/full")
"""A file of Linux that takes no byte, as a full disk does."""


@pytest.fixture(autouse=True)
def _free(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil._ntuple_diskusage(10_000, 7_270, 2_730)  # type: ignore[attr-defined]
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage)


def told(folder: Path, needed: str, prefix: str = "") -> str:
    inner = rf"/{prefix}\w+" if prefix else ""
    return rf"No space left .*: {needed} are needed in {re.escape(str(folder))}{inner}, and 2,730 are free"


@pytest.mark.skipif(not FULL.exists(), reason="Linux alone has such a file")
def test_hashes_of_ids_without_room_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """numpy says only "60000 requested and 2730 written"; the user learns where, how much, and what to do."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ids = pa.array([str(number).encode() for number in range(5_000)])

    def find() -> None:
        with RepeatFinder(5_000) as finder:
            finder._path(0).symlink_to(FULL)
            finder.add(ids, 0)
            finder.repeats(3)

    with pytest.raises(StorageError, match=told(tmp_path, "120,000 bytes", "vcf-batch-")) as caught:
        find()
    assert str(caught.value).startswith("cannot write the hashes of 5,000 ids: ")
    assert str(caught.value).endswith("Make room there, or set TMPDIR to a folder on a larger disk.")
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(not FULL.exists(), reason="Linux alone has such a file")
def test_a_shard_without_room_is_told(tmp_path: Path) -> None:
    """What the whole shard needs is estimated by the rows that were written."""
    (tmp_path / "00000.tar").symlink_to(FULL)
    sample = Sample(Row(0, "a", "a fox"), "success", dict.fromkeys(SETTINGS), bytes(10**6), 8, 8)
    writer = shards.ShardWriter(
        str(tmp_path), Shard(0, 0, 10, "00000"), "png", sample_records.schema(pa.schema([]), False)
    )
    with pytest.raises(StorageError, match=told(tmp_path, r"[\d,]+ bytes")) as caught, writer:
        writer.add(sample)
    assert "set TMPDIR to a larger disk" in str(caught.value)


ERRORS: dict[str, Callable[[], Exception]] = {
    "no space": lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "no quota": lambda: OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    "safetensors": lambda: RuntimeError("I/O error: No space left on device (os error 28)"),
    "torch": lambda: RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_every_librarys_full_disk_is_recognised(name: str) -> None:
    """Whatever class of error says so; other errors pass as they are."""
    with pytest.raises(StorageError) as caught, scratch.temporary("a checkpoint", 60_000) as folder:
        raise ERRORS[name]()
    assert str(caught.value).startswith("cannot write a checkpoint: ")
    assert f"60,000 bytes are needed in {folder}, and 2,730 are free" in str(caught.value)
    assert not Path(folder).exists()
    for error in (OSError(errno.EACCES, "refused"), UsageError("No space left on device"), ValueError("other")):
        with pytest.raises(type(error)) as passed, scratch.temporary("a checkpoint"):
            raise error
        assert passed.value is error


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_output_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Files that are published, copied and fetched say where there is no room, and for how much."""

    def no_room(path: str) -> None:
        raise OSError(code, os.strerror(code), path)

    (tmp_path / "file").write_bytes(bytes(60_000))
    target = str(tmp_path / "out" / "file")
    monkeypatch.setattr(local, "_sync", no_room)
    for act in (
        lambda: storage.publish_bytes(target, bytes(60_000)),
        lambda: storage.upload(str(tmp_path / "file"), target),
        lambda: storage.download(str(tmp_path / "file"), target),
    ):
        with pytest.raises(StorageError, match=told(tmp_path / "out", "60,000 bytes") + ".*larger disk"):
            act()
    assert not os.listdir(tmp_path / "out")


def test_a_folder_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk without room has no usable folder for temporary files either."""

    def none(*_: object, **__: object) -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(scratch.tempfile, "mkdtemp", none)
    with pytest.raises(StorageError, match="Set TMPDIR to a folder that can be written"), scratch.temporary("x"):
        pass
