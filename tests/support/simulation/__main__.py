"""Simulate many runs, or one with everything that happens: ``make simulate``."""

import argparse
import multiprocessing
import sys
import time

from support.simulation.universe import AT_ONCE, simulate, wrong_among


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="simulate the seeds below this number")
    parser.add_argument("--seed", type=int, help="simulate this seed alone, and show what happens")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    given = parser.parse_args()
    if given.seed is not None:
        simulate(given.seed, print)
        print("all that must hold held")
        return 0
    begin, wrong = time.monotonic(), 0
    parts = [range(first, min(first + AT_ONCE, given.seeds)) for first in range(0, given.seeds, AT_ONCE)]
    with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
        for found in pool.imap_unordered(wrong_among, parts):
            for error in found:
                wrong += 1
                print(error, flush=True)
    print(f"{given.seeds:,} seeds, {wrong} of them wrong, in {time.monotonic() - begin:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
