"""What of an output is generated again, and that a condition sees the rows and nothing else."""

import json
import shutil
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from support import runs
from vcf_batch import pool, storage
from vcf_batch.cli import main
from vcf_batch.commands.repair import Repair
from vcf_batch.config.run_config import RunConfig
from vcf_batch.driver.ledger import Ledger, Summary
from vcf_batch.errors import DamageFound, RefusedError, UsageError
from vcf_batch.output import commits, receipts, shards
from vcf_batch.output.output import Output
from vcf_batch.report.condition import Condition

ROWS, SHARD_SIZE = 10, 4
FAILED = "status = 'failed'"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of three shards over ten rows; rows 5 and 9 failed."""
    columns = {"half": pa.array([0.5] * ROWS, pa.float16()), "label": [f"row {number}" for number in range(ROWS)]}
    folder = tmp_path_factory.mktemp("whole")
    runs.write_output(runs.write_manifest(folder / "in", ROWS, columns), folder / "out", SHARD_SIZE, failed={5, 9})
    return folder / "out"


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "out")


def needed(output: Path, where: str = FAILED, **given: Any) -> dict[int, list[int]]:
    """Shard and numbers of the rows that are generated again. ``given`` are further arguments of :class:`Repair`."""
    opened = Output(str(output))
    again = Repair(opened, where, **given).rows(lambda line: None)
    for index, rows in again.items():
        assert len(rows) == len(opened.plan[index])
    return {index: [row for row, anew in enumerate(rows, index * SHARD_SIZE) if anew] for index, rows in again.items()}


def test_failed_rows_are_generated_again(whole: Path) -> None:
    assert needed(whole) == {1: [5], 2: [9]}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("status = 'failed' OR clip_score < 0.1", {0: [0, 1], 1: [5], 2: [9]}),
        ("label = 'row 7'", {1: [7]}),
        ("clip_score > 0.2 AND prompt LIKE '%rings'", {1: [6]}),
        ("reference = 'reference0.png' -- a comment", {0: [0, 3], 1: [6]}),
        ("now() > '2000-01-01'::TIMESTAMPTZ AND random() < 2 AND label IN ('row 7', 'row 8')", {1: [7], 2: [8]}),
        ("list_filter([label], lambda x: contains(x, '7')) <> []", {1: [7]}),
        ("false", {}),
        ("NULL", {}),
    ],
)
def test_a_condition_selects_rows(whole: Path, where: str, expected: Mapping[int, list[int]]) -> None:
    """Whether all files are read before, or receipts are trusted."""
    assert needed(whole, where) == needed(whole, where, trust_receipts=True) == expected


@pytest.mark.parametrize(
    ("where", "columns"),
    [
        (FAILED, ["key", "status"]),
        ("Status = 'failed' AND \"LABEL\" LIKE '%7'", ["key", "status", "label"]),
        ("list_filter([label], lambda seed: contains(seed, '7')) <> []", ["key", "seed", "label"]),
        ("attempts[1].seed = 3", ["key", "attempts"]),
        ("false", ["key"]),
        ("COLUMNS(*) IS NOT NULL", None),
        ("COLUMNS('.*_score') > 0.5", None),
        ("#1 = 'x'", None),
    ],
)
def test_a_condition_tells_the_columns_that_it_reads(whole: Path, where: str, columns: list[str] | None) -> None:
    """Rows with these alone give the same keys. Expressions that name no column read all."""
    rows = pa.concat_tables([runs.Files(whole, f"0000{shard}").table for shard in range(3)])
    condition = Condition(where, rows.schema)
    assert [*condition.columns] == (columns or [name for name in rows.column_names if name != "half"])
    assert condition.keys(rows.select([*condition.columns])) == condition.keys(rows)


def test_a_time_is_the_same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is a time of UTC, so an export that goes on elsewhere selects the same rows."""
    night = datetime(2024, 1, 1, 0, 30, tzinfo=UTC)
    rows = pa.table({"key": ["a"], "night": pa.array([night], pa.timestamp("us", "UTC"))})
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        assert Condition("night >= '2024-01-01'", rows.schema).keys(rows) == {"a"}
    finally:
        monkeypatch.undo()
        time.tzset()


def test_columns_that_are_one_name_in_sql_are_refused() -> None:
    """DuckDB takes the first one. A condition that reads neither is one."""
    rows = pa.table({"key": ["a"], "Grade": [1.0], "grade": [9.0], "size": [3]})
    with pytest.raises(UsageError, match="Grade and grade are one name in SQL"):
        Condition("grade > 5", rows.schema)
    assert Condition("size > 2", rows.schema).keys(rows) == {"a"}


@pytest.mark.parametrize(
    ("where", "reason"),
    [
        ("clip < 0.2", 'Referenced column "clip" not found'),
        ("half > 0", 'Referenced column "half" not found'),  # a type that DuckDB does not have
        ("", "Parser Error"),
        ("true; DROP TABLE x", "Parser Error"),
        ("true) UNION SELECT key --", "syntax error"),
        ("true LIMIT 1", "Parser Error"),
        ("count(*) > 1", "cannot contain aggregates"),
        ("key IN (SELECT content FROM read_text('/etc/passwd'))", "disabled by configuration"),
        ("key IN (SELECT file FROM glob('/etc/*'))", "disabled by configuration"),
        ("key IN (SELECT key FROM rows)", "rows does not exist"),  # a variable of Python
        ("key IN (SELECT key FROM 's3://bucket/secret.parquet')", "disabled by configuration"),
        ("key IN (SELECT content FROM read_blob('/etc/passwd'))", "disabled by configuration"),
        ("key IN (SELECT name FROM duckdb_settings())", "a subquery sees more than the row"),
        ("key IN (SELECT name FROM duckdb_secrets())", "a subquery sees more than the row"),
        ("EXISTS (FROM duckdb_functions())", "a subquery sees more than the row"),
        ("EXISTS (FROM duckdb_databases)", "a subquery sees more than the row"),
        ("EXISTS (FROM pragma_version())", "a subquery sees more than the row"),
        ("key = (TABLE duckdb_tables)", "Subquery returns"),
        ("EXISTS (FROM query('FROM duckdb_settings()'))", "subquery"),
        ("EXISTS (FROM information_schema.tables)", "a subquery sees more than the row"),
        ("EXISTS (FROM pg_catalog.pg_settings)", "a subquery sees more than the row"),
        ("[(SELECT value FROM duckdb_settings() LIMIT 1)] <> []", "a subquery sees more than the row"),
        ("list_transform([1], lambda x: (SELECT count(*) FROM duckdb_settings()))[1] > 1", "subquer"),
        ("current_setting('threads') > 0", "current_setting sees more than the row"),
        ("system.main.Current_Setting('threads') > 0", "current_setting sees more than the row"),
        ("getvariable('x') IS NULL", "getvariable sees more than the row"),
        ("getenv('HOME') IS NULL", "getenv does not exist"),
        ("current_database() = 'memory'", "current_database sees more than the row"),
        ("current_catalog = 'memory'", "current_catalog sees more than the row"),
        ("current_schema = 'main'", "current_schema sees more than the row"),
        ("pg_get_viewdef(1) IS NULL", "pg_get_viewdef sees more than the row"),
        ("version() > ''", "version sees more than the row"),
        ("sleep_ms(3600000) IS NULL", "sleep_ms sees more than the row"),
        ("pg_sleep(3600) IS NULL", "pg_sleep sees more than the row"),
        ("write_log('x') IS NULL", "write_log sees more than the row"),
        ("setseed(0.5) IS NULL", "setseed sees more than the row"),
    ],
)
def test_what_is_no_condition_on_a_row_is_refused_at_once(whole: Path, where: str, reason: str) -> None:
    """A condition sees the rows and nothing else: no file, no network, no other statement."""
    with pytest.raises(UsageError, match=r"is not a condition on the columns key, status") as error:
        Repair(Output(str(whole)), where)
    assert reason in str(error.value)


def test_rows_are_named_by_their_keys(whole: Path) -> None:
    """Those alone, or beside those of a condition; whether all files are read before, or receipts are trusted."""
    keys = {"000000002", "000000005", "000000008"}
    for trust in (False, True):
        assert needed(whole, "false", keys=keys, trust_receipts=trust) == {0: [2], 1: [5], 2: [8]}
        assert needed(whole, keys=keys, trust_receipts=trust) == {0: [2], 1: [5], 2: [8, 9]}


def test_rows_of_a_manifest_with_ids_are_named_by_these(tmp_path: Path) -> None:
    manifest = runs.write_manifest(tmp_path / "in", 4, {"sample_id": ["d", "c", "b", "a"]})
    runs.write_output(manifest, tmp_path / "out", SHARD_SIZE)
    assert needed(tmp_path / "out", "false", keys={"b"}) == {0: [2]}
    with pytest.raises(UsageError, match=r"1 of 2 keys of --keys is of no row of .*which has 4 rows: '000000002'\. "):
        Repair(Output(str(tmp_path / "out")), FAILED, keys={"a", "000000002"})


def test_a_key_in_a_damaged_shard_is_known(output: Path) -> None:
    """The manifest has it; the shard is generated whole anyway."""
    (output / "00001.parquet").write_bytes(b"")
    assert needed(output, "false", keys={"000000006"}) == {1: [4, 5, 6, 7]}


def test_damaged_and_missing_shards_are_generated_whole(output: Path) -> None:
    (output / "00000_stats.json").unlink()
    data = (output / "00001.tar").read_bytes()
    (output / "00001.tar").write_bytes(data[:-5] + b"\1" + data[-4:])
    assert needed(output) == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [9]}
    assert needed(output, "false") == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}


def test_receipts_are_trusted_if_that_is_asked_for(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but receipts and the columns of the condition is read, so damage of the same size is not found."""
    (output / "00000_stats.json").unlink()
    data = (output / "00001.tar").read_bytes()
    (output / "00001.tar").write_bytes(data[:-5] + b"\1" + data[-4:])
    columns, read = set[str](), pq.ParquetFile.read

    def noted(self: pq.ParquetFile, names: list[str], **options: Any) -> Any:
        columns.update(names)
        return read(self, names, **options)

    def refused(*given: Any) -> Any:
        raise AssertionError("a file is read")

    monkeypatch.setattr(pq.ParquetFile, "read", noted)
    monkeypatch.setattr(storage, "digest", refused)
    monkeypatch.setattr(shards, "read_members", refused)
    assert needed(output, trust_receipts=True) == {0: [0, 1, 2, 3], 1: [5], 2: [9]}
    assert columns == {"key", "status"}
    (output / "00001.tar").write_bytes(data[:-1])
    assert needed(output, trust_receipts=True) == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [9]}


def test_samples_stay_only_where_a_receipt_tells_of_their_device(tmp_path: Path) -> None:
    """Where the driver's counts are trusted, its receipt may be damaged without another size."""
    job = runs.write_output(runs.write_manifest(tmp_path / "in", ROWS), tmp_path / "out", SHARD_SIZE, failed={5})
    Ledger(job)
    receipt = tmp_path / "out/00001_stats.json"
    receipt.write_bytes(bytes(receipt.stat().st_size))
    assert needed(tmp_path / "out", "false", trust_receipts=True) == {}
    lines: list[str] = []
    redo = Repair(Output(str(tmp_path / "out")), FAILED, trust_receipts=True).rows(lines.append)
    assert redo == {1: bytes([True]) * SHARD_SIZE}
    assert lines[0].startswith("00001: its receipt is damaged")


@pytest.mark.parametrize("damage", ["footer", "page", "rows", "columns", "receipt"])
def test_a_parquet_that_cannot_be_read_costs_its_shard(output: Path, damage: str) -> None:
    """Where receipts are trusted, the shard is generated whole, and told."""
    files = runs.Files(output, "00001")
    data = bytearray(files.parquet.read_bytes())
    if damage == "receipt":
        files.edit_receipt(shard={"index": 1, "name": "00001", "start": 3, "stop": 7})
    elif damage in ("rows", "columns"):
        files.table = files.table.slice(1) if damage == "rows" else files.table.drop(["status"])
        files.write()
    else:
        at = len(data) - 8 if damage == "footer" else 10
        data[at : at + 8] = bytes(8)
        files.parquet.write_bytes(data)
    lines: list[str] = []
    redo = Repair(Output(str(output)), FAILED, trust_receipts=True).rows(lines.append)
    assert {index: sum(mask) for index, mask in redo.items()} == {1: 4, 2: 1}
    assert lines[0].startswith("00001: ") and lines[-1] == "5 rows in 2 shards are to be generated again"


@pytest.mark.parametrize("trust_receipts", [False, True])
def test_several_processes_choose_the_same_rows(output: Path, trust_receipts: bool) -> None:
    """With damage of either kind: a shard that is missing, and a parquet that cannot be read."""
    (output / "00000_stats.json").unlink()
    data = (output / "00001.parquet").read_bytes()
    (output / "00001.parquet").write_bytes(bytes(len(data)))
    chosen = needed(output, "label = 'row 8'", trust_receipts=trust_receipts, processes=2)
    assert chosen == {0: [0, 1, 2, 3], 1: [4, 5, 6, 7], 2: [8]}


@pytest.mark.parametrize("survived", range(6))
def test_a_repair_that_was_killed_keeps_the_samples_that_stay(output: Path, tmp_path: Path, survived: int) -> None:
    """A repair reuses committed samples byte for byte, even if its driver is killed while it replaces their shard."""
    manifest = Path(json.loads((output / "run.json").read_text())["config"]["manifest"])
    repaired = runs.write_output(manifest, tmp_path / "repaired", SHARD_SIZE, failed={9})
    (receipt,) = (found for found in receipts.read(repaired.config.output) if found.shard.index == 1)
    paths = {kind: str(tmp_path / "repaired" / f"00001{suffix}") for kind, suffix in receipts.FILE_SUFFIXES.items()}
    files = shards.ShardFiles(
        paths["tar"], paths["parquet"], counts=receipt.counts, entries=receipt.files, means=receipt.means
    )
    staged = commits.stage(files, str(output), receipt.shard, "attempt")
    runs.kill_after(survived, lambda: commits.commit(str(output), receipt, staged))

    commits.clean(str(output))
    assert needed(output) == ({1: [5], 2: [9]} if survived < 2 else {2: [9]})


def test_what_generating_does_not_mend_is_refused(output: Path) -> None:
    shutil.copy(output / "00001.tar", output / "00007.tar")
    with pytest.raises(DamageFound, match="00007: the run has 3 shards, and this is none of them; delete its files"):
        needed(output)


def test_a_changed_manifest_is_refused(output: Path) -> None:
    manifest = runs.write_manifest(output.parent / "in", 3)
    with pytest.raises(RefusedError, match="has changed since the run"):
        Repair(Output(str(output), {"manifest": str(manifest)}), FAILED)
    with pytest.raises(UsageError, match="does not exist"):
        Repair(Output(str(output), {"manifest": str(manifest.parent / "gone")}), FAILED)


# The command


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[Result, list[RunConfig], list[dict[int, bytes]]]:
    """The command's result, and what a run was started with; no run takes place."""
    configs, asked = [], []

    def record(config: RunConfig, choose_redo: pool.ChooseRedo, deadline: float | None) -> Summary:
        assert deadline is None
        configs.append(config)
        asked.append(dict(choose_redo()))
        return Summary(config.output, ROWS, {"success": 10, "rejected": 0, "failed": 0}, 8, 1.0)

    monkeypatch.setattr(pool, "run", record)
    return CliRunner().invoke(main, ["repair", *map(str, arguments)]), configs, asked


def test_a_repair_takes_its_settings_from_the_output(
    output: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs where and with as many workers as it is told, whatever the run it repairs was told."""
    record = json.loads((output / "run.json").read_text())
    record["config"] |= {"address": "ray://gone:10001", "num_workers": 16, "max_failed": 1.0}
    (output / "run.json").write_text(json.dumps(record))
    (output / "00000.tar").unlink()
    result, (config,), (again,) = call(monkeypatch, output, "--address", "local")
    assert result.exit_code == 0, result.output
    recorded = RunConfig.from_mapping(record["config"])
    assert config == recorded.replace(output=str(output), address="local", num_workers=None, max_failed=0)
    assert again == {0: b"\1\1\1\1", 1: b"\0\1\0\0", 2: b"\0\1"}
    assert result.output.splitlines()[0] == "00000: 00000.tar is missing"


def test_a_manifest_and_a_model_that_have_moved_are_named(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = Path(json.loads((output / "run.json").read_text())["config"]["manifest"])
    moved = shutil.copytree(recorded.parent, output.parent / "moved") / recorded.name
    result, (config,), _ = call(monkeypatch, output, "--manifest", moved, "--model", "/new", "--where", FAILED)
    assert result.exit_code == 0, result.output
    assert (config.manifest, config.model) == (str(moved), "/new")


def test_keys_of_a_file_are_redone_instead_of_failed_rows_or_beside_a_condition(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is that of 'export --exclude': a key on each line."""
    (tmp_path / "keys.txt").write_text("000000002\n\n 000000008 \r\n")
    for where, expected in ((), {0: b"\0\0\1\0", 2: b"\1\0"}), (("--where", FAILED), None):
        result, _, (again,) = call(monkeypatch, output, "--keys", tmp_path / "keys.txt", *where)
        assert result.exit_code == 0, result.output
        assert again == (expected or {0: b"\0\0\1\0", 1: b"\0\1\0\0", 2: b"\1\1"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read: "),
        ("\n", "has no key; give a key on each line, or leave the option out"),
        ("a b c d e f g".replace(" ", "\n"), "7 of 7 keys of --keys are of no row of "),
        ("a b c d e f g".replace(" ", "\n"), "which has 10 rows: 'a', 'b', 'c', 'd', 'e' and 2 more. Take them out"),
    ],
)
def test_a_file_of_keys_that_names_no_rows_is_refused_before_anything_is_read(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, message: str
) -> None:
    if text is not None:
        (tmp_path / "keys.txt").write_text(text)
    monkeypatch.setattr(storage, "digest", lambda *_: pytest.fail("a file is read"))
    result, configs, _ = call(monkeypatch, output, "--keys", tmp_path / "keys.txt")
    assert (result.exit_code, configs) == (2, [])
    assert message in result.output


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [("nowhere", 2, "holds no run; check the path"), ("damaged", 5, "run.json: it is missing")],
)
def test_an_output_that_says_nothing_of_its_run_is_not_repaired(
    output: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, message: str
) -> None:
    if name == "damaged":
        (output / "run.json").unlink()
        name = str(output)
    result, configs, _ = call(monkeypatch, name)
    assert (result.exit_code, configs) == (code, [])
    assert message in result.output
