"""`ray start --head` and `ray job submit`, end to end, with this repository as the submitted directory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ray_head, runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    with ray_head.running() as environment:
        yield environment


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `--working-dir .` submits, without what a developer's checkout has beside it."""
    folder = tmp_path_factory.mktemp("checkout")
    for part in ("vcf_batch", "jobs"):
        ignored = shutil.ignore_patterns("__pycache__", "weights")
        shutil.copytree(ROOT / part, folder / part, ignore=ignored)
    return folder


def submit(environment: dict[str, str], checkout: Path, name: str, *arguments: str) -> tuple[int, str, int]:
    """Submit `jobs/generate.py`: the exit code of Ray's command, its output, and the exit code of the job."""
    command = [ray_head.RAY, "job", "submit", "--working-dir", ".", "--submission-id", name, "--"]
    done = subprocess.run(
        [*command, sys.executable, "jobs/generate.py", *arguments],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    with urllib.request.urlopen(f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{name}", timeout=10) as response:
        return done.returncode, done.stdout, json.load(response)["driver_exit_code"]


def test_a_submitted_job_generates(cluster: dict[str, str], checkout: Path, tmp_path: Path) -> None:
    """The same job runs on a Ray cluster through `ray job submit`, and its exit code and logs arrive."""
    model = runs.save_model(tmp_path / "model")
    manifest = runs.write_manifest(tmp_path / "in", 6)
    output = tmp_path / "out"
    size = ("--height", "32", "--width", "32", "--shard-size", "4", "--num-workers", "1")
    code, log, driver = submit(cluster, checkout, "fine", str(manifest), str(output), "--model", str(model), *size)
    assert (code, driver) == (0, 0), log
    assert "6 rows: 6 success, 0 rejected, 0 failed" in log
    assert len(runs.rows_of(output)) == 6


def test_a_relative_output_is_refused(cluster: dict[str, str], checkout: Path, tmp_path: Path) -> None:
    """Inside a submitted job, where the working directory is a temporary copy, a relative output is refused."""
    manifest = runs.write_manifest(tmp_path / "in", 2)
    code, log, driver = submit(cluster, checkout, "relative", str(manifest), "out")
    assert (code, driver) == (1, 2), log
    assert "temporary copy" in log
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_job_submitted_again_after_its_driver_died_resumes(
    cluster: dict[str, str], checkout: Path, tmp_path: Path
) -> None:
    """No worker outlives its driver and keeps a device: the second job gets them all, and finishes the first one's
    work. (The devices are this head's two CPUs.)"""
    manifest, output = runs.write_manifest(tmp_path / "in", 40), tmp_path / "out"
    size = ("--height", "32", "--width", "32", "--shard-size", "2", "--num-workers", "2", "--steps", "10")
    arguments = (str(manifest), str(output), "--model", str(runs.save_model(tmp_path / "model")), *size)
    first = subprocess.Popen(
        [ray_head.RAY, "job", "submit", "--working-dir", ".", "--", sys.executable, "jobs/generate.py", *arguments],
        cwd=checkout,
        env=cluster,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs.wait_for(lambda: len(list(output.glob("*_stats.json"))) >= 2, 300)
    os.kill(json.loads((output / "_lease.json").read_text())["pid"], signal.SIGKILL)
    workers = {int(receipt.timings["worker"].partition(":")[2]) for receipt in runs.read_receipts(str(output)).values()}
    assert first.wait(120) == 1
    runs.wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    done = len(runs.read_receipts(str(output)))
    assert done < 20
    code, log, driver = submit(cluster, checkout, "again", *arguments)
    assert (code, driver) == (0, 0), log
    assert f"40 rows ({2 * done} of them were there before): 40 success" in log
