"""The short version of chaos.py; `make chaos` runs the long one."""

import subprocess
import sys
from pathlib import Path


def test_a_run_struck_by_faults_has_the_bytes_of_an_undisturbed_one() -> None:
    """After any mix of faults and reruns the output is byte-identical to an undisturbed run's, every row is there once,
    and nothing is left over."""
    script = Path(__file__).parents[1] / "support" / "chaos.py"
    # One of each kind; those that draw a moment draw an early one.
    options = ["--seed", "10", "--faults", "8", "--rows", "32", "--shards", "8"]
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 faults, 32 rows in 8 shards: identical" in result.stdout
