"""A driver may die, lose an answer, be refused or stand still at any of its requests: the run ends whole."""

import pytest

from support.simulation.explorer import FATES, SCENARIOS, Fate, Scenario, explore

SAMPLED = 11
"""One request in this many is struck where not all are."""

scenarios = pytest.mark.parametrize("scenario", SCENARIOS)
fates = pytest.mark.parametrize("fate", FATES)


def strike(scenario: Scenario, fate: Fate, first: int, step: int) -> None:
    requests = explore(scenario, fate, 0)
    assert requests > 20
    for number in range(first, requests + 1, step):
        explore(scenario, fate, number)


@scenarios
@fates
def test_whatever_happens_at_some_requests_the_run_ends_whole(scenario: Scenario, fate: Fate) -> None:
    """What is struck differs between scenarios and fates."""
    place = SCENARIOS.index(scenario) * len(FATES) + FATES.index(fate)
    strike(scenario, fate, 1 + place % SAMPLED, SAMPLED)


@pytest.mark.slow
@scenarios
@fates
def test_whatever_happens_at_any_request_the_run_ends_whole(scenario: Scenario, fate: Fate) -> None:
    strike(scenario, fate, 1, 1)
