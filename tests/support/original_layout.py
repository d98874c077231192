"""Stable Diffusion in one file, in the layout of the original code: the inverse of diffusers' conversion."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def save_checkpoint(model: Path, file: Path) -> Path:
    """Write a folder in diffusers' layout as one file, in float32."""
    pipeline = DiffusionPipeline.from_pretrained(model, safety_checker=None)
    tensors = {f"model.diffusion_model.{name}": each for name, each in _unet(pipeline.unet)}
    tensors |= {f"first_stage_model.{name}": each for name, each in _vae(pipeline.vae)}
    for prefix, named in _words(pipeline):
        tensors |= {f"{prefix}.{name}": each for name, each in named}
    save_file({name: each.clone().contiguous() for name, each in tensors.items()}, file)
    return file


def _words(pipeline: DiffusionPipeline) -> Iterator[tuple[str, Iterator[tuple[str, Tensor]]]]:
    """The text encoders by the prefix of their tensors."""
    if hasattr(pipeline, "text_encoder_2"):
        yield "conditioner.embedders.0", _clip(pipeline.text_encoder)
        yield "conditioner.embedders.1", _open_clip(pipeline.text_encoder_2)
    elif pipeline.text_encoder.config.hidden_act == "gelu":
        yield "cond_stage_model", _open_clip(pipeline.text_encoder, unused=1)
    else:
        yield "cond_stage_model", _clip(pipeline.text_encoder)


def save_layout(model: Path, folder: Path) -> Path:
    """The files of a model but for its weights and its vocabulary, as the project ships them for published models."""
    for file in model.rglob("*.json"):
        if (
            not re.search("vocab|tokenizer.json|index|safety|feature|special", file.name)
            or file.name == "model_index.json"
        ):
            target = folder / file.relative_to(model)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    index = json.loads((folder / "model_index.json").read_text())
    none = {name: [None, None] for name in ("safety_checker", "feature_extractor", "image_encoder")}
    (folder / "model_index.json").write_text(json.dumps(index | none | {"requires_safety_checker": False}))
    return folder


def _renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def _unet(unet: UNet2DConditionModel) -> Iterator[tuple[str, Tensor]]:
    layers = unet.config.layers_per_block
    for name, tensor in unet.state_dict().items():
        found = re.fullmatch(r"(down_blocks|mid_block|up_blocks)\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", name)
        if found is None:
            yield _renamed(name, TOP), tensor
            continue
        side, block, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
        rest = _renamed(rest, RESNET) if kind == "resnets" else rest
        if side == "mid_block":
            yield f"middle_block.{2 * number if kind == 'resnets' else 1}.{rest}", tensor
        elif kind == "downsamplers":
            yield f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}", tensor
        elif kind == "upsamplers":
            place = 2 if hasattr(unet.up_blocks[block], "attentions") else 1
            yield f"output_blocks.{block * (layers + 1) + layers}.{place}.{rest}", tensor
        else:
            blocks, first = ("input_blocks", 1) if side == "down_blocks" else ("output_blocks", 0)
            yield f"{blocks}.{first + block * (layers + 1) + number}.{int(kind == 'attentions')}.{rest}", tensor


def _vae(vae: AutoencoderKL) -> Iterator[tuple[str, Tensor]]:
    last = len(vae.config.up_block_types) - 1
    for name, tensor in vae.state_dict().items():
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        head, attention, rest = name.partition("mid_block.attentions.0.")
        if attention:
            name = f"{head}mid.attn_1.{_renamed(rest, VAE_ATTENTION)}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        yield name, tensor


def _clip(encoder: CLIPTextModel) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in encoder.state_dict().items():
        yield f"transformer.text_model.{name.removeprefix('text_model.')}", tensor


def _open_clip(encoder: CLIPTextModel | CLIPTextModelWithProjection, unused: int = 0) -> Iterator[tuple[str, Tensor]]:
    """OpenCLIP's text tower, with as many last layers that nobody uses: Stable Diffusion 2 leaves out one."""
    state = {name.removeprefix("text_model."): each for name, each in encoder.state_dict().items()}
    count, width = encoder.config.num_hidden_layers, encoder.config.hidden_size
    yield "model.token_embedding.weight", state["embeddings.token_embedding.weight"]
    yield "model.positional_embedding", state["embeddings.position_embedding.weight"]
    projection = state.get("text_projection.weight", torch.eye(width))
    yield "model.text_projection", projection.T
    for part in ("weight", "bias"):
        yield f"model.ln_final.{part}", state[f"final_layer_norm.{part}"]
        for number in range(count + unused):
            ours, theirs = f"encoder.layers.{min(number, count - 1)}.", f"model.transformer.resblocks.{number}."
            joined = [state[f"{ours}self_attn.{each}_proj.{part}"] for each in "qkv"]
            yield f"{theirs}attn.in_proj_{part}", torch.cat(joined)
            yield f"{theirs}attn.out_proj.{part}", state[f"{ours}self_attn.out_proj.{part}"]
            for name, other in OPEN_CLIP.items():
                yield f"{theirs}{other}.{part}", state[f"{ours}{name}.{part}"]
