"""Bisecting finds the row that kills its workers."""

import math

from hypothesis import given
from hypothesis import strategies as st

from vcf_batch.driver.bisection import REPEATS, Bisection


@given(st.integers(1, 1000), st.data())
def test_the_culprit_is_found_in_a_bounded_number_of_trials(rows: int, data: st.DataObject) -> None:
    """A row that kills its worker every time is found; of several one is. The cost is bounded."""
    culprits = data.draw(st.sets(st.integers(0, rows - 1), min_size=1, max_size=4))
    search, trials = Bisection(range(rows)), 0
    while search.culprit is None:
        trials += 1
        assert trials <= math.ceil(math.log2(rows)) + REPEATS
        (search.died if culprits & search.trial else search.survived)()
    assert search.culprit in culprits


@given(st.integers(1, 200), st.lists(st.booleans(), max_size=60))
def test_a_single_survival_clears_the_last_suspect(rows: int, deaths: list[bool]) -> None:
    """Only what repeats marks a row: whatever happens by chance, nobody is blamed who did not die alone every time."""
    search, alone = Bisection(range(rows)), []
    for died in [*deaths, *[False] * 20]:
        if search.in_vain or search.culprit is not None:
            break
        if len(search.trial) == 1:
            alone.append((search.trial, died))
        (search.died if died else search.survived)()
    assert search.in_vain or search.culprit is not None
    if search.culprit is not None:
        assert alone[-REPEATS:] == [(frozenset({search.culprit}), True)] * REPEATS
