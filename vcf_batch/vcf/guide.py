"""The PNO guide: the CLIP whose image embedding prompt-noise optimisation follows (docs/method.md, section 5)."""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModelWithProjection

from vcf_batch.config.strengths import reference_shares
from vcf_batch.errors import ModelError
from vcf_batch.models.loading import load_errors
from vcf_batch.vcf.aligner import load_preprocessing, load_vision_tower, squash


class Guide:
    """A frozen CLIP that embeds images differentiably, so that gradients reach their pixels.

    Args:
        clip: the vision tower of a CLIP, with its projection, on its device. The guide freezes it.
        mean, std: three numbers each, for images in [0, 1].
    """

    def __init__(self, clip: CLIPVisionModelWithProjection, mean: Sequence[float], std: Sequence[float]) -> None:
        self.tower = clip.vision_model.eval().requires_grad_(False)
        self.projection = clip.visual_projection.requires_grad_(False)
        self.mean, self.std = (torch.tensor(values, device=clip.device)[:, None, None] for values in (mean, std))

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device | str = "cpu") -> "Guide":
        """Load a guide in float32.

        Args:
            path: folder of a CLIP, or of its vision tower with projection, in transformers' layout.
            device: device of the guide.

        Raises:
            ModelError: a part is missing or does not fit.
            StorageError: the disk failed.
        """
        remedy = (
            ". It must hold a CLIP, or its vision tower with projection, in transformers' layout; name another with "
            "--pno-guide"
        )
        with load_errors(f"the PNO guide {path!r}", remedy):
            tower = load_vision_tower(path, torch.float32, "--pno-guide")
            processor = load_preprocessing(path, tower.config.image_size)
        return cls(tower.to(device), processor.image_mean, processor.image_std)

    @property
    def image_size(self) -> int:
        """Edge of the tower's input in pixels."""
        return self.tower.config.image_size

    def embed(self, images: Tensor) -> Tensor:
        """Embed images; differentiable. The embeddings are L2-normalised.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1], of any size; the whole image is squashed to the guide's square.

        Returns:
            float32 ``[B, D]``.
        """
        squashed = bicubic(images.to(self.mean.device), self.image_size).clamp(0, 1)
        pixels = ((squashed - self.mean) / self.std).to(self.projection.weight.dtype)
        return F.normalize(self.projection(self.tower(pixels).pooler_output).float(), dim=-1)

    @torch.no_grad()
    def targets(self, references: Sequence[Sequence[Image.Image]], weights: Sequence[Sequence[float] | None]) -> Tensor:
        """The embeddings to follow. An output's product with its target is the weighted mean of its cosines with the
        references.

        Args:
            references: for each sample, one or more images of any size.
            weights: for each sample, one weight per reference; None is equal weights.

        Returns:
            float32 ``[B, D]``.
        """
        squashed = [squash(picture, self.image_size) for own in references for picture in own]
        pixels = torch.from_numpy(np.stack([np.asarray(image, dtype=np.float32) for image in squashed])) / 255
        embedded = self.embed(pixels.permute(0, 3, 1, 2)).split([len(own) for own in references])
        return torch.stack(
            [
                torch.tensor(reference_shares(shares, len(own)), device=own.device) @ own
                for own, shares in zip(embedded, weights, strict=True)
            ]
        )

    def refuse_judge(self, judge: CLIPModel) -> None:
        """Refuse a judge that has the guide's own weights (docs/method.md, section 5).

        The weights of the vision towers are compared. Names and files prove nothing, because the same weights are
        published in many places and precisions.

        Raises:
            ModelError: guide and judge have the same weights.
        """
        ours, theirs = (list(tower.parameters()) for tower in (self.tower, judge.vision_model))
        if len(ours) == len(theirs) and all(map(_equal, ours, theirs)):
            raise ModelError(
                "the PNO guide and the judge are the same CLIP, so PNO would raise its own scores: name another guide "
                "with --pno-guide, or another judge with --judge"
            )


def bicubic(images: Tensor, size: int) -> Tensor:
    """Resize to a square as Pillow's antialiased bicubic filter does, as two matrix products.

    The gradient of ``torch.nn.functional.interpolate`` has no deterministic kernel on GPUs.

    Args:
        images: ``[B, 3, H, W]``.
        size: edge of the result in pixels.

    Returns:
        ``[B, 3, size, size]``.
    """
    rows, columns = (_weights(edge, size, images.device, images.dtype) for edge in images.shape[2:])
    return rows @ images @ columns.T


@functools.lru_cache
@torch.inference_mode(False)
@torch.no_grad()
def _weights(edge: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Weights ``[size, edge]`` of each pixel of an edge in each pixel of the resized one."""
    spread = F.interpolate(torch.eye(edge)[None, None], (size, edge), mode="bicubic", antialias=True)[0, 0]
    return spread.to(device, dtype)


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are equal up to rounding. The coarsest rounding is bfloat16's, with 8 bits."""
    return a.shape == b.shape and torch.allclose(a.float(), b.to(a.device).float(), rtol=1e-2, atol=1e-7)
