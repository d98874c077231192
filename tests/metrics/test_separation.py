"""The area under the curve is the share of pairs in the right order, and a limit lets through what it says."""

import itertools

import numpy as np
import pytest

from vcf_batch.metrics.bootstrap import Bootstrap
from vcf_batch.metrics.separation import separation


def drawn(seed: int, images: int = 40, shift: float = 0.8) -> tuple[list[float], list[list[float]]]:
    """Scores rounded so that some are equal, and a different number of others for each image."""
    generator = np.random.default_rng(seed)
    own = np.round(generator.normal(shift, 1, images), 1).tolist()
    return own, [np.round(generator.normal(0, 1, 1 + image % 4), 1).tolist() for image in range(images)]


def bootstrap(images: int = 40) -> Bootstrap:
    return Bootstrap([f"p{image}" for image in range(images)], [f"r{image}" for image in range(images)])


@pytest.mark.parametrize("higher", [True, False])
def test_the_area_is_the_share_of_pairs_in_the_right_order(higher: bool) -> None:
    """Counted pair by pair; equal scores count half; the value lies in its interval."""
    own, others = drawn(1)
    apart = [value for each in others for value in each]
    pairs = [*itertools.product(own, apart)]
    right = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    found = separation(own, others, higher, bootstrap(), ()).auc
    assert found.value == pytest.approx(right if higher else 1 - right)
    assert found.low is not None and found.high is not None and found.low < found.value < found.high


def test_the_interval_covers_the_truth() -> None:
    """Of 95 % intervals about 95 % cover the area of the distributions, 0.714 for normal ones 0.8 apart."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(100):
        own, others = generator.normal(0.8, 1, 60), generator.normal(0, 1, (60, 2))
        found = separation(own.tolist(), others.tolist(), True, Bootstrap(range(60), range(60), draws=400), ()).auc
        assert found.low is not None and found.high is not None
        hits += found.low <= 0.7142 <= found.high
    assert 88 <= hits <= 100


def test_the_interval_lies_within_what_an_area_can_be() -> None:
    """Scores that are nearly always in the right order have an interval that ends at 1."""
    own, others = [5.0] * 62 + [-5.0] * 2, [[0.0, 1.0]] * 32 + [[-9.0]] * 32
    found = separation(own, others, True, bootstrap(64), ()).auc
    assert 0.95 < found.value < 1 and found.high == 1.0


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.5])
def test_a_limit_lets_through_no_more_than_it_says(higher: bool, share: float) -> None:
    """And the next looser score would let through more; too few pairs for a share give none."""
    own, others = drawn(2, 80)
    apart = [value for each in others for value in each]
    limit = separation(own, others, higher, bootstrap(80), (share,)).limits[share]
    assert limit is not None

    def passed(limit: float) -> float:
        return sum(value >= limit if higher else value <= limit for value in apart) / len(apart)

    assert passed(limit) <= share
    looser = max(value for value in apart if value < limit) if higher else min(v for v in apart if v > limit)
    assert passed(looser) > share
    assert separation(own[:3], others[:3], higher, bootstrap(3), (0.01,)).limits == {0.01: None}
