"""Planning is a pure function: nothing lost, nothing doubled, the same plan every time."""

import itertools
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcf_batch import sharding

group_keys = st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=60)


@settings(deadline=None)
@given(num_rows=st.integers(0, 3000), shard_size=st.integers(1, 400))
def test_shards_cover_every_row_once_in_order(num_rows: int, shard_size: int) -> None:
    """A row never disappears: each manifest row belongs to exactly one shard."""
    shards = list(sharding.ShardPlan(num_rows, shard_size))
    covered = itertools.chain.from_iterable(range(shard.start, shard.stop) for shard in shards)
    assert list(covered) == list(range(num_rows))
    assert all(len(shard) == shard_size for shard in shards[:-1])
    assert [shard.index for shard in shards] == list(range(len(shards)))


@settings(deadline=None)
@given(num_rows=st.integers(1, 10**12), shard_size=st.integers(1, 10**6))
def test_names_are_unique_and_sort_like_the_rows(num_rows: int, shard_size: int) -> None:
    shards = sharding.ShardPlan(num_rows, shard_size)
    first, last = shards[0], shards[-1]
    assert len(first.name) == len(last.name) >= sharding.MIN_DIGITS
    assert int(last.name) == last.index == len(shards) - 1
    assert (first.start, last.stop) == (0, num_rows)


def test_memory_does_not_grow_with_the_manifest() -> None:
    """Memory does not grow with the manifest: a plan of 10**18 rows is two integers."""
    shards = sharding.ShardPlan(10**18, 3)
    assert len(shards) == -(-(10**18) // 3)
    assert shards[-1].stop == 10**18
    assert [shard.index for shard in itertools.islice(sharding.remaining(shards, {0, 2}), 3)] == [1, 3, 4]


def test_plan_behaves_like_a_list() -> None:
    shards = sharding.ShardPlan(10, 4)
    assert shards[1:] == [shards[1], shards[2]]
    assert shards[-1] == shards[2]
    assert [shard.name for shard in shards] == ["00000", "00001", "00002"]
    with pytest.raises(IndexError):
        shards[3]
    assert len(sharding.ShardPlan(0, 4)) == 0
    assert list(sharding.ShardPlan(0, 4)) == []


def test_names_take_more_digits_only_when_needed() -> None:
    assert sharding.shard_name(7, 100_000) == "00007"
    assert sharding.shard_name(7, 100_001) == "000007"
    with pytest.raises(ValueError, match="0 to 2"):
        sharding.shard_name(3, 3)


@settings(deadline=None)
@given(num_rows=st.integers(0, 500), shard_size=st.integers(1, 50), done=st.sets(st.integers(0, 600)))
def test_remaining_and_done_together_are_the_plan(num_rows: int, shard_size: int, done: set[int]) -> None:
    """A rerun redoes uncommitted shards only."""
    shards = sharding.ShardPlan(num_rows, shard_size)
    left = list(sharding.remaining(shards, done))
    assert sorted(left + [shard for shard in shards if shard.index in done]) == list(shards)
    assert not done & {shard.index for shard in left}


@settings(deadline=None)
@given(group_keys=group_keys, batch_size=st.integers(1, 9))
def test_batches_cover_every_row_once_and_never_mix_groups(group_keys: list, batch_size: int) -> None:
    batches = sharding.batches(group_keys, batch_size)
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(len(group_keys)))
    assert all(1 <= len(batch) <= batch_size and batch == sorted(batch) for batch in batches)
    assert all(len({group_keys[position] for position in batch}) == 1 for batch in batches)
    full = sum(len(batch) == batch_size for batch in batches)
    assert len(batches) - full <= len(set(group_keys))


@settings(deadline=None)
@given(group_keys=group_keys, batch_size=st.integers(1, 9))
def test_batches_depend_on_equality_of_the_keys_alone(group_keys: list, batch_size: int) -> None:
    """Batches are cut by a pure function of the shard, never by arrival."""
    renamed = [f"group {key}" for key in group_keys]
    assert sharding.batches(group_keys, batch_size) == sharding.batches(renamed, batch_size)


@settings(deadline=None)
@given(run_seed=st.integers(0, 2**63 - 1), key=st.from_regex(r"[A-Za-z0-9_-]{1,128}", fullmatch=True))
def test_seed_is_in_range(run_seed: int, key: str) -> None:
    assert 0 <= sharding.derive_seed(run_seed, key) < 2**63


def test_seeds_are_fixed_for_all_time_and_spread() -> None:
    """The output is a function of the fingerprint: another process, version or machine derives the same seed."""
    code = "from vcf_batch.sharding import derive_seed as d; print(d(0, '000000000'), d(7, 'cat'))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["8430065165502360589", "2255257109926964614"]
    seeds = {sharding.derive_seed(run_seed, f"{row:09d}") for run_seed in range(3) for row in range(2000)}
    assert len(seeds) == 6000
    assert 0.4 < sum(seed >= 2**62 for seed in seeds) / 6000 < 0.6


@pytest.mark.parametrize(("num_rows", "shard_size"), [(-1, 4), (4, 0)])
def test_impossible_sizes_are_refused(num_rows: int, shard_size: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        sharding.ShardPlan(num_rows, shard_size)
    with pytest.raises(ValueError, match="must be at least"):
        sharding.batches(["a"], 0)
