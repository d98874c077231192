"""The aligner's training data: image tokens and text tokens of each pair, from the model's frozen towers.

Tokens may be cached in files that are named by the hash of the image or the caption. So any run with the same towers
finds them, however its data set is named, split and shuffled.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from vcf_batch import images, storage
from vcf_batch.training.tar_samples import CaptionedImage
from vcf_batch.vcf.pipeline import VCFPipeline

MAX_TRAINING_PIXELS = 64_000_000
"""Largest number of pixels of a training image. A larger image counts as broken."""


@dataclass(frozen=True)
class Example:
    """A pair in the form that the towers take."""

    image_id: str
    """SHA-256 of the image file."""
    image: Image.Image | None
    """The squashed image; None if its tokens are known."""
    image_tokens: Tensor | None
    """``[1 + P, Dv]`` from the cache; None if the cache has none."""
    caption: str
    text_tokens: Tensor | None
    """``[T, Dt]`` from the cache; None if the cache has none."""


class Towers:
    """The frozen part of the training: text encoder and image encoder, with a cache of their tokens.

    Args:
        pipeline: a pipeline with text encoder, image encoder, feature extractor and the aligner to train.
        cache: folder or URL of cached tokens; None caches nothing.
        vision_id, text_id: names of the two towers in the cache. A name includes the dtype.
    """

    def __init__(self, pipeline: VCFPipeline, cache: str | None, vision_id: str, text_id: str) -> None:
        self.pipeline, self.cache, self.vision_id, self.text_id = pipeline, cache, vision_id, text_id

    def draw_example(self, pair: CaptionedImage, rng: random.Random) -> Example:
        """Draw one of the captions, and decode and squash the image or find its tokens in the cache. Thread-safe.

        Raises:
            RowError: the image is broken, there is no caption, or the pair has another problem.
            StorageError: the cache's storage failed.
        """
        data = pair.read()
        caption, image_id = rng.choice(pair.captions), hashlib.sha256(data).hexdigest()
        tokens = self._cached(self.vision_id, image_id)
        image = self.pipeline.squash(images.decode(data, MAX_TRAINING_PIXELS)) if tokens is None else None
        return Example(image_id, image, tokens, caption, self._cached(self.text_id, _text_id(caption)))

    def encode(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """The image tokens ``[B, N, Dv]`` that the aligner uses, and text tokens ``[B, T, Dt]``.

        Both are computed as in generation, on the pipeline's device and in its dtype.

        Raises:
            StorageError: the cache's storage failed.
        """
        vision = self._tokens(
            [example.image_id for example in examples],
            [example.image_tokens for example in examples],
            lambda missing: self.pipeline.vision_tokens([cast(Image.Image, examples[p].image) for p in missing]),
            self.vision_id,
        )
        text = self._tokens(
            [_text_id(example.caption) for example in examples],
            [example.text_tokens for example in examples],
            lambda missing: self.pipeline.encode_prompts([examples[place].caption for place in missing]),
            self.text_id,
        )
        return self.pipeline.aligner.select_tokens(vision), text

    def _tokens(
        self, ids: list[str], found: list[Tensor | None], compute: Callable[[list[int]], Tensor], tower: str
    ) -> Tensor:
        """Tokens of a batch. Tokens that were not found in the cache are computed and then cached."""
        missing = [place for place, tokens in enumerate(found) if tokens is None]
        if missing:
            for place, tokens in zip(missing, compute(missing), strict=True):
                found[place] = tokens
                if self.cache is not None:
                    storage.publish_bytes(self._url(tower, ids[place]), save({"tokens": tokens.contiguous()}))
        device = self.pipeline.device
        return torch.stack([tokens.to(device) for tokens in found if tokens is not None])

    def _cached(self, tower: str, content: str) -> Tensor | None:
        if self.cache is None:
            return None
        try:
            with storage.refusals_as_storage_errors():
                return load(storage.read_bytes(self._url(tower, content)))["tokens"]
        except (FileNotFoundError, SafetensorError):  # The file is missing or damaged.
            return None

    def _url(self, tower: str, content: str) -> str:
        assert self.cache is not None
        return storage.join(self.cache, tower, content[:2], f"{content}.safetensors")


def _text_id(caption: str) -> str:
    return hashlib.sha256(caption.encode()).hexdigest()
