"""Scores that compare a picture with its references at the picture's size: LPIPS and texture."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vcf_batch import images
from vcf_batch.metrics.lpips import PerceptualDistance
from vcf_batch.metrics.scorer import PIXELS_AT_ONCE, signed
from vcf_batch.metrics.shown import LPIPS_PARTS, TEXTURE_PARTS, Part, Seen, Shown, over_references, owners
from vcf_batch.metrics.texture import texture_similarity

Compare = Callable[[Tensor, Tensor], Tensor]
"""Function from two sets of pictures, ``[R, 3, H, W]`` in [-1, 1], to a number for each pair, ``[R]``."""


class Pixelwise:
    """Scorer by a comparison of equal sizes. A reference is squashed to the picture's size, as in a run.

    Args:
        parts: what the number means.
        compare: the comparison.
        device: the device of the comparison.
    """

    def __init__(self, parts: Mapping[str, Part], compare: Compare, device: torch.device | str) -> None:
        self.parts = parts
        self._compare, self._device = compare, torch.device(device)

    @classmethod
    def lpips(cls, network: PerceptualDistance) -> "Pixelwise":
        """Scorer by the perceptual distance."""
        return cls(LPIPS_PARTS, network, network.device)

    @classmethod
    def texture(cls, device: torch.device | str) -> "Pixelwise":
        """Scorer by :func:`vcf_batch.metrics.texture.texture_similarity`."""
        return cls(TEXTURE_PARTS, lambda a, b: texture_similarity(a / 2 + 0.5, b / 2 + 0.5), device)

    def prepare(self, picture: NDArray[np.uint8]) -> None:
        """Nothing: the picture itself is compared."""

    def score(
        self, shown: Sequence[Shown], prepared: Sequence[None], seen: Seen
    ) -> Mapping[str, Sequence[float | None]]:
        """See :class:`vcf_batch.metrics.shown.ImageScorer`. The pictures have one size."""
        height, width, _ = shown[0].picture.shape

        def resized(pictures: list[Image.Image]) -> list[NDArray[np.uint8]]:
            return [np.asarray(images.resize(picture, width, height)) for picture in pictures]

        references = seen.references((self, width, height), shown, resized)
        pictures = [shown[number].picture for number in owners(shown)]
        step = max(1, PIXELS_AT_ONCE // (height * width))
        values = [
            self._compare(signed(pictures[start : start + step], self._device), signed(part, self._device))
            for start in range(0, len(pictures), step)
            if (part := references[start : start + step])
        ]
        return {"": over_references(shown, torch.cat(values) if values else torch.empty(0))}
