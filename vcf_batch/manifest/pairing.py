"""Pairings of prompts with references: pure functions from the number of a pair to its two members.

A pair is computed from its number alone, so a part of a pairing takes no memory for the rest.
"""

import math
from collections.abc import Callable

import numpy as np

Pairs = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Function from pair numbers, ``[n]`` int64 from 0 on, to the indices of their prompts and references, ``[n]`` each."""

_ROUNDS = 6
"""Rounds of the Feistel network. With four, no statistic of its outputs tells the permutation from a random one."""


def pairs(pairing: str, num_prompts: int, num_references: int, seed: int) -> Pairs:
    """The function that computes the pairs of a pairing: every combination exactly once.

    Args:
        pairing: ``cross``: all references with the first prompt, then all with the second, in order. ``random``: a
            random order, so that the first n pairs are a random sample. ``balanced``: among the first n pairs, for any
            n, the counts of any two prompts differ by at most 1, and so do the counts of any two references.
        num_prompts: number of prompts, 1 or more.
        num_references: number of references, 1 or more.
        seed: seed of ``random`` and ``balanced``.
    """
    combinations = num_prompts * num_references
    if pairing == "cross":
        return lambda number: np.divmod(number, num_references)
    generator = np.random.default_rng(seed)
    if pairing == "random":
        keys = generator.integers(1 << 63, size=_ROUNDS, dtype=np.uint64)
        return lambda number: np.divmod(_permuted(number, combinations, keys), num_references)
    prompts, references = generator.permutation(num_prompts), generator.permutation(num_references)
    # Counting through prompts and references together returns to the first pair after ``cycle`` pairs.
    cycle = math.lcm(num_prompts, num_references)
    return lambda number: (
        prompts[number % num_prompts],
        references[(number + number // cycle) % num_references],
    )


def _permuted(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Apply a pseudo-random permutation of ``range(size)`` to ``values``.

    The permutation is a Feistel network, applied repeatedly until a result is below ``size``.
    """
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
    """Mix each value, so that every bit of the result depends on all its bits (the finaliser of SplitMix64)."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
