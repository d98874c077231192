"""Scorers by any CLIP: cosines of pictures with prompts and references, and the embeddings themselves."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vcf_batch.metrics.clip_score import ClipJudge, cosine
from vcf_batch.metrics.scorer import stacked
from vcf_batch.metrics.shown import CLIP_PARTS, EMBEDDING_PARTS, Part, Seen, Shown, over_references, owners


class _ByClip:
    """A scorer that sees pictures by a CLIP.

    Args:
        clip: the CLIP.
    """

    def __init__(self, clip: ClipJudge) -> None:
        self._clip = clip

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """What the CLIP sees of a picture, ``[3, h, w]``."""
        return self._clip.pixels([picture])[0]


class ClipCosines(_ByClip):
    """Scorer by a CLIP: what ``clip_score`` and ``clip_reference`` are by the judge of a run.

    Args:
        clip: the CLIP.
    """

    parts: Mapping[str, Part] = CLIP_PARTS

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


class ClipEmbeddings(_ByClip):
    """Scorer that gives no number but the embedding itself, of length 1, in half precision.

    The embedding of several references is that of their weighted mean.

    Args:
        clip: the CLIP.
    """

    parts: Mapping[str, Part] = EMBEDDING_PARTS

    def score(
        self, shown: Sequence[Shown], prepared: Sequence[Tensor], seen: Seen
    ) -> Mapping[str, Sequence[bytes | None]]:
        """See :class:`vcf_batch.metrics.shown.ImageScorer`."""
        pictures = self._clip.embed_pixels(stacked(prepared))
        references = iter(seen.references((self, "reference"), shown, self._clip.embed_images))
        means = [_mean([next(references) for _ in each.references], each.shares) for each in shown]
        return {"image": [*map(_bytes, pictures)], "reference": [None if own is None else _bytes(own) for own in means]}


def _mean(embeddings: Sequence[Tensor], shares: Sequence[float]) -> Tensor | None:
    """The weighted mean of embeddings ``[D]``, of length 1; None for none."""
    if len(embeddings) < 2:
        return embeddings[0] if embeddings else None
    weights = torch.tensor(shares, device=embeddings[0].device)
    return F.normalize(weights @ torch.stack([*embeddings]), dim=-1)


def _bytes(embedding: Tensor) -> bytes:
    return embedding.cpu().numpy().astype("<f2").tobytes()
