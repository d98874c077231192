"""Verify finds the same on several processes, and one that dies is told, never passed over."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from support import runs, shard_readers
from support.shard_readers import StrikingReader
from vcf_batch.cli import main
from vcf_batch.commands import verify
from vcf_batch.commands.verifying import processes
from vcf_batch.errors import StorageError, VcfBatchError
from vcf_batch.output.output import Output
from vcf_batch.output.row_json import row_json
from vcf_batch.sharding import ShardPlan

ROWS, SHARD_SIZE = 24, 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of twelve shards."""
    folder = tmp_path_factory.mktemp("whole")
    runs.write_output(runs.write_manifest(folder / "in", ROWS), folder / "out", SHARD_SIZE, failed={5})
    return folder / "out"


def found(output: Path, number: int) -> list[str]:
    return [str(finding) for finding in verify.check(Output(str(output)), processes=number)]


def lines(output: Path, *options: object) -> tuple[int, list[str]]:
    result = CliRunner().invoke(main, ["verify", str(output), *map(str, options)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output.splitlines()


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_several_processes_find_the_same_in_the_same_order(whole: Path, tmp_path: Path) -> None:
    """Damage of several kinds in several shards, a shard that is not generated, a key that is there twice."""
    output = shutil.copytree(whole, tmp_path / "out")
    (output / "00001.tar").unlink()
    flipped(output / "00003.tar")
    flipped(output / "00007.parquet")
    (output / "00009_stats.json").unlink()
    files = runs.Files(output, "00010")
    files.edit(0, prompt="another one")
    files.write()
    expected = found(output, 1)
    assert len(expected) == 5 and [line[:5] for line in expected] == ["00001", "00003", "00007", "00009", "00010"]
    assert found(output, 2) == expected
    assert lines(output, "--processes", 2) == lines(output, "--processes", 1)


def test_a_key_that_two_processes_read_is_found(whole: Path, tmp_path: Path) -> None:
    """Keys are compared over all shards, whoever reads them; a manifest that is gone is told once."""
    output = shutil.copytree(whole, tmp_path / "out")
    (output / "run.json").write_text((output / "run.json").read_text().replace("/in/manifest.parquet", "/gone"))
    files, own, other = runs.Files(output, "00006"), "000000012", "000000004"
    files.edit_everywhere(0, key=other)
    files.members = [(name.replace(f"{own}.", f"{other}."), data) for name, data in files.members]
    files.replace(f"{other}.json", row_json(files.table.slice(0, 1).to_batches()[0]))
    files.write()
    expected = found(output, 1)
    assert expected[0].startswith("note: manifest: ")
    assert expected[1:] == ["00006: row 12 has the key of row 4 in 00002.parquet"]
    assert found(output, 2) == expected


def test_an_output_without_damage_passes(whole: Path) -> None:
    code, told = lines(whole, "--processes", 3, "--sample", "0.5")
    assert code == 0 and told == lines(whole, "--processes", 1, "--sample", "0.5")[1]


def test_a_process_that_is_killed_ends_the_check_with_a_sentence() -> None:
    """What it did not read is not known, so no end of it is a pass; no process is left."""
    with pytest.raises(VcfBatchError, match=r"one of 2 processes that read shards was killed by SIGKILL.*--processes"):
        [*processes.read_in_processes(StrikingReader(shard_readers.killed), ShardPlan(400, 2), 2)]
    assert not processes.multiprocessing.active_children()


def test_what_a_process_raises_is_raised_here() -> None:
    with pytest.raises(StorageError, match="the store is down"):
        [*processes.read_in_processes(StrikingReader(shard_readers.failed), ShardPlan(400, 2), 2)]
    with pytest.raises(VcfBatchError, match=r"cannot hand on .*00000"):
        [*processes.read_in_processes(shard_readers.unsendable, ShardPlan(2, 2), 2)]
    with pytest.raises(VcfBatchError, match=r"cannot hand on .*00000.*: the first, the second"):
        [*processes.read_in_processes(shard_readers.raises_what_cannot_be_read, ShardPlan(2, 2), 2)]
    with pytest.raises(VcfBatchError, match="SystemExit: 0"):
        [*processes.read_in_processes(shard_readers.exits, ShardPlan(2, 2), 2)]
    assert not processes.multiprocessing.active_children()


def test_results_come_in_order_and_leaving_early_leaves_no_process() -> None:
    reading = processes.read_in_processes(StrikingReader(list), ShardPlan(400, 2), 2)
    assert [next(reading)[1] for _ in range(50)] == [f"{number:05d}" for number in range(50)]
    reading.close()  # type: ignore[attr-defined]
    assert not processes.multiprocessing.active_children()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_every_process(whole: Path, tmp_path: Path, number: signal.Signals) -> None:
    """With its code and one line, though the signal reaches all processes of the terminal, as Ctrl-C does."""
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from vcf_batch.commands.verifying import shard_reader\n"
        "check = shard_reader.check_shard\n"
        "def slow(*given):\n"
        f"    open({str(tmp_path / 'reading')!r}, 'w').close()\n"
        "    time.sleep(60)\n"
        "shard_reader.check_shard = slow\n"
        "if __name__ == '__main__':\n"
        f"    sys.argv = ['vcf-batch', 'verify', {str(whole)!r}, '--processes', '2']\n"
        "    from vcf_batch.__main__ import main\n"
        "    main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    while not (tmp_path / "reading").exists():
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors.strip() == "Interrupted."
    while is_there(process.pid):
        time.sleep(0.05)


def is_there(group: int) -> bool:
    """Whether a process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_few_rows_are_read_by_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """More processes are worth their start from some rows on, and there are no more than processors."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    rows = (1, 9_999, 10_000, 10_000_000)
    assert [processes.default_processes(number) for number in rows] == [1, 1, 2, 64]
