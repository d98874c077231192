"""Images of a model with LoRAs, and diffusers' own pipelines to compare them with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from numpy.typing import NDArray


def drawn(pipeline: Any) -> NDArray[np.float32]:
    """An image of three steps, ``[1, H, W, 3]`` in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    images = pipeline(
        "a red star",
        negative_prompt="blue",
        num_inference_steps=3,
        guidance_scale=5.0,
        height=64,
        width=64,
        generator=[generator],
        output_type="np",
    ).images
    return np.asarray(images)


def stock(folder: Path) -> Any:
    """diffusers' pipeline for a saved model; a folder ``sdxl`` has Stable Diffusion XL."""
    is_xl = folder.name == "sdxl"
    given: dict[str, Any] = {"add_watermarker": False} if is_xl else {"safety_checker": None}
    kind: Any = StableDiffusionXLPipeline if is_xl else StableDiffusionPipeline
    made = kind.from_pretrained(folder, **given)
    made.set_progress_bar_config(disable=True)
    return made
