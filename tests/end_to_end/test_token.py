"""A Ray head with token authentication, as docs/ray-cluster.md sets it up: who has the token runs code there."""

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import ray_head, runs

ROOT = Path(__file__).parents[2]
WITHOUT = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
NO_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": ""}
WRONG = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another-token"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment that reaches the head with its token, and a home without one."""
    with ray_head.running(token="0123456789abcdef0123456789abcdef") as environment:
        yield environment | {"HOME": str(tmp_path_factory.mktemp("home")), "PYTHONPATH": str(ROOT)}


def generate(folder: Path) -> list[str]:
    """The arguments of four rows of the demo."""
    size = ("--limit", "4", "--steps", "2", "--num-workers", "1")
    return [str(ROOT / "manifests/demo.parquet"), str(folder / "out"), *size]


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("others", [WITHOUT, NO_TOKEN, WRONG, {}], ids=["without", "no-token", "wrong", "right"])
def test_a_job_runs_for_who_has_the_token_alone(
    cluster: dict[str, str], tmp_path: Path, others: dict[str, str]
) -> None:
    """Without the token, or with another one, nothing that is submitted runs."""
    submit = [ray_head.RAY, "job", "submit", "--", sys.executable, str(ROOT / "jobs/generate.py")]
    done = run([*submit, *generate(tmp_path)], cluster | others)
    assert (done.returncode == 0, (tmp_path / "out").exists()) == (not others, not others), done.stderr
    if others:
        assert "AuthenticationError" in done.stderr
    else:
        assert len(runs.rows_of(tmp_path / "out")) == 4


def test_its_web_page_asks_for_the_token(cluster: dict[str, str]) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{cluster['RAY_API_SERVER_ADDRESS']}/api/jobs/", timeout=10)
    assert refused.value.code == 401


@pytest.mark.parametrize("others", [NO_TOKEN, WRONG], ids=["no-token", "wrong"])
def test_a_driver_without_the_token_says_what_to_do(
    cluster: dict[str, str], tmp_path: Path, others: dict[str, str]
) -> None:
    """Exit code 2 and the names of what to set, no traceback, and nothing written."""
    command = [sys.executable, "-m", "vcf_batch", "generate", *generate(tmp_path), "--address", cluster["RAY_ADDRESS"]]
    done = run(command, cluster | others)
    assert done.returncode == 2, done.stderr
    assert "RAY_AUTH_MODE=token" in done.stderr and "RAY_AUTH_TOKEN_PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
