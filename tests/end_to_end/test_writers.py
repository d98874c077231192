"""Manifests as the tools write them that people have: the same rows, planned and generated."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from support import runs
from vcf_batch.cli import main

MANIFESTS = Path(__file__).parents[1] / "data" / "manifests"
WRITTEN = [path.name for path in sorted(MANIFESTS.glob("*.parquet"))] + ["spark"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.save_model(tmp_path_factory.mktemp("writers") / "model")


def test_every_writer_is_there() -> None:
    assert len(WRITTEN) == 11


@pytest.mark.parametrize("name", WRITTEN)
def test_what_other_tools_write_is_planned_and_generated(name: str, model: Path, tmp_path: Path) -> None:
    """pandas, polars, DuckDB v1 and v2, fastparquet, pyarrow, datasets (path, bytes, list, decode=False) and a folder
    as Spark leaves it: the same four rows."""
    size = ["--height", "32", "--width", "32", "--steps", "1", "--gpus-per-worker", "0"]
    given = [str(MANIFESTS / name), str(tmp_path / "out"), "--model", str(model), *size, "--limit", "4", "--json"]
    planned = CliRunner().invoke(main, ["plan", *given])
    assert planned.exit_code == 0, planned.output
    found = json.loads(planned.stdout)
    assert found["rows_having"] == {"prompt": 4, "reference": 3, "sample_id": 4, "seed": 3}
    assert (found["problems"], found["doomed_rows"], found["columns"]["carried"]) == ([], [], "note")
    rows = runs.rows_of(runs.generate(MANIFESTS / name, tmp_path / "out", model, limit=4, steps=1, lpips="none"))
    assert [row["status"] for row in rows] == ["success"] * 4, rows
    assert [row["key"] for row in rows] == ["a-0", "a-1", "a-2", "a-3"]
    assert [row["note"] for row in rows] == ["x", "y", None, "é"]
    assert [row["seed"] for row in rows if row["key"] != "a-1"] == [7, 9, 10]
    assert [row["clip_reference"] is not None for row in rows] == [True, True, False, True]
