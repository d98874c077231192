"""Cosines of pictures with prompts and references by any CLIP."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vcf_batch.metrics.clip_score import ClipJudge, cosine
from vcf_batch.metrics.shown import Part, Seen, Shown, over_references, owners, stacked


class ClipCosines:
    """Scorer by a CLIP: what ``clip_score`` and ``clip_reference`` are by the judge of a run.

    Args:
        clip: the CLIP.
    """

    parts: Mapping[str, Part] = {
        "to_prompt": Part("How well the image fits the prompt, by a CLIP, -1 to 1.", True, "prompt"),
        "to_reference": Part("How much the image resembles the reference, by a CLIP, -1 to 1.", True, "reference"),
    }

    def __init__(self, clip: ClipJudge) -> None:
        self._clip = clip

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """What the CLIP sees of a picture, ``[3, h, w]``."""
        return self._clip.pixels([picture])[0]

    def score(
        self, shown: Sequence[Shown], prepared: Sequence[Tensor], seen: Seen
    ) -> Mapping[str, Sequence[float | None]]:
        """See :class:`vcf_batch.metrics.shown.ImageScorer`."""
        pictures = self._clip.embed_pixels(stacked(prepared))
        prompts = [each.prompt for each in shown]
        texts = stacked(seen((self, "prompt"), prompts, prompts, self._clip.embed_texts))
        found: dict[str, Sequence[float | None]] = {"to_prompt": cosine(pictures, texts).tolist()}
        references = stacked(seen.references((self, "reference"), shown, self._clip.embed_images))
        own = owners(shown)
        found["to_reference"] = over_references(shown, cosine(pictures[own], references) if own else references)
        return found
