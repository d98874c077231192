"""A run as the containers of deploy/ allow it: on a read-only root, without capabilities or new privileges."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

READ_ONLY = r"""
set -eu
mount --make-rprivate /
awk '$5 !~ "^/(proc|sys|dev)(/|$)" {print $5}' /proc/self/mountinfo | while read -r place; do
    mount -o remount,bind,ro "$place" 2>/dev/null || true
done
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /mnt
mkdir /mnt/tmp /mnt/home
if touch /var/tmp/writable "$1/writable" 2>/dev/null; then echo "the root can be written"; exit 99; fi
shift
exec setpriv --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""
"""Mounts of a process of its own; the arguments are a folder that must not be writable then, and a command."""


def _can_unshare() -> bool:
    if os.geteuid() or not shutil.which("unshare") or not shutil.which("setpriv"):
        return False
    command = ["unshare", "--mount", "mount", "--make-rprivate", "/"]
    return subprocess.run(command, capture_output=True).returncode == 0


needs_mounts = pytest.mark.skipif(not _can_unshare(), reason="needs to be root with mounts of its own")


def generate(home: str) -> subprocess.CompletedProcess[str]:
    """Run four rows of the demo with scratch and output on a file system in memory."""
    command = (
        'python="$1"; shift; "$python" -m vcf_batch generate "$@" /mnt/tmp/out --limit 4 --steps 2 --num-workers 1 '
        '--address local && "$python" -m vcf_batch verify /mnt/tmp/out'
    )
    manifest = str(ROOT / "manifests/demo.parquet")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return subprocess.run(
        [
            *("unshare", "--mount", "bash", "-c", READ_ONLY, "read-only", str(ROOT)),
            *("bash", "-c", command, "run", sys.executable, manifest),
        ],
        env=kept | {"HOME": home, "TMPDIR": "/mnt/tmp", "PYTHONPATH": str(ROOT)},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=300,
    )


@needs_mounts
def test_a_run_writes_below_tmpdir_home_and_shared_memory_alone() -> None:
    """With these and nothing else to write on, a run is whole."""
    done = generate("/mnt/home")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 success" in done.stdout + done.stderr


@needs_mounts
def test_a_home_that_cannot_be_written_is_told() -> None:
    done = generate("/")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr and "Traceback" not in done.stderr
