"""The short version of chaos.py; `make chaos` runs the long one."""

import subprocess
import sys
from pathlib import Path


def test_a_run_struck_by_faults_has_the_bytes_of_an_undisturbed_one() -> None:
    """After any mix of faults and reruns the output is byte-identical to an undisturbed run's, every row is there once,
    and nothing is left over."""
    script = Path(__file__).parents[1] / "support" / "chaos.py"
    # A worker hangs, a driver is stopped, a worker dies at some moment, a driver dies within a commit, a node is lost.
    # Of the kinds that are left out, test_faults.py and test_storage_faults.py have examples.
    options = ["--seed", "281", "--faults", "5", "--rows", "32", "--shards", "8"]
    result = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 faults, 32 rows in 8 shards: identical" in result.stdout
