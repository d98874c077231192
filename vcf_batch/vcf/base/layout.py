"""The families of base models, told apart by their configurations alone. No torch here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vcf_batch.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """How a family's models are laid out."""

    pipeline: str
    """The class that loads them, as ``module:class``."""
    tokenizers: tuple[str, ...]
    """The folders of its tokenizers, one for each text encoder."""
    tells_sizes: bool
    """Whether the UNet is told sizes: :data:`vcf_batch.config.limits.TOLD_SIZES`."""
    unet: Mapping[str, Any]
    """Keys of the UNet's configuration that stand for a further input, with the value that the family's have."""


SD = Layout("vcf_batch.vcf.pipeline:VCFPipeline", ("tokenizer",), False, {})
SDXL = Layout(
    "vcf_batch.vcf.base.pipeline_xl:VCFXLPipeline",
    ("tokenizer", "tokenizer_2"),
    True,
    {"addition_embed_type": "text_time"},
)


def empty_negative(index: Mapping[str, Any]) -> str | None:
    """What stands for an empty negative prompt: ``zeros``, or ``encoded`` for the encoding of the empty text.

    Args:
        index: the model's ``model_index.json``.

    Returns:
        None for a family that always encodes it.
    """
    if not any(index.get("text_encoder_2") or ()):
        return None
    return "zeros" if index.get("force_zeros_for_empty_prompt", True) else "encoded"


def layout_of(index: Mapping[str, Any], model: str) -> Layout:
    """The layout of a model.

    Args:
        index: its ``model_index.json``, which gives library and class of each part, or two nulls.
        model: its name, for messages.

    Raises:
        ModelError: it is the refiner of Stable Diffusion XL, or a model of it for inpainting or editing.
    """
    if not any(index.get("text_encoder_2") or ()):
        return SD
    if index.get("requires_aesthetics_score") or not any(index.get("text_encoder") or ()):
        raise ModelError(
            f"{model} is a refiner of Stable Diffusion XL, which needs another model's images; use the base model, "
            "stabilityai/stable-diffusion-xl-base-1.0 or a fine-tune of it"
        )
    name = str(index.get("_class_name"))
    for kind in ("Inpaint", "InstructPix2Pix", "ControlNet"):
        if kind in name:
            raise ModelError(
                f"{model} is a {name:.60}, which needs more than a prompt; use a base model, such as "
                "stabilityai/stable-diffusion-xl-base-1.0"
            )
    return SDXL
