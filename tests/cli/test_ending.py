"""Signals at any moment of a command's life: it ends with a documented code, and without a traceback."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import runs

ROOT = Path(__file__).parents[2]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
NUMBERS = [*CODES]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of eight rows, and a finished output of it."""
    folder = tmp_path_factory.mktemp("ending")
    runs.write_output(runs.write_manifest(folder / "in", 8), folder / "out", 4)
    return folder


def start(*arguments: object) -> subprocess.Popen[str]:
    """A command as people start it, once it listens: before that, Python itself has not begun."""
    words = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    runs.wait_for(lambda: listens(process))
    return process


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether a process has a handler of SIGTERM, or has ended."""
    [caught] = [line for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if "SigCgt" in line] or [
        "SigCgt: 4000"
    ]
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1) or process.poll() is not None


def ends(process: subprocess.Popen[str], allowed: set[int]) -> str:
    """What a process prints, once it has ended with one of these codes and without a traceback."""
    output, errors = process.communicate(timeout=120)
    assert process.returncode in allowed, f"{process.returncode}: {errors}"
    assert "Traceback" not in errors, errors
    assert process.returncode == 0 or "nterrupted" in errors, errors
    return output


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("command", ["generate", "verify", "jobs/generate.py"])
def test_a_signal_while_a_command_starts_ends_it_with_its_code(
    folder: Path, tmp_path: Path, command: str, delay: float, number: signal.Signals
) -> None:
    """During imports, too: no traceback. A command that is faster has finished."""
    arguments: list[object] = ["verify", folder / "out"]
    if command != "verify":
        arguments = ["generate", folder / "in/manifest.parquet", tmp_path / "new", "--model", "tiny"]
        arguments += ["--address", "127.0.0.1:9"]
    process = start(*([command, *arguments[1:]] if "/" in command else ["-m", "vcf_batch", *arguments]))
    time.sleep(delay)
    process.send_signal(number)
    ends(process, {CODES[number]} | ({0} if command == "verify" else set()))


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("moment", ["printing", "closing"])
def test_a_signal_after_the_end_does_not_change_the_code(moment: str, number: signal.Signals) -> None:
    """While a command that is done prints its last words, and while Python shuts down: what it printed is printed."""
    code = f"""
import atexit, sys, time
from vcf_batch import __main__, ending
def tarry(moment):
    if moment == "{moment}":
        print(moment, file=sys.stderr, flush=True)
        time.sleep(1 if moment == "printing" else 30)
class Command:
    def main(self, **_):
        from vcf_batch.cli.command import tell
        atexit.register(tarry, "closing")
        tell("done", {{}}, False)
        tarry("printing")
sys.modules["fake"] = sys.modules["__main__"]
command = Command()
__main__.main("fake", "command")
"""
    process = start("-c", code)
    assert process.stderr is not None and process.stderr.readline() == f"{moment}\n"
    process.send_signal(number)
    assert process.communicate(timeout=20) == ("done\n", "")
    assert process.returncode == 0


def moments(count: int, step: float) -> Iterator[tuple[float, signal.Signals]]:
    return itertools.product((step * place for place in range(count)), NUMBERS)


@pytest.mark.slow
@pytest.mark.parametrize(("delay", "number"), moments(20, 0.4))
def test_a_run_ends_with_a_documented_code_whenever_it_is_stopped(
    folder: Path, tmp_path: Path, delay: float, number: signal.Signals
) -> None:
    """A run on a Ray of its own, from its imports to its shards; and the same command resumes."""
    process = start(*generate(folder, tmp_path))
    time.sleep(delay)
    process.send_signal(number)
    ends(process, {0, CODES[number]})
    assert not list(tmp_path.glob("out/_lease*"))


@pytest.mark.slow
@pytest.mark.parametrize(("delay", "number"), moments(3, 0.2))
def test_a_finished_run_stays_finished(folder: Path, tmp_path: Path, delay: float, number: signal.Signals) -> None:
    """After the last line, while Ray and Python shut down."""
    process = start(*generate(folder, tmp_path, "--limit", 2))
    assert process.stdout is not None
    while not process.stdout.readline().startswith("To look at it"):
        assert process.poll() is None
    time.sleep(delay)
    process.send_signal(number)
    ends(process, {0})


def generate(folder: Path, tmp_path: Path, *more: object) -> list[object]:
    """A run of the embedded model."""
    arguments = [folder / "in/manifest.parquet", tmp_path / "out", "--model", "tiny", "--address", "local"]
    return ["-m", "vcf_batch", "generate", *arguments, "--steps", 2, "--shard-size", 2, "--num-workers", 1, *more]
