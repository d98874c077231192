"""The scorer, judge and perceptual distance together: outputs in, :class:`vcf_batch.records.Scores` out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vcf_batch import images
from vcf_batch.config.strengths import reference_shares
from vcf_batch.metrics.clip_score import ClipJudge, content_alignment, cosine
from vcf_batch.metrics.lpips import PerceptualDistance
from vcf_batch.metrics.shown import REFERENCES_KEPT, digest, means
from vcf_batch.metrics.texture import texture_similarity
from vcf_batch.models.forward_pass import ForwardPass
from vcf_batch.records import TEXTURE, Scores

WAITING_BYTES = 1 << 28
"""Most bytes of references that wait to be embedded. Beyond it, those that wait longest are embedded before they are
needed."""

OF_REFERENCES = ("clip_reference", "lpips", "style_similarity", TEXTURE)
"""Scores that an output has for each of its references."""

PIXELS_AT_ONCE = 2**20
"""Most pixels of one perceptual forward pass, so that VGG16's feature maps stay near 2 GB for any batch size."""


@dataclass(slots=True)
class _Reference:
    embeddings: ForwardPass[bytes, Image.Image, Tensor]
    """The pass that gives the embedding, ``[D]``, normalised, by :attr:`digest`."""
    digest: bytes
    resized: dict[tuple[int, int], NDArray[np.uint8]] = field(default_factory=dict)
    """The image resized to each output size (width, height) so far."""

    @property
    def embedding(self) -> Tensor:
        """``[D]``, normalised."""
        return self.embeddings[self.digest]


@dataclass(frozen=True, slots=True)
class Targets:
    """Prompts and references to compare a batch of outputs with."""

    prompts: Sequence[str]
    passes: Sequence[ForwardPass[str, str, Tensor]]
    """The pass that gives the embedding ``[D]`` of each prompt."""
    references: list[_Reference]
    """Embedded references of all outputs, output by output."""
    pictures: list[Image.Image]
    """Images of ``references``, in the same order."""
    shares: list[tuple[float, ...]]
    """For each output, the shares of its references in its scores; they sum to 1."""

    @property
    def texts(self) -> Tensor:
        """Embeddings of the prompts, ``[B, D]``."""
        return torch.stack([own[prompt] for prompt, own in zip(self.prompts, self.passes, strict=True)])

    @property
    def owners(self) -> list[int]:
        """Position of the output of each reference."""
        return [number for number, own in enumerate(self.shares) for _ in own]


class Scorer:
    """Scorer of outputs against their prompts and references.

    Each shard has its own scorer (:meth:`new_shard`), and each distinct prompt and reference is embedded once per
    shard. Embeddings are not kept for the next shard, because inputs of one forward pass change each other's last bits:
    a score would depend on a worker's earlier shards.

    Args:
        judge: the CLIP that scores.
        perceptual: the perceptual distance; without it, ``lpips`` and ``style_similarity`` are None.
        texture: measure ``texture_similarity``; else it is None.
    """

    def __init__(self, judge: ClipJudge, perceptual: PerceptualDistance | None = None, texture: bool = False) -> None:
        self.judge = judge
        self.perceptual = perceptual
        self.texture = texture
        self._texts: dict[str, ForwardPass[str, str, Tensor]] = {}
        self._references: dict[bytes, _Reference] = {}

    def new_shard(self) -> "Scorer":
        """A new scorer with the same judge and distance, and without embeddings."""
        return Scorer(self.judge, self.perceptual, self.texture)

    def targets(
        self,
        prompts: Sequence[str],
        references: Sequence[Sequence[Image.Image]],
        weights: Sequence[Sequence[float] | None] | None = None,
    ) -> Targets:
        """The targets of a batch, for all draws of its rows. They are embedded when the first of them is scored.

        Ask for the targets of every batch, in order, whether it is scored or not: which inputs are embedded together
        follows from the batches alone.

        Args:
            prompts: ``B`` prompts, 1 or more.
            references: RGB references of each output. A score is the mean over several references; without references,
                ``clip_reference``, ``lpips`` and ``style_similarity`` are None.
            weights: for each output, the weights of its references in that mean; None gives equal weights.
        """
        given = [None] * len(prompts) if weights is None else weights
        shares = [reference_shares(own, len(shown)) for own, shown in zip(given, references, strict=True)]
        pictures = [image for own in references for image in own]
        targets = Targets(prompts, self._text_passes(prompts), self._known_references(pictures), pictures, shares)
        self._forget_oldest()
        self._embed_waiting()
        return targets

    def score(
        self, targets: Targets, outputs: Sequence[NDArray[np.uint8]], twins: Sequence[NDArray[np.uint8]] = ()
    ) -> list[Scores]:
        """Score a batch of outputs.

        For the perceptual distance each reference is squashed bilinearly, with antialiasing, to the output's size (as
        in the paper's evaluation), and both are converted from uint8 to [-1, 1]. The judge has its own preprocessing.

        Args:
            targets: the targets of the batch.
            outputs: ``B`` images of one size, uint8 ``[H, W, 3]``.
            twins: images of the prompts alone from the same noise, of the same form as ``outputs``. Without twins,
                ``content_alignment`` is None.
        """
        if len(outputs) != len(targets.shares):
            raise ValueError(f"{len(outputs)} outputs, targets of {len(targets.shares)}")
        pictures = self.judge.embed_images(outputs)
        found = {"clip_score": cosine(pictures, targets.texts)}
        if targets.references:
            known = torch.stack([entry.embedding for entry in targets.references])
            found["clip_reference"] = cosine(pictures[targets.owners], known)
            shown = [outputs[owner] for owner in targets.owners]
            if self.perceptual is not None:
                device, compare = self.perceptual.device, self.perceptual.compare
                found["lpips"], found["style_similarity"] = _compared(compare, device, shown, targets)
            if self.texture:
                (found[TEXTURE],) = _compared(_textures, known.device, shown, targets)
        if twins:
            layouts, twin_layouts = self.judge.embed_layouts([*outputs, *twins]).split(len(outputs))
            found["content_alignment"] = content_alignment(layouts, twin_layouts)
        # All scores are read at once, because each reading waits for the device.
        read = torch.cat([*found.values()]).cpu().split([*map(len, found.values())])
        columns = {name: values.tolist() for name, values in zip(found, read, strict=True)}
        columns |= {name: means(columns[name], targets.shares) for name in OF_REFERENCES if name in columns}
        return [Scores(**dict(zip(columns, values, strict=True))) for values in zip(*columns.values(), strict=True)]

    def _text_passes(self, prompts: Sequence[str]) -> list[ForwardPass[str, str, Tensor]]:
        new = {prompt: prompt for prompt in prompts if prompt not in self._texts}
        self._texts.update(dict.fromkeys(new, ForwardPass(new, self.judge.embed_texts)))
        return [self._texts[prompt] for prompt in prompts]

    def _known_references(self, pictures: Sequence[Image.Image]) -> list[_Reference]:
        """The stored reference of each image. An image of many rows is usually one object, and is hashed once."""
        digests = {number: digest(image) for number, image in {id(image): image for image in pictures}.items()}
        keys = [digests[id(image)] for image in pictures]
        new = {key: image for key, image in zip(keys, pictures, strict=True) if key not in self._references}
        embeddings = ForwardPass(new, self.judge.embed_images)
        self._references.update((key, _Reference(embeddings, key)) for key in new)
        for key in dict.fromkeys(keys):
            self._references[key] = self._references.pop(key)  # keeps the dictionary in order of last use
        return [self._references[key] for key in keys]

    def _forget_oldest(self) -> None:
        for oldest in list(self._references)[: max(0, len(self._references) - REFERENCES_KEPT)]:
            del self._references[oldest]

    def _embed_waiting(self) -> None:
        """Embed references that batches without any success have left waiting, down to :data:`WAITING_BYTES`."""
        passes = {id(entry.embeddings): entry.embeddings for entry in self._references.values()}
        held = {number: sum(map(_bytes, own.waiting)) for number, own in passes.items()}
        excess = sum(held.values()) - WAITING_BYTES
        for number, own in passes.items():
            if excess > 0:
                own.make()
                excess -= held[number]


def _compared(
    compare: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    device: torch.device,
    outputs: Sequence[NDArray[np.uint8]],
    targets: Targets,
) -> list[Tensor]:
    """What ``compare`` gives for each output and the reference at its position, ``[R]`` each."""
    height, width, _ = outputs[0].shape
    for image, entry in zip(targets.pictures, targets.references, strict=True):
        if (width, height) not in entry.resized:
            entry.resized[width, height] = np.asarray(images.resize(image, width, height))
    step = max(1, PIXELS_AT_ONCE // (height * width))
    parts = []
    for start in range(0, len(outputs), step):
        part = slice(start, start + step)
        resized = [entry.resized[width, height] for entry in targets.references[part]]
        parts.append(compare(*(signed(pictures, device) for pictures in (outputs[part], resized))))
    return [torch.cat(values) for values in zip(*parts, strict=True)]


def _textures(outputs: Tensor, references: Tensor) -> tuple[Tensor]:
    """Texture scores of pictures in [-1, 1], ``[R]``."""
    return (texture_similarity(outputs / 2 + 0.5, references / 2 + 0.5),)


def signed(pictures: Sequence[NDArray[np.uint8]], device: torch.device) -> Tensor:
    """Convert ``B`` uint8 arrays ``[H, W, 3]`` to float32 ``[B, 3, H, W]`` in [-1, 1], on a device."""
    # The device gets the bytes, and makes the four times larger floats itself.
    return (torch.from_numpy(np.stack(pictures)).to(device).float() / 255 * 2 - 1).permute(0, 3, 1, 2)


def _bytes(image: Image.Image) -> int:
    return image.width * image.height * len(image.getbands())


def stacked(values: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, ``[N, ...]``; ``[0]`` for none."""
    return torch.stack([*values]) if values else torch.empty(0)
