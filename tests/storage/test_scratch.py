"""Scratch folders end with their processes."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from vcf_batch.storage import scratch

HOLD = """
import sys, time
from vcf_batch.storage import scratch
with scratch.folder() as path:
    print(path, flush=True)
    time.sleep(600)
"""


def test_only_folders_of_dead_processes_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed worker's scratch does not fill the disk, and nobody deletes a living one's."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    other = subprocess.Popen([sys.executable, "-c", HOLD], env=environment, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    theirs = Path(other.stdout.readline().strip())
    (theirs / "00000.tar").write_bytes(b"half a shard")
    (tmp_path / "somebody-elses").mkdir()
    with scratch.folder() as own:
        scratch.clean()
        assert theirs.exists() and Path(own).exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
        scratch.clean()
        assert not theirs.exists()
        assert Path(own).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["somebody-elses"]


def test_what_another_user_puts_there_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder for temporary files is everybody's: no pipe in it stops a worker, and no link leads it to delete."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    mine = tmp_path / "mine"
    pipe, device, link, inner, empty = (tmp_path / f"vcf-batch-scratch-{name}" for name in range(5))
    for folder in (mine, device, inner, empty):
        folder.mkdir()
    os.mkfifo(pipe)
    os.mkfifo(device / "owner")
    (mine / "owner").touch()
    link.symlink_to(mine)
    (inner / "owner").symlink_to(mine / "owner")
    before = sorted(tmp_path.rglob("*"))
    cleaning = threading.Thread(target=scratch.clean, daemon=True)
    cleaning.start()
    cleaning.join(10)
    assert not cleaning.is_alive()
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_of_another_user_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    theirs = tmp_path / "vcf-batch-scratch-theirs"
    theirs.mkdir()
    (theirs / "owner").touch()
    with monkeypatch.context() as other:
        other.setattr(os, "geteuid", lambda: os.getuid() + 1)
        scratch.clean()
    assert theirs.exists()
    scratch.clean()
    assert not theirs.exists()
