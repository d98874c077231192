"""Simulate many runs, or one as it happens: ``make simulate``. Strike every request: ``make explore``."""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterable
from multiprocessing.pool import Pool

from support.simulation.explorer import cases, wrong_in
from support.simulation.universe import AT_ONCE, simulate, wrong_among


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="simulate the seeds below this number")
    parser.add_argument("--seed", type=int, help="simulate this seed alone, and show what happens")
    parser.add_argument("--explore", action="store_true", help="strike every request once instead")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    given = parser.parse_args()
    if given.seed is not None:
        simulate(given.seed, print)
        print("all that must hold held")
        return 0
    begin = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        if given.explore:
            wrong = explore_all(pool)
        else:
            parts = [range(first, min(first + AT_ONCE, given.seeds)) for first in range(0, given.seeds, AT_ONCE)]
            wrong = shown(error for found in pool.imap_unordered(wrong_among, parts) for error in found)
            print(f"{given.seeds:,} seeds, {wrong} of them wrong")
    print(f"{time.monotonic() - begin:.0f} s in {given.processes} processes")
    return int(wrong > 0)


def explore_all(pool: Pool) -> int:
    """Strike every request of every case, and show how many there were; return how many runs were wrong."""
    requests: Counter[tuple[str, str]] = Counter()
    runs: Counter[str] = Counter()
    wrong = 0
    for case, number, found in pool.imap_unordered(wrong_in, cases()):
        requests[case.place, case.scenario] = max(requests[case.place, case.scenario], number)
        runs[case.place] += number
        wrong += shown(found)
    for (place, scenario), number in requests.items():
        print(f"{place}, {scenario}: {number} requests")
    for place, number in runs.items():
        print(f"{place}: {number:,} runs")
    print(f"{runs.total():,} runs, {wrong} of them wrong")
    return wrong


def shown(errors: Iterable[str]) -> int:
    """Show errors as they come, and count them."""
    count = 0
    for error in errors:
        print(error, flush=True)
        count += 1
    return count


if __name__ == "__main__":
    sys.exit(main())
