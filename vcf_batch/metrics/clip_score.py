"""The judge: the CLIP that scores images against prompts and references."""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from vcf_batch import images
from vcf_batch.errors import ModelError
from vcf_batch.models.loading import load_errors, refuse_missing_weights
from vcf_batch.models.model_files import lone_variant

_CHUNK = 64
"""Most inputs of one forward pass, so that a batch with many references causes no memory peak."""

_EPS = 1e-5


class ClipJudge:
    """The CLIP that embeds texts and images for cosine similarity (Radford et al. 2021; CLIPScore, Hessel et al. 2021).

    Args:
        model: the CLIP, on its device.
        tokenizer: its tokenizer.
        processor: its image preprocessing by ``preprocessor_config.json``, in Pillow, so that scores do not depend on
            an installed torchvision.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer, processor: CLIPImageProcessorPil) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device | str = "cpu", option: str = "--judge") -> "ClipJudge":
        """Load model, tokenizer and preprocessing.

        Args:
            path: folder of a CLIP in transformers' layout.
            device: device for the model; the model always runs in float32.
            option: the option that names another CLIP, for messages.

        Raises:
            ModelError: a part is missing or does not fit.
            StorageError: the disk failed.
        """
        remedy = (
            ". It must hold a CLIP model, its tokenizer and preprocessor_config.json in transformers' layout; "
            f"name another with {option}"
        )
        with load_errors(f"the judge {path!r}", remedy):
            model, report = CLIPModel.from_pretrained(
                path, dtype=torch.float32, variant=lone_variant(path), output_loading_info=True
            )
            tokenizer = CLIPTokenizer.from_pretrained(path)
            processor = CLIPImageProcessorPil.from_pretrained(path)
        refuse_missing_weights(report, f"the judge {path!r}", f"name a complete CLIP with {option}")
        vocabulary = model.config.text_config.vocab_size
        # A tokenizer without files knows three tokens.
        if not 3 < len(tokenizer) <= vocabulary:
            raise ModelError(
                f"the judge {path!r} has a tokenizer of {len(tokenizer)} tokens for a model of {vocabulary}; "
                f"name a CLIP with its own tokenizer with {option}"
            )
        if processor.do_resize and processor.size.shortest_edge and not processor.do_center_crop:
            raise ModelError(
                f"the judge {path!r} resizes without a crop, so its images would differ in size; set do_center_crop or "
                "a fixed height and width in its preprocessor_config.json"
            )
        return cls(model.to(device), tokenizer, processor)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """L2-normalised embeddings, float32 ``[B, D]`` on the judge's device. Text beyond the model's length is cut.

        All texts are padded to the model's length. Padding to the longest text would make the last bits of an embedding
        depend on the other texts.

        Args:
            texts: ``B`` texts.
        """
        parts = []
        for start in range(0, len(texts), _CHUNK):
            tokens = self.tokenizer(
                list(texts[start : start + _CHUNK]),
                padding="max_length",
                truncation=True,
                max_length=self.model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            ).to(self.device)
            features = self.model.get_text_features(
                input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
            )
            parts.append(F.normalize(features.pooler_output, dim=-1))
        return torch.cat(parts) if parts else self._nothing()

    @torch.inference_mode()
    def embed_images(self, pictures: Sequence[Image.Image | NDArray[np.uint8]]) -> Tensor:
        """L2-normalised embeddings, float32 ``[B, D]`` on the judge's device.

        Args:
            pictures: ``B`` RGB images or uint8 arrays ``[H, W, 3]`` of any sizes.
        """
        parts = []
        for start in range(0, len(pictures), _CHUNK):
            parts.append(self.embed_pixels(self.pixels(pictures[start : start + _CHUNK])))
        return torch.cat(parts) if parts else self._nothing()

    def pixels(self, pictures: Sequence[Image.Image | NDArray[np.uint8]]) -> Tensor:
        """What the model sees of images, float32 ``[B, 3, h, w]`` on the CPU. Any thread may call this.

        Args:
            pictures: ``B`` RGB images or uint8 arrays ``[H, W, 3]`` of any sizes, 1 or more.
        """
        chunk = [*map(_rgb, pictures)]
        if self.processor.do_center_crop:
            chunk = [*map(images.trimmed, chunk)]
        return cast(Tensor, self.processor(chunk, return_tensors="pt")["pixel_values"])

    @torch.inference_mode()
    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """L2-normalised embeddings, float32 ``[B, D]``, of what :meth:`pixels` gives."""
        features = self.model.get_image_features(pixel_values=pixels.to(self.device))
        return F.normalize(features.pooler_output, dim=-1)

    @torch.inference_mode()
    def embed_layouts(self, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Layout of images without their style: patch tokens, each channel normalised over the image.

        The mean and deviation of a channel over the patches carry the style (Huang and Belongie, 2017). Without them, a
        channel tells only where its feature is stronger or weaker.

        Args:
            pictures: ``B`` uint8 arrays ``[H, W, 3]``.

        Returns:
            Tokens of the last layer, float32 ``[B, P, D]`` on the judge's device.
        """
        parts = []
        for start in range(0, len(pictures), _CHUNK):
            pixels = self.processor([*map(_rgb, pictures[start : start + _CHUNK])], return_tensors="pt")["pixel_values"]
            tokens = self.model.vision_model(pixel_values=pixels.to(self.device)).last_hidden_state[:, 1:]
            deviation, mean = torch.std_mean(tokens, dim=1, correction=0, keepdim=True)
            parts.append((tokens - mean) / (deviation + _EPS))
        return torch.cat(parts)

    def _nothing(self) -> Tensor:
        return torch.empty(0, self.model.config.projection_dim, device=self.device)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise cosine of two sets of normalised embeddings: ``[B, D]``, ``[B, D]`` to ``[B]``.

    The raw value between -1 and 1: neither clamped at 0 nor multiplied by 100, as some libraries do.
    """
    return (a * b).sum(dim=-1)


def content_alignment(a: Tensor, b: Tensor) -> Tensor:
    """Similarity of layouts: ``[B, P, D]``, ``[B, P, D]`` from :meth:`ClipJudge.embed_layouts` to ``[B]``.

    It is the correlation of a channel's values over the patches, averaged over the channels: 1 for the same layout, 0
    for unrelated ones (docs/quality.md).
    """
    return (a * b).mean(dim=(1, 2))


def _rgb(picture: Image.Image | NDArray[np.uint8]) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
