"""Near-duplicates among very many hashes of 64 bits: all pairs within a Hamming distance, exactly, in bounded memory.

A row is a duplicate if an earlier row that is none itself is within the distance; of several, the first one is named.
So each row that is left out resembles one that stays, which a chain of resemblances would not ensure, and no two rows
that stay are within the distance. The order of the rows decides which ones stay.

The search first groups equal hashes. Then it joins all hashes within the distance into components, and last it goes
through each component in the order of the rows.

Joining cuts the 64 bits into blocks. Of two hashes within distance d, at most d blocks differ. So with b blocks, the
pair agrees in some b - d of them (the pigeonhole principle). For each choice of b - d blocks the hashes are sorted by
these, and those that agree in all of them are compared (Manku, Jain and Das Sarma, "Detecting Near-Duplicates for Web
Crawling", 2007). Hashes that are joined already are not compared again.

Memory is about 90 bytes for each row, beside the keys.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from vcf_batch.errors import UsageError

BITS = 64
"""Number of bits of a hash, such as those of the column ``phash``."""

MAX_DISTANCE = 16
"""Largest distance. Time grows fast with it; two random hashes have a distance of 32."""

MOST_ROWS = 2**31 - 1
"""Most rows: places are 32-bit integers."""

_SORT_COST = 40.0
"""Cost of sorting one hash, in comparisons of two."""
_AT_ONCE = 1 << 22
"""Pairs that are compared at once."""


def find(batches: Iterable[tuple[pa.Array, np.ndarray]], distance: int) -> pa.Table:
    """Find the near-duplicates among rows.

    Args:
        batches: keys (texts) and hashes (``[n]`` uint64) of the rows, in order.
        distance: largest number of bits in which duplicates differ, 0 to :data:`MAX_DISTANCE`.

    Returns:
        A table with ``key`` and ``duplicate_of``, a row for each one that was given, in order. ``duplicate_of`` is the
        key of the first row that stays and is within the distance; null for rows that stay.

    Raises:
        UsageError: the distance is out of range, or there are more than :data:`MOST_ROWS` rows.
    """
    keys, hashes = [], []
    for some_keys, some_hashes in batches:
        keys.append(some_keys.cast(pa.large_string()))
        hashes.append(np.asarray(some_hashes, np.uint64))
    firsts = first_alike(np.concatenate(hashes) if hashes else np.empty(0, np.uint64), distance)
    hashes.clear()
    # An index of null gives null. One piece, as taking from several pieces is slow.
    column = pa.concat_arrays(keys) if keys else pa.array([], pa.large_string())
    stays = firsts == np.arange(len(firsts))
    return pa.table({"key": column, "duplicate_of": column.take(pa.array(firsts, mask=stays))})


def first_alike(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The place of the row that each row is a duplicate of: its own if it is none.

    Args:
        hashes: ``[n]`` uint64, in the order of the rows.
        distance: see :func:`find`.

    Returns:
        ``[n]`` int32.

    Raises:
        UsageError: see :func:`find`.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise UsageError(f"the distance is {distance}; it must be 0 to {MAX_DISTANCE} of the {BITS} bits of a hash")
    if len(hashes) > MOST_ROWS:
        raise UsageError(f"there are {len(hashes):,} rows; near-duplicates are found among at most {MOST_ROWS:,}")
    order = np.argsort(hashes, kind="stable").astype(np.int32)
    ordered = hashes[order]
    begins = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(hashes)]
    distinct, first_rows = ordered[begins], order[begins]
    del ordered
    by_row = np.argsort(first_rows)  # from here on, distinct hashes are in the order of their first rows
    leaders = _leaders(distinct[by_row], distance)
    of_distinct = np.empty(len(distinct), np.int32)
    of_distinct[by_row] = first_rows[by_row][leaders]
    firsts = np.empty(len(hashes), np.int32)
    firsts[order] = of_distinct[np.cumsum(begins) - 1]
    return firsts


def _leaders(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The place of the first hash that stays and is within the distance, for each of some distinct hashes: ``[n]``."""
    found = np.arange(len(hashes), dtype=np.int32)
    if distance == 0 or len(hashes) < 2:
        return found
    components = _components(hashes, distance)
    order = np.argsort(components, kind="stable").astype(np.int32)
    begins = np.flatnonzero(np.diff(components[order], prepend=-1))
    sizes = np.diff(begins, append=len(order))
    for begin, size in zip(begins[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        left = order[begin : begin + size]  # in order, as the sort is stable
        while len(left) > 1:
            alike = np.bitwise_count(hashes[left] ^ hashes[left[0]]) <= distance
            found[left[alike]] = left[0]
            left = left[~alike]
    return found


def _components(hashes: np.ndarray, distance: int) -> np.ndarray:
    """The smallest place in the component of each hash: ``[n]`` int32. Hashes within the distance are in one."""
    parents = np.arange(len(hashes), dtype=np.int32)
    for blocks in _tables(_number_of_blocks(len(hashes), distance), distance):
        _join_alike(hashes, parents, blocks, distance)
        # Flat again, so that roots are found in one step.
        parents[:] = _roots(parents, np.arange(len(parents), dtype=np.int32))
    return parents


def _number_of_blocks(count: int, distance: int) -> int:
    """The number of blocks with the least work, if hashes are random."""

    def cost(blocks: int) -> float:
        agreeing = BITS * (blocks - distance) // blocks
        return math.comb(blocks, distance) * count * (_SORT_COST + count / 2.0 ** (agreeing + 1))

    return min(range(distance + 1, min(4 * distance + 4, BITS) + 1), key=cost)


def _tables(number: int, distance: int) -> Iterator[list[tuple[int, int]]]:
    """The blocks that are to agree, for each table: the place of the lowest bit of each, and its number of bits."""
    stops = [BITS * place // number for place in range(number + 1)]
    blocks = [(begin, stop - begin) for begin, stop in itertools.pairwise(stops)]
    return (list(chosen) for chosen in itertools.combinations(blocks, number - distance))


def _join_alike(hashes: np.ndarray, parents: np.ndarray, blocks: Sequence[tuple[int, int]], distance: int) -> None:
    """Join the hashes within the distance that agree in some blocks. ``parents`` is changed, and is flat before."""
    keys = np.zeros(len(hashes), np.uint64)
    for begin, bits in blocks:
        keys <<= np.uint64(bits)
        keys |= (hashes >> np.uint64(begin)) & np.uint64((1 << bits) - 1)
    order = np.argsort(keys).astype(np.int32)
    keys = keys[order]
    runs = np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [len(keys)]])
    del keys
    sizes = np.diff(runs)
    runs, sizes = runs[:-1][sizes > 1], sizes[sizes > 1]
    # Runs of similar lengths are compared together, so that each step is one operation on many.
    step = 1
    while len(runs):
        runs, sizes = _without_joined(parents, order, runs, sizes)
        stop = 2 * step
        for apart in range(step, stop):
            _compare(hashes, parents, order, runs, sizes, apart, distance)
        step = stop
        longer = sizes > step
        runs, sizes = runs[longer], sizes[longer]


def _without_joined(
    parents: np.ndarray, order: np.ndarray, runs: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The runs whose hashes are in more than one component."""
    kept = np.zeros(len(runs), bool)
    for part in _parts(sizes):
        places = _places(runs[part], sizes[part])
        roots = _roots(parents, order[places])
        begins = np.cumsum(sizes[part]) - sizes[part]
        kept[part] = np.minimum.reduceat(roots, begins) != np.maximum.reduceat(roots, begins)
    return runs[kept], sizes[kept]


def _compare(
    hashes: np.ndarray,
    parents: np.ndarray,
    order: np.ndarray,
    runs: np.ndarray,
    sizes: np.ndarray,
    apart: int,
    distance: int,
) -> None:
    """Join the pairs of a run that stand ``apart`` in it and are within the distance."""
    long = sizes > apart
    runs, pairs = runs[long], sizes[long] - apart
    for part in _parts(pairs):
        places = _places(runs[part], pairs[part])
        one, other = order[places], order[places + apart]
        alike = np.bitwise_count(hashes[one] ^ hashes[other]) <= distance
        if alike.any():
            _join(parents, one[alike], other[alike])


def _parts(counts: np.ndarray) -> Iterator[slice]:
    """Slices of some counts whose sums are about :data:`_AT_ONCE`, or that are one count."""
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(counts):
        before = int(ends[begin - 1]) if begin else 0
        stop = max(int(np.searchsorted(ends, before + _AT_ONCE, side="right")), begin + 1)
        yield slice(begin, stop)
        begin = stop


def _places(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers from each of ``begins`` on, as many as its count, one after the other."""
    shifts = begins - (np.cumsum(counts) - counts)
    return np.repeat(shifts, counts) + np.arange(int(counts.sum()))


def _roots(parents: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The root of each place: the smallest place that is joined with it."""
    roots = parents[places]
    while not np.array_equal(higher := parents[roots], roots):
        roots = higher
    return roots


def _join(parents: np.ndarray, one: np.ndarray, other: np.ndarray) -> None:
    """Join pairs of places. A root becomes the child of a smaller one, so there are no circles."""
    while len(one):
        # What is passed on the way to a root is made its child, so that ways stay short.
        parents[one], parents[other] = (roots := _roots(parents, one)), (others := _roots(parents, other))
        one, other = roots, others
        apart = one != other
        one, other = one[apart], other[apart]
        # Of several pairs with the same larger root one takes effect; the others are looked at again.
        parents[np.maximum(one, other)] = np.minimum(one, other)
