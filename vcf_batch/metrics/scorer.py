"""Judge and perceptual distance joined: a batch of outputs in, :class:`vcf_batch.records.Scores` out."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vcf_batch import images
from vcf_batch.config import reference_shares
from vcf_batch.metrics.clip_score import ClipJudge, content_alignment, cosine
from vcf_batch.metrics.lpips import PerceptualDistance
from vcf_batch.records import Scores

REFERENCES_KEPT = 256
"""Distinct references whose embedding and pixels are kept: 450 MB at 768 x 768."""

_PIXELS_AT_ONCE = 2**20
"""Pixels of one perceptual forward pass, so that VGG16's feature maps stay near 2 GB whatever the batch size."""


@dataclass(slots=True)
class _Reference:
    embedding: Tensor
    """``[D]``, normalised."""
    resized: dict[tuple[int, int], NDArray[np.uint8]] = field(default_factory=dict)
    """The image at each output size (width, height) that it was compared at."""


@dataclass(frozen=True, slots=True)
class Targets:
    """What a batch of outputs is compared with."""

    texts: Tensor
    """Embeddings of the prompts, ``[B, D]``."""
    references: list[_Reference]
    """Of all outputs, one after the other."""
    pictures: list[Image.Image]
    """Of ``references``."""
    shares: list[tuple[float, ...]]
    """Of each output, what each of its references counts, summing to 1."""

    @property
    def owners(self) -> list[int]:
        """Which output each reference belongs to."""
        return [number for number, own in enumerate(self.shares) for _ in own]


class Scorer:
    """Scores outputs against their prompts and references.

    Prompts and references are embedded once per distinct input and shard: each shard has a scorer of its own
    (:meth:`new_shard`). What an input is embedded together with changes its last bits, so nothing may be carried from
    one shard to the next, or a score would depend on which shards a worker happened to do before.

    Args:
        judge: the CLIP that scores.
        perceptual: the perceptual distance; None leaves ``lpips`` and ``style_similarity`` empty.
    """

    def __init__(self, judge: ClipJudge, perceptual: PerceptualDistance | None = None) -> None:
        self.judge = judge
        self.perceptual = perceptual
        self._texts: dict[str, Tensor] = {}
        self._references: dict[bytes, _Reference] = {}

    def new_shard(self) -> "Scorer":
        """A scorer with the same judge and distance that has embedded nothing yet."""
        return Scorer(self.judge, self.perceptual)

    def targets(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        weights: Sequence[Sequence[float] | None] | None = None,
    ) -> Targets:
        """Look at what a batch is to be scored against, once for all attempts at it.

        Args:
            prompts: ``B`` prompts, 1 or more.
            references: for each output its RGB references. Of several the mean is taken; with none, ``clip_reference``,
                ``lpips`` and ``style_similarity`` are None.
            weights: for each output, those of its references in that mean; None is equal ones.
        """
        given = [None] * len(prompts) if weights is None else weights
        shares = [reference_shares(own, len(shown)) for own, shown in zip(given, references, strict=True)]
        pictures = [image for own in references for image in own]
        texts, known = self._embedded_texts(prompts), self._embedded_references(pictures)
        self._forget_oldest()
        return Targets(texts, known, pictures, shares)

    def score(
        self, targets: Targets, outputs: Sequence[NDArray[np.uint8]], twins: Sequence[NDArray[np.uint8]] = ()
    ) -> list[Scores]:
        """Score a batch.

        For the perceptual distance each reference is squashed bilinearly, with antialiasing, to the output's size (as
        the paper's evaluation does) and both go from uint8 to [-1, 1]. The judge preprocesses on its own.

        Args:
            targets: of the batch.
            outputs: ``B`` images of one size, uint8 ``[H, W, 3]``.
            twins: what each prompt alone makes of the same noise, likewise; without them ``content_alignment`` is None.
        """
        if len(outputs) != len(targets.shares):
            raise ValueError(f"{len(outputs)} outputs, targets of {len(targets.shares)}")
        pictures = self.judge.embed_images(outputs)
        cosines: list[float] = []
        if targets.references:
            known = torch.stack([entry.embedding for entry in targets.references])
            cosines = cosine(pictures[targets.owners], known).tolist()
        distances, similarities = self._compared([outputs[owner] for owner in targets.owners], targets)
        alignments: list[float | None] = [None] * len(outputs)
        if twins:
            layouts, twin_layouts = self.judge.embed_layouts([*outputs, *twins]).split(len(outputs))
            alignments = content_alignment(layouts, twin_layouts).tolist()
        columns = (
            cosine(pictures, targets.texts).tolist(),
            _means(cosines, targets.shares),
            _means(distances, targets.shares),
            alignments,
            _means(similarities, targets.shares),
        )
        return [Scores(*values) for values in zip(*columns, strict=True)]

    def _embedded_texts(self, prompts: Sequence[str]) -> Tensor:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        self._texts.update(zip(new, self.judge.embed_texts(new), strict=True))
        return torch.stack([self._texts[prompt] for prompt in prompts])

    def _embedded_references(self, pictures: Sequence[Image.Image]) -> list[_Reference]:
        """What is known of each image. The same image in many rows is usually one object: it is hashed once."""
        digests = {number: _digest(image) for number, image in {id(image): image for image in pictures}.items()}
        keys = [digests[id(image)] for image in pictures]
        new = {key: image for key, image in zip(keys, pictures, strict=True) if key not in self._references}
        for key, embedding in zip(new, self.judge.embed_images(list(new.values())), strict=True):
            self._references[key] = _Reference(embedding)
        for key in dict.fromkeys(keys):
            self._references[key] = self._references.pop(key)  # the dictionary's order is that of last use
        return [self._references[key] for key in keys]

    def _forget_oldest(self) -> None:
        for digest in list(self._references)[: max(0, len(self._references) - REFERENCES_KEPT)]:
            del self._references[digest]

    def _compared(self, outputs: Sequence[NDArray[np.uint8]], targets: Targets) -> tuple[list[float], list[float]]:
        """Perceptual distance and style similarity of each output and the reference beside it.

        Both ``[]`` without a perceptual network.
        """
        if self.perceptual is None or not outputs:
            return [], []
        height, width, _ = outputs[0].shape
        for image, entry in zip(targets.pictures, targets.references, strict=True):
            if (width, height) not in entry.resized:
                entry.resized[width, height] = np.asarray(images.resize(image, width, height))
        step = max(1, _PIXELS_AT_ONCE // (height * width))
        distances: list[float] = []
        similarities: list[float] = []
        for start in range(0, len(outputs), step):
            part = slice(start, start + step)
            resized = [entry.resized[width, height] for entry in targets.references[part]]
            distance, similarity = self.perceptual.compare(_signed(outputs[part]), _signed(resized))
            distances += distance.tolist()
            similarities += similarity.tolist()
        return distances, similarities


def _signed(pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 ``[H, W, 3]`` each, to float32 ``[B, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(np.stack([images.to_signed(picture) for picture in pictures])).permute(0, 3, 1, 2)


def _digest(image: Image.Image) -> bytes:
    return hashlib.blake2b(repr((image.mode, image.size)).encode() + image.tobytes(), digest_size=16).digest()


def _means(values: Sequence[float], shares: Sequence[Sequence[float]]) -> list[float | None]:
    """The mean of each output's values, in their order; None for an output without any. No values at all: None for all.

    Args:
        shares: of each output, what each of its values counts, summing to 1.
    """
    following = iter(values)
    return [math.fsum(share * next(following) for share in own) if own and values else None for own in shares]
