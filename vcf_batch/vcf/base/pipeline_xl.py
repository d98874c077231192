"""VCFXLPipeline: :class:`vcf_batch.vcf.pipeline.VCFPipeline` for Stable Diffusion XL."""

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
)

from vcf_batch.config.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models.prompt_tokens import refuse_without_words
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.base.family import BaseFamily
from vcf_batch.vcf.base.stable_diffusion_xl import StableDiffusionXL
from vcf_batch.vcf.pipeline import VCFPipeline


class VCFXLPipeline(StableDiffusionXLLoraLoaderMixin, VCFPipeline):
    """A Stable Diffusion XL conditioned on prompts and reference images, used as a ``VCFPipeline``.

    ``VCFPipeline.from_pretrained`` returns one for such a model. Images are never watermarked.

    Args:
        text_encoder_2, tokenizer_2: the second text encoder, which also gives the pooled embedding.
        force_zeros_for_empty_prompt: whether the empty negative prompt is zeros, and not the encoding of the empty
            text. (diffusers does so for None and not for an empty text; a row has no None.)
        others: as in :class:`vcf_batch.vcf.pipeline.VCFPipeline`.

    Raises:
        ModelError: see there; or the two tokenizers do not cut texts alike, or the VAE's latents have a mean of their
            own.
    """

    _optional_components: ClassVar[list[str]] = [*StableDiffusionXLPipeline._optional_components, "aligner"]
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->aligner->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        aligner: ImageAligner | None = None,
        force_zeros_for_empty_prompt: bool = True,
        default_steps: int = DEFAULT_STEPS,
        default_guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        default_strength: float | None = None,
    ) -> None:
        if text_encoder is None or tokenizer is None:
            raise ModelError(
                "the model has one text encoder of the two of Stable Diffusion XL, as its refiner does; use the base "
                "model"
            )
        refuse_without_words(tokenizer_2, "tokenizer_2")
        sizes = [(len(each), each.model_max_length) for each in (tokenizer, tokenizer_2)]
        if sizes[0] != sizes[1]:
            raise ModelError(
                f"the model's tokenizers know {sizes[0][0]} and {sizes[1][0]} tokens and take {sizes[0][1]} and "
                f"{sizes[1][1]} of a text; both must be the same: copy the folders tokenizer and tokenizer_2 again"
            )
        if vae is not None and getattr(vae.config, "latents_mean", None) is not None:
            raise ModelError(
                "the VAE has latents_mean, so its latents have another scale than Stable Diffusion XL's; use a model "
                "without it"
            )
        self._second = {"text_encoder_2": text_encoder_2, "tokenizer_2": tokenizer_2}
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            aligner=aligner,
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            default_strength=default_strength,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)

    def _register_base(self, **parts: Any) -> None:
        self.register_modules(**parts, **self._second)
        del self._second
        blocks = self.vae.config.block_out_channels if self.vae is not None else [0] * 4
        self.vae_scale_factor = 2 ** (len(blocks) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def tokenizers(self) -> Sequence[Any]:
        return [self.tokenizer, self.tokenizer_2]

    @classmethod
    def _dtypes(cls, place: str, dtype: Any) -> Any:
        """float32 for a VAE that overflows in half precision: one whose configuration has ``force_upcast``."""
        config = AutoencoderKL.load_config(place, subfolder="vae")
        forced = config.get("force_upcast", True)
        return {"default": dtype, "vae": torch.float32} if forced and isinstance(dtype, torch.dtype) else dtype

    @property
    def family(self) -> BaseFamily:
        """What is particular to the family of this base model."""
        return StableDiffusionXL(self)

    def encode_prompt(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse diffusers' way to encode prompts, which here would be that of Stable Diffusion 1 and 2.

        Raises:
            UsageError: always; ``family.encode`` does it.
        """
        raise UsageError(
            "encode_prompt is not supported: call family.encode([prompt]), or give the prompts in the call"
        )


# diffusers looks up the class that model_index.json names among its own.
diffusers.VCFXLPipeline = VCFXLPipeline
