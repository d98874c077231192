"""Stable Diffusion 2.1 or XL with image encoder, aligner, PNO guide and judge, at full size with random weights.

Nothing is downloaded; the only file read is the tokenizer of the embedded family. Random weights are enough, because
the cost of the operations does not depend on the weights.
"""

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from vcf_batch.metrics.clip_score import ClipJudge
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.base.pipeline_xl import VCFXLPipeline
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
"""Mean and standard deviation of CLIP's normalisation."""


@dataclass(frozen=True)
class Shapes:
    """Configurations of the networks, and settings of the sampling."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]
    guide: dict[str, Any]
    judge: dict[str, Any]
    """Configuration of both towers of the judge."""
    text_tokens: int
    pixels: int
    """Edge of an image in pixels."""
    steps: int
    text_2: dict[str, Any] | None = None
    """Configuration of the second text encoder; None for a family with one."""

    @property
    def attention(self) -> tuple[int, int]:
        """Heads, and edge in latent pixels, of the UNet's first level with attention, whose heads are 64 wide."""
        level = next(number for number, kind in enumerate(self.unet["down_block_types"]) if "CrossAttn" in kind)
        return self.unet["attention_head_dim"][level], self.unet["sample_size"] // 2**level


FULL = Shapes(
    unet={
        "sample_size": 96,
        "block_out_channels": (320, 640, 1280, 1280),
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
    },
    vae={"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768},
    text={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    vision={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
    guide={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
    },
    judge={},
    text_tokens=77,
    pixels=768,
    steps=50,
)
"""Full size: 768x768, 77 + 257 tokens. ViT-H/14 reads the references, ViT-L/14 guides, ViT-B/32 judges."""

FULL_XL = replace(
    FULL,
    unet={
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    vae=FULL.vae | {"sample_size": 1024, "scaling_factor": 0.13025},
    text={"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    text_2={
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
    },
    pixels=1024,
    steps=30,
)
"""Full size of Stable Diffusion XL: 1024x1024, 77 + 257 tokens, the same towers beside it."""

_SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL_VISION = _SMALL | {"patch_size": 8, "image_size": 32}

SMOKE = Shapes(
    unet={
        "sample_size": 16,
        "block_out_channels": (32,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("CrossAttnUpBlock2D",),
        "attention_head_dim": (1,),
        "cross_attention_dim": 32,
        "layers_per_block": 1,
    },
    vae={"block_out_channels": (32, 32), "sample_size": 32},
    text=_SMALL,
    vision=_SMALL_VISION,
    guide=_SMALL_VISION,
    judge=_SMALL,
    text_tokens=16,
    pixels=32,
    steps=3,
)
"""Shapes for tests, with few kinds of layers, because each kind takes seconds to compile."""

SMOKE_XL = replace(
    SMOKE,
    unet=SMOKE.unet
    | {
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (1, 1),
        "cross_attention_dim": 64,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    text_2=_SMALL | {"projection_dim": 32},
)

FAMILIES = {"sd21": (FULL, SMOKE), "sdxl": (FULL_XL, SMOKE_XL)}
"""The shapes of each family, at full size and for tests."""


def tokenizer(shapes: Shapes) -> CLIPTokenizer:
    """The embedded family's tokenizer. Its few tokens are valid in larger vocabularies too."""
    return CLIPTokenizer.from_pretrained(os.path.join(tiny_folder(), "tokenizer"), model_max_length=shapes.text_tokens)


def pipeline(shapes: Shapes, device: str, dtype: torch.dtype) -> VCFPipeline:
    """The pipeline on its device, not yet set up for sampling. Its weights are always the same, up to rounding."""
    logging.set_verbosity_error()  # diffusers warns of every conversion to another precision
    words = tokenizer(shapes)
    depth = len(shapes.vae["block_out_channels"])
    torch.manual_seed(0)
    with torch.device(device):
        networks: dict[str, Any] = {
            "vae": AutoencoderKL(
                **shapes.vae,
                down_block_types=("DownEncoderBlock2D",) * depth,
                up_block_types=("UpDecoderBlock2D",) * depth,
                latent_channels=4,
            ),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**shapes.text, **_special(words, shapes))),
            "unet": UNet2DConditionModel(**shapes.unet, use_linear_projection=True),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**shapes.vision, projection_dim=32)),
            "aligner": ImageAligner(shapes.vision["hidden_size"], shapes.unet["cross_attention_dim"]),
        }
        if shapes.text_2 is not None:
            config = CLIPTextConfig(**shapes.text_2, **_special(words, shapes))
            networks["text_encoder_2"] = CLIPTextModelWithProjection(config)
    parts = {name: network.eval().to(dtype) for name, network in networks.items()}
    kind: type[VCFPipeline] = VCFPipeline
    if shapes.text_2 is not None:
        kind = VCFXLPipeline
        parts |= {"tokenizer_2": words, "vae": parts["vae"].float()}  # as runs of half precision have it
    return kind(
        **parts,
        tokenizer=words,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        feature_extractor=CLIPImageProcessorPil(image_mean=MEAN, image_std=STD),
        default_steps=shapes.steps,
    )


def guide(shapes: Shapes, device: str) -> Guide:
    """The PNO guide, in float32."""
    with torch.device(device):
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**shapes.guide, projection_dim=64))
    return Guide(tower, MEAN, STD)


def judge(shapes: Shapes, device: str) -> ClipJudge:
    """The CLIP that scores, in float32."""
    words = tokenizer(shapes)
    config = CLIPConfig(text_config=shapes.judge | _special(words, shapes), vision_config=shapes.judge)
    with torch.device(device):
        return ClipJudge(CLIPModel(config), words, CLIPImageProcessorPil())


def _special(words: CLIPTokenizer, shapes: Shapes) -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {name: getattr(words, name) for name in names} | {"max_position_embeddings": shapes.text_tokens}
