"""The driver's loop on a simulated cluster in virtual time: who gets a shard, and what becomes of workers that fail."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from support.simulated import HANGS, Simulation, World, death, fault, rows_of
from vcf_batch.driver.bisection import REPEATS
from vcf_batch.driver.cluster import Request
from vcf_batch.driver.failing_shard import PAUSES
from vcf_batch.driver.fault import Failure, Fault
from vcf_batch.driver.loop import ANSWER_SECONDS
from vcf_batch.driver.quarantine import FAILURES
from vcf_batch.driver.workers import CAPACITY_SECONDS, MAX_BACKOFF_SECONDS, START_ATTEMPTS
from vcf_batch.errors import NodeError, RefusedError, StorageError, Unfinished, UsageError, VcfBatchError
from vcf_batch.output import commits
from vcf_batch.output.receipts import Receipt

A, B, C = "node-a", "node-b", "node-c"
ROWS, SHARD_SIZE = 32, 4
LOST = RefusedError("another driver has the output")
LOAD_SECONDS, SHARD_SECONDS = 2.0, 10.0

Simulate = Callable[..., Simulation]


def well(node: str, request: Request) -> tuple[float, Fault | None]:
    """Nothing goes wrong here."""
    return (LOAD_SECONDS if request.method == "load" else SHARD_SECONDS), None


@pytest.fixture
def simulate(request: pytest.FixtureRequest) -> Iterator[Simulate]:
    made: list[Simulation] = []

    def build(world: World = well, nodes: tuple[str, ...] = (A, B), **settings: Any) -> Simulation:
        name = f"{request.node.name}-{len(made)}".replace("_", "-")
        made.append(Simulation(name, dict.fromkeys(nodes, 1), world, ROWS, **{"shard_size": SHARD_SIZE, **settings}))
        return made[-1]

    yield build
    for simulation in made:
        simulation.remove()


def once(strikes: Callable[[Request], bool], what: Callable[[str], tuple[float, Fault | None]]) -> World:
    """Something happens once, to the first request that is struck."""
    struck: list[Request] = []

    def world(node: str, request: Request) -> tuple[float, Fault | None]:
        if not struck and strikes(request):
            struck.append(request)
            return what(node)
        return well(node, request)

    return world


def check_whole(simulation: Simulation) -> None:
    """Every shard is committed, all its rows generated."""
    assert [*simulation.committed] == list(range(ROWS // SHARD_SIZE))
    assert all(receipt.counts["success"] == SHARD_SIZE for receipt in simulation.committed.values())


def test_an_undisturbed_run_commits_every_shard(simulate: Simulate) -> None:
    """Each worker loads once, has no pause between two shards, and is let go at the end."""
    simulation = simulate()
    simulation.run()
    check_whole(simulation)
    assert len(simulation.cluster.processes) == 2
    assert not any(process.is_alive for process in simulation.cluster.processes)
    assert simulation.clock.now() == LOAD_SECONDS + ROWS // SHARD_SIZE / 2 * SHARD_SECONDS
    assert len(simulation.told("shard_finished")) == len(simulation.notes.told) - len(simulation.told("progress"))


def test_a_deadline_lets_workers_finish_what_they_have(simulate: Simulate) -> None:
    """What a worker had before, two shards, is committed. The same run goes on, and ends whole."""
    simulation = simulate()
    ends = LOAD_SECONDS + 1.5 * SHARD_SECONDS
    with pytest.raises(
        Unfinished, match=f"the deadline has come, and {ROWS // SHARD_SIZE - 6} shards of the run are left"
    ):
        simulation.run(ends)
    assert len(simulation.committed) == 6 and not any(process.is_alive for process in simulation.cluster.processes)
    assert ends < simulation.clock.now() <= ends + 2 * SHARD_SECONDS
    resumed = simulation.again({A: 1, B: 1})
    resumed.run()
    check_whole(resumed)


@pytest.mark.parametrize("ends", [0.0, LOAD_SECONDS / 2])
def test_a_deadline_before_a_worker_is_ready_ends_the_run_at_once(simulate: Simulate, ends: float) -> None:
    simulation = simulate()
    with pytest.raises(Unfinished):
        simulation.run(ends)
    assert not simulation.committed and simulation.clock.now() <= ends + LOAD_SECONDS
    assert not any(process.is_alive for process in simulation.cluster.processes)


def test_a_deadline_after_the_end_changes_nothing(simulate: Simulate) -> None:
    simulation = simulate()
    simulation.run(1e6)
    check_whole(simulation)


def test_a_long_loading_is_no_missing_worker(simulate: Simulate) -> None:
    """What is waited for is said beside the progress."""
    simulation = simulate(lambda node, request: (100.0 if request.method == "load" else SHARD_SECONDS, None))
    simulation.run()
    check_whole(simulation)
    assert not simulation.told("no_worker_ready")


def test_the_same_world_gives_the_same_run(simulate: Simulate) -> None:
    """What the loop does depends on the cluster alone: no order of a set, no clock or id of the machine's."""
    told = []
    for _ in range(2):
        strikes = iter(range(100))

        def world(node: str, request: Request, strikes: Iterator[int] = strikes) -> tuple[float, Fault | None]:
            return (1.0, death(node)) if next(strikes) % 5 == 3 else well(node, request)

        simulation = simulate(world, (A, B, C), num_workers=None)
        simulation.run()
        check_whole(simulation)
        output = simulation.job.config.output
        told.append([(time, event, words.replace(output, "OUT")) for time, event, words in simulation.notes.told])
    assert told[0] == told[1]


def test_a_worker_that_dies_is_replaced_and_its_shard_done_again(simulate: Simulate) -> None:
    """It had two shards: neither is blamed, and each is tried again alone."""
    simulation = simulate(once(lambda request: request.task is not None, lambda node: (3.0, death(node))))
    simulation.run()
    check_whole(simulation)
    assert len(simulation.cluster.processes) == 3
    assert sorted(receipt.attempt for receipt in simulation.committed.values()) == [1] * 6 + [2] * 2
    assert len(simulation.told("attempt_failed")) == 2
    assert all("is repeated alone" in note for note in simulation.told("attempt_failed"))


def test_attempts_have_names_of_their_own(simulate: Simulate) -> None:
    """Staged files of two attempts never meet, even where one of them was declared dead."""
    simulation = simulate(once(lambda request: request.task is not None, lambda node: (3.0, death(node))))
    simulation.run()
    attempts = [name for process in simulation.cluster.processes for name in process.running if name]
    assert len({*attempts}) == len(attempts) == ROWS // SHARD_SIZE + 2
    assert {name.rpartition("-")[0] for name in attempts} >= {"00000-1", "00000-2"}


def test_a_worker_without_a_heartbeat_is_killed(simulate: Simulate) -> None:
    """A shard is not limited as a whole: one that goes on is waited for, one that stands still is not."""
    shards = iter([2 * 60.0, HANGS])

    def world(node: str, request: Request) -> tuple[float, Fault | None]:
        return (next(shards, SHARD_SECONDS) if request.method == "run" else LOAD_SECONDS), None

    simulation = simulate(world, num_workers=1, stall_timeout=60.0)
    simulation.run()
    check_whole(simulation)
    assert len(simulation.cluster.processes) == 2
    (first, *_) = simulation.told("attempt_failed")
    assert "no heartbeat for 60 s (--stall-timeout)" in first
    assert 60 <= simulation.times("attempt_failed")[0] - LOAD_SECONDS - 2 * 60 <= 70


def test_a_driver_that_was_stopped_takes_no_worker_to_hang(simulate: Simulate) -> None:
    """While the driver itself stood still, nobody could be heard."""
    simulation = simulate(lambda node, request: (150.0, None), shard_size=ROWS // 2, stall_timeout=60.0)

    def stop() -> None:
        simulation.clock.seconds += 90.0

    simulation.cluster.at(200.0, stop)
    simulation.run()
    assert len(simulation.committed) == 2
    assert not simulation.told("attempt_failed")


def test_a_bad_node_is_left_out(simulate: Simulate) -> None:
    """It fails while others succeed: it gets no more work, and its failures count against no shard."""

    def world(node: str, request: Request) -> tuple[float, Fault | None]:
        return (1.0, death(node)) if node == B and request.task else well(node, request)

    simulation = simulate(world, num_workers=None, shard_size=1)
    simulation.run()
    assert len(simulation.committed) == ROWS
    (left_out,) = simulation.told("node_left_out")
    assert B in left_out and f"failed {FAILURES} times in a row" in left_out
    after = simulation.times("node_left_out")[0]
    assert not any(time > after for time in simulation.times("attempt_failed"))
    assert {receipt.timings["worker"].partition(":")[0] for receipt in simulation.committed.values()} == {A}


def test_a_killer_row_is_bisected_and_blamed(simulate: Simulate) -> None:
    """What kills its worker again and again, alone, is recorded as failed; the rest completes."""
    culprit, alone = 13, list[str]()

    def world(node: str, request: Request) -> tuple[float, Fault | None]:
        if request.task and culprit in (rows := rows_of(request.task)):
            if rows == {culprit}:
                alone.append(node)
            return 1.0, death(node)
        return well(node, request)

    simulation = simulate(world)
    simulation.run()
    counts = [receipt.counts["failed"] for receipt in simulation.committed.values()]
    assert counts == [int(shard == culprit // SHARD_SIZE) for shard in range(ROWS // SHARD_SIZE)]
    assert len(alone) == REPEATS
    (blamed,) = simulation.told("row_failed")
    assert blamed.startswith(f"row {culprit} is recorded as failed: it dies")
    assert not simulation.told("node_left_out")


def test_trouble_of_storage_costs_a_pause_and_no_worker(simulate: Simulate) -> None:
    """The process is sound, so it goes on with other shards; the failed one comes again after its pause."""
    troubled = once(lambda request: request.task is not None, lambda node: (3.0, fault(Failure.TROUBLE, node)))
    simulation = simulate(troubled, num_workers=1)
    simulation.run()
    check_whole(simulation)
    assert len(simulation.cluster.processes) == 1
    assert simulation.committed[0].attempt == 2
    assert simulation.times("attempt_failed")[0] + PAUSES[0] < simulation.clock.now()


def test_a_commit_that_fails_is_repeated_after_a_pause(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commits are timed by the same clock, and workers do not wait for them."""
    commit, errors = commits.commit, iter([StorageError("no storage")])

    def failing_once(*arguments: Any) -> Receipt:
        for error in errors:
            raise error
        return commit(*arguments)

    monkeypatch.setattr(commits, "commit", failing_once)
    simulation = simulate(num_workers=1)
    simulation.run()
    check_whole(simulation)
    (failed,) = simulation.times("commit_failed")
    assert failed == LOAD_SECONDS + SHARD_SECONDS
    finished = dict(zip(simulation.told("shard_finished"), simulation.times("shard_finished"), strict=True))
    assert [int(name[6:11]) for name in finished] == [1, 0, *range(2, ROWS // SHARD_SIZE)]
    assert 0 <= finished["shard 00000 (rows 0 to 3) is finished"] - failed - PAUSES[0] <= ANSWER_SECONDS


def test_a_lost_node_costs_no_attempt_of_its_shards(simulate: Simulate) -> None:
    """The workers that remain go on, and so do those on a node that joins."""
    lost = once(
        lambda request: request.task is not None,
        lambda node: (3.0, fault(Failure.LOSS, node, node_died=True, one_task=False)),
    )
    simulation = simulate(lost, num_workers=None)
    simulation.cluster.at(20.0, lambda: simulation.cluster.add_node(C, 1))
    simulation.run()
    check_whole(simulation)
    assert {process.node for process in simulation.cluster.processes} == {A, B, C}
    assert not simulation.told("node_left_out")


def test_starts_that_fail_wait_longer_and_longer_and_then_the_run_gives_up(simulate: Simulate) -> None:
    """Workers that were started together count once; where none ever works, the last reason is told."""

    def world(node: str, request: Request) -> tuple[float, Fault | None]:
        return 1.0, Fault.of(RuntimeError("no model here"), node)

    simulation = simulate(world)
    with pytest.raises(VcfBatchError, match=rf"no worker could start, {START_ATTEMPTS} times; .*no model here"):
        simulation.run()
    times = simulation.times("worker_did_not_start")
    assert len(times) == START_ATTEMPTS - 1
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == sorted(pauses) and 1 < pauses[0] < pauses[-1] < MAX_BACKOFF_SECONDS
    assert not any(process.is_alive for process in simulation.cluster.processes)
    assert not simulation.committed


def test_settings_that_no_worker_can_use_end_the_run_at_once(simulate: Simulate) -> None:
    """Before any worker has loaded, what a user has to change is no node's trouble."""
    simulation = simulate(lambda node, _: (1.0, Fault.of(UsageError("no such model"), node)))
    with pytest.raises(UsageError, match="no such model"):
        simulation.run()
    assert simulation.clock.now() < 5


def test_where_there_is_no_room_the_user_is_told_what_is_waited_for(simulate: Simulate) -> None:
    """A worker that waits for a machine joins when the cluster has grown."""
    simulation = simulate(nodes=())
    simulation.cluster.at(75.0, lambda: simulation.cluster.add_node(A, 2))
    simulation.run()
    check_whole(simulation)
    assert simulation.times("no_worker_ready") == [30.0, 60.0]
    assert len(simulation.cluster.processes) == 2


def test_a_run_whose_output_is_lost_stops_and_ends_its_workers(simulate: Simulate) -> None:
    """Nothing is committed for another driver."""
    simulation = simulate()
    simulation.cluster.at(15.0, lambda: setattr(simulation.held, "lost", RefusedError("another driver took over")))
    with pytest.raises(RefusedError, match="took over"):
        simulation.run()
    assert not any(process.is_alive for process in simulation.cluster.processes)
    assert len(simulation.committed) == 2


def test_a_manifest_that_changes_ends_the_run(simulate: Simulate) -> None:
    """A manifest edited during a run is refused once a shard has met it in each of its attempts; no shard is lost."""

    def world(node: str, request: Request) -> tuple[float, Fault | None]:
        if request.task and request.task.shard.index == 0:
            return 1.0, Fault.of(RefusedError("m.parquet has changed"), node)
        return well(node, request)

    simulation = simulate(world)
    with pytest.raises(RefusedError, match=r"m\.parquet has changed"):
        simulation.run()
    assert [*simulation.committed] == list(range(1, ROWS // SHARD_SIZE))


def test_several_device_types_are_said_once(simulate: Simulate) -> None:
    """Workers of another type are used, and the user is told what tells the types apart, not once a shard."""
    simulation = simulate(nodes=(A, B, C), num_workers=3)
    simulation.cluster.devices = {B: "older GPU", C: "older GPU"}
    simulation.run()
    check_whole(simulation)
    (told,) = simulation.told("several_device_types")
    assert "older GPU and simulated (type older GPU / simulated)" in told and "--one-device-type" in told
    assert {receipt.device["type"] for receipt in simulation.committed.values()} == {"simulated", "older GPU"}


def half_done(simulate: Simulate) -> Simulation:
    """A run on one node whose driver lost the output after its second shard."""
    simulation = simulate(nodes=(A,), num_workers=1)
    simulation.cluster.at(LOAD_SECONDS + 2.5 * SHARD_SECONDS, lambda: setattr(simulation.held, "lost", LOST))
    with pytest.raises(RefusedError):
        simulation.run()
    return simulation


def test_a_run_of_one_device_type_leaves_other_nodes_out(simulate: Simulate) -> None:
    """The first worker that loads decides; a node of another type gets no further worker, and is named once."""
    simulation = simulate(nodes=(A, B), num_workers=None, one_device_type=True)
    simulation.cluster.devices = {B: "older GPU"}
    simulation.run()
    check_whole(simulation)
    assert {receipt.device["type"] for receipt in simulation.committed.values()} == {"simulated"}
    (told,) = simulation.told("other_device_type")
    assert f"a device of node {B} is not used" in told
    assert "it is older GPU (type older GPU / simulated); the run keeps to simulated" in told
    assert [process.node for process in simulation.cluster.processes].count(B) == 1
    assert not simulation.told("several_device_types")


def test_a_resumed_run_of_one_device_type_keeps_to_the_outputs(simulate: Simulate) -> None:
    """Whichever worker loads first, and without the option the user is told that the output has another type."""
    simulation = half_done(simulate)
    begun = {*simulation.committed}
    assert 0 < len(begun) < ROWS // SHARD_SIZE
    resumed = simulation.again(one_device_type=True, nodes={B: 1, A: 1})
    resumed.cluster.devices = {B: "older GPU"}
    resumed.run()
    check_whole(resumed)
    assert {receipt.device["type"] for receipt in resumed.committed.values()} == {"simulated"}
    assert len(resumed.told("other_device_type")) == 1


def test_where_nodes_of_another_type_alone_are_left_the_run_waits_and_says_so(simulate: Simulate) -> None:
    """A node of the type may come back; the remedy is told. Before the first commit another type is chosen instead."""
    simulation = simulate(nodes=(A, B), num_workers=None, one_device_type=True)
    simulation.cluster.devices = {B: "older GPU"}
    lost = fault(Failure.LOSS, A, node_died=True)
    simulation.cluster.at(LOAD_SECONDS + 1.5 * SHARD_SECONDS, lambda: simulation.cluster.end_node(A, lost))
    simulation.cluster.at(200.0, lambda: simulation.cluster.add_node(A, 1))
    simulation.run()
    check_whole(simulation)
    told = simulation.told("no_worker_ready")
    assert told and "devices of 1 node are not used (--one-device-type): they are older GPU (type" in told[0]
    assert "Rerun without --one-device-type" in told[0]
    early = simulate(nodes=(A, B), num_workers=None, one_device_type=True)
    early.cluster.devices = {B: "older GPU"}
    early.cluster.at(LOAD_SECONDS + 0.5 * SHARD_SECONDS, lambda: early.cluster.end_node(A, lost))
    early.run()
    check_whole(early)
    assert {receipt.device["type"] for receipt in early.committed.values()} == {"older GPU"}


@pytest.mark.parametrize("num_workers", [None, 2])
def test_a_run_of_one_device_type_uses_the_devices_of_that_type_on_a_mixed_node(
    simulate: Simulate, num_workers: int | None
) -> None:
    """A worker of another type holds its device, so that the next worker gets another one; a death changes nothing."""
    simulation = half_done(simulate)
    resumed = simulation.again(one_device_type=True, nodes={A: 3}, num_workers=num_workers)
    resumed.cluster.mixed = {A: ["older GPU", "simulated", "simulated"]}

    def end_one() -> None:
        one = next(process for process in resumed.cluster.processes if process.is_alive and process.device == 1)
        resumed.cluster.end(one, death(A))

    resumed.cluster.at(LOAD_SECONDS + 1.5 * SHARD_SECONDS, end_one)
    resumed.run()
    check_whole(resumed)
    assert {receipt.device["type"] for receipt in resumed.committed.values()} == {"simulated"}
    workers = {receipt.timings["worker"] for receipt in resumed.committed.values()}
    assert len(workers) >= 3, "both devices worked, and the one whose worker died worked again"
    assert len(resumed.told("other_device_type")) == 1
    assert not resumed.told("no_worker_ready")


def test_a_mixed_node_that_joins_is_used_where_it_can_be(simulate: Simulate) -> None:
    """A worker may load there before the cluster's room is looked at again."""
    simulation = half_done(simulate)
    resumed = simulation.again(one_device_type=True, nodes={}, num_workers=1)
    resumed.cluster.mixed = {B: ["older GPU", "simulated"]}
    resumed.cluster.at(CAPACITY_SECONDS + 1.0, lambda: resumed.cluster.add_node(B, 2))
    resumed.run()
    check_whole(resumed)
    assert {receipt.device["type"] for receipt in resumed.committed.values()} == {"simulated"}


def test_a_node_that_cannot_compute_as_required_costs_the_run_that_node_alone(simulate: Simulate) -> None:
    """Such as one where another cuDNN shadows torch's own, whichever node is first. Where no other is, the run ends."""

    def world(node: str, request: Request) -> tuple[float, Fault | None]:
        if request.method == "load" and node == A:
            return 1.0, Fault.of(NodeError("node-a loads cuDNN 90100; it must be 91501 or newer"), A)
        return well(node, request)

    simulation = simulate(world)
    simulation.run()
    check_whole(simulation)
    assert all("node-b" in receipt.timings["worker"] for receipt in simulation.committed.values())
    with pytest.raises(VcfBatchError, match=r"no worker could start, 5 times.*cuDNN 90100; it must be 91501") as error:
        simulate(world, nodes=(A,)).run()
    assert not isinstance(error.value, UsageError)
