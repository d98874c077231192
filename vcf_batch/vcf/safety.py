"""The safety checker of Stable Diffusion, which flags images that are not safe for work."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from numpy.typing import NDArray
from PIL import Image
from transformers import CLIPImageProcessorPil

from vcf_batch.models.loading import load_errors, refuse_missing_weights
from vcf_batch.models.model_files import lone_variant

# diffusers' checker logs that it returns black images, but its images are not used here.
logging.getLogger(StableDiffusionSafetyChecker.__module__).setLevel(logging.ERROR)


class SafetyChecker:
    """A checker that compares images with embeddings of concepts that are not safe for work.

    Args:
        model: the checker's network, on its device. Images are preprocessed as for OpenAI's CLIP.
    """

    def __init__(self, model: StableDiffusionSafetyChecker) -> None:
        self.model = model.eval().requires_grad_(False)
        size = model.config.vision_config.image_size
        self.processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)

    @classmethod
    def from_pretrained(cls, path: str, device: torch.device | str = "cpu") -> "SafetyChecker":
        """Load a checker, always in float32.

        Args:
            path: folder of a ``StableDiffusionSafetyChecker``.
            device: device of the checker.

        Raises:
            ModelError: the folder holds another model, or weights are missing.
            StorageError: the disk failed.
        """
        with load_errors(f"the safety checker {path!r}", "; name another with --safety-checker"):
            model, report = StableDiffusionSafetyChecker.from_pretrained(
                path, dtype=torch.float32, local_files_only=True, variant=lone_variant(path), output_loading_info=True
            )
        refuse_missing_weights(report, f"the safety checker {path!r}", "name a complete one with --safety-checker")
        return cls(model.to(device))

    def __call__(self, pictures: Sequence[NDArray[np.uint8]]) -> list[bool]:
        """For each image, whether it is flagged.

        Args:
            pictures: uint8 ``[H, W, 3]`` each.
        """
        pixels = self.processor([*map(Image.fromarray, pictures)], return_tensors="pt")["pixel_values"]
        # The network blackens the flagged images of its second argument, so that argument gets empty arrays.
        _, flags = self.model(pixels.to(self.model.device), [np.zeros(0) for _ in pictures])
        return list(map(bool, flags))
