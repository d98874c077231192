"""What a LoRA must be for, told from its header alone, by the names that published files have."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from vcf_batch.errors import ModelError
from vcf_batch.models.lora.header import check, check_file
from vcf_batch.models.resolution import resolve_file

Shapes = dict[str, tuple[int, ...]]
BLOCK = "unet.down_blocks.1.attentions.0.transformer_blocks.0"
FORMATS: dict[str, tuple[str, str]] = {
    "kohya": ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_{way}.weight", "down up"),
    "kohya, original layout": (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_{way}.weight",
        "down up",
    ),
    "PEFT": (f"{BLOCK}.attn2.to_k.lora_{{way}}.weight", "A B"),
    "diffusers": (f"{BLOCK}.attn2.to_k.lora.{{way}}.weight", "down up"),
    "diffusers, older": (f"{BLOCK}.attn2.processor.to_k_lora.{{way}}.weight", "down up"),
}


def shapes(name: str, width: int) -> Shapes:
    text, ways = FORMATS[name]
    down, up = (text.format(way=way) for way in ways.split())
    return {down: (16, width), up: (640, 16)}


@pytest.mark.parametrize("name", FORMATS)
def test_the_base_is_told_by_the_width_of_its_text_tokens(name: str) -> None:
    check(shapes(name, 768), "x", 768, False)
    reason = (
        r"x was trained for a base with text tokens of width 2048 \(Stable Diffusion XL\), and this model's have width"
    )
    with pytest.raises(ModelError, match=rf"{reason} 768 \(Stable Diffusion 1\.x\): use one that was trained for"):
        check(shapes(name, 2048), "x", 768, False)


def test_a_second_text_encoder_belongs_to_stable_diffusion_xl() -> None:
    text: Shapes = {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (8, 1280),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": (5120, 8),
    }
    check(text, "x", 2048, True)
    with pytest.raises(ModelError, match="x is for Stable Diffusion XL, as its tensor lora_te2_"):
        check(text, "x", 768, False)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        ({}, "x is no LoRA: it has no tensors"),
        ({"conv_in.weight": (320, 4, 3, 3)}, "x is no LoRA: it has tensors such as conv_in.weight"),
        ({"lora_unet_a.hada_w1_a": (8, 8)}, "x is a LoHa, as its tensor lora_unet_a.hada_w1_a shows; only plain LoRAs"),
        ({"lora_unet_a.lokr_w1": (8, 8)}, "x is a LoKr"),
        ({"lora_unet_a.oft_blocks": (8, 8)}, "x is an OFT"),
        ({"unet.a.lora_magnitude_vector": (8,)}, "x is a DoRA"),
        ({"lora_unet_a.dora_scale": (8, 1)}, "x is a DoRA"),
        ({"lora_unet_a.lora_mid.weight": (8, 8, 3, 3)}, "x is a LoCon with a core tensor"),
        ({"lora_unet_a.on_input": (1,)}, r"x is an \(IA\)\^3"),
        ({"lora_unet_a.a1.weight": (8, 8)}, "x is a GLoRA"),
        ({"lora_unet_a.diff": (8, 8)}, "x has whole weights beside or instead of updates of low rank"),
        ({"lora_unet_a_norm.w_norm": (8,)}, "x has whole weights beside"),
        ({"lora_unet_a.bias_values": (8,)}, "x has biases, as its tensor lora_unet_a.bias_values shows"),
        ({"unet.a.lora_B.bias": (8,)}, "x has biases"),
        ({"unet.a.lora_B.default.bias": (8,)}, "x has biases"),
        ({"bundle_emb.style.string_to_param.*": (1, 768)}, "x has embeddings of textual inversion"),
        ({"emb_params": (1, 768)}, "x has embeddings of textual inversion"),
        ({"clip_g": (1, 1280), "clip_l": (1, 768)}, "x has embeddings of textual inversion"),
        ({"lllite_unet_a.down.0.weight": (8, 8)}, "x is a ControlNet-LLLite"),
        (
            {"base_model.model.a.lora_A.weight": (8, 8)},
            "x was saved by PEFT itself, with its alpha in adapter_config.json",
        ),
        ({"unet.base_model.model.a.lora_A.weight": (8, 8)}, "x was saved by PEFT itself"),
        ({"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": (8, 8)}, "x is for a base such as Flux"),
        ({"transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": (8, 8)}, "x is for a base such as Flux"),
        ({"lora_transformer_single_transformer_blocks_0_attn_to_k.alpha": ()}, "x is for a base such as Flux"),
        ({"lora_te3_encoder_block_0.lora_down.weight": (8, 8)}, "x is for a base such as Flux or Stable Diffusion 3"),
        ({"lora_prior_unet_a.lora_down.weight": (8, 8)}, "x is for a base such as Flux"),
        (
            {"diffusion_model.input_blocks.1.1.proj_in.lora_down.weight": (8, 8)},
            "x has 1 tensors, and 1 of them belong to no part of a Stable Diffusion, such as diffusion_model",
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_its_kind(found: Shapes, reason: str) -> None:
    """Also where the rest of the file is one."""
    with pytest.raises(ModelError, match=reason):
        check(found, "x", 768, False)
    if found and "is no LoRA" not in reason and "has 1 tensors" not in reason:
        with pytest.raises(ModelError, match=reason):
            check(shapes("kohya", 768) | found, "x", 768, False)


def test_a_file_is_refused_by_its_header(tmp_path: Path) -> None:
    """The same file cut short is damaged."""
    tensors = {name: np.ones(shape, np.float16) for name, shape in shapes("kohya", 1024).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = resolve_file(str(tmp_path / "a.safetensors"))
    check_file(found, "x", {"cross_attention_dim": 1024}, False)
    with pytest.raises(ModelError, match=r"of width 1024 \(Stable Diffusion 2\.x\), and this model's have width 768"):
        check_file(found, "x", {"cross_attention_dim": 768}, False)
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    with pytest.raises(ModelError, match="x is damaged or no safetensors file: it must have"):
        check_file(found, "x", {"cross_attention_dim": 1024}, False)
