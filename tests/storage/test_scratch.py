"""Scratch folders end with their processes."""

import os
import signal
import subprocess
import sys
import tempfile
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
