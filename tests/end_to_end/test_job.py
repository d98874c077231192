"""`ray start --head` and `ray job submit`, end to end, with this repository as the submitted directory.

The head has token authentication, as docs/ray-cluster.md sets it up: who has the token runs code there. (Pages of the
documentation are run on a head without, by docs/test_docs.py.)
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ray_head, runs

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef0123456789abcdef"
WITHOUT = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
NO_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""}
WRONG = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another-token"}


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment that reaches the head with its token."""
    with ray_head.running(token=TOKEN) as environment:
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
    place = f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/{name}"
    asked = urllib.request.Request(place, headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(asked, timeout=10) as response:
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


# Who has the token, and who has none


def generate(folder: Path) -> list[str]:
    """The arguments of four rows of the demo."""
    size = ("--limit", "4", "--steps", "2", "--num-workers", "1")
    return [str(ROOT / "manifests/demo.parquet"), str(folder / "out"), *size]


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def stranger(cluster: dict[str, str], tmp_path: Path) -> dict[str, str]:
    """The environment of somebody whose home has no token."""
    (tmp_path / "home").mkdir()
    return cluster | {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("others", [WITHOUT, NO_TOKEN, WRONG], ids=["without", "no-token", "wrong"])
def test_a_job_runs_for_who_has_the_token_alone(
    stranger: dict[str, str], tmp_path: Path, others: dict[str, str]
) -> None:
    """Without the token, or with another one, nothing that is submitted runs. (With it, the tests above submit.)"""
    submit = [ray_head.RAY, "job", "submit", "--", sys.executable, str(ROOT / "jobs/generate.py")]
    done = run([*submit, *generate(tmp_path)], stranger | others)
    assert done.returncode and not (tmp_path / "out").exists(), done.stderr
    assert "AuthenticationError" in done.stderr


def test_its_web_page_asks_for_the_token(cluster: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/", timeout=10)
    assert refused.value.code == 401


@pytest.mark.parametrize("others", [NO_TOKEN, WRONG], ids=["no-token", "wrong"])
def test_a_driver_without_the_token_says_what_to_do(
    stranger: dict[str, str], tmp_path: Path, others: dict[str, str]
) -> None:
    """Exit code 2 and the names of what to set, no traceback, and nothing written."""
    command = [sys.executable, "-m", "vcf_batch", "generate", *generate(tmp_path), "--address", stranger["RAY_ADDRESS"]]
    done = run(command, stranger | others)
    assert done.returncode == 2, done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr and "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
