"""The weights of a LoRA: a file's low-rank updates, matched with the layers of a model.

Hu et al. 2021 (arXiv 2106.09685), section 4.1: a weight ``W`` becomes ``W + s * B A``, with ``A`` of rank ``r`` and
``s = scale * alpha / r``. Names of kohya's sd-scripts and of diffusers are converted by diffusers.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn

from vcf_batch.errors import ModelError
from vcf_batch.models.lora import header

if TYPE_CHECKING:
    from vcf_batch.vcf.pipeline import VCFPipeline

UPDATED_PARTS = ("unet", "text_encoder", "text_encoder_2")
"""Parts of a model that a LoRA may update."""

PEFT_METADATA = "lora_adapter_metadata"
"""Key of the metadata that diffusers' training scripts write: settings of PEFT, among them alpha."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CONVERTED = ".lora_A.weight", ".lora_B.weight"
_TEXT_NAMES = (
    (re.compile(r"\.to_(q|k|v|out)_lora\."), r".\1_proj.lora."),
    (re.compile(r"\.lora(_linear_layer)?\.down\."), ".lora_A."),
    (re.compile(r"\.lora(_linear_layer)?\.up\."), ".lora_B."),
)
"""Names of text encoders' tensors as diffusers has written them, and PEFT's. diffusers converts them itself only where
one belongs to the last layer of an attention."""


@dataclass(frozen=True)
class Update:
    """The update of one layer's weight: ``up @ down``, reshaped as the weight."""

    layer: str
    """Name of the layer in the pipeline, such as ``unet.mid_block.attentions.0.proj_in``."""
    down: Tensor
    """``[r, inputs]``, in the file's dtype, on the CPU."""
    up: Tensor
    """``[outputs, r]``, float32 and multiplied by alpha / r where that is not 1, else in the file's dtype."""


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA that fits a model."""

    sha256: str
    """Hex SHA-256 of the file."""
    updates: tuple[Update, ...]

    @property
    def size(self) -> int:
        """Bytes of the updates in memory."""
        return sum(tensor.nbytes for update in self.updates for tensor in (update.down, update.up))


def layers_of(pipeline: "VCFPipeline") -> dict[str, nn.Module]:
    """The layers that a LoRA may update, by name: linear ones and convolutions of :data:`UPDATED_PARTS`."""
    parts = {name: getattr(pipeline, name, None) for name in UPDATED_PARTS}
    return {
        f"{part}.{name}": layer
        for part, network in parts.items()
        if network is not None
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }


def read(data: bytes, what: str, pipeline: "VCFPipeline", layers: Mapping[str, nn.Module]) -> LoraWeights:
    """Read a LoRA in the format of kohya's sd-scripts or of diffusers, and match it with the layers of a model.

    Args:
        data: the safetensors file.
        what: what it is, for messages.
        pipeline: the model, whose configuration tells how names of older layouts are to be converted.
        layers: its layers, see :func:`layers_of`.

    Raises:
        ModelError: the file is damaged, is no LoRA or another kind of adapter, or does not fit the model.
    """
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # safetensors has its own error, and Python's for headers that lie
        raise ModelError(
            f"{what} is damaged or no safetensors file ({error}): copy it again; a pickle must be converted"
        ) from error
    has_two_texts = getattr(pipeline, "text_encoder_2", None) is not None
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    header.check(shapes, what, pipeline.unet.config.cross_attention_dim, has_two_texts)
    for name, tensor in tensors.items():
        is_known = tensor.dtype in _DTYPES or name.endswith(".alpha")  # alphas may be whole numbers
        if not is_known or not tensor.isfinite().all():
            trouble = "values that are not finite" if is_known else f"values of {tensor.dtype}"
            raise ModelError(f"{what} has {trouble} in {name:.100}; use one of float32, float16 or bfloat16")
    converted = _converted(_with_alphas(tensors, what), what, pipeline)
    settings = _settings(data)
    updates = [
        _update(name, pair, _factor(settings, name, pair), layers, what) for name, pair in _pairs(converted, what)
    ]
    return LoraWeights(hashlib.sha256(data).hexdigest(), tuple(updates))


def _with_alphas(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Tensors with kohya's alphas multiplied into the tensors they scale."""
    scaled = dict(tensors)
    for name in tensors:
        if not name.endswith(".alpha"):
            continue
        up = name.removesuffix("alpha") + "lora_up.weight"
        alpha = scaled.pop(name)
        if up not in scaled or alpha.numel() != 1 or scaled[up].ndim < 2:
            raise ModelError(f"{what} has {name:.100}, which scales no tensor of it; copy the file again")
        factor = float(alpha) / scaled[up].shape[1]
        if factor != 1:
            scaled[up] = scaled[up].float() * factor
    return scaled


def _converted(tensors: dict[str, Tensor], what: str, pipeline: "VCFPipeline") -> dict[str, Tensor]:
    """Tensors by names such as ``unet.mid_block.attentions.0.proj_in.lora_A.weight``."""
    count = len(tensors)
    if all(name.startswith(header.UNET_PARTS) for name in tensors):
        tensors = {f"unet.{name}": tensor for name, tensor in tensors.items()}
    tensors = {_readable(name): tensor for name, tensor in tensors.items()}
    try:
        state, _ = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=pipeline.unet.config)
        parts = {part: _of_part(state, part) for part in UPDATED_PARTS}
        own = parts["unet"]
        if not all("lora_A" in name or "lora_B" in name for name in own):
            own = convert_unet_state_dict_to_peft(own)
        found = {f"unet.{name}": tensor for name, tensor in own.items()}
        for part in UPDATED_PARTS[1:]:
            texts = {_text_name(name): tensor for name, tensor in parts[part].items()}
            if not hasattr(getattr(pipeline, part, None), "text_model"):  # transformers 5 has the tower itself
                texts = {name.removeprefix("text_model."): tensor for name, tensor in texts.items()}
            found |= {f"{part}.{name}": tensor for name, tensor in texts.items()}
    except Exception as error:  # whatever the converters meet in a stranger's file
        raise ModelError(
            f"{what} cannot be converted ({type(error).__name__}: {str(error).strip():.200}); give a plain LoRA as "
            "kohya's sd-scripts or diffusers write it"
        ) from error
    if len(found) != count:
        raise ModelError(
            f"{what} has {count} tensors, and {count - len(found)} of them have names of another layout than the rest, "
            "or stand for the layer of another one; give a plain LoRA as kohya's sd-scripts or diffusers write it"
        )
    return found


def _readable(name: str) -> str:
    """A name without what diffusers cannot read: it takes two layers of XL for one by their names in its own layout."""
    return re.sub(
        r"^lora_unet_add_embedding_linear_([12])", lambda found: f"lora_unet_label_emb_0_{2 * int(found[1]) - 2}", name
    )


def _text_name(name: str) -> str:
    for pattern, own in _TEXT_NAMES:
        name = pattern.sub(own, name)
    return name


def _of_part(state: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): each for name, each in state.items() if name.startswith(f"{part}.")}


def _pairs(tensors: Mapping[str, Tensor], what: str) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Yield the name of each layer with its tensors A and B."""
    ends = Counter(name for name in tensors if not name.endswith(_CONVERTED))
    if ends:
        raise ModelError(
            f"{what} is no plain LoRA: {min(ends):.100} is neither of the two tensors that a layer has; give one as "
            "kohya's sd-scripts or diffusers write it"
        )
    for name in tensors:
        layer = re.sub(r"\.lora_[AB]\.weight$", "", name)
        pair = [tensors.get(layer + end) for end in _CONVERTED]
        if pair[0] is None or pair[1] is None:
            raise ModelError(f"{what} has one of the two tensors of {layer:.100}; copy the file again")
        if name.endswith(_CONVERTED[0]):
            yield layer, (pair[0], pair[1])


def _update(
    name: str, pair: tuple[Tensor, Tensor], factor: float, layers: Mapping[str, nn.Module], what: str
) -> Update:
    """The update of a layer.

    Raises:
        ModelError: the model has no such layer, or one of another shape.
    """
    remedy = "use one that was trained for this model's base"
    if name not in layers:
        raise ModelError(f"{what} does not fit the model, which has no layer {name:.100}: {remedy}")
    weight, (down, up) = layers[name].weight, pair
    assert isinstance(weight, Tensor)
    shapes = [*down.shape], [*up.shape]
    inputs = _without_ones(weight.shape)[1:]
    if [*map(_without_ones, shapes)] != [[down.shape[0], *inputs], [weight.shape[0], down.shape[0]]]:
        raise ModelError(
            f"{what} does not fit the model: its tensors for {name:.100} have the shapes {shapes[0]} and {shapes[1]}, "
            f"and the layer's weight {[*weight.shape]}: {remedy}"
        )
    up = up.flatten(1)
    return Update(name, down.flatten(1), up if factor == 1 else up.float() * factor)


def _without_ones(shape: Sequence[int]) -> list[int]:
    """The shape of a weight, with a convolution of one pixel as the linear layer that it is.

    sd-scripts train Stable Diffusion 2 with such convolutions where diffusers' has linear layers.
    """
    return [*shape[:2]] if all(edge == 1 for edge in shape[2:]) else [*shape]


def _settings(data: bytes) -> dict[str, Any]:
    """The settings of PEFT that a file of diffusers has, by part; empty for none."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    try:
        found = json.loads(header.get("__metadata__", {}).get(PEFT_METADATA, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _factor(settings: Mapping[str, Any], name: str, pair: tuple[Tensor, Tensor]) -> float:
    """alpha / r of a layer by the settings of PEFT, or alpha / sqrt(r) where they say so; 1 without settings.

    A layer has the alpha of its name, or of the end of it, among the patterns; else that of its part.
    """
    part, _, layer = name.partition(".")
    rank, patterns = pair[0].shape[0], settings.get(f"{part}.alpha_pattern")
    own = patterns.items() if isinstance(patterns, dict) else ()
    alpha = next((each for end, each in own if f".{layer}".endswith(f".{end.lstrip('^')}")), None)
    alpha = settings.get(f"{part}.lora_alpha") if alpha is None else alpha
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        return 1.0
    return float(alpha) / (rank**0.5 if settings.get(f"{part}.use_rslora") else rank)
