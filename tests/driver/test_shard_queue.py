"""Who gets which shard when: failed shards come again, later and elsewhere, and nothing is lost on the way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.simulated import Clock, fault
from vcf_batch.driver import shard_queue
from vcf_batch.driver.failing_shard import PAUSES
from vcf_batch.driver.fault import Failure
from vcf_batch.driver.shard_queue import ShardQueue
from vcf_batch.records import Shard
from vcf_batch.setup.shard_task import ShardTask
from vcf_batch.sharding import ShardPlan

A, B = "node a", "node b"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def rows_of(shard: Shard) -> range:
    return range(shard.start, shard.stop)


def failed(queue: ShardQueue, task: ShardTask, node: str, failure: Failure = Failure.TROUBLE) -> bool:
    return queue.failed(task, fault(failure, node))


def taken(queue: ShardQueue, node: str, *others: str) -> ShardTask:
    task = queue.take(node, {node, *others})
    assert task is not None
    return task


def test_a_failed_shard_comes_again_after_growing_pauses(clock: Clock) -> None:
    """The worker first gets another shard, or waits; the failed one comes again before fresh ones."""
    queue = ShardQueue(ShardPlan(9, 1), rows_of, clock.now)
    task = taken(queue, A)
    for number, pause in enumerate(PAUSES, start=1):
        assert not task.last_attempt
        assert failed(queue, task, A)
        clock.seconds += pause - 0.5
        assert taken(queue, A).shard.index == number
        clock.seconds += 0.5
        task = taken(queue, A)
        assert (task.shard.index, task.attempt) == (0, number + 1)
    assert list(PAUSES) == sorted(set(PAUSES))
    assert task.last_attempt
    assert not failed(queue, task, A)
    assert not queue.waiting


def test_one_nodes_trouble_does_not_use_up_a_shards_attempts(clock: Clock) -> None:
    """Only what repeats on a healthy worker marks a row: a shard goes where it has not failed."""
    queue = ShardQueue(ShardPlan(1, 1), rows_of, clock.now)
    assert failed(queue, taken(queue, A, B), A)
    clock.seconds += PAUSES[0]
    assert queue.take(A, {A, B}) is None
    assert queue.waiting
    assert failed(queue, taken(queue, B, A), B)
    clock.seconds += PAUSES[1]
    assert taken(queue, A, B).last_attempt


def test_a_lone_node_gets_its_failed_shard_again(clock: Clock) -> None:
    queue = ShardQueue(ShardPlan(1, 1), rows_of, clock.now)
    assert failed(queue, taken(queue, A, B), A)
    clock.seconds += PAUSES[0]
    assert taken(queue, A).attempt == 2


def test_a_lost_node_costs_no_attempt(clock: Clock) -> None:
    queue = ShardQueue(ShardPlan(1, 1), rows_of, clock.now)
    for attempt in range(1, 10):
        task = taken(queue, A)
        assert task.attempt == attempt
        queue.repeat(task)


def test_where_everything_fails_no_fresh_shard_is_begun(clock: Clock) -> None:
    """Memory does not grow with the manifest: driver state is proportional to the shards in flight."""
    queue = ShardQueue(ShardPlan(10**9, 1), rows_of, clock.now)
    for _ in range(shard_queue.MAX_WAITING):
        assert failed(queue, taken(queue, A), A)
    assert queue.take(A, {A}) is None
    clock.seconds += PAUSES[0]
    assert taken(queue, A).shard.index == 0


def test_a_worker_gets_fresh_shards_beside_another_unless_a_failed_one_is_due(clock: Clock) -> None:
    """A failed shard comes before fresh ones, and alone."""
    queue = ShardQueue(ShardPlan(9, 1), rows_of, clock.now)
    task = taken(queue, A)
    assert not task.is_alone
    assert failed(queue, task, A)
    beside = queue.take_beside(A, {A})
    assert beside is not None and beside.shard.index == 1
    clock.seconds += PAUSES[0]
    assert queue.take_beside(A, {A}) is None
    again = taken(queue, A)
    assert again.shard.index == 0 and again.is_alone


@given(
    count=st.integers(1, 6),
    size=st.integers(1, 5),
    outcomes=st.lists(st.sampled_from(["done", "lost", *Failure]), max_size=80),
    nodes=st.lists(st.sampled_from([A, B]), min_size=1, max_size=7),
    batch_size=st.sampled_from([None, 4]),
    forgiven=st.sets(st.integers(0, 80), max_size=3),
    beside=st.sets(st.integers(0, 80)),
)
def test_no_shard_is_lost_or_doubled(
    count: int,
    size: int,
    outcomes: list[str | Failure],
    nodes: list[str],
    batch_size: int | None,
    forgiven: set[int],
    beside: set[int],
) -> None:
    """Every shard is finished or set aside, exactly once, whatever happens to its attempts and trials."""
    clock = Clock()
    queue, ended, step = ShardQueue(ShardPlan(count * size, size), rows_of, clock.now, batch_size), list[int](), 0
    while len(ended) < count:
        assert step < 2000
        clock.seconds += 20.0
        node = nodes[step % len(nodes)]
        take = queue.take_beside if step in beside else queue.take
        task = take(node, set(nodes))
        outcome = outcomes[step] if step < len(outcomes) else "done"
        if step in forgiven:
            queue.forgive(node)
        step += 1
        if task is None:
            continue
        assert task.selected is None or not task.selected & task.verdicts.keys()
        if outcome == "lost":
            queue.repeat(task)
        elif isinstance(outcome, Failure):
            if not failed(queue, task, node, outcome):
                ended.append(task.shard.index)
        elif task.selected is not None:
            queue.done(task)
        elif queue.generated(task, node):
            queue.done(task)
            ended.append(task.shard.index)
    assert sorted(ended) == list(range(count))
