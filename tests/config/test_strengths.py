"""The shares of several references."""

import math

import pytest

from vcf_batch.config.strengths import reference_shares
from vcf_batch.errors import UsageError


@pytest.mark.parametrize(
    ("weights", "count", "shares"),
    [
        (None, 0, ()), (None, 4, (0.25,) * 4), ((), 0, ()), ((3.0,), 1, (1.0,)), ((0.5, 0.5), 2, (0.5, 0.5)),
        ((1, 0), 2, (1.0, 0.0)), ((1000, 3000 / 3), 2, (0.5, 0.5)), ((5e-324, 5e-324), 2, (0.5, 0.5)),
    ],
)  # fmt: skip
def test_reference_shares_sum_to_1(weights: tuple[float, ...] | None, count: int, shares: tuple[float, ...]) -> None:
    assert reference_shares(weights, count) == shares


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0,), "reference_weights has 1 values for 2 references"),
        ((0.0, 0.0), "reference_weights are all 0"),
        ((1.0, -1.0), "number 2 of reference_weights is -1.0; it must be between 0 and 1000"),
        ((math.nan, 1.0), "number 1 of reference_weights is nan; it must be between 0 and 1000"),
        ((math.inf, 1.0), "number 1 of reference_weights is inf"),
    ],
)
def test_weights_that_say_nothing_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reference_shares(weights, 2)
