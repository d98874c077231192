"""The layout of a Stable Diffusion in one file, told by its tensors. Nothing is loaded, so torch is not needed.

A file in the layout of the original code has weights alone. Its networks' configurations, scheduler and tokenizer are
those of the published model, which ``layouts`` has. The vocabulary of CLIP is the same for all of them.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vcf_batch import storage
from vcf_batch.errors import ModelError
from vcf_batch.storage import scratch

_SUFFIX = ".safetensors"
CONFIGURATIONS = Path(__file__).parent / "layouts"
VOCABULARY = Path(__file__).parent / "vocabulary"

_UNET = "model.diffusion_model.input_blocks.0.0.weight"
_VAE = "first_stage_model.decoder.conv_in.weight"
_WORDS = {
    "sd15": ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",),
    "sd21": ("cond_stage_model.model.token_embedding.weight",),
    "sdxl": (
        "conditioner.embedders.1.model.token_embedding.weight",
        "conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight",
    ),
}
"""The embeddings of words in the text encoders of a layout. The first one is in checkpoints of that layout alone."""
_OTHERS = {
    "conditioner.embedders.0.model.token_embedding.weight": "the refiner of Stable Diffusion XL",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA",
    "image_proj.proj.weight": "an IP-Adapter",
    "image_proj.latents": "an IP-Adapter",
}
"""Tensors of files that people have beside checkpoints, and what they are in words."""
_MARKS = {
    "edm_mean": "Playground v2.5, whose noise and latents have another scale: use another model",
    "v_pred": "for v-prediction, and the published model predicts noise: use that model as a folder in diffusers' "
    "layout, which has a scheduler of its own",
}
"""Tensors that mark a checkpoint with another scheduler than the published model's. The weights do not tell it."""


def is_single_file(name: str) -> bool:
    """Whether a model's name is that of one file. A folder may be named like the file that it was converted from."""
    return name.endswith(_SUFFIX) and not is_folder(name)


def is_folder(name: str) -> bool:
    """Whether a name is that of a folder of this machine."""
    return storage.is_local(name) and os.path.isdir(storage.absolute(name))


def layout_of(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    """The layout of a checkpoint: a folder of :data:`CONFIGURATIONS`.

    Args:
        shapes: shape of each tensor of the file, by its name.
        name: the file, for messages.

    Raises:
        ModelError: the file is no whole checkpoint of Stable Diffusion 1.x, 2.x or XL, its UNet needs more than text,
            or it is marked as one for another scheduler.
    """
    found = next((layout for layout, words in _WORDS.items() if words[0] in shapes), None)
    lacking = [tensor for tensor in (_UNET, _VAE, *(_WORDS[found] if found else ())) if tensor not in shapes]
    if found is None or lacking:
        other = next((what for tensor, what in _OTHERS.items() if tensor in shapes), None)
        told = f"it lacks {lacking[0]}" if found else f"its first tensor is {min(shapes, default='none')}"
        told = f"it is {other}" if other else told
        raise ModelError(
            f"{name} is no checkpoint of Stable Diffusion 1.x, 2.x or XL with UNet, VAE and text encoders in the "
            f"layout of the original code ({told}): name such a file, or a folder in diffusers' layout"
        )
    if (channels := shapes[_UNET][1]) != 4:
        raise ModelError(
            f"the UNet of {name} takes {channels} channels, and the latents have 4; use a model that needs text alone, "
            "not one for inpainting or editing"
        )
    if mark := next((what for tensor, what in _MARKS.items() if tensor in shapes), None):
        raise ModelError(f"{name} is {mark}")
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


def read_config(layout: str, file: str) -> dict[str, Any]:
    """One of the JSON files of :func:`files`."""
    config: dict[str, Any] = json.loads(files(layout)[file].read_text())
    return config


@contextlib.contextmanager
def folder_of(layout: str) -> Iterator[str]:
    """The files of a layout as one folder, for loaders; the block's end deletes it."""
    with scratch.temporary("the configuration of a checkpoint") as folder:
        for name, file in files(layout).items():
            os.makedirs(os.path.dirname(os.path.join(folder, name)), exist_ok=True)
            os.symlink(file, os.path.join(folder, name))
        yield folder
