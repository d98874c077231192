"""How well a score tells pairs that share something from pairs that do not. Numbers in, numbers out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vcf_batch.metrics.bootstrap import Bootstrap, Interval


class Separation(NamedTuple):
    """The area under the ROC curve, and a limit for each share of false accepts."""

    auc: Interval
    limits: dict[float, float | None]
    """None where there are too few pairs that do not share for such a share."""


def separation(
    own: Sequence[float],
    others: Sequence[Sequence[float]],
    higher_is_better: bool,
    bootstrap: Bootstrap,
    shares: Sequence[float],
) -> Separation:
    """Compare the scores of images with what they were made from, with those of the same images with something else.

    The area is the share of all pairs of an own and another score in which the own one is better; equal ones count
    half. Its interval resamples the images: an image counts by how often its own score is better than the others, and
    by how often its others are worse than the own ones (the two placements of DeLong et al. 1988, Biometrics 44(3),
    837-845).

    Args:
        own: a score for each image.
        others: scores of each image with something else, one or more.
        higher_is_better: whether a higher score is the better one.
        bootstrap: the resamples of the images.
        shares: shares of false accepts, 0 to 1.
    """
    sign = 1.0 if higher_is_better else -1.0
    shared = sign * np.asarray(own, np.float64)
    grouped = [sign * np.asarray(each, np.float64) for each in others]
    apart = np.sort(np.concatenate(grouped))
    placed = _share_below(apart, shared)
    auc = float(placed.mean())
    among = np.sort(shared)
    counts = np.array([len(each) for each in grouped], np.float64)
    beaten = np.array([(1 - _share_below(among, each)).sum() for each in grouped])
    # The others of an image count by their number, so that the mean of both placements is the area.
    interval = bootstrap.mean(
        placed + beaten * (len(counts) / counts.sum()) - auc * counts * len(counts) / counts.sum()
    )
    # The sum of both placements is linear, so near 1 its resamples go beyond what an area can be.
    low, high = (bound if bound is None else min(1.0, max(0.0, bound)) for bound in (interval.low, interval.high))
    return Separation(Interval(interval.value, low, high), {share: _limit(apart, share, sign) for share in shares})


def _share_below(ordered: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of the ordered numbers below each value; equal ones count half."""
    low, high = (np.searchsorted(ordered, values, side) for side in ("left", "right"))
    return (low + high) / (2 * len(ordered))


def _limit(apart: NDArray[np.float64], share: float, sign: float) -> float | None:
    """The lowest limit that no more than a share of the ordered numbers keeps; None if that is less than one."""
    allowed = math.floor(share * len(apart) + 1e-9)
    return sign * float(np.nextafter(apart[-1 - allowed], np.inf)) if 1 <= allowed < len(apart) else None
