"""Which prompt meets which reference: pure functions from the number of a pair to its two members.

A pair is computed from its number alone, so any part of a pairing of any size takes no memory for the rest of it.
"""

import math
from collections.abc import Callable

import numpy as np

PAIRINGS = ("cross", "random", "balanced")

Pairs = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Numbers of pairs, ``[n]`` int64 from 0 on, to the indices of their prompts and their references, ``[n]`` each."""

_ROUNDS = 6
"""Of the Feistel network. Four make a permutation that no statistic of its outputs tells from a random one."""


def pairs(pairing: str, num_prompts: int, num_references: int, seed: int) -> Pairs:
    """The pairs of a pairing: all different, as many as there are combinations.

    Args:
        pairing: ``cross``: all references with the first prompt, then with the second, in order. ``random``: in an
            order that is random as a whole, so that its first n are a random sample. ``balanced``: such that among the
            first n, for any n, no prompt comes more than once oftener than another, and no reference.
        num_prompts, num_references: 1 or more of each.
        seed: of ``random`` and ``balanced``.
    """
    combinations = num_prompts * num_references
    if pairing == "cross":
        return lambda number: np.divmod(number, num_references)
    generator = np.random.default_rng(seed)
    if pairing == "random":
        keys = generator.integers(1 << 63, size=_ROUNDS, dtype=np.uint64)
        return lambda number: np.divmod(_permuted(number, combinations, keys), num_references)
    prompts, references = generator.permutation(num_prompts), generator.permutation(num_references)
    # Counting through prompts and references in step comes back to the same pair after as many as this.
    cycle = math.lcm(num_prompts, num_references)
    return lambda number: (
        prompts[number % num_prompts],
        references[(number + number // cycle) % num_references],
    )


def _permuted(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of ``range(size)``, at ``values``: a Feistel network whose results beyond ``size`` go in again."""
    half = np.uint64(max((size - 1).bit_length() + 1, 2) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    result = values.astype(np.uint64)
    pending = np.arange(len(result))
    while len(pending):
        left, right = result[pending] >> half, result[pending] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        result[pending] = left << half | right
        pending = pending[result[pending] >= size]
    return result.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of the result depends on every bit of the value (the finaliser of SplitMix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
