"""The names and shapes of a LoRA's tensors: what kind of adapter it is, and for which base.

A header is enough to refuse another kind of adapter, or one for another base, before anything is written. A worker
matches every tensor with the model's layers: :mod:`vcf_batch.vcf.lora.weights`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from vcf_batch.errors import ModelError
from vcf_batch.models.resolution import ResolvedModel, tensor_shapes

_OTHER_KINDS = {
    r"hada_": "is a LoHa",
    r"lokr_": "is a LoKr",
    r"oft_": "is an OFT",
    r"dora_scale|lora_magnitude_vector": "is a DoRA",
    r"lora_mid": "is a LoCon with a core tensor",
    r"on_input$": "is an (IA)^3",
    r"\.[abc][12]?\.weight$": "is a GLoRA",
    r"\.diff(_b)?$|\.w_norm$|\.b_norm$": "has whole weights beside or instead of updates of low rank",
    r"bias_(indices|values|size)$|(lora_(A|B|up|down)|lora\.(up|down))(\.\w+)?\.bias$": "has biases",
    r"bundle_emb|emb_params|string_to_param|^clip_[lg]$": "has embeddings of textual inversion",
    r"^lllite_": "is a ControlNet-LLLite",
    r"base_model\.model\.": "was saved by PEFT itself, with its alpha in adapter_config.json",
}
"""What no plain LoRA has, by what the names of tensors have in them."""

_OTHER_BASES = re.compile(r"(double|single|joint)_blocks|^(lora_)?transformer[._]|^lora_(prior|te3)_")
"""Names of bases without a UNet of Stable Diffusion, such as Flux and Stable Diffusion 3."""

UNET_PARTS = (
    *("down_blocks.", "mid_block.", "up_blocks."),
    *("conv_in.", "conv_out.", "time_embedding.", "add_embedding."),
)
"""Where names begin in files of a UNet alone, as older scripts of diffusers wrote them."""
_PARTS = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "unet.", "text_encoder.", "text_encoder_2.", *UNET_PARTS)

_DOWN = re.compile(r"(lora_down|lora_A|[._]lora\.down|lora_linear_layer\.down)\.weight$")
_TEXT_KEY = re.compile(r"attn2[._](processor[._])?to_[kv]")
_SECOND_TEXT = ("lora_te2_", "text_encoder_2.")
_BASES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
"""Published bases by the width of their text tokens."""


def check_file(lora: ResolvedModel, what: str, unet: Mapping[str, Any], has_two_texts: bool) -> None:
    """Refuse a LoRA by its header.

    Args:
        lora: the file.
        what: what it is, for messages.
        unet: the configuration of the model's UNet.
        has_two_texts: whether the model has two text encoders.

    Raises:
        ModelError: it is damaged, another kind of adapter, or for another base; or it cannot be read.
        StorageError: the storage failed.
    """
    check(tensor_shapes(lora, what, "name another file"), what, unet.get("cross_attention_dim"), has_two_texts)


def check(shapes: Mapping[str, tuple[int, ...]], what: str, width: Any, has_two_texts: bool) -> None:
    """Refuse tensors that are not those of a LoRA for a model.

    Args:
        shapes: shape of each tensor of the file.
        what, has_two_texts: see :func:`check_file`.
        width: width of the model's text tokens.

    Raises:
        ModelError: see :func:`check_file`.
    """
    _refuse_other_kinds(shapes, what)
    down = {name: shape for name, shape in shapes.items() if _DOWN.search(name)}
    if not down:
        raise ModelError(
            f"{what} is no LoRA: it has {f'tensors such as {min(shapes):.100}' if shapes else 'no tensors'}; give one "
            "as kohya's sd-scripts or diffusers write it"
        )
    if odd := [name for name in shapes if not name.startswith(_PARTS)]:
        raise ModelError(
            f"{what} has {len(shapes)} tensors, and {len(odd)} of them belong to no part of a Stable Diffusion, such "
            f"as {min(odd):.100}; give a plain LoRA as kohya's sd-scripts or diffusers write it"
        )
    widths = {shape[-1] for name, shape in down.items() if _TEXT_KEY.search(name) and len(shape) == 2}
    if widths and widths != {width}:
        has = max(widths - {width})
        raise ModelError(
            f"{what} was trained for a base with text tokens of width {_base(has)}, and this model's have width "
            f"{_base(width)}: use one that was trained for this model's base"
        )
    if not has_two_texts and (second := next((name for name in down if name.startswith(_SECOND_TEXT)), None)):
        raise ModelError(
            f"{what} is for Stable Diffusion XL, as its tensor {second:.100} for a second text encoder shows; this "
            "model has one text encoder: use a LoRA that was trained for this model's base"
        )


def _refuse_other_kinds(names: Iterable[str], what: str) -> None:
    """Refuse adapters that are no plain LoRA, or for another kind of base.

    Raises:
        ModelError: with the kind, and the name that shows it.
    """
    for name in names:
        if kind := next((kind for mark, kind in _OTHER_KINDS.items() if re.search(mark, name)), None):
            raise ModelError(f"{what} {kind}, as its tensor {name:.100} shows; only plain LoRAs are supported")
        if _OTHER_BASES.search(name):
            raise ModelError(
                f"{what} is for a base such as Flux or Stable Diffusion 3, as its tensor {name:.100} shows; use one "
                "for Stable Diffusion 1.x, 2.x or XL"
            )


def _base(width: Any) -> str:
    return f"{width} ({_BASES[width]})" if width in _BASES else str(width)
