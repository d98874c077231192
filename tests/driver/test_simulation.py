"""Runs in simulated worlds: what must hold of every run holds of each that is drawn.

``make simulate SEEDS=10000`` draws more, ``make simulate SEED=7`` shows what happens in one.
"""

import pytest

from support.simulation.universe import simulate

SEEDS = 300
AT_ONCE = 50
QUICK = 100
"""Seeds of `make test`; `make test-all` has all of them."""


@pytest.mark.parametrize(
    "first",
    [pytest.param(first, marks=[pytest.mark.slow] * (first >= QUICK)) for first in range(0, SEEDS, AT_ONCE)],
)
def test_a_run_ends_whole_whatever_happens(first: int) -> None:
    """Every row is there once, none that is innocent is blamed, no sample is lost, nothing is left over, no driver
    commits without having found its own lease, and no receipt stands beside files that it does not describe."""
    for seed in range(first, first + AT_ONCE):
        simulate(seed)


def test_one_integer_decides_everything() -> None:
    """The same seed gives the same story, so that a failure can be looked at."""
    told: list[list[str]] = [[], []]
    for lines in told:
        simulate(7, lines.append)
    assert told[0] == told[1] and len(told[0]) > 5
