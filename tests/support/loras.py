"""Random LoRAs in the formats of kohya's sd-scripts and of diffusers, for models of published layouts."""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from vcf_batch.vcf.lora.weights import layers_of
from vcf_batch.vcf.pipeline import VCFPipeline

ATTENTION = re.compile(r"unet\..*attn[12]\.to_[qkv]|unet\..*to_out\.0|text_encoder.*\.[qkv]_proj|.*\.out_proj")
EVERYTHING = re.compile(r"unet\..*(attn|ff|proj_|conv[12]|time_emb_proj|conv_shortcut).*|text_encoder.*(_proj|fc[12])")
TEXT = re.compile(r"text_encoder.*_proj")
UNET = re.compile(r"unet\..*attn2\.to_[kv]")


def updates(
    pipeline: VCFPipeline, which: re.Pattern[str], seed: int, rank: int = 4, size: float = 0.3
) -> dict[str, tuple[Tensor, Tensor]]:
    """Random tensors A and B of every layer whose name fits ``which``, by name."""
    torch.manual_seed(seed)
    return {
        name: pair_of(layer.weight, rank, size)  # type: ignore[arg-type]
        for name, layer in layers_of(pipeline).items()
        if which.fullmatch(name)
    }


def pair_of(weight: nn.Parameter, rank: int, size: float) -> tuple[Tensor, Tensor]:
    down = torch.randn(rank, *weight.shape[1:]) / weight[0].numel() ** 0.5
    return down, torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2)) * size / rank**0.5


def save_kohya(
    file: Path, pipeline: VCFPipeline, pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float | None = 2.0
) -> Path:
    """A file as sd-scripts write it: in diffusers' layout of the UNet for Stable Diffusion 1, in the original one for
    XL; None leaves alphas out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    named = original if _is_xl(pipeline) else str
    save_file(kohya(pipeline, pairs, alpha, named), file, {"ss_network_module": "networks.lora"})
    return file


def kohya(
    pipeline: VCFPipeline,
    pairs: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float | None = 2.0,
    named: Callable[[str], str] = str,
) -> dict[str, Tensor]:
    """Tensors by the names of sd-scripts; ``named`` gives the name of a UNet's layer."""
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in pairs.items():
        key = _kohya(name, _is_xl(pipeline), named)
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def _is_xl(pipeline: VCFPipeline) -> bool:
    return pipeline.components.get("text_encoder_2") is not None


def _kohya(name: str, is_xl: bool, named: Callable[[str], str]) -> str:
    part, _, layer = name.partition(".")
    if part == "unet":
        return "lora_unet_" + named(layer).replace(".", "_")
    prefix = {"text_encoder": "lora_te1_" if is_xl else "lora_te_", "text_encoder_2": "lora_te2_"}[part]
    if layer == "text_projection":
        return prefix + layer
    return prefix + "text_model_" + layer.removeprefix("text_model.").replace(".", "_")


OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
"""Layers of a UNet outside its blocks, by diffusers' name and the original one."""


def original(layer: str, per_level: int = 2) -> str:
    """Name of a UNet's layer in the original layout; ``per_level`` is the number of its up blocks' resnets."""
    if layer in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[layer]
    kinds = {"resnets": 0, "attentions": 1}
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", layer)
    middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", layer)
    sampler = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(?:down|up)samplers\.0\.conv", layer)
    if found:
        side, block, kind, number, rest = found.groups()
        place = int(block) * per_level + int(number) + (1 if side == "down" else 0)
        return f"{'input' if side == 'down' else 'output'}_blocks.{place}.{kinds[kind]}.{_within(rest)}"
    if sampler:
        side, block = sampler.groups()
        place = (int(block) + 1) * per_level - (1 if side == "up" else 0)
        return f"input_blocks.{place}.0.op" if side == "down" else f"output_blocks.{place}.2.conv"
    assert middle, layer
    kind, number, rest = middle.groups()
    return f"middle_block.{2 * int(number) if kind == 'resnets' else 1}.{_within(rest)}"


def _within(rest: str) -> str:
    own = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
    return {**own, "conv_shortcut": "skip_connection"}.get(rest, rest)


def save_diffusers(
    file: Path, pipeline: VCFPipeline, pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: int | None = None
) -> Path:
    """A file as diffusers' training scripts write it, with PEFT's settings if there is an alpha."""
    settings: dict[str, Any] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, (down, up) in pairs.items():
        part, _, layer = name.partition(".")
        if part == "text_encoder":
            layer = f"text_model.{layer.removeprefix('text_model.')}"
        parts.setdefault(part, {}).update({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})
        if alpha is not None:
            # As transformers 5 names them; diffusers cannot load others that have such settings.
            targets = [key.partition(".lora")[0] for key in parts[part]]
            targets = [key.removeprefix("text_model.") if part == "text_encoder" else key for key in targets]
            own = LoraConfig(r=down.shape[0], lora_alpha=alpha, target_modules=targets)
            settings[f"{part}_lora_adapter_metadata"] = own.to_dict()
    kind: Any = StableDiffusionXLPipeline if _is_xl(pipeline) else StableDiffusionPipeline
    # The scripts train attention alone, and convert the names; others write a UNet's as PEFT has them.
    as_they_are = {"unet"} if any("attn" not in name for name in parts.get("unet", ())) else set()
    layers = {
        f"{part}_lora_layers": own if part in as_they_are else convert_state_dict_to_diffusers(own)
        for part, own in parts.items()
    }
    kind.save_lora_weights(file.parent, **layers, **settings, weight_name=file.name)
    return file


def names_of(folder: Path, pipeline: VCFPipeline, count: int, which: re.Pattern[str] = ATTENTION) -> Iterable[str]:
    """Write ``count`` LoRAs into a folder, in kohya's format by turns with diffusers', and yield their names."""
    for number in range(count):
        pairs = updates(pipeline, which, seed=number)
        save = save_diffusers if number % 2 else save_kohya
        yield save(folder / f"lora{number}.safetensors", pipeline, pairs).name
