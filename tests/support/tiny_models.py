"""Stable Diffusion's real components at a size that runs in milliseconds, randomly initialised."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.pipeline import VCFPipeline

TEXT_WIDTH, VISION_WIDTH = 32, 48
TEXT_TOKENS, IMAGE_TOKENS = 16, 5
IMAGE_SIZE = 16
"""Pixels along an edge, of the output and of the vision tower's input."""


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose vocabulary is single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=TEXT_TOKENS
    )


def build_scheduler(prediction_type: str) -> DDIMScheduler:
    """SD 1's schedule for ``epsilon``; zero terminal SNR with trailing timesteps for ``v_prediction``."""
    zero_snr = prediction_type == "v_prediction"
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        rescale_betas_zero_snr=zero_snr,
        timestep_spacing="trailing" if zero_snr else "leading",
    )


def build_pipeline(seed: int = 0, prediction_type: str = "epsilon") -> VCFPipeline:
    """A complete float32 pipeline of 16x16 images: 16 text tokens of width 32, 5 image tokens of width 48.

    The weights depend on ``seed`` alone. Cross-attention is made stronger than a fresh UNet's, so that prompts and
    references show in the images.
    """
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=TEXT_TOKENS,
                projection_dim=TEXT_WIDTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=VISION_WIDTH,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=IMAGE_SIZE,
                patch_size=8,
                projection_dim=24,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        for name, parameter in unet.named_parameters():
            if "attn2.to_" in name and name.endswith("weight"):
                parameter.data *= 4
        vae = AutoencoderKL(
            block_out_channels=(16, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=IMAGE_SIZE,
        )
        aligner = ImageAligner(VISION_WIDTH, TEXT_WIDTH)
    pipeline = VCFPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=build_scheduler(prediction_type),
        feature_extractor=CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE),
        image_encoder=image_encoder.eval(),
        aligner=aligner.eval(),
        default_steps=4,
        default_guidance_scale=5.0,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
