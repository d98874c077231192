"""An output that is read from Python: what it gives is committed."""

from pathlib import Path
from typing import Any

import duckdb
import pytest
import webdataset as wds

import vcf_batch
from support import runs
from vcf_batch import storage
from vcf_batch.errors import UsageError
from vcf_batch.output import lease, run_file

ROWS, SHARD_SIZE = 10, 4


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """Three shards over ten rows; shard 1 has lost its receipt, as after a driver that died in its commit."""
    manifest = runs.write_manifest(tmp_path / "in", ROWS)
    out = Path(runs.write_output(manifest, tmp_path / "out", SHARD_SIZE).config.output)
    (out / "00001_stats.json").unlink()
    return out


def keys(tars: list[str]) -> list[int]:
    samples: Any = wds.WebDataset(tars, shardshuffle=False)
    return [int(sample["__key__"]) for sample in samples]


def test_a_loader_over_the_tars_reads_committed_samples_only(output: Path) -> None:
    """A tar that no receipt stands for is none of the output's, though a reader who globs would take it."""
    assert keys(sorted(map(str, output.glob("*.tar")))) == [*range(10)]
    tars = vcf_batch.Output(str(output)).tars()
    assert tars == [f"{output}/00000.tar", f"{output}/00002.tar"]
    assert keys(tars) == [*range(4), 8, 9]
    (output / "00000.tar").write_bytes(b"cut")
    assert vcf_batch.Output(str(output)).tars() == [f"{output}/00002.tar"]


def test_the_tars_of_an_object_store(output: Path, s3: str) -> None:
    for path in filter(Path.is_file, output.iterdir()):
        storage.upload(str(path), f"{s3}/{path.name}")
    assert vcf_batch.Output(s3).tars() == [f"{s3}/00000.tar", f"{s3}/00002.tar"]


def test_duckdb_over_the_receipts_reads_committed_rows_only(output: Path) -> None:
    """The way of docs/dataset.md that needs no vcf-batch."""
    database = duckdb.connect()
    database.execute(
        "SET VARIABLE committed = (SELECT list(replace(filename, '_stats.json', '.parquet') ORDER BY filename) "
        f"FROM read_text('{output}/*_stats.json'))"
    )
    found = database.sql("SELECT key FROM read_parquet(getvariable('committed'))").fetchall()
    assert [int(key) for (key,) in found] == [*range(4), 8, 9]


@pytest.mark.parametrize("record", [None, b""])
def test_a_run_that_has_just_begun_is_not_called_damaged(tmp_path: Path, record: bytes | None) -> None:
    """It takes its lease before it writes its record, which is empty for a moment where there are no hard links."""
    with lease.hold(str(tmp_path)):
        if record is not None:
            (tmp_path / run_file.RUN_FILE_NAME).write_bytes(record)
        with pytest.raises(UsageError, match="holds no run yet"):
            vcf_batch.Output(str(tmp_path))


def test_a_url_without_a_driver_is_a_mistake_and_no_damage() -> None:
    with pytest.raises(UsageError, match="Install the fsspec driver of foo"):
        vcf_batch.Output("foo://bar")
