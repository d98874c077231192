"""Verify finds whatever was done to an output, and names the shard and the cause."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support import runs
from vcf_batch import storage
from vcf_batch.cli import main
from vcf_batch.commands import verify
from vcf_batch.driver.ledger import Ledger
from vcf_batch.errors import StorageError
from vcf_batch.output import lease, progress_file, shards
from vcf_batch.output.output import Output
from vcf_batch.output.row_json import row_json
from vcf_batch.output.shards import side_by_side
from vcf_batch.sharding import ShardPlan

ROWS, SHARD_SIZE = 10, 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of three shards over ten rows; row 5 failed."""
    columns = {"sample_id": [f"s{number}" for number in range(ROWS)], "weight": [float("nan"), *range(1, ROWS)]}
    folder = tmp_path_factory.mktemp("whole")
    manifest = runs.write_manifest(folder / "in", ROWS, columns)
    job = runs.write_output(manifest, folder / "out", SHARD_SIZE, failed={5})
    Ledger(job)  # counts what is finished, as the driver does at its end
    return Path(job.config.output)


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "out")


def run(output: Path, *options: str) -> tuple[int, list[str]]:
    """Exit code and lines of the command."""
    result = CliRunner().invoke(main, ["verify", str(output), *options])
    assert "Traceback" not in result.output
    return result.exit_code, result.output.splitlines()


# What is done to an output


Corruption = Callable[[Path], object]


def edited(change: Callable[[runs.Files], Any]) -> Corruption:
    """Shard 00001 changed by ``change``, and whole again to all appearance."""

    def corrupt(output: Path) -> None:
        files = runs.Files(output, "00001")
        change(files)
        files.write()

    return corrupt


def receipt(**changes: Any) -> Corruption:
    return lambda output: runs.Files(output, "00001").edit_receipt(**changes)


def flip(suffix: str, find: bytes, offset: int = 0) -> Corruption:
    """One bit of a file of shard 00001, ``offset`` bytes after ``find``."""

    def corrupt(output: Path) -> None:
        path = output / f"00001{suffix}"
        data = bytearray(path.read_bytes())
        data[data.index(find) + offset] ^= 1
        path.write_bytes(data)

    return corrupt


def cut(output: Path) -> None:
    path = output / "00001.tar"
    path.write_bytes(path.read_bytes()[:3000])


def cut_to_match(output: Path) -> None:
    files = runs.Files(output, "00001")
    data = files.tar.read_bytes()
    files.tar.write_bytes(data[: data.index(b"s6.png") + 1000])
    files.match()


def swap(*suffixes: str) -> Corruption:
    def corrupt(output: Path) -> None:
        for suffix in suffixes:
            first, second = output / f"00000{suffix}", output / f"00001{suffix}"
            first.rename(output / "aside")
            second.rename(first)
            (output / "aside").rename(second)

    return corrupt


def new_image(data: bytes) -> Corruption:
    def change(files: runs.Files) -> None:
        files.edit_everywhere(0, sha256=hashlib.sha256(data).hexdigest())
        files.replace("s4.png", data)

    return edited(change)


def swap_rows(files: runs.Files) -> None:
    order = [0, 1, 3, 2]
    files.table = files.table.take(order)
    files.members = files.members[:3] + files.members[6:] + files.members[3:6]


def double_key(files: runs.Files) -> None:
    files.edit(2, key="s4")
    files.members = [(name.replace("s6.", "s4."), data) for name, data in files.members]
    files.members[5] = ("s4.json", row_json(files.table.slice(2, 1).to_batches()[0]))


def no_parquet(output: Path) -> None:
    files = runs.Files(output, "00001")
    files.parquet.write_bytes(b"PAR1" * 99)
    files.match()


def copy_shard(output: Path) -> None:
    for suffix in (".tar", ".parquet", "_stats.json"):
        shutil.copy(output / f"00001{suffix}", output / f"00003{suffix}")


def edit_run(**changes: Any) -> Corruption:
    def corrupt(output: Path) -> None:
        record = json.loads((output / "run.json").read_text())
        (output / "run.json").write_text(json.dumps(record | changes))

    return corrupt


def move(files: runs.Files, name: str, place: int) -> None:
    member = next(member for member in files.members if member[0] == name)
    files.members.remove(member)
    files.members.insert(place, member)


CORRUPTIONS: dict[str, tuple[Corruption, str]] = {
    "a bit of an image": (flip(".tar", b"\x89PNG", 60), "00001: s4.png in 00001.tar has another sha256"),
    "a bit of a tar header": (flip(".tar", b"s6.png"), "00001: 00001.tar cannot be read: the header at byte 6,656 has"),
    "a bit of the first tar header": (
        flip(".tar", b"s4.png"),
        "00001: 00001.tar cannot be read: the header at byte 0 has a wrong sum",
    ),
    "a bit that no reader looks at": (flip(".tar", b"}" + bytes(9), 9), "00001: 00001.tar has the sha256"),
    "a bit behind the end": (flip(".tar", bytes(2000), 1999), "00001: 00001.tar cannot be read: it goes on at byte"),
    "a bit of a prompt": (flip(".tar", b"green", 1), "00001: "),
    "a bit of a parquet": (flip(".parquet", b"PAR1", 40), "00001: 00001.parquet"),
    "a bit of a parquet's footer": (flip(".parquet", b"clip_score", 1), "00001: 00001.parquet"),
    "a tar cut short": (cut, "00001: 00001.tar has 3000 bytes, its receipt says"),
    "a tar cut short, hashes to match": (
        cut_to_match,
        "00001: 00001.tar cannot be read: it ends at byte 7,656, within s6.png",
    ),
    "no tar": (lambda output: (output / "00001.tar").unlink(), "00001: 00001.tar is missing"),
    "no parquet": (lambda output: (output / "00001.parquet").unlink(), "00001: 00001.parquet is missing"),
    "no receipt": (lambda output: (output / "00001_stats.json").unlink(), "00001: it has no receipt"),
    "two tars swapped": (swap(".tar"), "00001: 00001.tar has "),
    "two shards' files swapped": (swap(".tar", ".parquet"), "00001: 00001."),
    "two shards swapped": (
        swap(".tar", ".parquet", "_stats.json"),
        "00001: 00001_stats.json is that of shard 00000 (rows 0 to 3); here belong shard 00001 (rows 4 to 7)",
    ),
    "a receipt that is not JSON": (
        lambda output: (output / "00001_stats.json").write_text("{"),
        "00001: 00001_stats.json is damaged",
    ),
    "timings in a receipt": (
        receipt(timings={"total": "quick", "worker": "a:1", "ended": "2026-01-01"}),
        "00001: 00001_stats.json is damaged: not a receipt: total is 'quick'",
    ),
    "counts in a receipt": (
        receipt(counts={"success": 4, "rejected": 0, "failed": 0}),
        "00001: its rows have counts {'success': 3",
    ),
    "means in a receipt": (receipt(means={"clip_score": 0.9}), "00001: its rows have means {'clip_score': 0.354"),
    "a hash in a receipt": (
        flip("_stats.json", b'"sha256": "', 11),
        "00001: 00001.parquet has the sha256",
    ),
    "another run's receipt": (receipt(fingerprint="f" * 64), "00001: 00001_stats.json has the fingerprint ffff"),
    "a receipt of one file": (receipt(files={}), "00001: 00001_stats.json describes []"),
    "a key that is there twice": (edited(double_key), "00001: row 6: key is 's4', the run has 's6' there"),
    "a prompt in the parquet": (edited(lambda files: files.edit(0, prompt="a cat")), "00001: row 4: prompt is 'a cat'"),
    "a carried column": (edited(lambda files: files.edit_everywhere(0, weight=9.0)), "00001: row 4: weight is 9.0"),
    "a setting": (edited(lambda files: files.edit_everywhere(0, steps=5)), "00001: row 4: steps is 5, the run has 4"),
    "a strength": (
        edited(lambda files: files.edit_everywhere(0, strength=0.7)),
        "00001: row 4: strength is 0.7, the run has 1.0",
    ),
    "a score in the parquet": (edited(lambda files: files.edit(0, clip_score=0.9)), "00001: s4.json in 00001.tar"),
    "a score in both": (edited(lambda files: files.edit_everywhere(0, clip_score=0.9)), "00001: its rows have means"),
    "a failure without a reason": (edited(lambda files: files.edit(1, error_message=None)), "00001: row 5: status"),
    "a success that was none": (
        edited(lambda files: files.edit(1, status="success", error_message=None)),
        "00001: 00001.tar has a member 's6.png' where s5.png belongs",
    ),
    "a failure that was none": (
        edited(lambda files: files.edit(0, status="failed", error_message="no")),
        "00001: 00001.tar has a member 's4.png' where s6.png belongs",
    ),
    "a JSON member": (edited(lambda files: files.replace("s4.json", b"{}")), "00001: s4.json in 00001.tar is not"),
    "a prompt in the tar": (edited(lambda files: files.replace("s4.txt", b"a cat")), "00001: s4.txt in 00001.tar is"),
    "an extra member": (
        edited(lambda files: files.members.append(("s9.png", b"more"))),
        "00001: 00001.tar has a member 's9.png' that no row",
    ),
    "an image that is there twice": (
        edited(lambda files: files.members.insert(0, files.members[0])),
        "00001: 00001.tar has a member 's4.png' where s4.txt belongs",
    ),
    "members in another order": (edited(lambda files: move(files, "s4.txt", 0)), "00001: 00001.tar has a member 's4.t"),
    "rows in another order": (edited(swap_rows), "00001: row 6: key is 's7', the run has 's6' there"),
    "a row that is gone": (
        edited(lambda files: setattr(files, "table", files.table.slice(1))),
        "00001: 00001.parquet has 3 rows; shard 00001 (rows 4 to 7) has 4",
    ),
    "a column that is gone": (
        edited(lambda files: setattr(files, "table", files.table.drop_columns(["label"]))),
        "00001: 00001.parquet has other columns than a run writes: pyarrow.Field<label: string>",
    ),
    "an image of another size": (new_image(runs.png(4, 40)), "00001: s4.png in 00001.tar has 40 x 40 pixels, its row"),
    "an image that is none": (new_image(b"not an image"), "00001: s4.png in 00001.tar cannot be decoded: the file"),
    "a parquet that is none": (
        no_parquet,
        "00001: 00001.parquet cannot be read",
    ),
    "a shard too many": (copy_shard, "00003: the run has 3 shards, and this is none of them; delete its files"),
    "no run.json": (lambda output: (output / "run.json").unlink(), "Error: run.json: it is missing"),
    "another fingerprint": (edit_run(fingerprint="f" * 64), "Error: run.json: "),
    "another number of rows": (
        edit_run(manifest={"url": "m", "identity": "i", "rows": 9, "files": {}}),
        "Error: run.json: it says 9 rows; the manifest has 10",
    ),
    "a run.json without its parts": (edit_run(config=None), "Error: run.json: "),
}


def test_an_output_that_nobody_touched_has_no_damage(whole: Path) -> None:
    assert run(whole) == (0, [f"{whole}: 10 rows in 3 shards, no damage"])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_is_found(output: Path, name: str) -> None:
    """Exit code 5, and a line that names the shard and the cause; shards that are whole are not blamed."""
    corrupt, expected = CORRUPTIONS[name]
    corrupt(output)
    code, lines = run(output)
    assert code == 5
    assert any(line.startswith(expected) for line in lines), lines
    if "swapped" not in name:
        assert len(lines) <= 2


def test_a_repeated_key_is_found_without_a_manifest(output: Path) -> None:
    """Keys are unique across shards."""
    (output / "run.json").write_text((output / "run.json").read_text().replace("/in/manifest.parquet", "/gone"))
    files = runs.Files(output, "00002")
    files.edit_everywhere(0, key="s4")
    files.members = [(name.replace("s8.", "s4."), data) for name, data in files.members]
    files.replace("s4.json", row_json(files.table.slice(0, 1).to_batches()[0]))
    files.write()
    code, lines = run(output)
    assert code == 5
    assert lines[0].startswith("note: manifest: ") and "/gone does not exist; " in lines[0]
    assert lines[1] == "00002: row 8 has the key of row 4 in 00001.parquet"


def test_a_manifest_that_has_changed_is_told_and_the_rest_is_checked(output: Path) -> None:
    size = json.loads((output / "run.json").read_text())["manifest"]["files"]["manifest.parquet"]["size"]
    other = runs.write_manifest(output.parent / "in", 3)
    record = json.loads((output / "run.json").read_text())
    record["config"]["manifest"] = str(other)
    (output / "run.json").write_text(json.dumps(record))
    assert run(output)[0] == 0
    told = f"note: manifest: {other} has changed since the run: manifest.parquet has changed: it had {size} bytes, and "
    assert run(output)[1][0] == f"{told}has {other.stat().st_size} now; rows are not compared with it"
    flip(".tar", b"\x89PNG", 60)(output)
    assert run(output)[0] == 5


def test_a_manifest_that_changes_meanwhile_is_told_and_the_rest_is_checked(output: Path) -> None:
    """Rows are no longer compared with it; the other findings of the check are there."""
    flip(".tar", b"\x89PNG", 60)(output)
    copy = output.parent / "manifest.parquet"
    shutil.copyfile(Output(str(output)).config.manifest, copy)
    opened = Output(str(output), {"manifest": str(copy)})
    assert opened.manifest
    runs.write_manifest(output.parent, 3)
    damage, note = verify.check(opened)
    assert damage.is_damage and "another sha256 than its row says" in str(damage)
    told = str(note)
    assert "rows read since are not compared with it" in told and "must not change during a run" in told


def test_what_a_killed_run_left_is_no_damage(output: Path) -> None:
    (output / "_staging" / "attempt").mkdir(parents=True)
    (output / "_staging" / "attempt" / "00001.tar").write_bytes(b"half")
    code, lines = run(output)
    assert (code, lines[0]) == (
        0,
        "note: _staging: 1 files of a run that is at work or was killed; the next start removes them",
    )


def test_a_place_without_a_run_is_a_mistake(tmp_path: Path) -> None:
    code, lines = run(tmp_path)
    assert (code, lines) == (2, [f"Error: {tmp_path} holds no run; check the path"])


def test_an_output_in_an_object_store_is_read_like_any_other(output: Path, s3: str) -> None:
    for path in filter(Path.is_file, output.iterdir()):
        storage.upload(str(path), f"{s3}/{path.name}")
    assert [str(finding) for finding in verify.check(Output(s3))] == []
    storage.remove(f"{s3}/00001.tar")
    assert [str(finding) for finding in verify.check(Output(s3))] == ["00001: 00001.tar is missing"]


def test_storage_trouble_is_not_damage(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_read = storage.open_read

    def broken(url: str) -> Any:
        if url.endswith("00001.tar"):
            raise StorageError("the storage is down")
        return open_read(url)

    monkeypatch.setattr(storage, "open_read", broken)
    code, lines = run(output)
    assert (code, lines) == (1, ["Error: the storage is down"])


def test_a_storage_that_refuses_is_trouble_and_no_damage(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(url: str) -> Any:
        raise PermissionError(f"{url}: refused")

    monkeypatch.setattr(storage, "list_tree", refused)
    with pytest.raises(StorageError, match="refused"):
        [*verify.check(Output(output))]


def test_shards_are_read_in_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not grow with the number of shards."""
    begun: list[str] = []
    monkeypatch.setattr(shards, "SHARD_READERS", 1)
    results = side_by_side(lambda shard: begun.append(shard.name), ShardPlan(100, 1))
    next(results)
    assert len(begun) <= 2
    assert len(list(results)) == 99


def test_what_is_not_generated_yet_is_unfinished_and_no_damage(output: Path) -> None:
    """Exit code 6: of a run that has ended with the remedy, of one at work with its owner. Damage beside it is 5.
    Files that no receipt stands for are named."""
    for name in ("_progress.json", "00001_stats.json", "00002_stats.json", "00002.tar"):
        (output / name).unlink()
    code, lines = run(output)
    assert (code, lines[:2]) == (
        6,
        [
            "00001: it has no receipt: it is not generated yet. No receipt stands for 00001.tar and 00001.parquet: no "
            "part of the dataset, deleted by the next start",
            "00002: it has no receipt: it is not generated yet. No receipt stands for 00002.parquet: no part of the "
            "dataset, deleted by the next start",
        ],
    )
    assert "2 of 3 shards are not generated yet, the others have no damage; nobody is at work. Rerun" in lines[2]
    with lease.hold(str(output)):
        code, lines = run(output)
    assert (code, "is at work since 20" in lines[-1]) == (6, True)
    (output / "00000.tar").unlink()
    assert run(output)[0] == 5


def test_a_shard_that_is_replaced_while_it_is_read_is_not_accused(
    output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repair that ends meanwhile: receipt and files are read once more."""
    replaced = shutil.copytree(output, tmp_path / "replaced")
    files = runs.Files(replaced, "00001")
    files.edit_everywhere(0, clip_score=0.5)
    files.write()
    means = {"clip_score": (0.5 + 6 / 16 + 7 / 16) / 3, "clip_reference": None, "lpips": None}
    files.edit_receipt(means=json.loads(files.receipt.read_text())["means"] | means)
    digest, done = storage.digest, list[str]()

    def late(url: str) -> Any:
        if url.endswith("00001.parquet") and not done:
            done.append(url)
            for path in replaced.glob("00001*"):
                shutil.copy(path, output / path.name)
        return digest(url)

    monkeypatch.setattr(storage, "digest", late)
    assert run(output) == (0, [f"{output}: 10 rows in 3 shards, no damage"])
    assert done


# A sample


def test_a_sample_is_the_same_each_time() -> None:
    """A larger one has the shards of a smaller one, and none is empty."""
    plan = ShardPlan(100_000, 10)
    samples = [verify.sample(plan, fraction) for fraction in (1e-9, 0.001, 0.01, 0.1, 0.5, 1.0)]
    assert samples == [verify.sample(plan, fraction) for fraction in (1e-9, 0.001, 0.01, 0.1, 0.5, 1.0)]
    assert all(smaller < larger for smaller, larger in itertools.pairwise(samples))
    assert [len(samples[0]), len(samples[-1])] == [1, len(plan)]
    assert [len(found) for found in samples[1:4]] == pytest.approx([10, 100, 1000], rel=0.3)
    assert sorted(samples[1])[:4] == [1825, 2155, 2909, 3912]


def test_only_the_sample_is_read(output: Path) -> None:
    """What is damaged elsewhere is not found, and the answer says what was read. Missing shards are all told."""
    (chosen,) = verify.sample(Output(output).plan, 0.1)
    others = [index for index in range(3) if index != chosen]
    other = output / f"{others[0]:05d}.parquet"
    data = other.read_bytes()
    other.write_bytes(data[:50] + b"\1" + data[51:])
    rows = len(Output(output).plan[chosen])
    said = f"{output}: 10 rows in 3 shards; 1 of them, with {rows} rows, were read, no damage"
    assert run(output, "--sample", "0.1") == (0, [said])
    assert run(output, "--sample", "1")[0] == 5
    told = json.loads(CliRunner().invoke(main, ["verify", str(output), "--sample", "0.1", "--json"]).stdout)
    assert (told["shards_read"], told["rows_read"], told["shards"]) == (1, rows, 3)
    for name in (f"{others[1]:05d}_stats.json", progress_file.PROGRESS_NAME):
        (output / name).unlink()
    code, lines = run(output, "--sample", "0.1")
    assert code == 6 and lines[0].startswith(f"{others[1]:05d}: it has no receipt")
    assert "1 of 3 shards are not generated yet, those that were read have no damage" in lines[1]
    other.write_bytes(data)
    (output / f"{chosen:05d}.tar").write_bytes(b"")
    assert run(output, "--sample", "0.1")[0] == 5
    assert run(output, "--sample", "0")[0] == 2
