"""Modules that a command imports, in a process of its own."""

import os
import subprocess
import sys


def by(*arguments: str, code: int = 0) -> set[str]:
    """Full names of the modules that the real command imports by a statement.

    Args:
        arguments: of ``vcf-batch``.
        code: the exit code with which it has to end.
    """
    done = subprocess.run(
        [sys.executable, "-m", "vcf_batch", *arguments],
        env=os.environ | {"PYTHONPROFILEIMPORTTIME": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
