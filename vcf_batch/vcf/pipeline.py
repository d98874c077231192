"""VCFPipeline: a batch of different prompts, each with references, fusion, strength, guidance and seed of its own."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NoReturn, Self

import diffusers
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image
from torch import Generator, Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from vcf_batch.config.limits import ADAPTED_ROLES, DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, FUSIONS
from vcf_batch.config.sampling import Sampling
from vcf_batch.config.strengths import default_strengths
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models.loading import load_errors, refuse_missing_weights
from vcf_batch.models.model_files import loadable, read_header
from vcf_batch.models.parts import REFERENCE_PARTS
from vcf_batch.models.prompt_tokens import refuse_without_words
from vcf_batch.models.resolution import TINY, tiny_folder
from vcf_batch.models.single_file import layout as single_file
from vcf_batch.vcf.acceleration import compile_forward, replay_small_batches, upload
from vcf_batch.vcf.aligner import ENCODE_BATCH, ImageAligner, squash
from vcf_batch.vcf.arguments import (
    References,
    draw,
    encode_texts,
    fuse_references,
    leveled,
    per_sample,
    tell_unknown,
    told_sizes,
)
from vcf_batch.vcf.attention import Kernel, use_kernel
from vcf_batch.vcf.base.family import BaseFamily, EncodedText
from vcf_batch.vcf.base.layout import layout_of
from vcf_batch.vcf.base.stable_diffusion import StableDiffusion
from vcf_batch.vcf.call import call
from vcf_batch.vcf.fusion import Conditioning, Fusion, condition
from vcf_batch.vcf.ip_adapter import IPAdapter, load_ip_adapter
from vcf_batch.vcf.roles.role import Role
from vcf_batch.vcf.sampling import Generators, denoise, prepare_scheduler, recomputed

Sampler = Callable[[Tensor, Conditioning], Tensor]
"""Function that makes images of noise and conditioning."""

DECODE_BATCH = 8
DECODE_BYTES = DECODE_BATCH * 768 * 768 * 2
"""Most bytes of one channel of the images that are decoded at once, so that the decoder's feature maps stay near 9 GB
whatever the size of images: 8 of 768 x 768 in 16 bits, 2 of 1024 x 1024 in float32."""


class VCFPipeline(StableDiffusionPipeline):
    """Stable Diffusion conditioned on prompts and reference images by Visual Concept Fusion (docs/method.md).

    Sample i of a batch equals the same sample generated alone: noise comes from one CPU generator per sample, and
    nothing is averaged, scaled or padded visibly over the batch. In float32 on a CPU they agree within 1e-4 on images
    in [0, 1]. In bfloat16 a batch may take other kernels than a single sample, whose rounding (8 bits of mantissa)
    grows over the steps: the tests allow 0.05, with a mean of 0.005.

    :func:`~vcf_batch.vcf.fusion.condition`, :func:`~vcf_batch.vcf.sampling.denoise` and :meth:`decode` are
    differentiable; gradients are switched off in the encoders and in the methods that generate.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: as in ``StableDiffusionPipeline``.
        feature_extractor: gives the mean and standard deviation that references are normalised with.
        image_encoder: the vision tower whose penultimate hidden state the aligner reads.
        aligner: carries image tokens into the text space. It and the two before are needed for references only.
        safety_checker: not supported, must be None.
        requires_safety_checker: kept in the configuration, because ``StableDiffusionPipeline`` expects it there.
        default_steps: denoising steps where none are given.
        default_guidance_scale: guidance scale where none is given.
        default_strength: strength of ``concat`` where none is given, for an aligner that brings none of its own and
            needs another one than the paper's 1. The other fusions keep the paper's 0.3.

    Raises:
        ModelError: aligner, vision tower and UNet do not fit each other, the UNet is of a distilled model, or there is
            a safety checker.
    """

    ip_adapter: IPAdapter | None = None
    """The IP-Adapter of :meth:`use_ip_adapter`. It is no part of the model, and not saved with it."""

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
        if unet is not None and (width := unet.config.time_cond_proj_dim) is not None:
            raise ModelError(
                f"the UNet takes the guidance scale as an input (its time_cond_proj_dim is {width}), as models "
                "distilled for few steps do; use a model without distillation"
            )
        # This checks the limits.
        default_strengths(aligner and aligner.config, {"default_strength": default_strength})
        if tokenizer is not None:
            refuse_without_words(tokenizer)
        self._register_base(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
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
    def _class_for(cls, folder: str, given: Mapping[str, Any]) -> "type[VCFPipeline]":
        """The class for the family of the model in a folder, in one file or on the Hub.

        Raises:
            ModelError: see :func:`vcf_batch.vcf.base.layout.layout_of`, or the file is no Stable Diffusion.
        """
        if cls is not VCFPipeline or folder == TINY:
            return cls
        names = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only")
        try:
            if single_file.is_single_file(folder):
                index = single_file.read_config(_layout_of(folder), "model_index.json")
            else:
                index = cls.load_config(folder, **{name: given[name] for name in names if name in given})
        except OSError:  # loading tells what is wrong with it
            return cls
        module, _, name = layout_of(index, folder).pipeline.partition(":")
        own: type[VCFPipeline] = getattr(importlib.import_module(module), name)
        return own

    @classmethod
    def _dtypes(cls, place: str, dtype: Any) -> Any:
        """The dtype of each part of a model in a folder or on the Hub, where ``dtype`` is asked for."""
        return dtype

    def _register_base(self, **parts: Any) -> None:
        """Register the parts that the base model has, by name, as the pipeline of diffusers does."""
        super().__init__(**parts, safety_checker=None, requires_safety_checker=False)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "VCFPipeline":
        """Load a saved VCFPipeline, or a plain Stable Diffusion model with the missing parts given as arguments.

        For a Stable Diffusion XL it is a :class:`vcf_batch.vcf.base.pipeline_xl.VCFXLPipeline`.

        Takes what ``DiffusionPipeline.from_pretrained`` takes, ``tiny`` for the embedded model, and a local safetensors
        file with a whole Stable Diffusion 1.x, 2.x or XL, whose configuration is the published model's; a safety
        checker is never loaded. Parts that a folder has in one variant alone, such as ``fp16``, are loaded from it.
        Without a dtype every part is float32, however it is stored.

        Raises:
            ModelError: the files of a network lack some of its weights, a file is no Stable Diffusion, or the model is
                a refiner or for inpainting.
        """
        given, folder = dict(kwargs), str(pretrained_model_name_or_path)
        if (own := cls._class_for(folder, given)) is not cls:
            return own.from_pretrained(folder, **given)
        if cls is VCFPipeline:
            given = {"safety_checker": None, **given}
        if folder == TINY:
            folder = tiny_folder()
        # Without a dtype transformers would keep the stored type of its parts, and diffusers gives float32 to its own.
        dtype = given.pop("dtype", given.pop("torch_dtype", torch.float32))
        if single_file.is_single_file(folder):
            return cls._from_file(folder, given | {"dtype": dtype})
        given["dtype"] = cls._dtypes(folder, dtype)
        if "variant" in given:
            return super().from_pretrained(folder, **given)
        with loadable(folder, given) as (place, variant):
            pipeline = super().from_pretrained(place, **given | ({"variant": variant} if variant else {}))
        _refuse_meta(pipeline, folder)
        return pipeline

    @classmethod
    def _from_file(cls, file: str, given: dict[str, Any]) -> "VCFPipeline":
        """Load a Stable Diffusion from one file; see :meth:`from_pretrained`."""
        given = given | {"local_files_only": True}
        # diffusers moves weights that the file lacks, and fails.
        with (
            single_file.folder_of(_layout_of(file)) as config,
            load_errors(file, ". If the file lacks weights, copy it again"),
        ):
            given["dtype"] = cls._dtypes(config, given["dtype"])
            if isinstance(given["dtype"], dict):  # diffusers takes one dtype for all parts of a file
                own, given["dtype"] = given["dtype"]["vae"], given["dtype"]["default"]
                given.setdefault("vae", _vae_of(file, config, own))
            pipeline = cls.from_single_file(file, config=config, **given)
        _refuse_meta(pipeline, file)
        return pipeline

    def set_up(self, device: str, compiled: bool = False, attention: Kernel | None = None) -> Self:
        """Get the networks ready to sample: frozen, on their device, in the layout that its convolutions want.

        Args:
            device: ``cuda`` or ``cpu``.
            compiled: compile UNet and VAE decoder when they are first called, and for each new shape; on a GPU, also
                record the UNet's calls for batches of one or two.
            attention: kernel of the UNet's attention where no gradients flow; None is torch's own choice.
        """
        self.set_progress_bar_config(disable=True)
        for network in (self.unet, self.vae):
            network.requires_grad_(False)  # gradients pass through them, on the way to conditioning and noise
        self.to(device)
        if self.aligner is not None:
            self.aligner.projections = {role: each.to(device) for role, each in self.aligner.projections.items()}
        if self.ip_adapter is not None:
            self.ip_adapter.to(device)
        if device == "cuda":
            # Tensor cores take channels last, and get a copy otherwise. On CPUs it was measured to make no difference.
            for network in (self.unet, self.vae):
                network.to(memory_format=torch.channels_last)
        use_kernel(self.unet, attention)
        if compiled:
            for network in (self.unet, self.vae.decoder):
                compile_forward(network)
            if device == "cuda":
                replay_small_batches(self.unet)
        return self

    def load_ip_adapter(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse diffusers' way to load an IP-Adapter, whose strength is one for a whole batch.

        Raises:
            UsageError: always; :meth:`use_ip_adapter` loads one.
        """
        raise UsageError(
            'load_ip_adapter is not supported: call use_ip_adapter(weights, encoder), and give fusion="ip_adapter" and '
            "strength in the call"
        )

    def use_ip_adapter(self, weights: str, encoder: str) -> None:
        """Load an IP-Adapter, so that ``fusion="ip_adapter"`` can be asked for.

        Call it before :meth:`set_up`, or with the pipeline on its device and not compiled: the adapter is moved by
        :meth:`set_up` alone.

        Args:
            weights: file in the published layout, ``.safetensors`` or ``.bin``.
            encoder: folder of the CLIP vision tower that the adapter was trained with.

        Raises:
            ModelError: the file is no IP-Adapter, or does not fit the model or the encoder.
        """
        self.ip_adapter = load_ip_adapter(weights, encoder, self.unet)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], clip_skip: int | None = None) -> Tensor:
        """Text tokens of prompts, exactly as ``encode_prompt`` of diffusers gives them; it would wait for the device.

        Args:
            prompts: one or more; what exceeds :attr:`max_tokens` is cut off with a warning.
            clip_skip: number of the text encoder's last layers that are left out; None leaves out none.

        Returns:
            ``[B, T, Dt]`` on the pipeline's device, in the text encoder's dtype.

        Raises:
            UsageError: the text encoder has fewer layers.
        """
        return torch.stack([text.tokens for text in self.family.encode(prompts, clip_skip=clip_skip)])

    @torch.no_grad()
    def encode_windows(self, prompts: Sequence[str], clip_skip: int | None = None) -> list[Tensor]:
        """Text tokens of prompts of any length, in windows of :attr:`max_tokens` tokens with a begin and an end each.

        Each window is encoded alone, and the tokens of a prompt's windows stand one after the other: the way of
        AUTOMATIC1111's web UI and of compel, without the former's break at commas. The first window is what
        :meth:`encode_prompts` gives.

        Args:
            prompts: one or more.
            clip_skip: see :meth:`encode_prompts`.

        Returns:
            ``[W * T, Dt]`` for each prompt, with W windows, on the pipeline's device.

        Raises:
            UsageError: the text encoder has fewer layers.
        """
        return [text.tokens for text in self.family.encode(prompts, True, clip_skip)]

    @property
    def family(self) -> BaseFamily:
        """What is particular to the family of this base model."""
        return StableDiffusion(self)

    @property
    def tokenizers(self) -> Sequence[Any]:
        """The tokenizer of each text encoder."""
        return [self.tokenizer]

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens that the text encoder gets of a prompt."""
        return int(self.tokenizer.model_max_length)

    @torch.no_grad()
    def encode_references(
        self, images: Sequence[Image.Image], image_tokens: str | None = None, *, adapted: bool = False
    ) -> Tensor:
        """Image tokens of reference images: the aligner's (docs/method.md, sections 1 and 2), or an IP-Adapter's.

        Args:
            images: one or more, of any size.
            image_tokens: ``all``, ``patches`` or ``cls``; None is the aligner's own choice.
            adapted: give the IP-Adapter's tokens, for the fusion ``ip_adapter``.

        Returns:
            ``[B, N, Dt]`` on the pipeline's device, in the dtype of aligner or adapter.

        Raises:
            ModelError: the model lacks one of :data:`vcf_batch.models.parts.REFERENCE_PARTS`, or the adapter.
            UsageError: no such choice of image tokens.
        """
        if adapted:
            return self.adapter.encode(images)
        self._require_reference_parts()
        tokens = self.aligner.select_tokens(self.vision_tokens(images), image_tokens)
        return self.aligner(tokens.to(self.aligner.dtype))

    @torch.no_grad()
    def vision_tokens(self, images: Sequence[Image.Image]) -> Tensor:
        """Image tokens that the aligner reads: the vision tower's penultimate hidden state (docs/method.md, section 1).

        Returns:
            ``[B, 1 + P, Dv]``, CLS first, before :meth:`ImageAligner.select_tokens`.
        """
        tower, statistics = self.image_encoder, (self.feature_extractor.image_mean, self.feature_extractor.image_std)
        hidden_states = []
        for start in range(0, len(images), ENCODE_BATCH):
            batch = images[start : start + ENCODE_BATCH]
            pixels = self.aligner.preprocess(batch, tower.config.image_size, *statistics)
            pixels = upload(pixels, self._execution_device).to(tower.dtype)
            hidden_states.append(tower(pixels, output_hidden_states=True).hidden_states[-2])
        return torch.cat(hidden_states)

    def project(self, tokens: Tensor, role: Role, adapted: bool = False) -> Tensor:
        """The part of a reference's tokens ``[N, Dt]`` that a role uses.

        Args:
            tokens: tokens of the aligner, or of an IP-Adapter, which has no projections.
            role: the role of the reference.
            adapted: whether they are an IP-Adapter's.

        Raises:
            ModelError: the role needs a projection, and the aligner has none.
            UsageError: an IP-Adapter does not take the role.
        """
        if adapted and role.name not in ADAPTED_ROLES:
            raise UsageError(
                f"the role is {role.name}; with the fusion ip_adapter it must be one of {', '.join(ADAPTED_ROLES)}"
            )
        if adapted or not role.projected:
            return tokens
        if (projection := self.aligner.projections.get(role.name)) is None:
            raise ModelError(
                f"the role {role.name} needs a projection, and this model's aligner has none: fit one with 'vcf-batch "
                "model fit-roles'"
            )
        return projection(tokens)

    def squash(self, image: Image.Image, *, adapted: bool = False) -> Image.Image:
        """The first step of :meth:`encode_references`, which is costly for a large image.

        Doing it twice changes nothing, and any thread may do it.

        Raises:
            ModelError: the model lacks one of :data:`vcf_batch.models.parts.REFERENCE_PARTS`, or the adapter.
        """
        if adapted:
            return self.adapter.prepare(image)
        self._require_reference_parts()
        return squash(image, self.image_encoder.config.image_size)

    @property
    def adapter(self) -> IPAdapter:
        """The IP-Adapter.

        Raises:
            ModelError: there is none.
        """
        if self.ip_adapter is None:
            raise ModelError("the fusion is ip_adapter, but no IP-Adapter is loaded: call use_ip_adapter first")
        return self.ip_adapter

    def _require_reference_parts(self) -> None:
        for name in REFERENCE_PARTS:
            if getattr(self, name) is None:
                raise ModelError(
                    f"this model has no {name}, and references need one; "
                    f"load it with VCFPipeline.from_pretrained(..., {name}=...), or leave the references out"
                )

    def resolve_strength(self, fusion: str, strength: float | None) -> float:
        """The given strength, else the default of fusion, aligner and model:
        :func:`vcf_batch.config.strengths.default_strengths`.

        Raises:
            UsageError: no such fusion.
        """
        if fusion not in FUSIONS:
            raise UsageError(f"fusion is {fusion!r}; it must be one of {', '.join(FUSIONS)}")
        own = self.aligner.config if self.aligner is not None else None
        return default_strengths(own, self.config)[fusion] if strength is None else strength

    def draw_noise(
        self,
        seeds: Sequence[int] | Generators,
        height: int | None = None,
        width: int | None = None,
        added: int = 0,
        latents: Tensor | None = None,
        count: int | None = None,
    ) -> Tensor:
        """Standard normal noise, drawn for each sample on the CPU from its own seed.

        Args:
            seeds: one per sample; or generators in their place, one per sample or one for all.
            height, width: size of the image in pixels; None is the model's native size.
            added: number of noises that follow the initial one, for the steps of a sampler that adds noise.
            latents: the initial noise ``[B, C, H / f, W / f]``; None draws it.
            count: number of samples, which one generator for all does not tell.

        Returns:
            float32 ``[B, 1 + added, C, H / f, W / f]`` on the pipeline's device, with the VAE's factor ``f``.

        Raises:
            UsageError: a size is not a multiple of ``f``, or the latents have another shape.
        """
        native = self.unet.config.sample_size
        native = (native, native) if isinstance(native, int) else native
        shape = [self.unet.config.in_channels]
        for name, pixels, latent in (("height", height, native[0]), ("width", width, native[1])):
            if pixels is not None and (pixels <= 0 or pixels % self.vae_scale_factor):
                raise UsageError(f"{name} is {pixels}; it must be a multiple of {self.vae_scale_factor}")
            shape.append(latent if pixels is None else pixels // self.vae_scale_factor)
        if not isinstance(seeds, Generator):
            seeds = [each if isinstance(each, Generator) else Generator().manual_seed(each) for each in seeds]
            count = len(seeds)
        if latents is not None:
            found = [*latents.shape]
            if height is None and width is None and len(found) == 4:
                shape = [shape[0], *found[2:]]
            if found != [count, *shape]:
                raise UsageError(f"latents has the shape {found}; it must have {[count, *shape]}")
        noise = [] if latents is None else [latents.float()]
        noise += [draw(seeds, shape, count) for _ in range(1 + added - len(noise))]
        return upload(torch.stack([each.to(noise[-1].device) for each in noise], dim=1), self._execution_device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents, a few at a time. Differentiable, one at a time and without keeping activations.

        Args:
            latents: ``[B, C, h, w]``.

        Returns:
            float32 ``[B, 3, H, W]`` in [0, 1], on the device of the latents; NaN where a value is not finite.
        """
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        image_bytes = latents[0, 0].numel() * self.vae_scale_factor**2 * scaled.element_size()
        most = 1 if torch.is_grad_enabled() else max(1, min(DECODE_BATCH, DECODE_BYTES // image_bytes))
        parts = scaled.split(most)
        decoded = [recomputed(functools.partial(self.vae.decode, return_dict=False), part)[0].float() for part in parts]
        images = torch.cat(decoded) / 2 + 0.5
        # Clamping would turn infinity into white or black, which looks like an image.
        return images.clamp(0, 1).where(images.isfinite(), torch.nan)

    @torch.no_grad()
    def prepare(
        self,
        text_tokens: Tensor | Sequence[Tensor | EncodedText],
        negative_tokens: Tensor | Sequence[Tensor | EncodedText],
        fusions: Sequence[Fusion],
        *,
        seeds: Sequence[int],
        guidance_scale: float | Sequence[float | None] | None = None,
        sampling: Sampling,
    ) -> tuple[Sampler, Tensor, Conditioning]:
        """Prepare the sampling, from encoded texts and the tokens of :meth:`encode_references`.

        Args:
            text_tokens, negative_tokens: the prompts and negative prompts as :attr:`family` encodes them, of as many
                tokens for each sample. Tokens ``[T, Dt]`` alone are enough for a family without pooled embeddings.
            fusions: one per sample, with its references' tokens and the way they join the prompt.
            seeds: one per sample, 0 to :data:`vcf_batch.config.limits.MAX_SEED`.
            guidance_scale: one for all samples or one per sample; 1 is no guidance, None is the model's default.
            sampling: the way from noise to an image, for all samples.

        Returns:
            A differentiable function that makes images of noise and conditioning, float32 ``[B, 3, H, W]`` in [0, 1];
            the noise; and the conditioning. The function gives the same images for the same noise, also with a
            scheduler that draws more.

        Raises:
            UsageError: a value outside its limits, or a sequence of the wrong length.
        """
        count = len(text_tokens)
        scales = self._scales(guidance_scale, count)
        used = self._with_steps(sampling)
        generators = [Generator().manual_seed(seed) for seed in per_sample("seeds", seeds, count)]
        noise = self.draw_noise(generators, used.height, used.width, used.added_noises)

        def sample(noise: Tensor, conditioning: Conditioning) -> Tensor:
            scheduler = prepare_scheduler(self.scheduler, used)
            own = None if used.scheduler else [each.clone_state() for each in generators]
            settings: dict[str, Any] = {"guidance_scale": scales, "sampling": used, "generators": own}
            return self.decode(denoise(self.unet, scheduler, noise, conditioning, **settings))

        return sample, noise, self.conditioned(text_tokens, negative_tokens, fusions, noise, used)

    def conditioned(
        self,
        text_tokens: Tensor | Sequence[Tensor | EncodedText],
        negative_tokens: Tensor | Sequence[Tensor | EncodedText],
        fusions: Sequence[Fusion],
        noise: Tensor,
        sampling: Sampling,
    ) -> Conditioning:
        """The conditioning of a batch, with what the family gives the UNet besides; for the arguments see
        :meth:`prepare`.

        Args:
            noise: ``[B, 1 + added, C, h, w]``, whose size is that of the images.

        Raises:
            UsageError: see :meth:`vcf_batch.vcf.base.family.BaseFamily.added_inputs`.
        """
        positive = [EncodedText.of(text) for text in text_tokens]
        negative = [self.family.negative(EncodedText.of(text)) for text in negative_tokens]
        height, width = (edge * self.vae_scale_factor for edge in noise.shape[-2:])
        added = self.family.added_inputs(positive, negative, (height, width), sampling)
        first, second = ([text.tokens for text in side] for side in (positive, negative))
        return dataclasses.replace(condition(first, second, fusions), added=added)

    def _scales(self, guidance_scale: float | Sequence[float | None] | None, count: int) -> list[float]:
        """The guidance scale of each sample, from one for all or one each; None is the model's default."""
        scales = per_sample("guidance_scale", guidance_scale, count)
        return [self.config.default_guidance_scale if scale is None else scale for scale in scales]

    def _with_steps(self, sampling: Sampling) -> Sampling:
        """The sampling with its number of steps: the given one, else the model's default."""
        return dataclasses.replace(
            sampling, steps=self.config.default_steps if sampling.steps is None else sampling.steps
        )

    @torch.no_grad()
    def generate_from_tokens(self, *args: Any, **settings: Any) -> Tensor:
        """Generate images from the arguments of :meth:`prepare`. Nothing waits for the device.

        Returns:
            float32 ``[B, 3, H, W]`` in [0, 1] on the pipeline's device.

        Raises:
            UsageError: a value outside its limits, or a sequence of the wrong length.
        """
        sample, noise, conditioning = self.prepare(*args, **settings)
        return sample(noise, conditioning)

    @torch.no_grad()
    @tell_unknown
    def generate(
        self,
        prompts: Sequence[str],
        references: Sequence[References] | None = None,
        *,
        seeds: Sequence[int],
        negative_prompts: str | Sequence[str | None] | None = "",
        long_prompts: str = "truncate",
        fusion: str | Sequence[str] = "concat",
        strength: float | Sequence[float | None] | None = None,
        fusion_lo: float | Sequence[float] = 0.0,
        fusion_hi: float | Sequence[float] = 1.0,
        reference_weights: Sequence[Sequence[float] | None] | None = None,
        reference_roles: str | Sequence[str | Sequence[str] | None] | None = None,
        reference_masks: Sequence[References] | None = None,
        negative_references: Image.Image | Sequence[Image.Image | None] | None = None,
        unconditional: str = "zeros",
        image_tokens: str | None = None,
        guidance_scale: float | Sequence[float | None] | None = None,
        guidance_lo: float = Sampling.guidance_lo,
        guidance_hi: float = Sampling.guidance_hi,
        deep_cache: int = Sampling.deep_cache,
        steps: int | None = Sampling.steps,
        scheduler: str | None = Sampling.scheduler,
        eta: float = Sampling.eta,
        height: int | None = Sampling.height,
        width: int | None = Sampling.width,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
    ) -> Tensor:
        """Generate one image per prompt. Each distinct prompt and each distinct image object is encoded once.

        Arguments that calling the pipeline has, too, mean the same there. One with a value per prompt may also be a
        single value for all, except ``prompts`` and ``seeds``.

        Args:
            prompts: B prompts.
            references: for each prompt one image, several, or None for text only. None is text only throughout.
            seeds: one per prompt.
            negative_prompts: texts that the images should not show.
            long_prompts: ``truncate`` cuts off what the text encoder does not take, ``chunk`` encodes it in windows
                (:meth:`encode_windows`).
            reference_weights: for each prompt one weight per reference; None is equal weights.
            guidance_scale: 1 is no guidance, 0 the unconditional side alone; None is the model's default.
            steps: number of denoising steps; None is the model's default.

        Returns:
            float32 ``[B, 3, H, W]`` in [0, 1] on the CPU.

        Raises:
            ModelError: there are references, but the model lacks a part they need.
            TypeError: there is no such argument; with the nearest one.
            UsageError: a value outside its limits, or a sequence of the wrong length.
        """
        if not (count := len(prompts)):
            raise UsageError("prompts is empty; give at least one prompt")
        negatives = [negative or "" for negative in per_sample("negative_prompts", negative_prompts, count)]
        texts = encode_texts(self, [*prompts, *negatives], long_prompts)
        fusions = fuse_references(
            self,
            count,
            references,
            reference_weights=reference_weights,
            reference_roles=reference_roles,
            reference_masks=reference_masks,
            negative_references=negative_references,
            fusion=fusion,
            strength=strength,
            fusion_lo=fusion_lo,
            fusion_hi=fusion_hi,
            unconditional=unconditional,
            image_tokens=image_tokens,
        )
        sampling = Sampling(
            guidance_lo=guidance_lo,
            guidance_hi=guidance_hi,
            deep_cache=deep_cache,
            steps=steps,
            scheduler=scheduler,
            eta=eta,
            height=height,
            width=width,
            **told_sizes(original_size, crops_coords_top_left, target_size),
        )
        return self.generate_from_tokens(
            *leveled(self, texts[:count], texts[count:]),
            fusions,
            seeds=seeds,
            guidance_scale=guidance_scale,
            sampling=sampling,
        ).cpu()

    __call__ = call

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether a call in progress is guided in any of its samples."""
        return any(scale > 1 for scale in per_sample("_guidance_scale", self._guidance_scale, 1))


# diffusers looks up the class that model_index.json names among its own.
diffusers.VCFPipeline = VCFPipeline


def _layout_of(file: str) -> str:
    """The layout of a checkpoint in one file: see :func:`vcf_batch.models.single_file.layout.layout_of`."""
    return single_file.layout_of(read_header(file), file)


def _vae_of(file: str, config: str, dtype: torch.dtype) -> AutoencoderKL:
    """The VAE of a checkpoint in one file, in a precision of its own; ``config`` is the folder of its layout."""
    settings: dict[str, Any] = {"config": config, "subfolder": "vae", "dtype": dtype, "local_files_only": True}
    vae: AutoencoderKL = AutoencoderKL.from_single_file(file, **settings)
    return vae


def _refuse_meta(pipeline: VCFPipeline, place: str) -> None:
    """Refuse a pipeline with weights that its files lack: diffusers leaves them without values, and says nothing.

    Raises:
        ModelError: there are such weights.
    """
    for part, network in pipeline.components.items():
        lacking = [name for name, own in getattr(network, "named_parameters", dict)() if own.is_meta]
        refuse_missing_weights({"missing_keys": lacking}, f"the {part} of {place}", "copy the model again")
