"""Pairings are functions of a number: every pair once, the same on every machine, balanced where they say so."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcf_batch.config.limits import PAIRINGS
from vcf_batch.manifest.pairing import pairs

SIDES = st.integers(1, 12)


def listed(pairing: str, prompts: int, references: int, rows: int, seed: int = 0) -> list[tuple[int, int]]:
    """The first pairs of a pairing."""
    found = pairs(pairing, prompts, references, seed)(np.arange(rows))
    return list(zip(*(side.tolist() for side in found), strict=True))


@given(pairing=st.sampled_from(PAIRINGS), prompts=SIDES, references=SIDES, seed=st.integers(0, 1 << 62))
def test_every_combination_comes_exactly_once(pairing: str, prompts: int, references: int, seed: int) -> None:
    found = listed(pairing, prompts, references, prompts * references, seed)
    assert sorted(found) == [(prompt, reference) for prompt in range(prompts) for reference in range(references)]


@given(prompts=SIDES, references=SIDES, seed=st.integers(0, 99), data=st.data())
def test_balanced_uses_prompts_and_references_equally_often_however_many_rows(
    prompts: int, references: int, seed: int, data: st.DataObject
) -> None:
    rows = data.draw(st.integers(1, prompts * references))
    sides = zip(*listed("balanced", prompts, references, rows, seed), strict=True)
    for side, size in zip(sides, (prompts, references), strict=True):
        counts = [Counter(side)[index] for index in range(size)]
        assert max(counts) - min(counts) <= 1


@given(pairing=st.sampled_from(PAIRINGS), rows=st.lists(st.integers(0, 170_000 * 400_000 - 1), max_size=30))
def test_a_pair_depends_on_its_number_alone(pairing: str, rows: list[int]) -> None:
    """170,000 prompts with 400,000 references are never materialised."""
    at = pairs(pairing, 170_000, 400_000, seed=1)
    together = np.stack(at(np.array(rows, dtype=np.int64)), axis=1) if rows else np.empty((0, 2))
    assert [tuple(pair) for pair in together.tolist()] == [
        tuple(int(side[0]) for side in at(np.array([row]))) for row in rows
    ]


@pytest.mark.parametrize("pairing", ["random", "balanced"])
def test_the_seed_decides(pairing: str) -> None:
    assert listed(pairing, 50, 60, 100, seed=1) == listed(pairing, 50, 60, 100, seed=1)
    assert listed(pairing, 50, 60, 100, seed=1) != listed(pairing, 50, 60, 100, seed=2)


def test_random_pairs_cover_prompts_and_references_evenly() -> None:
    """10,000 of a million pairs: each tenth of the prompts and of the references has about a tenth of them."""
    for side in zip(*listed("random", 1000, 1000, 10_000), strict=True):
        shares = np.bincount(np.array(side) // 100, minlength=10)
        assert abs(shares - 1000).max() < 150
