"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721): published weights that let references join by attention of their own.

A projection makes a few tokens of what a CLIP sees in a reference. Each cross-attention layer of the UNet attends to
them with keys and values of its own, beside the text: :class:`vcf_batch.vcf.attention.TokenBiasAttention`. The
projection is diffusers'. The attention is not, because diffusers' has one strength for a whole batch.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from vcf_batch import images
from vcf_batch.errors import ModelError
from vcf_batch.models import adapter_layout
from vcf_batch.models.adapter_layout import KEYS, PROJECTION, REMEDY, Widths
from vcf_batch.models.loading import load_errors
from vcf_batch.vcf.acceleration import upload
from vcf_batch.vcf.aligner import ENCODE_BATCH, load_preprocessing, load_vision_tower
from vcf_batch.vcf.attention import TokenBiasAttention, refuse_other_processors


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
        UsageError: the UNet has attention processors of somebody's own, or sliced ones.
    """
    refuse_other_processors(unet)
    what = f"the IP-Adapter {weights}"
    tensors = _read(weights, what)
    tower, processor = _load_encoder(encoder)
    layers = [unet.get_submodule(name.removesuffix(".processor")) for name in [*unet.attn_processors][1::2]]
    adapter_layout.check(
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        what,
        [tuple(layer.to_k.weight.shape) for layer in layers],
        Widths(tower.config.hidden_size, tower.config.projection_dim),
        encoder,
    )
    own = {name.removeprefix(PROJECTION): tensor for name, tensor in tensors.items() if name.startswith(PROJECTION)}
    projection: nn.Module = unet._convert_ip_adapter_image_proj_to_diffusers(own, low_cpu_mem_usage=False)
    return IPAdapter(projection, tower, processor, _give_keys(unet, tensors)).to(unet.device, unet.dtype)


def _read(weights: str, what: str) -> dict[str, Tensor]:
    """The tensors of a file, each a finite floating point one."""
    with load_errors(what, f"; {REMEDY}"):
        if weights.endswith(".safetensors"):
            tensors = safetensors.torch.load_file(weights)
        else:
            tensors = _flat(torch.load(weights, map_location="cpu", weights_only=True))
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise ModelError(
                f"{what} has weights that are no finite numbers: {name}, {tensor.dtype}. It is damaged, or of a "
                f"training that diverged: {REMEDY}"
            )
    return tensors


def _flat(parts: object) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file, which has a dictionary for each part, with the names that safetensors have."""
    nested = (
        {name: own for name, own in parts.items() if isinstance(own, Mapping)} if isinstance(parts, Mapping) else {}
    )
    flat = {f"{part}.{name}": each for part, own in nested.items() for name, each in own.items()}
    return {name: each for name, each in flat.items() if isinstance(each, Tensor)}


def _load_encoder(folder: str) -> tuple[CLIPVisionModelWithProjection, CLIPImageProcessorPil]:
    remedy = (
        ". It must hold a CLIP vision tower with projection in transformers' layout; name another with --image-encoder"
    )
    with load_errors(f"the image encoder {folder!r}", remedy):
        tower = load_vision_tower(folder, torch.float32)
        return tower, load_preprocessing(folder, tower.config.image_size)


def _give_keys(unet: UNet2DConditionModel, tensors: Mapping[str, Tensor]) -> nn.ModuleList:
    """Replace the UNet's attention processors by such that have the adapter's keys and values.

    The file numbers all attention layers in diffusers' order. Cross-attention has the odd numbers.
    """
    processors, keys = {}, nn.ModuleList()
    for number, (name, before) in enumerate(unet.attn_processors.items()):
        linears = [_linear(tensors[f"{KEYS}{number}.to_{kind}_ip.weight"]) for kind in "kv" if number % 2]
        keys.extend(linears)
        processors[name] = TokenBiasAttention.in_place_of(before, *linears)
    unet.set_attn_processor(processors)
    return keys


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer
