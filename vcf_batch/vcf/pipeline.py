"""VCFPipeline: a batch of different prompts, each with references, fusion, strength, guidance and seed of its own."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from vcf_batch.config import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, REFERENCE_PARTS, SCHEDULERS
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.vcf.aligner import ImageAligner, squash
from vcf_batch.vcf.attention import accept_token_bias
from vcf_batch.vcf.fusion import Conditioning, condition, default_strength

References = Image.Image | Sequence[Image.Image] | None
"""The references of one prompt: one image, several, or None for text only."""

ENCODE_BATCH = 32
DECODE_BATCH = 8

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


class VCFPipeline(StableDiffusionPipeline):
    """Stable Diffusion conditioned on prompts and reference images by Visual Concept Fusion (docs/method.md).

    Sample i of a batch equals the same sample generated alone: noise comes from one CPU generator per sample, and
    nothing is averaged, scaled or padded visibly over the batch. In float32 on a CPU they agree within 1e-4 on images
    in [0, 1]. In bfloat16 a batch may take other kernels than a single sample, whose rounding (8 bits of mantissa)
    grows over the steps: the tests allow 0.05, with a mean of 0.005.

    ``fusion.condition``, :meth:`denoise` and :meth:`decode` are differentiable; gradients are switched off in the
    encoders and in the methods that generate.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: as in ``StableDiffusionPipeline``.
        feature_extractor: gives the mean and standard deviation that references are normalised with.
        image_encoder: the vision tower whose penultimate hidden state the aligner reads.
        aligner: carries image tokens into the text space. It and the two before are needed for references only.
        safety_checker: not supported, must be None.
        requires_safety_checker: kept in the configuration, because ``StableDiffusionPipeline`` expects it there.
        default_steps: denoising steps where none are given.
        default_guidance_scale: guidance scale where none is given.
        default_strength: strength of ``concat`` where none is given, for an aligner that needs another one than the
            paper's 1. The other fusions keep the paper's 0.3.

    Raises:
        ModelError: aligner, vision tower and UNet do not fit each other, or there is a safety checker.
    """

    _optional_components: ClassVar[list[str]] = [*StableDiffusionPipeline._optional_components, "aligner"]
    model_cpu_offload_seq = "text_encoder->image_encoder->aligner->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        feature_extractor: CLIPImageProcessor | None = None,
        image_encoder: CLIPVisionModelWithProjection | None = None,
        aligner: ImageAligner | None = None,
        safety_checker: StableDiffusionSafetyChecker | None = None,
        requires_safety_checker: bool = False,
        default_steps: int = DEFAULT_STEPS,
        default_guidance_scale: float = DEFAULT_GUIDANCE_SCALE,
        default_strength: float | None = None,
    ) -> None:
        if safety_checker is not None:
            raise ModelError(
                "VCFPipeline runs no safety checker; pass safety_checker=None and check its output instead"
            )
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=False,
        )
        self.register_modules(aligner=aligner)
        self.register_to_config(
            default_steps=default_steps,
            default_guidance_scale=default_guidance_scale,
            default_strength=default_strength,
        )
        if aligner is not None and aligner.config.text_dim != unet.config.cross_attention_dim:
            raise ModelError(
                f"the aligner gives tokens of width {aligner.config.text_dim}, but the UNet is conditioned on width "
                f"{unet.config.cross_attention_dim}; use an aligner trained for this model"
            )
        if aligner is not None and image_encoder is not None:
            width = image_encoder.config.hidden_size
            if aligner.config.vision_dim != width:
                raise ModelError(
                    f"the aligner reads tokens of width {aligner.config.vision_dim}, but the image encoder gives width "
                    f"{width}; use the image encoder the aligner was trained with"
                )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "VCFPipeline":
        """Load a saved VCFPipeline, or a plain Stable Diffusion model with the missing parts given as arguments.

        Takes what ``DiffusionPipeline.from_pretrained`` takes; a safety checker is never loaded.
        """
        return super().from_pretrained(pretrained_model_name_or_path, **{"safety_checker": None, **kwargs})

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Text tokens of prompts or negative prompts, exactly as ``encode_prompt`` of diffusers gives them.

        Args:
            prompts: one or more; what exceeds the text encoder's length is cut off with a warning.

        Returns:
            ``[B, T, Dt]`` on the pipeline's device, in the text encoder's dtype.
        """
        device = self._execution_device
        batches = [list(prompts[start : start + ENCODE_BATCH]) for start in range(0, len(prompts), ENCODE_BATCH)]
        return torch.cat([self.encode_prompt(batch, device, 1, False)[0] for batch in batches])

    @torch.no_grad()
    def encode_references(self, images: Sequence[Image.Image]) -> Tensor:
        """Aligned image tokens of reference images (docs/method.md, sections 1 and 2).

        Args:
            images: one or more, of any size.

        Returns:
            ``[B, N, Dt]`` on the pipeline's device, in the aligner's dtype.

        Raises:
            ModelError: the model lacks one of :data:`vcf_batch.config.REFERENCE_PARTS`.
        """
        self._require_reference_parts()
        tokens = self.aligner.select_tokens(self.vision_tokens(images))
        return self.aligner(tokens.to(self.aligner.dtype))

    @torch.no_grad()
    def vision_tokens(self, images: Sequence[Image.Image]) -> Tensor:
        """What the aligner reads of images: the vision tower's penultimate hidden state (docs/method.md, section 1).

        Returns:
            ``[B, 1 + P, Dv]``, CLS first, before :meth:`ImageAligner.select_tokens`.
        """
        tower, statistics = self.image_encoder, (self.feature_extractor.image_mean, self.feature_extractor.image_std)
        hidden_states = []
        for start in range(0, len(images), ENCODE_BATCH):
            batch = images[start : start + ENCODE_BATCH]
            pixels = self.aligner.preprocess(batch, tower.config.image_size, *statistics)
            pixels = pixels.to(self._execution_device, tower.dtype)
            hidden_states.append(tower(pixels, output_hidden_states=True).hidden_states[-2])
        return torch.cat(hidden_states)

    def squash(self, image: Image.Image) -> Image.Image:
        """The first step of :meth:`encode_references`, which is the costly one where an image is large.

        Doing it twice changes nothing, and any thread may do it.

        Raises:
            ModelError: the model lacks one of :data:`vcf_batch.config.REFERENCE_PARTS`.
        """
        self._require_reference_parts()
        return squash(image, self.image_encoder.config.image_size)

    def _require_reference_parts(self) -> None:
        for name in REFERENCE_PARTS:
            if getattr(self, name) is None:
                raise ModelError(
                    f"this model has no {name}, and references need one; "
                    f"load it with VCFPipeline.from_pretrained(..., {name}=...), or leave the references out"
                )

    def resolve_strength(self, fusion: str, strength: float | None) -> float:
        """The strength that is used: the given one, else the model's for ``concat``, else the paper's.

        Raises:
            UsageError: no such fusion.
        """
        if strength is not None:
            return strength
        recommended = self.config.default_strength if fusion == "concat" else None
        return default_strength(fusion) if recommended is None else recommended

    def initial_noise(self, seeds: Sequence[int], height: int | None = None, width: int | None = None) -> Tensor:
        """Standard normal noise, drawn for each sample on the CPU from its own seed.

        Args:
            seeds: one per sample.
            height, width: of the image in pixels; None is the model's native size.

        Returns:
            float32 ``[B, C, H / f, W / f]`` on the pipeline's device, with the VAE's factor ``f``.

        Raises:
            UsageError: a size is not a multiple of ``f``.
        """
        native = self.unet.config.sample_size
        native = (native, native) if isinstance(native, int) else native
        shape = [self.unet.config.in_channels]
        for name, pixels, latent in (("height", height, native[0]), ("width", width, native[1])):
            if pixels is not None and (pixels <= 0 or pixels % self.vae_scale_factor):
                raise UsageError(f"{name} is {pixels}; it must be a multiple of {self.vae_scale_factor}")
            shape.append(latent if pixels is None else pixels // self.vae_scale_factor)
        noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise).to(self._execution_device)

    def denoise(
        self,
        noise: Tensor,
        conditioning: Conditioning,
        *,
        guidance_scale: Sequence[float],
        steps: int,
        scheduler: str = "ddim",
    ) -> Tensor:
        """Denoise with classifier-free guidance, both sides in one UNet call. Differentiable.

        Latents, guidance and scheduler are float32 whatever the UNet's dtype.

        Args:
            noise: ``[B, C, h, w]``, standard normal.
            conditioning: of the same B samples.
            guidance_scale: one per sample; 1 throughout leaves the unconditional side out.
            steps: denoising steps.
            scheduler: ``ddim``, ``dpm++`` or ``euler``.

        Returns:
            float32 latents ``[B, C, h, w]``.

        Raises:
            UsageError: no such scheduler, or it cannot take so many steps.
        """
        solver = self.make_scheduler(scheduler)
        limit = solver.config.num_train_timesteps
        if not 1 <= steps <= limit:
            raise UsageError(f"steps is {steps}; it must be between 1 and {limit}")
        solver.set_timesteps(steps, device="cpu")
        scale = torch.tensor(guidance_scale, dtype=torch.float32, device=noise.device).reshape(-1, 1, 1, 1)
        guided = any(value != 1 for value in guidance_scale)
        tokens, bias = conditioning.tokens, conditioning.bias
        if guided:
            tokens = torch.cat([conditioning.negative_tokens, tokens])
            bias = None if bias is None else torch.cat([bias, bias])
        attention = None
        if bias is not None:
            accept_token_bias(self.unet)
            attention = {"token_bias": bias.to(self.unet.dtype)}
        tokens = tokens.to(self.unet.dtype)
        latents = noise.float() * solver.init_noise_sigma
        # The scheduler reads its tables with CPU timesteps and the UNet takes device ones, so no step waits for a copy.
        for cpu_timestep, timestep in zip(solver.timesteps, solver.timesteps.to(noise.device), strict=True):
            scaled = solver.scale_model_input(latents, cpu_timestep).to(self.unet.dtype)
            prediction = self.unet(
                torch.cat([scaled, scaled]) if guided else scaled,
                timestep,
                encoder_hidden_states=tokens,
                cross_attention_kwargs=attention,
                return_dict=False,
            )[0].float()
            if guided:
                negative, positive = prediction.chunk(2)
                prediction = negative + scale * (positive - negative)
            latents = solver.step(prediction, cpu_timestep, latents, return_dict=False)[0]
        return latents

    def make_scheduler(self, name: str) -> Any:
        """A new scheduler with the checkpoint's noise schedule, prediction type and spacing.

        Raises:
            UsageError: no such scheduler.
        """
        if name not in _SCHEDULERS:
            raise UsageError(f"scheduler is {name!r}; it must be one of {', '.join(SCHEDULERS)}")
        # DDIM clips by default, which is meant for pixels and ruins latents; a checkpoint whose own scheduler cannot
        # clip has no say in its configuration.
        fixed = {"clip_sample": False} if name == "ddim" else {}
        return _SCHEDULERS[name].from_config(self.scheduler.config, **fixed)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, a few at a time. Differentiable.

        Args:
            latents: ``[B, C, h, w]``.

        Returns:
            float32 ``[B, 3, H, W]`` in [0, 1], on the device of the latents.
        """
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        decoded = [self.vae.decode(part, return_dict=False)[0].float() for part in scaled.split(DECODE_BATCH)]
        return (torch.cat(decoded) / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def generate_from_tokens(
        self,
        text_tokens: Tensor,
        image_tokens: Sequence[Sequence[Tensor]],
        negative_tokens: Tensor,
        *,
        seeds: Sequence[int],
        fusion: str | Sequence[str] = "concat",
        strength: float | Sequence[float | None] | None = None,
        guidance_scale: float | Sequence[float | None] | None = None,
        steps: int | None = None,
        scheduler: str = "ddim",
        height: int | None = None,
        width: int | None = None,
    ) -> Tensor:
        """Generate from what :meth:`encode_prompts` and :meth:`encode_references` gave, kept from wherever it was.

        Args:
            text_tokens: ``[B, T, Dt]``, of the prompts.
            image_tokens: of each sample, the aligned tokens ``[N, Dt]`` of each of its references; empty is text only.
                ``concat`` appends the tokens of all, the other fusions work on all of them together.
            negative_tokens: ``[B, T, Dt]``, of the negative prompts.
            seeds: one per sample, 0 to :data:`vcf_batch.config.MAX_SEED`.
            fusion: ``concat``, ``naive`` or ``cross_attention``.
            strength: 0 is text only; None is the default of model and fusion.
            guidance_scale: 1 is no guidance; None is the model's default.
            steps: None is the model's default.
            scheduler: ``ddim``, ``dpm++`` or ``euler``.
            height, width: pixels; None is the model's native size.

        ``fusion``, ``strength`` and ``guidance_scale`` are one value for all samples or a sequence of one per sample.

        Returns:
            float32 ``[B, 3, H, W]`` in [0, 1] on the CPU.

        Raises:
            UsageError: a value outside its limits, or a sequence of the wrong length.
        """
        count = len(text_tokens)
        fusions = _per_sample("fusion", fusion, count)
        strengths = [
            self.resolve_strength(mode, value)
            for mode, value in zip(fusions, _per_sample("strength", strength, count), strict=True)
        ]
        default_scale = self.config.default_guidance_scale
        scales = _per_sample("guidance_scale", guidance_scale, count)
        conditioning = condition(
            text_tokens,
            [
                torch.cat(list(tokens)) if tokens else None
                for tokens in _per_sample("image_tokens", image_tokens, count)
            ],
            negative_tokens,
            fusions,
            strengths,
        )
        latents = self.denoise(
            self.initial_noise(_per_sample("seeds", seeds, count), height, width),
            conditioning,
            guidance_scale=[default_scale if value is None else value for value in scales],
            steps=self.config.default_steps if steps is None else steps,
            scheduler=scheduler,
        )
        return self.decode(latents).cpu()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        references: Sequence[References] | None = None,
        *,
        seeds: Sequence[int],
        negative_prompts: str | Sequence[str] = "",
        **settings: Any,
    ) -> Tensor:
        """Generate one image per prompt. Each distinct prompt and each distinct image object is encoded once.

        Args:
            prompts: B prompts.
            references: of each prompt one image, several, or None for text only; None is text only throughout.
            seeds: one per prompt.
            negative_prompts: one for all, or one per prompt.
            settings: ``fusion``, ``strength``, ``guidance_scale``, ``steps``, ``scheduler``, ``height`` and ``width``
                as in :meth:`generate_from_tokens`.

        Returns:
            float32 ``[B, 3, H, W]`` in [0, 1] on the CPU.

        Raises:
            ModelError: there are references, but the model lacks a part they need.
            UsageError: a value outside its limits, or a sequence of the wrong length.
        """
        count = len(prompts)
        if not count:
            raise UsageError("prompts is empty; give at least one prompt")
        negatives = _per_sample("negative_prompts", negative_prompts, count)
        texts = list(dict.fromkeys([*prompts, *negatives]))
        text_tokens = self.encode_prompts(texts)
        images = [
            [entry] if isinstance(entry, Image.Image) else list(entry or ())
            for entry in _per_sample("references", references, count)
        ]
        distinct = {id(image): image for entry in images for image in entry}
        aligned = dict(zip(distinct, self.encode_references(list(distinct.values())), strict=True)) if distinct else {}
        return self.generate_from_tokens(
            text_tokens[[texts.index(prompt) for prompt in prompts]],
            [[aligned[id(image)] for image in entry] for entry in images],
            text_tokens[[texts.index(prompt) for prompt in negatives]],
            seeds=seeds,
            **settings,
        )

    def __call__(
        self,
        prompt: str | Sequence[str],
        references: References | Sequence[References] = None,
        *,
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] = 0,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> StableDiffusionPipelineOutput | tuple:
        """Generate as other diffusers pipelines do.

        Args:
            prompt: one prompt or several.
            references: with one prompt, its image or images. With several prompts, one image for all of them, or a
                sequence with one entry per prompt: an image, several, or None.
            negative_prompt: one for all, or one per prompt.
            seed: one for all, or one per prompt.
            num_inference_steps: None is the model's default.
            output_type: ``pil`` for PIL images, ``pt`` for a float32 tensor ``[B, 3, H, W]`` in [0, 1].
            return_dict: False returns the tuple ``(images, None)``.
            settings: ``fusion``, ``strength``, ``guidance_scale``, ``scheduler``, ``height`` and ``width`` as in
                :meth:`generate_from_tokens`.

        Raises:
            ModelError: there are references, but the model lacks a part they need.
            UsageError: a value outside its limits, or a sequence of the wrong length.
        """
        if output_type not in ("pil", "pt"):
            raise UsageError(f"output_type is {output_type!r}; it must be one of pil, pt")
        if isinstance(prompt, str):
            prompt, references = [prompt], [references]  # type: ignore[list-item]
        images = self.generate(
            prompt,
            _per_sample("references", references, len(prompt)),
            seeds=_per_sample("seed", seed, len(prompt)),
            negative_prompts=negative_prompt,
            steps=num_inference_steps,
            **settings,
        )
        output = (
            self.image_processor.numpy_to_pil(images.permute(0, 2, 3, 1).numpy()) if output_type == "pil" else images
        )
        return StableDiffusionPipelineOutput(output, None) if return_dict else (output, None)


def _per_sample(name: str, value: Any, count: int) -> list[Any]:
    """One value per sample, from one for all or a sequence."""
    if value is None or isinstance(value, str | int | float | Image.Image):
        return [value] * count
    values = list(value)
    if len(values) != count:
        raise UsageError(f"{name} has {len(values)} values for {count} prompts; give one for each prompt")
    return values
