"""The simulation finds bugs: each of those that are planted, within a thousand seeds."""

import pytest

from support.simulation.planted_bugs import PLANTED, Plant
from support.simulation.universe import Violation, simulate

SEEDS = 1000


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED.keys())
def test_a_planted_bug_is_found(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert any(map(is_wrong, range(SEEDS)))


def is_wrong(seed: int) -> bool:
    """Whether a seed shows that something does not hold."""
    try:
        simulate(seed)
    except Violation:
        return True
    return False
