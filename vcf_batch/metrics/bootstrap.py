"""Bootstrap intervals of mean scores over prompts x references x seeds. Numbers in, numbers out."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 4000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate, and the percentiles between which :data:`LEVEL` of its resamples lie."""

    value: float
    low: float
    high: float


class Bootstrap:
    """Resamples some samples. Every score of them is resampled alike, so that scores stay paired.

    Samples that share a prompt or a reference are not independent, so what is drawn with replacement is

    * pairs of prompt and reference, where every prompt meets one reference, or every reference one prompt;
    * prompts and references, each on their own, where both meet several: a sample then counts as often as its prompt
      times as often as its reference (the pigeonhole bootstrap; Owen 2007, Annals of Applied Statistics 1(2), 386-411);
    * samples, where there is one pair only.

    Where there is a single prompt, or a single reference, the interval holds for it alone.

    Args:
        prompts: of each sample.
        references: of each sample.
        draws: how many resamples.
        seed: of the resampling.

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
        """Mean of one value per sample."""
        return self.ratio(values, np.ones(len(self._place[0])))

    def ratio(self, values: ArrayLike, base: ArrayLike) -> Interval:
        """Sum of ``values`` over the sum of ``base``, both one per sample."""
        (value, values_drawn), (one, base_drawn) = self._sums(values), self._sums(base)
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample may miss all of the few samples there are
            drawn = values_drawn / base_drawn
        low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(value / one, float(low), float(high))

    def _sums(self, values: ArrayLike) -> tuple[float, NDArray[np.float64]]:
        """The sum of the samples' values, and of each resample's."""
        table = np.zeros(self._shape)
        np.add.at(table, self._place, np.asarray(values, np.float64))
        return float(table.sum()), (self._drawn[0] @ table * self._drawn[1]).sum(axis=1)


def _numbered(labels: Iterable[Hashable]) -> NDArray[np.int64]:
    """Labels as numbers from 0, in the order in which they first come."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(label, len(numbers)) for label in labels], np.int64)
