"""An output is handed on whole or shard by shard, never in halves, and nothing of anybody else's is replaced."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from support import runs
from vcf_batch import pool, storage
from vcf_batch.cli import main
from vcf_batch.commands import push as pushing
from vcf_batch.commands import verify
from vcf_batch.commands.push import ABANDONED_SECONDS, Pushed, push
from vcf_batch.driver.ledger import Summary
from vcf_batch.errors import DamageFound, RefusedError, StorageError, UsageError
from vcf_batch.output.output import Output
from vcf_batch.report import status

MINE = "# My own words\n"


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Ten rows in three shards."""
    runs.write_output(runs.write_manifest(tmp_path / "in", 10), tmp_path / "out", 4)
    return Output(str(tmp_path / "out"))


def copied(pushed: Pushed) -> tuple[int, int]:
    """Shards copied, and shards that were there; none is left out."""
    assert pushed.left_out == []
    return pushed.copied, pushed.there


def call(*arguments: object) -> tuple[int, str]:
    """Exit code of ``vcf-batch push``, and what it prints."""
    result = CliRunner().invoke(main, ["push", *map(str, arguments)])
    return result.exit_code, result.output


def damage(url: str) -> list[str]:
    return [str(finding.cause) for finding in verify.check(Output(url)) if finding.is_damage]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_what_is_pushed_is_the_output(
    output: Output, kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Shards, receipts, card and page have the same bytes there, and nothing else is; a second push copies none."""
    for internal in ("_progress.json", "_lease.json", "_staging/00000.tar", "profile/trace.json"):
        storage.publish_bytes(storage.join(output.url, internal), b"{}")
    target = str(tmp_path / "there") if kind == "local" else request.getfixturevalue("s3")
    assert copied(push(output, target)) == (3, 0)
    assert damage(target) == []
    names = set(storage.list_tree(target))
    files = {f"0000{shard}{suffix}" for shard in range(3) for suffix in (".tar", ".parquet", "_stats.json")}
    assert names == files | {"README.md", "index.html", "run.json"}
    for name in names:
        assert storage.read_bytes(storage.join(target, name)) == storage.read_bytes(storage.join(output.url, name))
    assert copied(push(output, target)) == (0, 3)
    assert copied(push(Output(target), str(tmp_path / "back"))) == (3, 0)


def test_a_push_that_was_cut_goes_on(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No receipt is there without its files, and what is there is not copied again."""
    upload, left = storage.upload, [6]

    def cut(local_path: str, url: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise StorageError("the network is gone")
        upload(local_path, url)

    monkeypatch.setattr(storage, "upload", cut)
    target = tmp_path / "there"
    with pytest.raises(StorageError, match="gone"):
        push(output, str(target))
    for receipt in target.glob("*_stats.json"):
        assert all((target / receipt.name.replace("_stats.json", suffix)).exists() for suffix in (".tar", ".parquet"))
    monkeypatch.undo()
    pushed = push(output, str(target))
    assert pushed.copied + pushed.there == 3 and pushed.copied > 0
    assert damage(str(target)) == []


def test_what_a_killed_push_left_is_deleted_and_what_another_one_writes_stays(output: Output, tmp_path: Path) -> None:
    """An unfinished file counts as left behind once nobody has written it for an hour."""
    target = tmp_path / "there"
    target.mkdir()
    for name, age in (("left", ABANDONED_SECONDS + 60), ("at-work", 60)):
        (target / f".tmp-{name}").write_bytes(b"half")
        os.utime(target / f".tmp-{name}", (time.time() - age,) * 2)
    assert copied(push(output, str(target))) == (3, 0)
    assert [path.name for path in target.glob(".tmp-*")] == [".tmp-at-work"]
    assert damage(str(target)) == []


def test_a_shard_that_was_repaired_is_copied_again(output: Output, tmp_path: Path) -> None:
    target = tmp_path / "there"
    push(output, str(target))
    files = runs.Files(Path(output.url), "00001")
    files.edit_everywhere(0, clip_score=0.5)
    files.write()
    assert copied(push(output, str(target))) == (1, 2)
    assert (target / "00001.tar").read_bytes() == files.tar.read_bytes()


@pytest.mark.parametrize("left", [b"", b"{"])
def test_what_is_no_receipt_counts_as_none_here_and_there(output: Output, tmp_path: Path, left: bytes) -> None:
    """A driver or a push that dies may leave such a file: no command takes its shard for a finished one.

    An empty one may be just being written, so it is no damage.
    """
    target = tmp_path / "there"
    receipt = Path(output.url, "00001_stats.json")
    whole = receipt.read_bytes()
    receipt.write_bytes(left)
    pushed = push(output, str(target))
    assert (pushed.copied, [*pushed.damaged], pushed.unfinished) == ((2, ["00001"], 0) if left else (2, [], 1))
    assert sum(status.read(output.url).totals.counts.values()) == 6
    assert [finding.shard.name for finding in verify.check(output) if finding.shard] == ["00001"]
    receipt.write_bytes(whole)
    (target / "00000_stats.json").write_bytes(left)
    assert copied(push(output, str(target))) == (2, 1)
    assert damage(str(target)) == []


def test_a_receipt_that_goes_during_a_push_is_named(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a repair that replaces its shard does not end meanwhile: the shard is unfinished."""
    monkeypatch.setattr(pushing, "COPY_PAUSE_SECONDS", 0.0)
    copy = pushing._copy_shard

    def repaired(source: Output, *arguments: Any) -> bool | None:
        Path(source.url, "00001_stats.json").unlink(missing_ok=True)
        return copy(source, *arguments)

    monkeypatch.setattr(pushing, "_copy_shard", repaired)
    pushed = push(output, str(tmp_path / "there"))
    assert pushed.copied == 2
    assert pushed.left_out == ["00001 is left out, as it is not generated yet"]


def test_a_target_that_refuses_to_be_read_is_trouble_of_the_storage(
    output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, read = str(tmp_path / "there"), storage.read_bytes
    push(output, target)

    def refused(url: str, *given: Any, **more: Any) -> bytes:
        if url == f"{target}/00001_stats.json":
            raise PermissionError(f"{url}: refused")
        return read(url, *given, **more)

    monkeypatch.setattr(storage, "read_bytes", refused)
    with pytest.raises(StorageError, match="refused"):
        push(output, target)


def test_a_damaged_shard_is_not_handed_on(output: Output, tmp_path: Path) -> None:
    tar = Path(output.url, "00001.tar")
    data = bytearray(tar.read_bytes())
    data[len(data.rstrip(b"\0"))] ^= 1  # padding of the last member, at which no reader looks
    tar.write_bytes(data)
    with pytest.raises(DamageFound, match=r"00001\.tar does not match its receipt"):
        push(output, str(tmp_path / "there"))
    assert not (tmp_path / "there" / "00001_stats.json").exists()


def test_what_is_left_out_of_a_push_is_told(output: Output, tmp_path: Path) -> None:
    """Damaged shards with exit code 5, those that are not generated yet with 6; with --partial 0 and the same words."""
    target = tmp_path / "there"
    unfinished = "00002 is left out, as it is not generated yet\n"
    Path(output.url, "00002_stats.json").unlink()
    code, told = call(output.url, target)
    assert (code, unfinished in told, "1 of 3 shards are left out" in told) == (6, True, True)
    assert call(output.url, target, "--partial") == (0, f"{target}: 0 shards copied, 2 were there\n{unfinished}")
    tar = Path(output.url, "00001.tar")
    size = tar.stat().st_size
    with tar.open("r+b") as file:
        file.truncate(1000)
    damaged = f"00001 is left out, as it is damaged: 00001.tar has 1000 bytes, its receipt says {size}\n{unfinished}"
    code, told = call(output.url, tmp_path / "new")
    assert (code, damaged in told, "vcf-batch repair" in told) == (5, True, True)
    assert call(output.url, tmp_path / "new", "--partial") == (
        0,
        f"{tmp_path / 'new'}: 0 shards copied, 1 were there\n{damaged}",
    )
    assert not (tmp_path / "new" / "00001_stats.json").exists()


@pytest.mark.parametrize(
    ("moment", "replaced_files", "pushed_again"),
    [("00001.tar", [".tar"], False), ("00001.parquet", [".parquet", ".tar", "_stats.json"], True)],
    ids=["just before it is sent", "between its two files"],
)
def test_what_is_pushed_is_what_its_receipt_says(
    output: Output,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    replaced_files: list[str],
    pushed_again: bool,
) -> None:
    """A repair that replaces a file between the comparison and the upload changes nothing there; one that replaces the
    shard between its files has the receipt read again, and the shard copied again."""
    monkeypatch.setattr(pushing, "COPY_PAUSE_SECONDS", 0.0)
    before = shutil.copytree(output.url, tmp_path / "before")
    after = shutil.copytree(output.url, tmp_path / "after")
    files = runs.Files(after, "00001")
    files.edit_everywhere(0, clip_score=0.5)
    files.write()
    upload, done = storage.upload, list[str]()

    def late(path: str, url: str) -> None:
        if url.endswith(moment) and not done:
            done.append(url)
            for suffix in replaced_files:
                shutil.copy(after / f"00001{suffix}", tmp_path / "aside")
                os.replace(tmp_path / "aside", Path(output.url, f"00001{suffix}"))
        upload(path, url)

    monkeypatch.setattr(storage, "upload", late)
    target = tmp_path / "there"
    assert copied(push(output, str(target))) == (3, 0)
    assert done
    for suffix in (".tar", ".parquet", "_stats.json"):
        expected = after if pushed_again else before
        assert (target / f"00001{suffix}").read_bytes() == (expected / f"00001{suffix}").read_bytes()


def test_nothing_of_anybody_elses_is_replaced(output: Output, tmp_path: Path) -> None:
    """Neither another run nor a card; one's own card is handed on as it is."""
    with pytest.raises(UsageError, match="the output itself"):
        push(output, output.url + "/")
    (tmp_path / "link").symlink_to(output.url)
    for inside in (f"{output.url}/sub", f"{output.url}/../out/a/b", f"{tmp_path}/link/sub"):
        with pytest.raises(UsageError, match=r"lies in the output .*; name a place outside of it"):
            push(output, inside)
    assert not (Path(output.url) / "sub").exists()
    runs.write_output(runs.write_manifest(tmp_path / "in2", 5), tmp_path / "other", 4)
    with pytest.raises(RefusedError, match="holds another run"):
        push(output, str(tmp_path / "other"))
    there = tmp_path / "there" / "README.md"
    there.parent.mkdir()
    there.write_text(MINE)
    with pytest.raises(UsageError, match="somebody else's"):
        push(output, str(there.parent))
    assert list(there.parent.iterdir()) == [there]
    Path(output.url, "README.md").write_text(MINE)
    assert copied(push(output, str(there.parent))) == (3, 0)
    assert there.read_text() == MINE


def test_generate_pushes_what_it_has_generated(output: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a run that succeeds, and only then."""
    counts = {"success": 10, "rejected": 0, "failed": 0}
    monkeypatch.setattr(pool, "run", lambda *_: Summary(output.url, 10, counts, 0, 1.0))  # type: ignore[arg-type]
    arguments = ["generate", str(tmp_path / "in/manifest.parquet"), output.url, "--push", str(tmp_path / "there")]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, f"{tmp_path}/there: 3 shards copied, 0 were there")
    result = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(result.stdout)["rows"]["success"] == 10 and "there: 0 shards copied" in result.stderr
    monkeypatch.setattr(pool, "run", lambda *_: Summary(output.url, 10, counts | {"failed": 1}, 0, 1.0))  # type: ignore[arg-type]
    result = CliRunner().invoke(main, [*arguments[:-1], output.url + "/sub"])
    assert result.exit_code == 2 and "lies in the output" in result.output, "before the run, not after it"
    result = CliRunner().invoke(main, [*arguments[:-1], str(tmp_path / "nowhere")])
    assert (result.exit_code, (tmp_path / "nowhere").exists()) == (3, False)


def test_push_is_a_command(output: Output, tmp_path: Path) -> None:
    """A licence that the card has stays, though the card is written anew."""
    for arguments in (["card", output.url, "--license", "cc-by-4.0"], ["push", output.url, str(tmp_path / "there")]):
        assert CliRunner().invoke(main, arguments).exit_code == 0
    assert "license: cc-by-4.0" in (tmp_path / "there" / "README.md").read_text()
