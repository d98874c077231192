"""Intervals of mean scores: what is resampled, and what that makes of them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vcf_batch.metrics.bootstrap import Bootstrap, Interval

DRAWS = 500

scores = st.lists(st.floats(-1, 1), min_size=2, max_size=12)


def paired(count: int, repeats: int = 1) -> Bootstrap:
    """Prompts that meet one reference each, with some samples of every pair."""
    labels = [number for number in range(count) for _ in range(repeats)]
    return Bootstrap(labels, labels, DRAWS)


def bounds(interval: Interval) -> tuple[float, float, float]:
    assert interval.low is not None and interval.high is not None
    return interval.value, interval.low, interval.high


def test_one_sample_has_no_interval() -> None:
    """Nothing can be resampled from one: an interval of width 0 would promise certainty."""
    assert Bootstrap(["a"], ["b"]).mean([0.5]) == Interval(0.5, None, None)
    assert Bootstrap(["a"], ["b"]).ratio([0.5], [0.25]) == Interval(2, None, None)
    assert bounds(Bootstrap(["a", "a"], ["b", "b"]).mean([0.0, 1.0])) == (0.5, 0, 1)


@given(scores)
def test_the_interval_lies_within_the_scores_and_around_their_mean(values: list[float]) -> None:
    value, low, high = bounds(paired(len(values)).mean(values))
    assert value == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= low <= high <= max(values) + 1e-9


@given(scores, st.floats(0.1, 10), st.floats(-5, 5))
def test_other_units_scale_the_interval(values: list[float], scale: float, shift: float) -> None:
    resampled = paired(len(values))
    moved = bounds(resampled.mean([scale * value + shift for value in values]))
    assert moved == pytest.approx([scale * bound + shift for bound in bounds(resampled.mean(values))], abs=1e-9)


@given(scores, st.integers(2, 4))
def test_more_samples_of_the_same_pairs_do_not_narrow_the_interval(values: list[float], repeats: int) -> None:
    """Samples of one pair are not independent: what the seeds repeat is no new evidence."""
    repeated = [value for value in values for _ in range(repeats)]
    assert bounds(paired(len(values), repeats).mean(repeated)) == pytest.approx(
        bounds(paired(len(values)).mean(values))
    )


@given(st.lists(st.floats(0.1, 1), min_size=2, max_size=12), st.floats(0.5, 2))
def test_scores_of_the_same_samples_stay_paired(values: list[float], factor: float) -> None:
    """A method that keeps a fixed share of every score keeps that share without any doubt."""
    ratio = paired(len(values)).ratio([factor * value for value in values], values)
    assert bounds(ratio) == pytest.approx((factor, factor, factor))


def test_independent_pairs_have_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(size=400)
    value, low, high = bounds(Bootstrap(range(400), range(400)).mean(values))
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.1 * half)


def test_shared_prompts_and_references_widen_the_interval() -> None:
    """Where a score depends on its prompt, a hundred samples of ten prompts tell about ten prompts."""
    prompts, references = zip(*itertools.product(range(10), range(10)), strict=True)
    values = np.random.default_rng(4).normal(size=10)[list(prompts)]
    low, high = bounds(Bootstrap(prompts, references).mean(values))[1:]
    assert high - low == pytest.approx(2 * 1.96 * values.std() / np.sqrt(10), rel=0.1)


@pytest.mark.parametrize(("prompts", "references"), [("aaaa", "bcde"), ("bcde", "aaaa"), ("aaaa", "bbbb")])
def test_what_there_is_one_of_is_not_resampled(prompts: str, references: str) -> None:
    """One prompt, one reference, or one pair alone: the interval comes from the rest."""
    assert bounds(Bootstrap(prompts, references, DRAWS).mean([1, 2, 3, 4])) == bounds(paired(4).mean([1, 2, 3, 4]))


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [0.1, 0.5, 0.2, 0.9]
    assert paired(4).mean(values) == paired(4).mean(values)
    assert paired(4).mean(values) != Bootstrap(range(4), range(4), DRAWS, seed=1).mean(values)


def test_no_samples_have_no_interval() -> None:
    with pytest.raises(ValueError, match="no samples"):
        Bootstrap([], [])
