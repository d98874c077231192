"""The layout of a Stable Diffusion in one file, told by its tensors. Nothing is loaded, so torch is not needed.

A file in the layout of the original code has weights alone. Its networks' configurations, scheduler and tokenizer are
those of the published model, which ``layouts`` has. The vocabulary of CLIP is the same for all of them.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from vcf_batch.errors import ModelError
from vcf_batch.storage import scratch

SUFFIX = ".safetensors"
CONFIGURATIONS = Path(__file__).parent / "layouts"
VOCABULARY = Path(__file__).parent / "vocabulary"

_UNET = "model.diffusion_model."
_WORDS = {
    "sd15": "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
    "sd21": "cond_stage_model.model.token_embedding.weight",
}
"""A tensor that only checkpoints of a layout have: the embeddings of the words."""
_OTHERS = {
    "conditioner.embedders.1.model.token_embedding.weight": "Stable Diffusion XL",
    "conditioner.embedders.0.model.token_embedding.weight": "the refiner of Stable Diffusion XL",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA",
    "image_proj.proj.weight": "an IP-Adapter",
    "image_proj.latents": "an IP-Adapter",
}
"""Tensors of files that people have beside checkpoints, and what they are in words."""


def layout_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    """The layout of a checkpoint: a folder of :data:`CONFIGURATIONS`.

    Args:
        shapes: shape of each tensor of the file, by its name.
        name: the file, for messages.

    Raises:
        ModelError: the file is no whole checkpoint of Stable Diffusion 1.x or 2.x, or its UNet needs more than text.
    """
    found = next((layout for layout, tensor in _WORDS.items() if tensor in shapes), None)
    if found is None or f"{_UNET}input_blocks.0.0.weight" not in shapes:
        other = next((what for tensor, what in _OTHERS.items() if tensor in shapes), None)
        told = f"it is {other}" if other else f"its first tensor is {min(shapes, default='none')}"
        raise ModelError(
            f"{name} is no checkpoint of Stable Diffusion 1.x or 2.x with UNet, VAE and text encoder in the layout of "
            f"the original code ({told}): name such a file, or a folder in diffusers' layout"
        )
    if (channels := shapes[f"{_UNET}input_blocks.0.0.weight"][1]) != 4:
        raise ModelError(
            f"the UNet of {name} takes {channels} channels, and the latents have 4; use a model that needs text alone, "
            "not one for inpainting or editing"
        )
    return found


def files(layout: str) -> dict[str, Path]:
    """The files of a layout by their paths in a model's folder: configurations, scheduler and tokenizer."""
    folder = CONFIGURATIONS / layout
    own = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*.json")}
    return own | {
        f"{part}/{file}": VOCABULARY / file
        for part in {os.path.dirname(name) for name in own if name.startswith("tokenizer")}
        for file in ("vocab.json", "merges.txt")
    }


@contextlib.contextmanager
def folder_of(layout: str) -> Iterator[str]:
    """The files of a layout as one folder, for loaders; the block's end deletes it."""
    with scratch.temporary("the configuration of a checkpoint") as folder:
        for name, file in files(layout).items():
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            os.symlink(file, os.path.join(folder, name))
        yield folder
