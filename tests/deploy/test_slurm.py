"""deploy/slurm.sh: what it asks of Slurm, which is not here, and what it starts, by programs that stand in."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.runs import wait_for

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "deploy/slurm.sh"

PROGRAMS = {
    # The command of a step, here. Slurm ends all processes of a step; here its process group.
    "srun": 'LOG; while [ "$1" != bash ]; do shift; done; setsid "$@" & trap "kill -- -$! 2> /dev/null" TERM; wait',
    "scontrol": "LOG",
    "ray": 'LOG; [ "$1" = health-check ] || sleep 0.5',
    "vcf-batch": """
        trap 'CODE=143; echo >> "$0.TERM"' TERM
        LOG
        until [ "$(grep -c " start " "${0%/*}/ray.log")" = "$STEPS" ]; do sleep 0.05; done
        while [ "$CODE" = waits ]; do sleep 0.05; done
        sleep 0.2
        exit "$CODE"
    """,
}
"""What stands in for programs, in bash. `LOG` writes the call down."""

JOB = {
    "SLURM_JOB_ID": "17",
    "SLURM_JOB_NUM_NODES": "3",
    "SLURMD_NODENAME": "first",
    "SLURM_CPUS_PER_TASK": "8",
    "SLURM_GPUS_ON_NODE": "4",
    "HEAD_IP": "127.0.0.1",
    # Of the programs that stand in: how the driver ends, once so many steps have called `ray start`.
    "CODE": "0",
    "STEPS": "2",
}


class Job:
    """A job of Slurm, as far as its script sees one."""

    def __init__(self, folder: Path, script: subprocess.Popen[str]) -> None:
        self._folder, self._script = folder, script

    def calls(self, program: str) -> list[str]:
        """The arguments of each call so far, and of vcf-batch the address of Ray before them."""
        log = self._folder / f"{program}.log"
        return log.read_text().splitlines() if log.exists() else []

    def _starts(self) -> int:
        return sum(" start " in f" {call} " for call in self.calls("ray"))

    def signal(self, number: int, to_all: bool = False) -> None:
        """Send a signal to the script, or to all processes of it, once its driver and all Ray nodes run."""
        wait_for(lambda: bool(self.calls("vcf-batch")) and str(self._starts()) == JOB["STEPS"], 60)
        if to_all:
            os.killpg(self._script.pid, number)
        else:
            self._script.send_signal(number)

    def end(self) -> tuple[int, str]:
        """The exit code, once there is one, and what it wrote to standard error."""
        _, errors = self._script.communicate(timeout=300)
        return self._script.returncode, errors


@contextmanager
def job(
    folder: Path, settings: dict[str, str], *arguments: str, programs: dict[str, str] = PROGRAMS, text: str = ""
) -> Iterator[Job]:
    """Start the script with programs that stand in, in an environment like that of a job."""
    for name, code in programs.items():
        log = f'echo "${{RAY_ADDRESS-}}" "${{@//$\'\\n\'/ }}" >> {folder}/{name}.log'
        (folder / name).write_text(f"#!/bin/bash\n{code.replace('LOG', log)}\n")
        (folder / name).chmod(0o755)
    (folder / "slurm.sh").write_text(text or SCRIPT.read_text())
    (folder / "slurm.sh").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SLURM"))}
    path = os.pathsep.join((str(folder), str(Path(sys.executable).parent), environment["PATH"]))
    script = subprocess.Popen(
        [str(folder / "slurm.sh"), *arguments],
        env=environment | JOB | {"PATH": path, "PYTHONPATH": str(ROOT)} | settings,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Job(folder, script)
    finally:
        script.terminate()
        script.communicate(timeout=60)


def test_each_node_of_the_job_is_a_ray_node_and_the_first_one_has_the_driver(tmp_path: Path) -> None:
    with job(tmp_path, {}, "manifest.parquet", "out put", "--model", "tiny") as running:
        assert running.end() == (0, "")
    others, head = sorted(running.calls("srun"), key=lambda call: "--head" in call)  # Which is first is chance.
    assert "--nodes=1 --ntasks=1 --nodelist=first " in head and "--head --node-ip-address=127.0.0.1 --port=" in head
    assert "--nodes=2 --ntasks=2 --exclude=first " in others and " --head" not in others
    [driver] = running.calls("vcf-batch")
    address, *arguments = driver.split(" ", 1)
    assert arguments == ["generate manifest.parquet out put --model tiny"]
    assert f"--port={address.removeprefix('127.0.0.1:')} " in head and f"--address={address}" in others
    assert running.calls("scontrol") == []


def test_a_job_of_one_node_has_a_head_alone(tmp_path: Path) -> None:
    with job(tmp_path, {"SLURM_JOB_NUM_NODES": "1", "STEPS": "1"}) as running:
        assert running.end() == (0, "")
    assert len(running.calls("srun")) == 1


def test_ray_gets_the_nodes_share_and_no_port_that_another_cluster_has(tmp_path: Path) -> None:
    """Ports that Ray fixes by default are all named, and are 0 or free (docs/ray-cluster.md)."""
    with job(tmp_path, {}) as running:
        running.end()
    starts = [each for each in running.calls("ray") if " start " in f" {each} "]
    assert len(starts) == 2
    for start in starts:
        assert "--num-cpus=8 --num-gpus=4 " in start
        assert "--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0" in start
    [head] = [each for each in starts if "--head" in each]
    assert "--include-dashboard=false" in head and "--temp-dir=/tmp/ray-17" in head
    assert not {"6379", "8265", "10001"} & {*head.replace("=", " ").split()}


@pytest.mark.parametrize("code", ["0", "1", "2", "3", "4", "130"])
def test_a_run_that_is_done_or_refused_is_not_queued_again(code: str, tmp_path: Path) -> None:
    with job(tmp_path, {"CODE": code}) as running:
        assert running.end() == (int(code), "")
    assert running.calls("scontrol") == []


def test_a_run_that_its_deadline_ended_is_queued_again(tmp_path: Path) -> None:
    with job(tmp_path, {"CODE": "6"}) as running:
        assert running.end()[0] == 6
    assert running.calls("scontrol") == [" requeue 17"]


def test_the_end_of_the_time_ends_the_run_in_order_and_queues_the_job_again(tmp_path: Path) -> None:
    """The signal that `#SBATCH --signal` asks for, which comes to the script alone, becomes the driver's SIGTERM."""
    assert "#SBATCH --signal=B:USR1@" in SCRIPT.read_text()
    with job(tmp_path, {"CODE": "waits"}) as running:
        running.signal(signal.SIGUSR1)
        assert running.end()[0] == 143
    assert running.calls("scontrol") == [" requeue 17"]


def test_a_job_that_is_cancelled_ends_the_run_in_order_and_stays_away(tmp_path: Path) -> None:
    """Slurm sends SIGTERM to all processes of the step. The driver gets no second one, which would end it at once."""
    with job(tmp_path, {"CODE": "waits"}) as running:
        running.signal(signal.SIGTERM, to_all=True)
        assert running.end()[0] == 143
    assert running.calls("scontrol") == []
    assert (tmp_path / "vcf-batch.TERM").read_text() == "\n"


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(tmp_path: Path) -> None:
    with job(tmp_path, {"CODE": "6", "SLURM_RESTART_COUNT": "100"}) as running:
        code, errors = running.end()
    assert code == 6 and "not queued again: the job was restarted 100 times" in errors
    assert running.calls("scontrol") == []


def test_a_head_that_does_not_come_up_in_time_fails_the_job(tmp_path: Path) -> None:
    """It is not queued again: the next start would fare no better."""
    script = SCRIPT.read_text().replace("head_seconds=300", "head_seconds=1")
    never = 'LOG; [ "$1" != health-check ] || exit 1; sleep 30'
    with job(tmp_path, {}, programs=PROGRAMS | {"ray": never}, text=script) as running:
        code, errors = running.end()
    assert code == 1 and "did not start at 127.0.0.1:" in errors and "within 1 seconds" in errors
    assert running.calls("vcf-batch") == running.calls("scontrol") == []


def test_an_address_that_no_other_node_reaches_is_refused(tmp_path: Path) -> None:
    programs = PROGRAMS | {"hostname": "echo 127.0.1.1"}
    with job(tmp_path, {"HEAD_IP": ""}, programs=programs) as running:
        code, errors = running.end()
    assert code == 1 and "calls itself 127.0.1.1" in errors and "set HEAD_IP" in errors
    assert running.calls("srun") == []


def test_a_head_that_does_not_start_fails_the_job(tmp_path: Path) -> None:
    with job(tmp_path, {}, programs=PROGRAMS | {"ray": "exit 1"}) as running:
        code, errors = running.end()
    assert code == 1 and "the Ray head on first did not start at 127.0.0.1:" in errors
    assert running.calls("vcf-batch") == []


@pytest.mark.slow
def test_a_job_of_two_nodes_generates(tmp_path: Path) -> None:
    """With the real Ray and the real driver, both nodes on this machine, with a token of the job's own."""
    arguments = ["demo", str(tmp_path / "out"), "--model", "tiny", "--limit", "8", "--shard-size", "4", "--steps", "2"]
    settings = {"SLURM_JOB_ID": f"t{os.getpid()}", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_PER_TASK": "1"}
    programs = {name: PROGRAMS[name] for name in ("srun", "scontrol")}
    more = ["--num-workers", "2", "--gpus-per-worker", "0"]
    try:
        with job(tmp_path, settings | {"SLURM_GPUS_ON_NODE": "0"}, *arguments, *more, programs=programs) as running:
            code, errors = running.end()
        assert code == 0, errors
        assert len(list((tmp_path / "out").glob("*_stats.json"))) == 2
    finally:
        shutil.rmtree(f"/tmp/ray-{settings['SLURM_JOB_ID']}", ignore_errors=True)
