"""Near-duplicates are exactly those that a comparison of all pairs finds, whatever the hashes."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vcf_batch.commands.score.duplicates import near_hashes
from vcf_batch.errors import UsageError


def one_by_one(hashes: Sequence[int], distance: int) -> list[int]:
    """The definition: the first earlier row that stays and is within the distance, else the row itself."""
    firsts: list[int] = []
    staying: list[int] = []
    for row, own in enumerate(hashes):
        first = next((other for other in staying if (own ^ hashes[other]).bit_count() <= distance), row)
        firsts.append(first)
        if first == row:
            staying.append(row)
    return firsts


HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4).flatmap(
    lambda centres: st.lists(
        st.tuples(st.sampled_from(centres), st.lists(st.integers(0, 63), max_size=6)).map(
            lambda drawn: drawn[0] ^ sum({1 << bit for bit in drawn[1]})
        ),
        max_size=40,
    )
)
"""Hashes around a few centres, so that many are near one another, in chains and in balls."""


@settings(deadline=None, max_examples=150)
@given(hashes=HASHES, distance=st.integers(0, near_hashes.MAX_DISTANCE))
def test_duplicates_are_those_of_a_comparison_of_all_pairs(hashes: list[int], distance: int) -> None:
    found = near_hashes.first_alike(np.array(hashes, np.uint64), distance)
    assert found.tolist() == one_by_one(hashes, distance)


@pytest.mark.parametrize("blocks", range(4, 10))
def test_any_number_of_blocks_finds_the_same(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows with few bits: long runs, which are compared in several parts."""
    hashes = np.random.default_rng(blocks).integers(0, 2**14, 3000, dtype=np.uint64) << np.uint64(27)
    monkeypatch.setattr(near_hashes, "_AT_ONCE", 1000)
    monkeypatch.setattr(near_hashes, "_number_of_blocks", lambda count, distance: blocks)
    assert near_hashes.first_alike(hashes, 3).tolist() == one_by_one(hashes.tolist(), 3)


@pytest.mark.parametrize("distance", [1, 2, 3, 4, 6, 8])
def test_every_choice_of_blocks_is_a_cover(distance: int) -> None:
    """Whatever bits two hashes differ in, as many as the distance, some table has all of them outside of its blocks."""
    rng = np.random.default_rng(distance)
    for number in range(distance + 1, min(4 * distance + 4, 12) + 1):
        tables = [*near_hashes._tables(number, distance)]
        masks = [sum(((1 << bits) - 1) << begin for begin, bits in blocks) for blocks in tables]
        for _ in range(200):
            differing = sum(1 << int(bit) for bit in rng.choice(64, distance, replace=False))
            assert any(not mask & differing for mask in masks)


def test_a_chain_is_no_duplicate_of_its_begin() -> None:
    """Each row resembles the one before it: every second one stays, and names nothing that it does not resemble."""
    chain = [(1 << length) - 1 for length in range(0, 64, 2)]
    assert one_by_one(chain, 2) == [row - row % 2 for row in range(32)]
    assert near_hashes.first_alike(np.array(chain, np.uint64), 2).tolist() == one_by_one(chain, 2)


def test_keys_come_out_in_the_order_in_which_they_came() -> None:
    """Batches of any size, strings of either kind."""
    batches = [
        (pa.array(["c", "a"]), np.array([0, 7 << 40], np.uint64)),
        (pa.array([], pa.string()), np.array([], np.uint64)),
        (pa.array(["b", "d", "e"], pa.large_string()), np.array([1, 7 << 40 | 3, 0], np.uint64)),
    ]
    found = near_hashes.find(iter(batches), 1)
    assert found.to_pydict() == {"key": ["c", "a", "b", "d", "e"], "duplicate_of": [None, None, "c", None, "c"]}
    wider = near_hashes.find(batches, 2)["duplicate_of"].to_pylist()
    assert wider == [None, None, "c", "a", "c"]
    assert near_hashes.find([], 4).num_rows == 0


def test_what_cannot_be_searched_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = np.zeros(3, np.uint64)
    for distance in (-1, 17):
        with pytest.raises(UsageError, match=f"the distance is {distance}; it must be 0 to 16 of the 64 bits"):
            near_hashes.first_alike(hashes, distance)
    monkeypatch.setattr(near_hashes, "MOST_ROWS", 2)
    with pytest.raises(UsageError, match="there are 3 rows; near-duplicates are found among at most 2"):
        near_hashes.first_alike(hashes, 4)


def test_many_rows_in_one_component_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that are joined already are passed over: here all, from the second table on."""
    flips = [sum({1 << one, 1 << other}) for one, other in itertools.product(range(64), repeat=2)]
    hashes = np.unique(np.array([flip ^ 0x5555 for flip in flips], np.uint64))
    compared: list[int] = []
    compare = near_hashes._compare

    def counted(*given: Any) -> None:
        compared.append(int((given[4] - given[5]).clip(0).sum()))
        compare(*given)

    monkeypatch.setattr(near_hashes, "_compare", counted)
    near_hashes.first_alike(hashes, 4)
    assert sum(compared) < 3 * len(hashes)
