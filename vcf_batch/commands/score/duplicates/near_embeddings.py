"""Near-duplicates among very many embeddings: a row is one if an earlier row that stays is at least as near as asked.

The rule is that of :mod:`vcf_batch.commands.score.duplicates.near_hashes`, and so is its order. An index of faiss has
the rows that stay. It proposes which of them may be near a new row, and their cosine decides: the product of the stored
half-precision numbers in double precision. Each term is a multiple of 2^-48 and the sum is below 2, so no sum is
rounded, and no machine, order or number of threads changes a decision.

Up to :data:`EXACT_ROWS` rows each row is compared with all that stay. Beyond, rows that stay are kept in clusters, by a
k-means over a sample (Jegou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", 2011, section IV;
half-precision numbers instead of codes). A new row is compared with those of the :data:`PROBES` clusters whose centres
are nearest. So a pair may be missed, and a row stays that is no first. Rows that come together are compared in full.

Memory is 2 D + 16 bytes for each row that stays, with D numbers to an embedding, and what an array keeps free to grow.
"""

import math
from typing import Any

import numpy as np

from vcf_batch.errors import UsageError

EXACT_ROWS = 100_000
"""Rows up to which every pair is compared."""
PROBES = 16
"""Clusters that a row is compared with."""
SAMPLED = 40
"""Rows of the sample for each cluster."""

_CLUSTERS = 4.0
"""Clusters for each row, to the square root."""
_ITERATIONS = 4
_AT_ONCE = 4096
"""Rows that are searched together."""
_PAIRS = 1 << 14
"""Pairs whose cosines are computed together."""
_SLACK = 1e-4
"""What single precision may be wrong by in what it proposes."""


def faiss() -> Any:
    """The library, which is an extra.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise UsageError(
            f"--by clip needs faiss, which cannot be imported ({error}): pip install 'vcf-batch[duplicates]'"
        ) from error
    return faiss


def clusters(rows: int) -> int:
    """The number of clusters among rows; 1 where every pair is compared."""
    return 1 if rows <= EXACT_ROWS else int(_CLUSTERS * math.sqrt(rows))


class EmbeddingComparison:
    """Comparison of embeddings by their cosine.

    Args:
        cosine: least cosine of duplicates, above 0.
        rows: number of rows, or more.
        sample: ``[s, D]`` float16, embeddings of some of the rows. Without one, every pair is compared.

    Raises:
        UsageError: faiss is not installed.
    """

    def __init__(self, cosine: float, rows: int, sample: np.ndarray) -> None:
        self._faiss, self._cosine, self._clusters = faiss(), cosine, clusters(rows)
        self._index = self._trained(sample) if self._clusters > 1 and len(sample) else None
        self._staying: list[np.ndarray] = []
        self._firsts: list[np.ndarray] = [np.empty(0, np.int32)]
        self._rows = 0

    def _trained(self, sample: np.ndarray) -> Any:
        """An empty index of clusters. One thread computes them from a fixed seed."""
        width = sample.shape[1]
        index = self._faiss.IndexIVFScalarQuantizer(
            self._faiss.IndexFlatIP(width),
            width,
            min(self._clusters, len(sample)),
            self._faiss.ScalarQuantizer.QT_fp16,
            self._faiss.METRIC_INNER_PRODUCT,
            False,
        )
        index.cp.niter, index.cp.seed, index.cp.min_points_per_centroid = _ITERATIONS, 0, 1
        threads = self._faiss.omp_get_max_threads()
        self._faiss.omp_set_num_threads(1)
        try:
            index.train(sample.astype(np.float32))
        finally:
            self._faiss.omp_set_num_threads(threads)
        index.nprobe = PROBES
        index.make_direct_map()  # to look at what it proposes
        return index

    def add(self, values: np.ndarray) -> None:
        """Compare further rows with those before them.

        Args:
            values: ``[m, D]`` float16, each of length 1.
        """
        for start in range(0, len(values), _AT_ONCE):
            self._add(values[start : start + _AT_ONCE].astype(np.float32))

    def _add(self, values: np.ndarray) -> None:
        firsts = self._firsts_before(values)
        new = np.flatnonzero(firsts < 0)
        leaders = new[self._leaders(values[new])]
        firsts[new] = self._rows + leaders
        staying = np.unique(leaders)
        if self._index is None:
            self._index = self._faiss.IndexFlatIP(values.shape[1])
        self._index.add(values[staying])
        self._staying.append((self._rows + staying).astype(np.int32))
        self._firsts.append(firsts.astype(np.int32))
        self._rows += len(values)

    def _firsts_before(self, values: np.ndarray) -> np.ndarray:
        """The place of the first earlier row that stays and is near each row, ``[m]``; -1 without one."""
        if self._index is None or not self._index.ntotal:
            return np.full(len(values), -1)
        ends, _, found = self._index.range_search(values, self._cosine - _SLACK)
        owners = np.repeat(np.arange(len(values)), np.diff(ends.astype(np.int64)))
        none = self._index.ntotal
        numbers = np.full(len(values), none)
        for start in range(0, len(found), _PAIRS):
            own, other = owners[start : start + _PAIRS], found[start : start + _PAIRS]
            near = self._are_near(values[own], self._index.reconstruct_batch(other))
            np.minimum.at(numbers, own[near], other[near])
        staying = np.concatenate([*self._staying, np.array([-1], np.int32)])
        return staying[numbers].astype(np.int64)

    def _leaders(self, values: np.ndarray) -> np.ndarray:
        """The place of the first of these rows that stays and is near each of them: ``[m]``, its own if it stays."""
        leaders = np.arange(len(values))
        proposed = values @ values.T >= self._cosine - _SLACK
        np.fill_diagonal(proposed, False)
        for place in np.flatnonzero(proposed.any(axis=1)):
            if leaders[place] < place:
                continue
            others = place + 1 + np.flatnonzero(proposed[place, place + 1 :])
            others = others[leaders[others] == others]
            leaders[others[self._are_near(values[place], values[others])]] = place
        return leaders

    def _are_near(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Whether rows are near, ``[..., D]`` float32 with half-precision values to ``[...]`` bool."""
        return (one.astype(np.float64) * other).sum(axis=-1) >= self._cosine

    def firsts(self) -> np.ndarray:
        """See :class:`vcf_batch.commands.score.duplicates.comparison.Comparison`."""
        return np.concatenate(self._firsts)
