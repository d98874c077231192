"""Repeated ids are found exactly, wherever they are, in bounded memory."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcf_batch.manifest import check


@pytest.fixture(autouse=True, scope="module")
def small_partitions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "ROWS_PER_PARTITION", 4)
        patch.setattr(check, "_PENDING_ROWS", 6)
        yield


def find(ids: list[str], batch: int, most: int = 100) -> tuple[int, list[check.Repeat]]:
    with check.RepeatFinder(len(ids)) as finder:
        for start in range(0, len(ids), batch):
            finder.add(pa.array(ids[start : start + batch]).cast(pa.binary()), start)
        return finder.repeats(most)


@settings(deadline=None)
@given(ids=st.lists(st.text("ab_", min_size=1, max_size=4), max_size=60), batch=st.integers(1, 9))
def test_same_repeats_as_a_set_finds(ids: list[str], batch: int) -> None:
    expected = [check.Repeat(row, ids.index(sample_id)) for row, sample_id in enumerate(ids) if sample_id in ids[:row]]
    assert find(ids, batch) == (len(expected), expected)


def test_distinct_ids_have_no_repeats() -> None:
    assert find([f"{row:09d}" for row in range(2000)], 100) == (0, [])


def test_one_id_everywhere_shows_the_first_repeats_only() -> None:
    total, shown = find(["same"] * 500, 50, most=3)
    assert total == 499
    assert [(repeat.row, repeat.first) for repeat in shown] == [(1, 0), (2, 0), (3, 0)]


def test_hash_spreads_sequential_ids_evenly() -> None:
    ids = pa.array([f"{row:09d}" for row in range(20_000)]).cast(pa.large_binary())
    counts = np.bincount(check.hash_ids(ids)[0] % np.uint64(16), minlength=16)
    assert counts.min() > 1000
    assert counts.max() < 1500


def test_hash_sees_the_slice_it_is_given() -> None:
    ids = pa.array(["a", "bb", "", "ccc"]).cast(pa.large_binary())
    for part, whole in zip(check.hash_ids(ids.slice(1, 3)), check.hash_ids(ids), strict=True):
        assert part.tolist() == whole[1:].tolist()


def test_scratch_is_removed() -> None:
    with check.RepeatFinder(10) as finder:
        folder = finder._folder
        assert folder.exists()
    assert not folder.exists()
