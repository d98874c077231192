"""The architectures of the tiny family: Stable Diffusion's classes, small enough to be trained on two CPU cores."""

import json
import random
from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from vcf_batch.tiny import world

TEXT_TOKENS = 48
TEXT_WIDTH = 128
VISION_WIDTH = 192


def vae() -> AutoencoderKL:
    """The autoencoder: 0.68 M parameters, 64x64 pictures to 16x16 latents of 4 channels."""
    return AutoencoderKL(
        sample_size=world.SIZE,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
    )


def unet() -> UNet2DConditionModel:
    """The UNet: 8.6 M parameters, predicts v, with cross-attention at 8x8 and 4x4."""
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        block_out_channels=(64, 128, 160),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=(2, 4, 5),
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
    )


def scheduler() -> DDIMScheduler:
    """The scheduler: v-prediction, zero terminal signal-to-noise ratio, trailing steps (arXiv 2305.08891)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The conditioning CLIP: its text tower feeds the UNet, its vision tower feeds the aligner (65 tokens)."""
    return _clip(tokenizer, text=(TEXT_WIDTH, 4, 4), vision=(VISION_WIDTH, 4, 6), patch=8, projection=128)


def judge(tokenizer: CLIPTokenizer) -> CLIPModel:
    """The CLIP that scores. Its shape and seed differ from :func:`clip`, so the guide is never the judge."""
    return _clip(tokenizer, text=(96, 3, 3), vision=(160, 4, 5), patch=8, projection=96)


def _clip(
    tokenizer: CLIPTokenizer, text: tuple[int, int, int], vision: tuple[int, int, int], patch: int, projection: int
) -> CLIPModel:
    """A CLIP whose towers are each given as (width, layers, heads)."""
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=text[0],
                intermediate_size=text[0] * 4,
                num_hidden_layers=text[1],
                num_attention_heads=text[2],
                max_position_embeddings=TEXT_TOKENS,
                projection_dim=projection,
                pad_token_id=tokenizer.pad_token_id,
                **special,
            ).to_dict(),
            vision_config=CLIPVisionConfig(
                image_size=world.SIZE,
                patch_size=patch,
                hidden_size=vision[0],
                intermediate_size=vision[0] * 4,
                num_hidden_layers=vision[1],
                num_attention_heads=vision[2],
                projection_dim=projection,
            ).to_dict(),
            projection_dim=projection,
        )
    )


def image_processor() -> CLIPImageProcessorPil:
    """An image processor with CLIP's normalisation at the world's picture size."""
    size = {"height": world.SIZE, "width": world.SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": world.SIZE}, crop_size=size)


def train_tokenizer(folder: Path, scenes: world.Scenes) -> CLIPTokenizer:
    """Train CLIP's byte-level BPE on the captions of scenes. Any other text is split into bytes."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(world.captions(scenes, random.Random(scenes.seed), 0.5, world.TAUGHT), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    words = alphabet + [f"{symbol}</w>" for symbol in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_TOKENS)
    tokenizer.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)
