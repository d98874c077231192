"""A shard whose attempts fail: tried again, looked into, and given up only where nothing else is left."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support import simulated
from support.simulated import Clock, fault
from vcf_batch.driver.bisection import REPEATS
from vcf_batch.driver.failing_shard import LOSS_PAUSES, MAX_CULPRITS, PAUSES, FailingShard
from vcf_batch.driver.fault import Failure
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask

A, B = "node a", "node b"

World = Callable[[set[int], ShardTask], Failure | None]
"""What happens to a worker that generates these rows; None if all goes well."""


def live(world: World, rows: int = 16, batch_size: int | None = None) -> tuple[ShardTask | None, list[ShardTask]]:
    """A case in a world until it is committed or set aside: the task that went well, and all tasks."""
    case = FailingShard(Shard(3, 100, 100 + rows, "00003"), range(100, 100 + rows), batch_size, Clock().now)
    done: list[ShardTask] = []
    # A case is opened by the first failure of a whole attempt.
    task, first = ShardTask(case.shard), True
    while True:
        assert len(done) < 400
        done.append(task)
        generated = set(range(100, 100 + rows)) - task.verdicts.keys()
        failure = world(generated if task.selected is None else set(task.selected), task)
        assert not (first and failure is None), "the world is fine"
        first = False
        if failure is not None:
            if not case.failed(task, fault(failure, A)):
                return None, done
        elif task.selected is None:
            return task, done
        else:
            case.survived(task)
        task = case.task()


def killers(*culprits: int) -> World:
    return lambda rows, task: Failure.CRASH if rows & set(culprits) else None


@pytest.mark.parametrize(
    "culprits",
    [{100}, {107}, {115}, {100, 101}, {103, 104, 112}, {102, 106, 110, 115}, {100, 101, 102, 103, 104}],
)
def test_rows_that_kill_their_worker_are_blamed_and_the_rest_completes(culprits: set[int]) -> None:
    """A row that kills its worker every time is recorded as failed, after its retries; several are, too."""
    task, done = live(killers(*culprits))
    assert task is not None and task.verdicts.keys() == culprits
    assert all(message.startswith(simulated.SYMPTOM) for message in task.verdicts.values())
    trials = [task for task in done if task.selected is not None]
    assert len(trials) <= len(culprits) * (math.ceil(math.log2(16)) + REPEATS)
    for culprit in culprits:
        assert sum(trial.selected == {culprit} for trial in trials) >= REPEATS
    assert [task.selected for task in done[: len(PAUSES) + 1]] == [None] * (len(PAUSES) + 1)


def test_the_cost_of_a_bisection_is_that_of_the_shard() -> None:
    """Bounded: the trials of one culprit together generate hardly more rows than the shard has."""
    for culprit in range(100, 164):
        _, done = live(killers(culprit), rows=64)
        assert sum(len(task.selected) for task in done if task.selected is not None) <= 64 + REPEATS


def test_where_every_row_dies_no_row_is_blamed() -> None:
    """Only what repeats on a healthy worker marks a row."""
    task, done = live(lambda rows, task: Failure.CRASH)
    assert task is None
    assert len(done) <= len(PAUSES) + 1 + 2 * (4 + REPEATS) + 2


def test_what_only_whole_shards_suffer_from_blames_no_row() -> None:
    """No culprit is found: the shard is tried once more, then set aside."""
    task, done = live(lambda rows, task: Failure.CRASH if len(rows) > 8 else None)
    assert task is None
    assert not done[-1].verdicts
    assert done[-1].selected is None
    survived = iter([False, False, False])
    task, _ = live(lambda rows, task: Failure.CRASH if task.selected is None and not next(survived, True) else None)
    assert task is not None and not task.verdicts


def test_too_many_culprits_are_a_reason_to_doubt() -> None:
    task, _ = live(killers(*range(100, 100 + 4 * MAX_CULPRITS, 2)), rows=4 * MAX_CULPRITS)
    assert task is None


def test_trouble_never_blames_a_row() -> None:
    """Trouble of storage, network or a node fails the attempt, never the row."""
    task, done = live(lambda rows, task: Failure.TROUBLE)
    assert task is None
    assert [task.last_attempt for task in done] == [False] * len(PAUSES) + [True]


def test_crashes_do_not_use_up_the_attempts_of_trouble() -> None:
    """Trouble with a reference fails its row only if it repeats: not where other attempts crashed."""
    failures = iter([Failure.CRASH, Failure.TROUBLE, Failure.CRASH, Failure.TROUBLE])
    task, done = live(lambda rows, task: next(failures, None))
    assert task is done[-1]
    assert [task.last_attempt for task in done] == [False, False, False, False, True]
    assert [task.attempt for task in done] == [1, 2, 3, 4, 5]


def test_trouble_in_a_trial_is_not_taken_for_a_death() -> None:
    failures = iter([False, False, False, True, True])
    task, _ = live(
        lambda rows, task: Failure.TROUBLE if next(failures, False) else Failure.CRASH if 104 in rows else None
    )
    assert task is not None and task.verdicts.keys() == {104}


def test_a_lost_node_is_nobodys_fault_unless_it_is_always_the_same_rows() -> None:
    """A lost node costs no attempt; a row that takes down every node that generates it is found, after growing
    pauses."""
    task, done = live(lambda rows, task: Failure.LOSS if 104 in rows else None)
    assert task is not None and task.verdicts.keys() == {104}
    assert [task.selected for task in done[: len(LOSS_PAUSES)]] == [None] * len(LOSS_PAUSES)
    assert len(done) <= len(LOSS_PAUSES) + len(PAUSES) + 1 + 4 + REPEATS + 1
    assert sorted(LOSS_PAUSES) == [*LOSS_PAUSES]
    failures = iter([Failure.LOSS] * len(LOSS_PAUSES) + [Failure.CRASH] * len(PAUSES))
    task, _ = live(lambda rows, task: next(failures, None))
    assert task is not None and not task.verdicts


def test_a_verdict_tells_the_first_symptom_of_the_row_alone() -> None:
    """Where a row suffers from several things, its error message does not depend on which came last."""
    case = FailingShard(Shard(0, 0, 2, "00000"), range(2), None, Clock().now)
    symptoms = iter(["of the shard"] * (len(PAUSES) + 1) + ["first alone", *(f"later {n}" for n in range(REPEATS))])
    while not (task := case.task()).verdicts:
        assert case.failed(task, fault(Failure.CRASH, A, next(symptoms)))
    assert task.verdicts[0].startswith("first alone; ")


def scarce(limit: int) -> World:
    """A GPU that holds so many rows."""
    return lambda rows, task: Failure.MEMORY if min(task.sampled_at_once or 8, len(rows)) > limit else None


def test_without_permission_batches_stay_as_they_are() -> None:
    task, done = live(scarce(3))
    assert task is None
    assert len(done) == len(PAUSES) + 1
    assert {task.sampled_at_once for task in done} == {None}


@pytest.mark.parametrize(("limit", "sampled"), [(7, 4), (3, 2), (1, 1)])
def test_smaller_batches_come_after_a_fresh_process(limit: int, sampled: int) -> None:
    """CUDA out of memory is retried in a fresh process, then with fewer and fewer rows at once."""
    task, done = live(scarce(limit), batch_size=8)
    assert task is not None and task.sampled_at_once == sampled
    assert [task.sampled_at_once for task in done[:3]] == [None, None, 4]
    passing = iter([Failure.MEMORY])
    task, done = live(lambda rows, task: next(passing, None), batch_size=8)
    assert task is done[1] and task.sampled_at_once is None


def test_a_row_that_does_not_fit_alone_is_found() -> None:
    task, _ = live(lambda rows, task: Failure.MEMORY if 109 in rows else None, batch_size=8)
    assert task is not None and task.verdicts.keys() == {109}


def test_what_failed_on_a_bad_node_does_not_count() -> None:
    """No row is blamed for a node, and no attempt is lost."""
    case = FailingShard(Shard(0, 0, 8, "00000"), range(8), None, Clock().now)
    for failure in (Failure.TROUBLE, Failure.CRASH, Failure.TROUBLE, Failure.CRASH, Failure.CRASH):
        assert case.failed(case.task(), fault(failure, A))
    trial = case.task()
    assert trial.selected is not None
    assert case.failed(trial, fault(Failure.CRASH, A))
    late = case.task()
    case.forgive(A)
    assert not case.failed_on
    assert case.task().selected is None and not case.task().last_attempt
    assert case.failed(late, fault(Failure.CRASH, B))
    assert case.task().selected is None
    for _ in PAUSES:
        assert case.failed(case.task(), fault(Failure.TROUBLE, B))
    assert not case.failed(case.task(), fault(Failure.TROUBLE, B))


def blamed_on(node: str) -> tuple[FailingShard, ShardTask]:
    """A case whose first row died on a node, again and again; what is tried next is the rest of the shard."""
    case = FailingShard(Shard(0, 0, 8, "00000"), range(8), None, Clock().now)
    while not (task := case.task()).verdicts:
        assert case.failed(task, fault(Failure.CRASH, node))
    return case, task


def test_a_row_that_died_on_one_node_alone_is_tried_where_the_rest_went_well() -> None:
    """Only what repeats on a healthy worker marks a row: where nothing but the node may have made the difference, no
    verdict is recorded."""
    case, rest = blamed_on(A)
    assert case.is_proven(rest, A)
    assert not case.is_proven(rest, B)
    trial = case.task()
    assert trial.selected == {0}
    assert case.failed_on == {A}
    case.survived(trial)
    assert case.task().selected is None
    assert not case.task().verdicts

    case, rest = blamed_on(A)
    assert not case.is_proven(rest, B)
    for _ in range(REPEATS):
        assert case.failed(case.task(), fault(Failure.CRASH, B))
    assert case.is_proven(case.task(), "node c")


def test_a_verdict_of_a_node_that_is_left_out_does_not_count() -> None:
    """Not even where the rest of the shard has been generated by then."""
    case, rest = blamed_on(A)
    case.forgive(A)
    assert not case.is_proven(rest, A)
    assert not case.task().verdicts


def test_a_search_in_vain_on_a_bad_node_does_not_count() -> None:
    case = FailingShard(Shard(0, 0, 8, "00000"), range(8), None, Clock().now)
    while (task := case.task()).selected is None:
        assert case.failed(task, fault(Failure.CRASH, A))
    while (task := case.task()).selected is not None:
        case.survived(task)
    case.forgive(A)
    assert case.failed(case.task(), fault(Failure.CRASH, B))


def test_batches_that_a_bad_node_made_smaller_are_whole_again() -> None:
    """No sample leaves the promise of identical bytes for a node."""
    case = FailingShard(Shard(0, 0, 8, "00000"), range(8), 8, Clock().now)
    for node in (B, A, A):
        assert case.failed(case.task(), fault(Failure.MEMORY, node))
    assert case.task().sampled_at_once == 2
    case.forgive(A)
    assert case.task().sampled_at_once is None
    assert case.failed_on == {B}
    assert case.failed(case.task(), fault(Failure.MEMORY, B))
    assert case.task().sampled_at_once == 4
    case.forgive("another node")
    assert case.task().sampled_at_once == 4


def test_only_rows_that_are_generated_are_suspected() -> None:
    """A shard of which most samples are kept is bisected among the others."""
    case = FailingShard(Shard(0, 0, 8, "00000"), [2, 5], None, Clock().now)
    for _ in [*PAUSES, "last"]:
        assert case.failed(case.task(), fault(Failure.CRASH, A))
    assert case.task().selected == {2}


def test_pauses_hold_back_whole_attempts_only() -> None:
    clock = Clock()
    clock.seconds = 1000.0
    case = FailingShard(Shard(0, 0, 8, "00000"), range(8), None, clock.now)
    for pause in PAUSES:
        case.failed(case.task(), fault(Failure.CRASH, A))
        assert case.not_before == 1000.0 + pause
    case.failed(case.task(), fault(Failure.CRASH, A))
    assert case.task().selected == {0, 1, 2, 3}
    assert case.not_before == 0.0


@given(st.integers(1, 40), st.sets(st.integers(100, 139), max_size=5), st.integers(0, 2**60))
def test_any_world_comes_to_an_end(rows: int, culprits: set[int], luck: int) -> None:
    """Whatever dies by chance besides, a case ends; and whoever is blamed died alone every time."""
    bits = [bool(luck >> bit & 1) for bit in range(60)]
    alone: dict[int, list[bool]] = {}

    def world(generated: set[int], task: ShardTask) -> Failure | None:
        died = bool(generated & culprits) or not alone or (bits.pop() if bits else False)
        for row in generated if len(generated) == 1 else ():
            alone.setdefault(row, []).append(died)
        alone.setdefault(-1, [])
        return Failure.CRASH if died else None

    task, _ = live(world, rows)
    for row in task.verdicts if task else ():
        assert alone[row][-REPEATS:] == [True] * REPEATS or rows == 1
