"""Ctrl-C and SIGTERM in a process of its own."""

import signal
import subprocess
import sys

import pytest

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
