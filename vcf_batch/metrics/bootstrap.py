"""Bootstrap intervals of mean scores over prompts x references x seeds. Numbers in, numbers out."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 4000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its interval: :data:`LEVEL` of the resamples lie between ``low`` and ``high``.

    Both are None where there is nothing to resample, as a single sample tells nothing of its spread.
    """

    value: float
    low: float | None
    high: float | None


class Bootstrap:
    """Resamples of a set of samples, the same for every score, so that scores stay paired.

    Samples that share a prompt or a reference are not independent. So these are drawn with replacement:

    * pairs of prompt and reference, if every prompt has one reference, or every reference has one prompt;
    * prompts and references separately, if both have several partners. The count of a sample is then the count of its
      prompt times the count of its reference (the pigeonhole bootstrap; Owen 2007, Annals of Applied Statistics 1(2),
      386-411);
    * samples, if there is only one pair.

    With a single prompt, or a single reference, the interval holds for it alone.

    Args:
        prompts: prompt of each sample.
        references: reference of each sample.
        draws: number of resamples.
        seed: seed of the resampling.

    Raises:
        ValueError: there are no samples.
    """

    def __init__(
        self, prompts: Sequence[Hashable], references: Sequence[Hashable], draws: int = DRAWS, seed: int = 0
    ) -> None:
        pairs = list(zip(prompts, references, strict=True))
        if not pairs:
            raise ValueError("there are no samples to resample")
        rows, columns = _numbered(prompts), _numbered(references)
        distinct = len(set(pairs))
        if distinct == 1:
            rows = np.arange(len(pairs))
        elif distinct == max(rows.max(), columns.max()) + 1:
            rows, columns = _numbered(pairs), np.zeros(len(pairs), np.int64)
        self._place = rows, columns
        self._shape = int(rows.max()) + 1, int(columns.max()) + 1
        generator = np.random.default_rng(seed)
        self._drawn = [
            generator.multinomial(size, np.full(size, 1 / size), draws).astype(float) for size in self._shape
        ]

    def mean(self, values: ArrayLike) -> Interval:
        """Mean of ``values``, one per sample, with its interval."""
        return self.ratio(values, np.ones(len(self._place[0])))

    def ratio(self, values: ArrayLike, base: ArrayLike) -> Interval:
        """Sum of ``values`` over the sum of ``base``, both one per sample, with its interval."""
        (value, values_drawn), (one, base_drawn) = self._sums(values), self._sums(base)
        if self._shape == (1, 1):
            return Interval(value / one, None, None)
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample of few samples may be empty
            drawn = values_drawn / base_drawn
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(value / one, float(low), float(high))

    def _sums(self, values: ArrayLike) -> tuple[float, NDArray[np.float64]]:
        """Sum of the values over the samples, and over each resample."""
        table = np.zeros(self._shape)
        np.add.at(table, self._place, np.asarray(values, np.float64))
        return float(table.sum()), (self._drawn[0] @ table * self._drawn[1]).sum(axis=1)


def _numbered(labels: Iterable[Hashable]) -> NDArray[np.int64]:
    """Labels as numbers from 0, in order of first appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)
