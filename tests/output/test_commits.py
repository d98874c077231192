"""Commits: whole or absent, whoever dies, is suspended or lives on."""

import contextlib
import errno
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from support.runs import Killed, kill_after, read_receipts
from vcf_batch import storage
from vcf_batch.errors import RefusedError, StorageError
from vcf_batch.output import commits, receipts, shards
from vcf_batch.output.commits import StagedFilesLost
from vcf_batch.output.receipts import Receipt
from vcf_batch.records import Shard, Status
from vcf_batch.storage import local, writing
from vcf_batch.storage.drivers import filesystem

SHARD = Shard(0, 0, 2, "00000")


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3")


def fake_files(folder: Path, content: str, success: int = 2) -> shards.ShardFiles:
    """A finished shard of two rows; without a tar if none of them is a success."""
    paths = {kind: str(folder / f"{content}.{kind}") for kind in ("tar", "parquet")}
    for kind, path in paths.items():
        Path(path).write_text(f"{content} {kind}")
    entries = {kind: storage.digest(path) for kind, path in paths.items() if success or kind != "tar"}
    counts: dict[Status, int] = {"success": success, "rejected": 0, "failed": 2 - success}
    return shards.ShardFiles(paths["tar"], paths["parquet"], counts, entries, {})


def receipt_for(files: shards.ShardFiles, attempt: int = 1) -> Receipt:
    return Receipt(SHARD, "f" * 64, attempt, files.counts, files.entries, {"dtype": "float32"}, {}, files.means)


def check(output: str, found: Mapping[int, Receipt]) -> None:
    """Each receipt describes the files beside it, all of them."""
    for receipt in found.values():
        for kind, suffix in receipts.FILE_SUFFIXES.items():
            url = storage.join(output, receipt.shard.name + suffix)
            assert (storage.digest(url) if storage.exists(url) else None) == receipt.files.get(kind)


def test_a_staged_shard_does_not_exist_and_a_committed_one_does(output: str, tmp_path: Path) -> None:
    """Only the driver commits: files to their final names, receipt last. A shard without a receipt does not exist."""
    files = fake_files(tmp_path, "x")
    receipt = receipt_for(files)
    staged = commits.stage(files, output, SHARD, "attempt-1")
    assert set(storage.list_tree(output)) == {"_staging/attempt-1/00000.tar", "_staging/attempt-1/00000.parquet"}
    assert read_receipts(output) == {}
    commits.commit(output, receipt, staged)
    assert set(storage.list_tree(output)) == {"00000.tar", "00000.parquet", "00000_stats.json"}
    assert read_receipts(output) == {0: receipt}
    assert storage.digest(storage.join(output, "00000.parquet")) == files.entries["parquet"]


def test_discard_and_clean(output: str, tmp_path: Path) -> None:
    files = fake_files(tmp_path, "x")
    first, second = (commits.stage(files, output, SHARD, attempt) for attempt in ("one", "two"))
    commits.discard(output, first)
    assert set(storage.list_tree(output)) == set(second.values())
    commits.clean(output)
    commits.clean(output)
    assert storage.list_tree(output) == {}


def test_a_commit_that_never_ended_leaves_nothing_after_the_next_start(output: str, tmp_path: Path) -> None:
    """Leftovers are never read as data and are removed at the next start; what is committed stays."""
    whole, half = fake_files(tmp_path, "whole"), fake_files(tmp_path, "half")
    receipt = receipt_for(whole)
    commits.commit(output, receipt, commits.stage(whole, output, SHARD, "one"))
    storage.publish_bytes(storage.join(output, "run.json"), b"{}")
    committed = storage.list_tree(output)
    storage.upload(half.tar, storage.join(output, "00001.tar"))
    storage.upload(half.parquet, storage.join(output, "123456.parquet"))
    if storage.is_local(output):
        Path(output, ".tmp-0123").write_bytes(b"half")
    commits.clean(output)
    assert storage.list_tree(output) == committed
    assert not storage.is_local(output) or {path.name for path in Path(output).iterdir()} == set(committed)


def test_a_worker_that_was_declared_dead_never_touches_a_final_name(output: str, tmp_path: Path) -> None:
    """A worker that was declared dead and lives on (this happens) can never touch a final name."""
    dead = fake_files(tmp_path, "dead")
    alive = fake_files(tmp_path, "alive")
    receipt = receipt_for(alive, attempt=2)
    commits.commit(output, receipt, commits.stage(alive, output, SHARD, "attempt-2"))
    commits.stage(dead, output, SHARD, "attempt-1")
    assert read_receipts(output) == {0: receipt}
    assert storage.digest(storage.join(output, "00000.tar")) == alive.entries["tar"]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_staged_file_that_is_gone_or_cut_is_not_committed(output: str, tmp_path: Path, kind: str) -> None:
    files = fake_files(tmp_path, "x")
    receipt = receipt_for(files)
    staged = commits.stage(files, output, SHARD, "one")
    storage.publish_bytes(storage.join(output, staged[kind]), b"cut")
    with pytest.raises(StorageError, match="3 bytes"):
        commits.commit(output, receipt, staged)
    storage.remove(storage.join(output, staged[kind]))
    with pytest.raises(StorageError, match="gone"):
        commits.commit(output, receipt, staged)
    assert storage.list_files(output) == {}


WITHOUT_TAR = ["neither", "the older one", "the new one", "both"]
"""Which of two shards has no tar, because it has no successful sample."""


def two(tmp_path: Path, without_tar: str) -> tuple[shards.ShardFiles, shards.ShardFiles]:
    """An older shard, and the one that replaces it."""
    older, new = (without_tar in (name, "both") for name in ("the older one", "the new one"))
    return fake_files(tmp_path, "old", 0 if older else 2), fake_files(tmp_path, "new", 0 if new else 2)


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("calls", range(1, 6))
@pytest.mark.parametrize("without_tar", ["neither", "the older one"])
def test_a_commit_that_failed_goes_on_where_it_stopped(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, there: bool, without_tar: str
) -> None:
    """While the staged files are there, a shard whose commit failed need not be generated again: whichever call it
    was, and whether or not it had its effect."""
    old, new = two(tmp_path, without_tar)
    receipt = receipt_for(new)
    if there:
        commits.commit(output, receipt_for(old), commits.stage(old, output, SHARD, "one"))
    staged = commits.stage(new, output, SHARD, "two")
    left = calls

    def failing(call: Callable[..., None], effect: bool) -> Callable[..., None]:
        def wrapped(*arguments: Any, **options: Any) -> None:
            nonlocal left
            left -= 1
            if left or effect:
                call(*arguments, **options)
            if not left:
                raise StorageError("as ordered")

        return wrapped

    monkeypatch.setattr(storage, "move", failing(storage.move, effect=False))
    monkeypatch.setattr(storage, "publish_bytes", failing(storage.publish_bytes, effect=True))
    if calls <= 3 + 2 * there:
        with pytest.raises(StorageError, match="as ordered"):
            commits.commit(output, receipt, staged)
    commits.commit(output, receipt, staged)
    assert read_receipts(output) == {0: receipt}
    assert storage.digest(storage.join(output, "00000.tar")) == new.entries["tar"]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("calls", range(1, 7))
@pytest.mark.parametrize("without_tar", ["the new one", "both"])
def test_a_commit_that_takes_the_tar_away_goes_on_or_has_its_shard_generated_again(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int, there: bool, without_tar: str
) -> None:
    """Whichever call failed: no receipt stands beside an older tar, and the next commit of the shard makes it whole."""
    old, new = two(tmp_path, without_tar)
    receipt = receipt_for(new)
    if there:
        commits.commit(output, receipt_for(old), commits.stage(old, output, SHARD, "one"))
    staged = commits.stage(new, output, SHARD, "two")
    left = calls

    def failing(call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(*arguments: Any, **options: Any) -> None:
            nonlocal left
            left -= 1
            if not left:
                raise StorageError("as ordered")
            call(*arguments, **options)

        return wrapped

    monkeypatch.setattr(storage, "move", failing(storage.move))
    monkeypatch.setattr(storage, "publish_bytes", failing(storage.publish_bytes))
    takes_tar_away = there and without_tar == "the new one"
    if calls <= 2 + 2 * there + takes_tar_away:
        with pytest.raises(StorageError, match="as ordered") as failed:
            commits.commit(output, receipt, staged)
        assert isinstance(failed.value, StagedFilesLost) == (takes_tar_away and calls == 4)
        check(output, read_receipts(output))
        if isinstance(failed.value, StagedFilesLost):
            staged = commits.stage(new, output, SHARD, "three")
    commits.commit(output, receipt, staged)
    assert read_receipts(output) == {0: receipt}
    check(output, {0: receipt})


def test_a_look_for_a_newer_receipt_that_fails_leaves_no_receipt_beside_an_older_tar(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the staged files are in their places, so a repeated call would not know of the older tar."""
    old, new = two(tmp_path, "the new one")
    commits.commit(output, receipt_for(old), commits.stage(old, output, SHARD, "one"))
    staged = commits.stage(new, output, SHARD, "two")
    content, looks = receipts.content, 0

    def failing(*arguments: Any) -> bytes | None:
        nonlocal looks
        looks += 1
        if looks == 2:
            raise StorageError("as ordered")
        return content(*arguments)

    monkeypatch.setattr(receipts, "content", failing)
    with pytest.raises(StagedFilesLost, match="as ordered"):
        commits.commit(output, receipt_for(new), staged)
    check(output, read_receipts(output))
    commits.commit(output, receipt_for(new), commits.stage(new, output, SHARD, "three"))
    check(output, {0: receipt_for(new)})


@pytest.mark.parametrize("step", ["read_bytes", "move", "publish_bytes"])
def test_a_driver_suspended_within_a_commit_harms_nothing_of_the_next_owners(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A driver that lost its lease never commits: not even when another takes over in the middle of its commit."""
    late, new = fake_files(tmp_path, "late"), fake_files(tmp_path, "next")
    receipt = receipt_for(new, attempt=2)
    staged = commits.stage(late, output, SHARD, "one")
    stepped = getattr(storage, step)

    def suspended(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(storage, step, stepped)
        commits.clean(output)
        commits.commit(output, receipt, commits.stage(new, output, SHARD, "two"))
        return stepped(*arguments, **options)

    monkeypatch.setattr(storage, step, suspended)
    with pytest.raises(StorageError, match=r"another driver|is gone"):
        commits.commit(output, receipt_for(late), staged)
    assert read_receipts(output) == {0: receipt}
    check(output, {0: receipt})


@pytest.mark.parametrize(("step", "number"), [("publish_bytes", 1), ("move", 1), ("move", 2), ("move", 3)])
@pytest.mark.parametrize("success", [2, 0])
def test_a_driver_suspended_while_it_replaces_a_shard_harms_nothing_of_the_next_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, success: int
) -> None:
    """Nor does it remove the next owner's receipt in place of the older one that it has seen, nor its tar."""
    output = str(tmp_path / "out")
    old, new = (fake_files(tmp_path, content) for content in ("old", "next"))
    late = fake_files(tmp_path, "late", success)
    receipt = receipt_for(new, attempt=2)
    commits.commit(output, receipt_for(old), commits.stage(old, output, SHARD, "zero"))
    staged = commits.stage(late, output, SHARD, "one")
    calls, stepped = 0, getattr(storage, step)

    def suspended(*arguments: Any, **options: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            commits.clean(output)
            commits.commit(output, receipt, commits.stage(new, output, SHARD, "two"))
        stepped(*arguments, **options)

    monkeypatch.setattr(storage, step, suspended)
    with pytest.raises(StorageError, match="is gone"):
        commits.commit(output, receipt_for(late), staged)
    assert read_receipts(output) == {0: receipt}
    check(output, {0: receipt})


def steps_of(replaces: bool, without_tar: str) -> int:
    """Number of changes that a commit makes until its receipt is there: files moved, receipts moved and published."""
    files = 2 - (without_tar in ("the new one", "both"))
    return files + 1 + 2 * replaces + (replaces and without_tar == "the new one")


@pytest.mark.parametrize(
    ("replaces", "without_tar", "survived"),
    [
        (replaces, without_tar, survived)
        for replaces in (False, True)
        for without_tar in WITHOUT_TAR
        for survived in range(steps_of(replaces, without_tar) + 1)
    ],
)
def test_a_driver_killed_within_a_commit_leaves_a_whole_shard_or_none(
    output: str, tmp_path: Path, replaces: bool, without_tar: str, survived: int
) -> None:
    """Nothing is ever lost, doubled or half-written: a receipt never stands beside files it does not describe, and the
    next start has either the older shard or the one that replaces it, whole."""
    # Of the same size, so that only the order of the steps keeps them apart.
    old, new = two(tmp_path, without_tar)
    first, second = receipt_for(old), receipt_for(new, attempt=2)
    if replaces:
        commits.commit(output, first, commits.stage(old, output, SHARD, "one"))
    staged = commits.stage(new, output, SHARD, "two")

    kill_after(survived, lambda: commits.commit(output, second, staged))

    assert commits.any_committed(output) == (replaces or survived == steps_of(replaces, without_tar))
    check(output, read_receipts(output))
    commits.clean(output)
    found = read_receipts(output)
    check(output, found)
    if replaces:
        assert found == {0: first if survived < 2 else second}
    assert len(storage.list_tree(output)) == sum(1 + len(receipt.files) for receipt in found.values())
    commits.commit(output, second, commits.stage(new, output, SHARD, "three"))
    assert read_receipts(output) == {0: second}
    check(output, {0: second})


def suspend(
    monkeypatch: pytest.MonkeyPatch, owner: object, step: str, meanwhile: Callable[[], object], argument: str = ""
) -> None:
    """Let ``meanwhile`` happen right before the first call of a step that has ``argument`` among its own."""
    stepped = getattr(owner, step)

    def suspended(*arguments: Any, **options: Any) -> Any:
        if argument in str((arguments, options)):
            monkeypatch.setattr(owner, step, stepped)
            meanwhile()
        return stepped(*arguments, **options)

    monkeypatch.setattr(owner, step, suspended)


@pytest.mark.parametrize("next_one", ["replaces it too", "leaves the older shard"])
@pytest.mark.parametrize("step", ["publish_bytes", "size", "move", "cp_file", "delete_object"])
def test_a_driver_suspended_while_it_replaces_a_shard_on_s3_harms_nothing_of_the_next_owners(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, next_one: str
) -> None:
    """On S3 too: the older receipt is deleted only if it is still the one that was found, and put back if the next
    owner has left it."""
    old, late, new = (fake_files(tmp_path, content) for content in ("old", "late", "next"))
    expected = first = receipt_for(old)
    commits.commit(s3, first, commits.stage(old, s3, SHARD, "zero"))
    staged = commits.stage(late, s3, SHARD, "one")

    def next_owner() -> None:
        nonlocal expected
        commits.clean(s3)
        if next_one == "replaces it too":
            expected = receipt_for(new, attempt=2)
            commits.commit(s3, expected, commits.stage(new, s3, SHARD, "two"))

    driver = filesystem(s3)[0]
    owner, name = {"cp_file": (driver, "cp_file"), "delete_object": (driver, "call_s3")}.get(step, (storage, step))
    suspend(monkeypatch, owner, name, next_owner, "IfMatch" if step == "delete_object" else "")
    with pytest.raises(StorageError, match=r"another driver|is gone"):
        commits.commit(s3, receipt_for(late), staged)
    assert read_receipts(s3) == {0: expected}
    check(s3, {0: expected})
    commits.clean(s3)
    assert read_receipts(s3) == {0: expected}
    assert len(storage.list_tree(s3)) == 3


@pytest.mark.parametrize("suspended", ["before it copies the tar", "before it deletes the tar"])
def test_a_driver_suspended_while_it_takes_a_tar_away_on_s3_leaves_the_next_owners(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suspended: str
) -> None:
    """On S3 too: the older tar is deleted only if it is still the one that was found."""
    old, late, new = (
        fake_files(tmp_path, content, success) for content, success in (("old", 2), ("late", 0), ("next", 2))
    )
    receipt = receipt_for(new, attempt=2)
    commits.commit(s3, receipt_for(old), commits.stage(old, s3, SHARD, "zero"))
    staged = commits.stage(late, s3, SHARD, "one")

    def next_owner() -> None:
        commits.clean(s3)
        assert read_receipts(s3) == {0: receipt_for(late)}, "the replacement is finished"
        commits.commit(s3, receipt, commits.stage(new, s3, SHARD, "two"))

    driver = filesystem(s3)[0]
    owner, step = (driver, "cp_file") if suspended == "before it copies the tar" else (driver, "call_s3")
    arguments = "00000.tar" if step == "cp_file" else "00000.tar', 'IfMatch"
    suspend(monkeypatch, owner, step, next_owner, arguments)
    with pytest.raises(StorageError, match="another driver"):
        commits.commit(s3, receipt_for(late), staged)
    assert read_receipts(s3) == {0: receipt}
    check(s3, {0: receipt})
    commits.clean(s3)
    assert len(storage.list_tree(s3)) == 3


@pytest.mark.parametrize("suspended", ["before it copies the receipt", "before it deletes the receipt"])
def test_what_remains_on_a_store_without_conditions(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suspended: str
) -> None:
    """Without If-Match a driver that wakes up may delete the next owner's receipt. If it has copied that one before, it
    puts it back, or the next start does. Otherwise the shard has none, and is generated again as a whole."""
    old, late, new = (fake_files(tmp_path, content) for content in ("old", "late", "next"))
    receipt = receipt_for(new, attempt=2)
    monkeypatch.setattr(storage, "version", lambda _: None)
    commits.commit(s3, receipt_for(old), commits.stage(old, s3, SHARD, "zero"))
    staged = commits.stage(late, s3, SHARD, "one")

    def next_owner() -> None:
        commits.clean(s3)
        commits.commit(s3, receipt, commits.stage(new, s3, SHARD, "two"))

    if suspended == "before it copies the receipt":
        suspend(monkeypatch, storage, "move", next_owner)
    else:
        suspend(monkeypatch, writing, "remove", next_owner)
    with pytest.raises(StorageError, match="is gone"):
        commits.commit(s3, receipt_for(late), staged)
    assert read_receipts(s3) == ({0: receipt} if suspended == "before it copies the receipt" else {})
    commits.clean(s3)
    if suspended == "before it copies the receipt":
        assert read_receipts(s3) == {0: receipt}
    else:
        assert storage.list_tree(s3) == {}


def test_a_tar_is_not_taken_away_where_the_next_owner_has_committed(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without If-Match too, if the driver wakes up before it looks for a receipt: that is its last look."""
    old, late, new = (fake_files(tmp_path, name, success) for name, success in (("old", 2), ("late", 0), ("next", 2)))
    receipt = receipt_for(new, attempt=2)
    monkeypatch.setattr(storage, "version", lambda _: None)
    commits.commit(s3, receipt_for(old), commits.stage(old, s3, SHARD, "zero"))
    staged = commits.stage(late, s3, SHARD, "one")
    move = storage.move

    def suspended(source: str, target: str, version: str | None = None) -> None:
        move(source, target, version)
        if target.endswith("00000.parquet"):
            monkeypatch.setattr(storage, "move", move)
            commits.clean(s3)
            commits.commit(s3, receipt, commits.stage(new, s3, SHARD, "two"))

    monkeypatch.setattr(storage, "move", suspended)
    with pytest.raises(StorageError, match="another driver"):
        commits.commit(s3, receipt_for(late), staged)
    assert read_receipts(s3) == {0: receipt}
    check(s3, {0: receipt})


def test_a_receipt_that_was_moved_away_is_put_back_if_its_files_are_there(output: str, tmp_path: Path) -> None:
    """What `replaced.json` still holds is restored at the next start, if the hashes match; else nothing is."""
    files = fake_files(tmp_path, "old")
    receipt = receipt_for(files)
    commits.commit(output, receipt, commits.stage(files, output, SHARD, "one"))
    replaced = storage.join(output, "_staging/late/replaced.json")
    storage.publish_bytes(replaced, receipt.to_json())
    storage.remove(storage.join(output, "00000_stats.json"))
    assert commits.any_committed(output)
    commits.clean(output)
    assert read_receipts(output) == {0: receipt}
    assert len(storage.list_tree(output)) == 3

    storage.publish_bytes(replaced, receipt.to_json())
    storage.remove(storage.join(output, "00000_stats.json"))
    storage.publish_bytes(storage.join(output, "00000.tar"), b"old taR")
    commits.clean(output)
    assert storage.list_tree(output) == {}


@pytest.mark.parametrize("step", ["publish_bytes", "list_files", "move"])
def test_a_driver_suspended_while_it_deletes_strays_harms_nothing_of_the_next_owners(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A tar that had no receipt may have one by now: it is moved into a folder that the next owner has deleted."""
    output = str(tmp_path / "out")
    stray, new = fake_files(tmp_path, "stray"), fake_files(tmp_path, "next")
    storage.upload(stray.tar, storage.join(output, "00000.tar"))
    receipt, is_owner = receipt_for(new), True

    def next_owner() -> None:
        nonlocal is_owner
        is_owner = False
        commits.clean(output)
        commits.commit(output, receipt, commits.stage(new, output, SHARD, "two"))

    def confirm() -> None:
        if not is_owner:
            raise RefusedError("another driver took over")

    suspend(monkeypatch, storage, step, next_owner)
    with contextlib.suppress(RefusedError):
        commits.clean(output, confirm)
    assert not is_owner
    assert read_receipts(output) == {0: receipt}
    check(output, {0: receipt})


def kill_at_the_receipt(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Let the driver die on a file system without hard links once it has created the name of the receipt."""

    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    def die(path: str, data: bytes) -> None:
        Path(path).touch()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", no_links)
        patch.setattr(local, "_write_new", die)
        with pytest.raises(Killed):
            work()


@pytest.mark.parametrize("left", [b"", b"{", b"[]"])
@pytest.mark.parametrize("replaces", [False, True])
def test_what_is_no_receipt_in_the_place_of_one_counts_as_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replaces: bool, left: bytes
) -> None:
    """A replacement is finished although the driver died while it created the receipt, so kept samples stay; a new
    shard is generated again."""
    monkeypatch.setattr(local, "CREATOR_SECONDS", 0.05)
    output = str(tmp_path / "out")
    old, new = fake_files(tmp_path, "old"), fake_files(tmp_path, "new")
    receipt = receipt_for(new, attempt=2)
    if replaces:
        commits.commit(output, receipt_for(old), commits.stage(old, output, SHARD, "one"))
    staged = commits.stage(new, output, SHARD, "two")
    kill_at_the_receipt(monkeypatch, lambda: commits.commit(output, receipt, staged))
    assert Path(output, "00000_stats.json").read_bytes() == b""
    Path(output, "00000_stats.json").write_bytes(left)

    assert read_receipts(output) == {}
    assert {*receipts.complete(storage.list_files(output))} == (set() if left == b"" else {0})
    assert commits.any_committed(output) == replaces
    commits.clean(output)
    assert read_receipts(output) == ({0: receipt} if replaces else {})
    if not replaces and left == b"":
        assert storage.list_tree(output) == {}
    commits.commit(output, receipt, commits.stage(new, output, SHARD, "three"))
    assert read_receipts(output) == {0: receipt}
    check(output, {0: receipt})


def test_a_replacement_cannot_be_finished_where_another_driver_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late driver ends with an error of storage, whatever is gone or there under its hands."""
    output = str(tmp_path / "out")
    old, new = fake_files(tmp_path, "old"), fake_files(tmp_path, "new")
    commits.commit(output, receipt_for(old), commits.stage(old, output, SHARD, "one"))
    staged = commits.stage(new, output, SHARD, "two")
    kill_after(2, lambda: commits.commit(output, receipt_for(new), staged))
    moved = storage.move

    def overtaken(source: str, target: str) -> None:
        monkeypatch.setattr(storage, "move", moved)
        commits.clean(output)
        moved(source, target)

    monkeypatch.setattr(storage, "move", overtaken)
    with pytest.raises(StorageError, match="another driver changed"):
        commits.clean(output)
    assert read_receipts(output) == {0: receipt_for(new)}


def test_a_driver_that_lost_the_output_finishes_no_replacement(output: str, tmp_path: Path) -> None:
    old, new = fake_files(tmp_path, "old"), fake_files(tmp_path, "new")
    commits.commit(output, receipt_for(old), commits.stage(old, output, SHARD, "one"))
    staged = commits.stage(new, output, SHARD, "two")
    kill_after(2, lambda: commits.commit(output, receipt_for(new), staged))
    left = storage.list_tree(output)

    def lost() -> None:
        raise RefusedError("another run took over")

    with pytest.raises(RefusedError):
        commits.clean(output, lost)
    assert storage.list_tree(output) == left


def test_a_receipt_that_comes_and_goes_is_an_error_of_storage(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A commit that is told of a receipt, and finds none, is repeated."""
    files = fake_files(tmp_path, "x")
    staged, published = commits.stage(files, output, SHARD, "one"), storage.publish_bytes

    def refused(*_: object, **__: object) -> None:
        raise FileExistsError(errno.EEXIST, "the file is there already")

    monkeypatch.setattr(storage, "publish_bytes", refused)
    with pytest.raises(StorageError, match="is no receipt"):
        commits.commit(output, receipt_for(files), staged)
    monkeypatch.setattr(storage, "publish_bytes", published)
    commits.commit(output, receipt_for(files), staged)
    assert read_receipts(output) == {0: receipt_for(files)}


@pytest.mark.parametrize("damaged", ["parquet", "receipt"])
def test_a_replacement_whose_files_are_damaged_is_not_finished(output: str, tmp_path: Path, damaged: str) -> None:
    """What a commit left is published with the bytes that its receipt describes, or not at all."""
    old, new = fake_files(tmp_path, "old"), fake_files(tmp_path, "new")
    commits.commit(output, receipt_for(old), commits.stage(old, output, SHARD, "one"))
    staged = commits.stage(new, output, SHARD, "two")
    paths = staged | {"receipt": "_staging/two/replacing.json"}
    storage.publish_bytes(storage.join(output, paths["receipt"]), receipt_for(new).to_json())
    storage.remove(storage.join(output, "00000_stats.json"))
    storage.publish_bytes(storage.join(output, paths[damaged]), b"bad")
    commits.clean(output)
    assert storage.list_tree(output) == {}


@pytest.mark.parametrize("fingerprint", ["f" * 64, "e" * 64])
def test_a_whole_shard_that_a_listing_did_not_show_stays(output: str, tmp_path: Path, fingerprint: str) -> None:
    """Where listings lag behind, a driver generates shards again that are there. Rows of them may fail now."""
    first, second = fake_files(tmp_path, "a"), fake_files(tmp_path, "b", success=1)
    commits.commit(output, receipt_for(first), commits.stage(first, output, SHARD, "attempt-1"))
    staged = commits.stage(second, output, SHARD, "attempt-2")
    now = commits.commit(output, receipt_for(second), staged, stays={fingerprint})
    kept = fingerprint == "f" * 64
    assert now == receipt_for(first if kept else second)
    assert read_receipts(output) == {0: now}
    check(output, {0: now})
    assert storage.list_tree(storage.join(output, commits.STAGING)) == {}


def test_a_damaged_shard_does_not_stay(output: str, tmp_path: Path) -> None:
    first, second = fake_files(tmp_path, "a"), fake_files(tmp_path, "bb")
    commits.commit(output, receipt_for(first), commits.stage(first, output, SHARD, "attempt-1"))
    storage.remove(storage.join(output, "00000.parquet"))
    staged = commits.stage(second, output, SHARD, "attempt-2")
    assert commits.commit(output, receipt_for(second), staged, stays={"f" * 64}) == receipt_for(second)


def test_a_shard_whose_receipt_a_listing_did_not_show_is_no_stray(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fake_files(tmp_path, "a")
    commits.commit(output, receipt_for(files), commits.stage(files, output, SHARD, "attempt-1"))
    whole, listing = storage.list_files(output), storage.list_files

    def lagging(url: str) -> dict[str, int]:
        return {name: size for name, size in listing(url).items() if not name.endswith(receipts.RECEIPT_SUFFIX)}

    with monkeypatch.context() as patch:
        patch.setattr(storage, "list_files", lagging)
        commits.clean(output)
    assert storage.list_files(output) == whole
