"""The lease: one run owns an output, a dead owner is replaced, and one that lost the output knows."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from support import runs
from vcf_batch import storage
from vcf_batch.errors import RefusedError, StorageError
from vcf_batch.output import lease
from vcf_batch.output.lease import Lease


@pytest.fixture(autouse=True)
def times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beats in a hurry. A lease never expires, unless a test says so: this machine may be slow."""
    for name, seconds in (("HEARTBEAT", 0.05), ("EXPIRY", 1e9), ("WAIT", 60.0), ("LOOK", 0.01)):
        monkeypatch.setattr(lease, f"{name}_SECONDS", seconds)


@pytest.fixture
def expiring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.3)


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3")


def read(output: str, name: str = lease.LEASE_NAME) -> Any:
    return json.loads(storage.read_bytes(storage.join(output, name)))


def leave(output: str, **changes: Any) -> None:
    """A lease that nobody renews, of a machine far away whose clock is wrong."""
    owner = {"token": "t", "host": "far", "pid": 1, "started": "2100-01-01", "machine": "far", "birth": "1"}
    storage.publish_bytes(storage.join(output, lease.LEASE_NAME), json.dumps(owner | changes).encode())


def test_a_lease_names_its_owner_is_renewed_and_goes_with_it(output: str) -> None:
    """A lease object with owner and heartbeat in the output store, released at the end."""
    with lease.hold(output) as held:
        held.confirm()
        assert lease.is_seen(output, held.token)
        assert read(output)["pid"] == os.getpid()
        runs.wait_for(
            lambda: storage.exists(storage.join(output, lease.HEARTBEAT)) and read(output, lease.HEARTBEAT) >= 3
        )
    assert storage.list_tree(output) == {}
    assert not lease.is_seen(output, held.token)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), StorageError("gone")])
def test_whatever_ends_a_run_releases_its_lease(output: str, stop: BaseException) -> None:
    with pytest.raises(type(stop)), lease.hold(output):
        raise stop
    assert storage.list_tree(output) == {}


def test_of_several_drivers_one_owns_the_output(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One run owns an output; the others are refused, and told by whom."""
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.5)
    refusals: list[str] = []
    release = threading.Event()

    def drive(_: int) -> bool:
        try:
            with lease.hold(output):
                release.wait(30)
        except RefusedError as error:
            refusals.append(str(error))
            if len(refusals) == 3:
                release.set()
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(drive, range(4))) == 1
    assert all(f"process {os.getpid()} on " in refusal and "stop it" in refusal for refusal in refusals)


def test_the_next_driver_waits_for_one_that_is_about_to_end(output: str, caplog: pytest.LogCaptureFixture) -> None:
    second = Lease(output)
    with ThreadPoolExecutor(1) as thread:
        with lease.hold(output) as first:
            waiting = thread.submit(second.acquire)
            runs.wait_for(lambda: bool(caplog.records))
            first.confirm()
        waiting.result()
    second.confirm()
    assert f"is held by process {os.getpid()} on" in caplog.text


@pytest.mark.usefixtures("expiring")
def test_a_lease_without_a_heartbeat_expires(output: str, caplog: pytest.LogCaptureFixture) -> None:
    """A second run waits for the heartbeat to expire, then takes over. No clock but its own counts."""
    leave(output)
    with lease.hold(output) as held:
        held.confirm()
    assert "That run has died; taking over." in caplog.text


def test_of_two_watchers_the_slower_one_leaves_the_faster_ones_lease_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = str(tmp_path)
    leave(output)

    def overtaken(owner: dict[str, Any]) -> bool:
        leave(output, token="faster")
        return owner["token"] == "t"

    monkeypatch.setattr(lease, "_is_gone", overtaken)
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.1)
    with pytest.raises(RefusedError, match="is held by another run"):
        Lease(output).acquire()
    assert read(output)["token"] == "faster"


def test_a_watcher_that_is_overtaken_after_its_last_look_leaves_the_new_lease_alone(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at a dead owner's lease and the deletion, another driver has taken the output over."""
    leave(output)
    monkeypatch.setattr(lease, "_is_gone", lambda owner: owner.get("token") == "t")
    monkeypatch.setattr(lease, "WAIT_SECONDS", 0.1)
    slow, fast, read_lease, looks = Lease(output), Lease(output), lease._read, iter(range(100))

    def overtaken(url: str, name: str = lease.LEASE_NAME) -> bytes | None:
        found = read_lease(url, name)
        if name == lease.LEASE_NAME and next(looks) == 1:
            fast.acquire()
        return found

    monkeypatch.setattr(lease, "_read", overtaken)
    with pytest.raises(RefusedError, match="is held by another run, which is alive"):
        slow.acquire()
    fast.confirm()
    assert [name for name in storage.list_files(output) if "tmp" in name] == []


def test_a_driver_that_is_overtaken_while_it_ends_leaves_the_next_ones_lease_alone(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its last look at its own lease and the deletion, the lease has expired and another driver has begun."""
    read_lease, looks = lease._read, iter(range(100))

    def overtaken(url: str, name: str = lease.LEASE_NAME) -> bytes | None:
        found = read_lease(url, name)
        if ending and name == lease.LEASE_NAME and next(looks) == 1:
            leave(output, token="next")
        return found

    ending = False
    monkeypatch.setattr(lease, "HEARTBEAT_SECONDS", 1e3)
    monkeypatch.setattr(lease, "_read", overtaken)
    held = Lease(output)
    held.acquire()
    keeper = threading.Thread(target=held.keep)
    keeper.start()
    ending = True
    held.release(keeper)
    assert read(output)["token"] == "next"


@pytest.mark.usefixtures("expiring")
@pytest.mark.parametrize("data", [b"", b"[1]", b"\xff{", b'{"pid": "x"}'])
def test_a_damaged_lease_expires_like_any_other(output: str, data: bytes) -> None:
    storage.publish_bytes(storage.join(output, lease.LEASE_NAME), data)
    with lease.hold(output) as held:
        held.confirm()


def killed_owner(output: str) -> subprocess.Popen[bytes]:
    """A driver that was killed while it owned the output; nobody has waited for it yet."""
    code = f"from vcf_batch.output import lease; lease.Lease({output!r}).acquire(); print(flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.kill()
    return process


def test_a_killed_driver_of_this_machine_is_replaced_at_once(tmp_path: Path) -> None:
    """A rerun after SIGKILL takes over as soon as the owner is provably dead, reaped or not."""
    output = str(tmp_path / "out")
    with killed_owner(output) as process:
        with lease.hold(output) as held:
            held.confirm()
        process.wait()
        leave(output, **{**held._owner, "token": "t", "pid": process.pid})
        with lease.hold(output):
            pass


def test_a_living_process_or_another_machine_is_not_declared_dead() -> None:
    """Only a process of this very machine can be known to be gone; a later one with its number is not it."""
    owner = Lease("unused")._owner
    assert not lease._is_gone(owner)
    assert not lease._is_gone({})
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    if owner["machine"]:
        assert lease._is_gone(owner | {"pid": process.pid})
        assert lease._is_gone(owner | {"birth": "0"})
    assert not lease._is_gone(owner | {"pid": process.pid, "machine": "another"})


def test_a_driver_that_lost_its_lease_knows_and_leaves_the_new_one_alone(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that was suspended while another took over notices before it commits, and takes nothing back."""
    late = Lease(output)
    late.acquire()
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.3)
    with lease.hold(output) as held:
        monkeypatch.setattr(lease, "EXPIRY_SECONDS", 1e9)
        with pytest.raises(RefusedError, match=rf"no longer owns .* process {os.getpid()} on .* took over"):
            late.confirm()
        assert isinstance(late.lost, RefusedError)
        keeper = threading.Thread(target=late.keep)
        keeper.start()
        keeper.join()
        late.release(keeper)
        held.confirm()
    with pytest.raises(RefusedError, match="took over and has ended, or somebody deleted the file"):
        late.confirm()


def test_the_heartbeat_of_a_lost_lease_stops(output: str) -> None:
    with lease.hold(output) as held:
        leave(output)
        runs.wait_for(lambda: held.lost is not None)
    assert read(output)["token"] == "t"


def test_trouble_of_storage_does_not_end_the_heartbeat(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, failures = storage.publish_bytes, [StorageError("throttled")] * 3

    def failing(url: str, data: bytes, create: bool = False) -> None:
        if failures:
            raise failures.pop()
        publish(url, data, create)

    with lease.hold(output):
        monkeypatch.setattr(storage, "publish_bytes", failing)
        runs.wait_for(lambda: not failures and storage.exists(storage.join(output, lease.HEARTBEAT)))


def test_anybody_can_tell_who_owns_an_output(output: str) -> None:
    """By dates, or where these leave a doubt, by watching the beat."""
    assert lease.owner(output) is None
    with lease.hold(output):
        found = lease.owner(output)
    assert found
    assert (found.pid, found.alive) == (os.getpid(), True)
    assert found.silent is not None


def test_an_owner_is_alive_whatever_its_clock_says(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.0)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 60.0)
    with lease.hold(output):
        runs.wait_for(lambda: storage.exists(storage.join(output, lease.HEARTBEAT)))
        found = lease.owner(output)
    assert found
    assert found.alive


def test_an_owner_that_is_gone_or_silent_is_not_alive(output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "EXPIRY_SECONDS", 0.0)
    monkeypatch.setattr(lease, "WATCH_SECONDS", 0.1)
    leave(output)
    found = lease.owner(output)
    assert found
    assert (found.host, found.alive) == ("far", False)


@pytest.mark.parametrize("failing", ["_read", "_delete"])
def test_a_lease_whose_storage_fails_at_the_end_is_deleted_all_the_same(
    output: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    """A run that ends well leaves no lease behind because one request failed; if one stays, the log says so."""
    monkeypatch.setattr(lease, "RELEASE_PAUSES", (0.0, 0.0))
    real, failures = getattr(Lease, failing), [StorageError("throttled")] * 2

    def flaky(*arguments: Any, **options: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*arguments, **options)

    with lease.hold(output):
        monkeypatch.setattr(Lease, failing, flaky)
    assert not storage.exists(storage.join(output, lease.LEASE_NAME))
    assert "could not be deleted" not in caplog.text
    with lease.hold(output):
        failures += [StorageError("throttled")] * 3
    assert storage.exists(storage.join(output, lease.LEASE_NAME))
    assert "could not be deleted: throttled. It expires after" in caplog.text


def test_a_lease_that_the_next_owner_cleans_away_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that is suspended while it gives its lease back finds that others have deleted what it moved away."""
    output, move = str(tmp_path), storage.move

    def overtaken(source: str, target: str) -> None:
        move(source, target)
        storage.remove_unfinished(output)

    monkeypatch.setattr(storage, "move", overtaken)
    with lease.hold(output):
        pass
    assert storage.list_tree(output) == {}
