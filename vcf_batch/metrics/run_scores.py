"""The scores of a run, computed again for any pairs of images and what they are compared with."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vcf_batch.metrics.scorer import Scorer
from vcf_batch.metrics.shown import Part, Seen, Shown
from vcf_batch.records import TEXTURE


class RunScores:
    """Scorer by the judge and the perceptual distance of a run: the columns that its parquets have.

    Args:
        scorer: those of the run.
        triplets: whether the run has twins.
    """

    def __init__(self, scorer: Scorer, triplets: bool) -> None:
        self._scorer, self._triplets = scorer, triplets
        parts = {"clip_score": Part("", True, "prompt"), "clip_reference": Part("", True, "reference")}
        if scorer.perceptual is not None:
            parts |= {"lpips": Part("", False, "reference"), "style_similarity": Part("", True, "reference")}
        if scorer.texture:
            parts[TEXTURE] = Part("", True, "reference")
        if triplets:
            parts["content_alignment"] = Part("", True, "twin")
        self.parts: Mapping[str, Part] = parts

    def prepare(self, picture: NDArray[np.uint8]) -> None:
        """Nothing: the judge prepares pictures itself."""

    def score(
        self, shown: Sequence[Shown], prepared: Sequence[None], seen: Seen
    ) -> Mapping[str, Sequence[float | None]]:
        """See :class:`vcf_batch.metrics.shown.ImageScorer`. The pictures have one size."""
        scorer = self._scorer.new_shard()
        targets = scorer.targets(
            [each.prompt for each in shown],
            [[*each.references] for each in shown],
            [each.shares or None for each in shown],
        )
        twins = [each.twin for each in shown if each.twin is not None] if self._triplets else []
        found = scorer.score(targets, [each.picture for each in shown], twins if len(twins) == len(shown) else [])
        return {part: [getattr(each, part) for each in found] for part in self.parts}
