"""IP-Adapters as ``h94/IP-Adapter`` lays them out, at reduced width: names of files and keys, shapes, image encoder."""

from pathlib import Path

import safetensors.torch
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from vcf_batch.vcf.pipeline import VCFPipeline

HIDDEN, EMBEDDING = 40, 24
"""Widths of the image encoder: its tokens, and its embedding."""

TOKENS = {"base": 4, "plus": 3, "full": 5}
"""Number of tokens of an image by kind of adapter. (Published: 4, 16 and 257.)"""


def save_encoder(folder: Path, edge: int = 16) -> Path:
    """``models/image_encoder``: a vision tower without preprocessor_config.json."""
    torch.manual_seed(3)
    CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=edge,
            patch_size=8,
            projection_dim=EMBEDDING,
        )
    ).save_pretrained(folder)
    return folder


def save_adapter(file: Path, unet: UNet2DConditionModel, kind: str = "base", seed: int = 0) -> Path:
    """``ip-adapter_sd15.safetensors`` and its like, or the same as ``.bin``."""
    torch.manual_seed(seed)
    parts = {"image_proj": _projection(kind, unet.config.cross_attention_dim), "ip_adapter": _keys(unet)}
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".bin":
        torch.save(parts, file)
    else:
        flat = {f"{part}.{key}": value for part, own in parts.items() for key, value in own.items()}
        safetensors.torch.save_file(flat, file)
    return file


def _keys(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    keys = {}
    for number, name in enumerate(unet.attn_processors):
        if number % 2:
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for letter in "kv":
                keys[f"{number}.to_{letter}_ip.weight"] = 0.4 * torch.randn(layer.to_k.weight.shape)
    return keys


def _projection(kind: str, width: int) -> dict[str, Tensor]:
    if kind == "base":
        return _linear("proj", EMBEDDING, 4 * width) | _norm("norm", width)
    if kind == "full":
        return _linear("proj.0", HIDDEN, HIDDEN) | _linear("proj.2", HIDDEN, width) | _norm("proj.3", width)
    inner = 64  # heads are counted in 64s
    tensors = {"latents": torch.randn(1, TOKENS["plus"], inner)}
    tensors |= _linear("proj_in", HIDDEN, inner) | _linear("proj_out", inner, width) | _norm("norm_out", width)
    for layer in range(4):
        attention, forward = f"layers.{layer}.0", f"layers.{layer}.1"
        tensors |= _norm(f"{attention}.norm1", inner) | _norm(f"{attention}.norm2", inner)
        for name, outputs in (("to_q", inner), ("to_kv", 2 * inner), ("to_out", inner)):
            tensors |= _linear(f"{attention}.{name}", inner, outputs, bias=False)
        tensors |= _norm(f"{forward}.0", inner)
        tensors |= _linear(f"{forward}.1", inner, 4 * inner, bias=False)
        tensors |= _linear(f"{forward}.3", 4 * inner, inner, bias=False)
    return tensors


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> dict[str, Tensor]:
    weight = {f"{name}.weight": torch.randn(outputs, inputs) / inputs**0.5}
    return weight | ({f"{name}.bias": 0.1 * torch.randn(outputs)} if bias else {})


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.1 * torch.randn(width), f"{name}.bias": 0.1 * torch.randn(width)}


def give_adapter(pipeline: VCFPipeline, folder: Path) -> None:
    """Save an adapter of the kind ``base`` and its encoder in a folder, and load it into a pipeline."""
    weights, encoder = folder / "base.safetensors", folder / "image_encoder"
    save_adapter(weights, pipeline.unet)
    save_encoder(encoder)
    pipeline.use_ip_adapter(str(weights), str(encoder))
