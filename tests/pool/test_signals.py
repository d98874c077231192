"""Ctrl-C and SIGTERM in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vcf_batch.errors import Interrupted
from vcf_batch.pool.signals import Signals

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys, time
from vcf_batch.errors import Interrupted
from vcf_batch.pool.signals import Signals
try:
    with Signals():
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            print("letting go", flush=True)
            time.sleep(float(sys.argv[1]))
            print("in order", flush=True)
except Interrupted as stop:
    sys.exit(stop.exit_code)
"""


def start(letting_go: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(letting_go)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_ends_a_run_in_order(number: signal.Signals, code: int) -> None:
    process = start(0.0)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (code, "letting go\nin order\n", "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_second_one_ends_it_at_once(number: signal.Signals, code: int) -> None:
    """Ctrl-C twice does not wait for workers or storage."""
    process = start(600.0)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "letting go\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output) == (code, "")
    assert "Stopped at once" in errors


def test_an_import_does_not_swallow_the_signal(tmp_path: Path) -> None:
    """What is raised in an import may be swallowed or printed there: it waits until the import is over."""
    (tmp_path / "greedy.py").write_text(
        "import time\nprint('importing', flush=True)\ntry:\n    time.sleep(1)\nexcept BaseException:\n    pass\n"
    )
    code = SCRIPT.replace('print("ready", flush=True)', 'print("ready", flush=True); import greedy')
    process = subprocess.Popen(
        [sys.executable, "-c", code, "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["ready\n", "importing\n"]
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "letting go\nin order\n", "")


def test_a_signal_that_something_swallowed_is_raised_once_more() -> None:
    """The run asks in each turn of its loop."""

    def work() -> None:
        with Signals() as signals:
            signals.check()
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            signals.check()

    with pytest.raises(Interrupted) as stop:
        work()
    assert stop.value.exit_code == 143


def test_a_command_that_holds_nothing_yet_ends_at_once() -> None:
    """Once it holds something, it lets go in order."""
    begin = "from vcf_batch import ending; ending.install()\n"
    for hold, told in (("", "Interrupted"), ("signals.hold(); ", "")):
        code = begin + SCRIPT.replace("with Signals():", "with Signals() as signals:")
        code = code.replace('print("ready"', hold + 'print("ready"')
        process = subprocess.Popen(
            [sys.executable, "-c", code, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (143, "letting go\nin order\n" if hold else "")
        assert errors.strip().startswith(told)
