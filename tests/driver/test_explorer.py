"""A driver, a push or a reader may die, lose an answer, be refused or stand still at any of its requests: the run ends
whole, and nobody is accused who is innocent."""

import zlib

import pytest

from support.simulation.explorer import FATES, PLACES, READERS, RUNS, Case, Place, Scenario, cases, explore, wrong_in

CASES = [*cases()]
SCENARIOS = [*RUNS, *READERS]


def is_in_make_test(case: Case) -> bool:
    return (PLACES.index(case.place) + SCENARIOS.index(case.scenario) + FATES.index(case.fate)) % 2 == 0


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("place", PLACES)
def test_whatever_happens_at_some_requests_the_run_ends_whole(place: Place, scenario: Scenario) -> None:
    """One request of every second case is struck, another one in each. Each fate strikes in each place and in each
    scenario. (`make test-all` strikes every request of every case.)"""
    chosen = [case for case in CASES if (case.place, case.scenario) == (place, scenario) and is_in_make_test(case)]
    requests = explore(chosen[0], 0)
    assert requests > 5
    for case in chosen:
        explore(case, 1 + zlib.crc32(repr(case).encode()) % requests)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.place}, {case.scenario}, {case.fate}")
def test_whatever_happens_at_any_request_the_run_ends_whole(case: Case) -> None:
    _, requests, wrong = wrong_in(case)
    assert requests > 5 and not wrong
