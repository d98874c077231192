"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): published weights that let references join by attention of their own.

A projection makes a few tokens of what a CLIP sees in a reference. Each cross-attention layer of the UNet attends to
them with keys and values of its own, beside the text: :class:`vcf_batch.vcf.attention.TokenBiasAttention`. The
projection is diffusers'. The attention is not, because diffusers' has one strength for a whole batch.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from vcf_batch import images
from vcf_batch.errors import ModelError
from vcf_batch.models.loading import load_errors
from vcf_batch.vcf.aligner import ENCODE_BATCH, load_vision_tower
from vcf_batch.vcf.attention import TokenBiasAttention
from vcf_batch.vcf.upload import upload

_PLUS_LAYERS = 4
"""Number of layers of the resampler of IP-Adapter Plus, in every published file and in diffusers."""


class IPAdapter:
    """The image side of an IP-Adapter: references in, tokens for the UNet out.

    Args:
        projection: diffusers' projection or resampler.
        encoder: the CLIP vision tower that the adapter was trained with.
        processor: preprocessing of that tower: the shorter edge resized, the middle cropped.
        keys: keys and values of the UNet's cross-attention layers, which its attention processors use.
    """

    def __init__(
        self,
        projection: nn.Module,
        encoder: CLIPVisionModelWithProjection,
        processor: CLIPImageProcessorPil,
        keys: nn.ModuleList,
    ) -> None:
        self.projection = projection.eval().requires_grad_(False)
        self.encoder = encoder.eval().requires_grad_(False)
        self.processor, self.keys = processor, keys

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "IPAdapter":
        """Move the networks to a device, and to a dtype if one is given."""
        for network in (self.projection, self.encoder, self.keys):
            network.to(device=device, dtype=dtype)
        return self

    def prepare(self, image: Image.Image) -> Image.Image:
        """The part of an image that the adapter sees, in the encoder's size.

        It is the costly step of :meth:`encode` for a large image. Doing it twice changes nothing, and any thread may
        do it.
        """
        image = images.trimmed(image) if self.processor.do_center_crop else image
        pixels = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        return Image.fromarray(pixels.astype(np.uint8).transpose(1, 2, 0))

    @torch.no_grad()
    def encode(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Tokens of references.

        Args:
            pictures: one or more RGB images of any size.

        Returns:
            ``[B, n, Dt]`` on the adapter's device, in its dtype.
        """
        parts = []
        for start in range(0, len(pictures), ENCODE_BATCH):
            batch = [self.prepare(picture) for picture in pictures[start : start + ENCODE_BATCH]]
            pixels = self.processor(batch, return_tensors="pt")["pixel_values"]
            parts.append(self._tokens(upload(pixels, self.encoder.device).to(self.encoder.dtype)))
        return torch.cat(parts)

    @torch.no_grad()
    def nothing(self) -> Tensor:
        """Tokens ``[n, Dt]`` of the unconditional side where there is no negative reference, as diffusers has them.

        They are those of an embedding of zeros, or for IP-Adapter Plus of a picture of the mean colour.
        """
        edge = self.encoder.config.image_size
        return self._tokens(torch.zeros(1, 3, edge, edge, device=self.encoder.device, dtype=self.encoder.dtype), 0.0)[0]

    def _tokens(self, pixels: Tensor, scale: float = 1.0) -> Tensor:
        if isinstance(self.projection, ImageProjection):
            return self.projection(self.encoder(pixels).image_embeds * scale)
        return self.projection(self.encoder(pixels, output_hidden_states=True).hidden_states[-2])


def load_ip_adapter(weights: str, encoder: str, unet: UNet2DConditionModel) -> IPAdapter:
    """Load an IP-Adapter for a UNet, and give the UNet's cross-attention its keys and values.

    The adapter gets the UNet's dtype and device.

    Args:
        weights: file in the published layout: safetensors with the keys ``image_proj.*`` and ``ip_adapter.*``, or
            ``.bin`` with two dictionaries of bare tensors.
        encoder: folder of the CLIP vision tower, in transformers' layout.
        unet: the UNet; its attention processors are replaced.

    Raises:
        ModelError: the file is no IP-Adapter, or one of another kind, or does not fit UNet or encoder.
    """
    what = f"the IP-Adapter {weights}"
    parts = _read(weights, what)
    if _is_for_faces(parts["image_proj"]):
        raise ModelError(
            f"{what} is a FaceID adapter, which needs embeddings of faces that are not computed here; use an adapter "
            "without FaceID, such as ip-adapter-plus-face_sd15.safetensors"
        )
    tower, processor = _load_encoder(encoder)
    projection = _projection(parts["image_proj"], unet, what)
    _check_widths(projection, tower, unet, what, encoder)
    keys = _give_keys(unet, parts["ip_adapter"], what)
    return IPAdapter(projection, tower, processor, keys).to(unet.device, unet.dtype)


def _read(weights: str, what: str) -> dict[str, dict[str, Tensor]]:
    """The two parts of a file, each by the names of its tensors."""
    with load_errors(what, "; name another file with --ip-adapter"):
        if weights.endswith(".safetensors"):
            flat = safetensors.torch.load_file(weights)
            parts: Mapping[str, Mapping[str, Tensor]] = {
                part: {key.removeprefix(f"{part}."): value for key, value in flat.items() if key.startswith(f"{part}.")}
                for part in ("image_proj", "ip_adapter")
            }
        else:
            parts = torch.load(weights, map_location="cpu", weights_only=True)
    found = {part: parts.get(part) if isinstance(parts, Mapping) else None for part in ("image_proj", "ip_adapter")}
    if not all(isinstance(part, Mapping) and part and _are_tensors(part) for part in found.values()):
        raise ModelError(
            f"{what} is no IP-Adapter: it must hold tensors image_proj.* and ip_adapter.*; name another file with "
            "--ip-adapter"
        )
    for part, values in found.items():
        for name, value in (values or {}).items():
            if not (value.is_floating_point() and value.isfinite().all()):
                raise ModelError(
                    f"{what} has weights that are no finite numbers: {part}.{name}, {value.dtype}. It is damaged, "
                    "or of a training that diverged: name another with --ip-adapter"
                )
    return {part: dict(values or {}) for part, values in found.items()}


def _is_for_faces(projection: Mapping[str, Tensor]) -> bool:
    """Whether a projection takes embeddings of InsightFace."""
    of_faces = "proj.0.weight" in projection and "proj.3.weight" not in projection
    return of_faces or any(key.startswith("perceiver_resampler.") for key in projection)


def _are_tensors(part: Mapping[str, Tensor]) -> bool:
    return all(isinstance(value, Tensor) for value in part.values())


def _load_encoder(folder: str) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessorPil]:
    remedy = (
        ". It must hold a CLIP vision tower with projection in transformers' layout; name another with --image-encoder"
    )
    with load_errors(f"the image encoder {folder!r}", remedy):
        tower = load_vision_tower(folder, torch.float32)
        # h94/IP-Adapter has no preprocessor_config.json; CLIP's own preprocessing is what its adapters saw.
        edge = tower.config.image_size
        own = Path(folder, "preprocessor_config.json").exists()
        processor = (
            CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)
            if own
            else CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size=edge)
        )
    return tower, processor


def _projection(tensors: dict[str, Tensor], unet: UNet2DConditionModel, what: str) -> nn.Module:
    """diffusers' projection with the weights of a file."""
    layers = {int(found[1]) for key in tensors if (found := re.match(r"layers\.(\d+)\.", key))}
    if layers and layers != {*range(_PLUS_LAYERS)}:
        raise ModelError(f"{what} has a resampler of {len(layers)} layers; it must have {_PLUS_LAYERS}")
    with load_errors(what, "; name another file with --ip-adapter"):
        network: nn.Module = unet._convert_ip_adapter_image_proj_to_diffusers(tensors, low_cpu_mem_usage=False)
    return network


def _check_widths(
    projection: nn.Module, tower: CLIPVisionModelWithProjection, unet: UNet2DConditionModel, what: str, encoder: str
) -> None:
    takes, gives = _widths(projection)
    is_base = isinstance(projection, ImageProjection)
    width = tower.config.projection_dim if is_base else tower.config.hidden_size
    if takes != width:
        raise ModelError(
            f"{what} reads {'embeddings' if is_base else 'tokens'} of width {takes}, but the image encoder {encoder} "
            f"gives width {width}; name the encoder that the adapter was trained with in --image-encoder"
        )
    if gives != unet.config.cross_attention_dim:
        raise ModelError(
            f"{what} gives tokens of width {gives}, but the model's UNet is conditioned on width "
            f"{unet.config.cross_attention_dim}; use an adapter for this family of models"
        )


def _widths(projection: nn.Module) -> tuple[int, int]:
    """Width of what a projection takes, and of the tokens that it gives."""
    if isinstance(projection, IPAdapterPlusImageProjection):
        return projection.proj_in.in_features, projection.norm_out.normalized_shape[0]
    first = next(module for module in projection.modules() if isinstance(module, nn.Linear))
    return first.in_features, cast(nn.LayerNorm, projection.norm).normalized_shape[0]


def _give_keys(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor], what: str) -> nn.ModuleList:
    """Replace the UNet's attention processors by such that have the adapter's keys and values.

    The file numbers all attention layers in diffusers' order. Cross-attention has the odd numbers.
    """
    names = list(unet.attn_processors)
    wanted = {f"{number}.{kind}" for number in range(1, len(names), 2) for kind in ("to_k_ip.weight", "to_v_ip.weight")}
    if wanted != tensors.keys():
        odd = sorted(wanted ^ tensors.keys())
        raise ModelError(
            f"{what} has keys for {len(tensors) // 2} layers, and the model's UNet has {len(wanted) // 2} of "
            f"cross-attention (the first difference is {odd[0]}); use an adapter for this family of models"
        )
    processors, keys = {}, nn.ModuleList()
    for number, name in enumerate(names):
        kernel = getattr(unet.attn_processors[name], "kernel", None)
        processors[name] = TokenBiasAttention(kernel)
        if number % 2:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            key, value = (tensors[f"{number}.to_{kind}_ip.weight"] for kind in "kv")
            for weight, own in ((key, layer.to_k), (value, layer.to_v)):
                if weight.shape != own.weight.shape:
                    raise ModelError(
                        f"{what} has keys of shape {[*weight.shape]} for {name}, and the model's UNet needs "
                        f"{[*own.weight.shape]}; use an adapter for this family of models"
                    )
            linears = _linear(key), _linear(value)
            keys.extend(linears)
            processors[name] = TokenBiasAttention(kernel, *linears)
    unet.set_attn_processor(processors)
    return keys


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
