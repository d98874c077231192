"""The benchmark of what needs a GPU runs where there is none, at tiny shapes."""

import importlib
from pathlib import Path

import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.usefixtures("restored_torch")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _as_a_script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))  # restored afterwards


def measured(*sections: str) -> list[str]:
    """The rows that the named sections print."""
    gpu = importlib.import_module("gpu")
    options = [option for section in sections or gpu.SECTIONS for option in ("--only", section)]
    result = CliRunner().invoke(gpu.main, ["--smoke", *options])
    assert result.exit_code == 0, result.output
    assert "failed" not in result.stdout and "not measured" not in result.stdout
    return [line for line in result.stdout.splitlines() if line.startswith("| ")][1:]


def test_every_row_can_be_measured() -> None:
    """All but the compiled networks: correctness, sampling, stock diffusers, decoding, optimisation, a worker's job."""
    rows = measured("correctness", "sampling", "stock", "decoding", "optimization", "job")
    assert len(rows) == 18
    assert all(row.count("|") == 4 for row in rows)


@pytest.mark.slow
def test_compiled_rows_can_be_measured() -> None:
    assert len(measured("sampling", "stock", "compiled")) == 13
