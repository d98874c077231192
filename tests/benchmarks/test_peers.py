"""The benchmark of whole commands runs, and finds the same rows in every output."""

import importlib
from pathlib import Path

import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.slow
def test_every_contender_writes_the_same_images_and_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plain loop over diffusers, Ray Data and vcf-batch agree on every pixel and score of two batches."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    peers = importlib.import_module("peers")
    result = CliRunner().invoke(peers.main, ["--rows", "16", "--rounds", "1"])
    assert result.exit_code == 0, result.output
    rows = [line for line in result.stdout.splitlines() if line.startswith("| 16 |")]
    taken, equal = rows[:6], rows[6:]
    assert all(row.count("|") == 9 for row in taken)
    assert len(equal) == 5
    assert all(row.endswith("| 16 | 16 |") for row in equal)
