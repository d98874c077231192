"""Calling a VCFPipeline as other pipelines of diffusers are called, with their arguments, callbacks and results."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image
from torch import Generator, Tensor

from vcf_batch.config.limits import MAX_EDGE, MAX_STEPS
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import UsageError
from vcf_batch.vcf.arguments import (
    References,
    encode_texts,
    fuse_references,
    generators_of,
    leveled,
    per_sample,
    tell_unknown,
    texts_of,
    told_sizes,
    whole_number,
)
from vcf_batch.vcf.base.family import EncodedText
from vcf_batch.vcf.fusion import Conditioning
from vcf_batch.vcf.sampling import Moment, denoise, prepare_scheduler

if TYPE_CHECKING:
    from vcf_batch.vcf.pipeline import VCFPipeline

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@torch.no_grad()
@tell_unknown
def call(
    self: "VCFPipeline",
    prompt: str | Sequence[str] | None = None,
    references: References | Sequence[References] = None,
    *,
    reference_weights: Sequence[float] | Sequence[Sequence[float] | None] | None = None,
    reference_roles: str | Sequence[str] | Sequence[str | Sequence[str] | None] | None = None,
    reference_masks: References | Sequence[References] = None,
    fusion: str | Sequence[str] = "concat",
    strength: float | Sequence[float | None] | None = None,
    fusion_lo: float | Sequence[float] = 0.0,
    fusion_hi: float | Sequence[float] = 1.0,
    negative_prompt: str | Sequence[str | None] | None = None,
    negative_references: Image.Image | Sequence[Image.Image | None] | None = None,
    unconditional: str = "zeros",
    image_tokens: str | None = None,
    height: int | None = Sampling.height,
    width: int | None = Sampling.width,
    original_size: tuple[int, int] | None = None,
    crops_coords_top_left: tuple[int, int] = (0, 0),
    target_size: tuple[int, int] | None = None,
    num_inference_steps: int | None = Sampling.steps,
    guidance_scale: float | Sequence[float | None] | None = None,
    guidance_lo: float = Sampling.guidance_lo,
    guidance_hi: float = Sampling.guidance_hi,
    guidance_rescale: float = 0.0,
    deep_cache: int = Sampling.deep_cache,
    scheduler: str | None = Sampling.scheduler,
    eta: float = Sampling.eta,
    num_images_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    latents: Tensor | None = None,
    prompt_embeds: Tensor | None = None,
    negative_prompt_embeds: Tensor | None = None,
    pooled_prompt_embeds: Tensor | None = None,
    negative_pooled_prompt_embeds: Tensor | None = None,
    long_prompts: str = "truncate",
    clip_skip: int | None = None,
    output_type: str = "pil",
    return_dict: bool = True,
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
) -> StableDiffusionPipelineOutput | Any:
    """Generate as other pipelines of diffusers do.

    Without references, or at strength 0, the images are those of ``StableDiffusionPipeline`` with the same components,
    generators and arguments. What follows is for each of B prompts, given as one value for all or one for each prompt,
    where the type allows both; the images of a prompt stand one after the other.

    Args:
        prompt: one prompt or several; None where there are ``prompt_embeds``.
        references: with one prompt, its image or images. With several prompts, or with ``prompt_embeds``, one image for
            all of them, or a sequence with one entry per prompt: an image, several, or None.
        reference_weights: with one prompt, one weight per reference. With several prompts, such a sequence or None for
            each of them. Only ratios matter; None is equal weights.
        reference_roles: what each reference decides on: ``all``, ``style``, ``palette`` or ``layout`` (docs/roles.md).
            With one prompt, one role for all references or one for each. With several prompts, one for all, or for each
            of them such a value. None is ``all``.
        reference_masks: where in the picture each reference may act: images whose white parts say yes, of any size. As
            ``references``, with None for everywhere.
        fusion: ``concat``, ``naive``, ``cross_attention``, or ``ip_adapter`` after :meth:`use_ip_adapter`.
        strength: weight of the references, 0 or more. 0 is text only; None is the default of model and fusion.
        fusion_lo, fusion_hi: the part of the schedule in which references are used, as fractions of t / 999 (1 is pure
            noise), both ends included.
        negative_prompt: what the images should not show; None is the empty prompt.
        negative_references: images that the results should not look like; the unconditional side has them.
        unconditional: image tokens of that side for a prompt with references and no negative one: ``zeros`` as the
            authors do, or those of a ``blank`` image. ``negative`` is ``zeros``, and requires negative references.
        image_tokens: ``all``, ``patches`` or ``cls``; None is the aligner's own choice.
        height, width: size of the images in pixels, a multiple of the VAE's factor (8 for Stable Diffusion); None is
            the size of the latents, else the model's native size.
        num_inference_steps: 1 to 1000; None is the model's default.
        guidance_scale: 1 or less is no guidance, as in diffusers; None is the model's default.
        guidance_lo, guidance_hi: the part of the schedule that is guided, as fractions.
        guidance_rescale: share, 0 to 1, of rescaling each guided prediction to the deviation of the prompt's own: Lin
            et al. 2023 (arXiv 2305.08891), section 3.4.
        deep_cache: number of steps that share one output of the UNet's deep blocks:
            :class:`vcf_batch.config.sampling.Sampling`.
        scheduler: ``ddim``, ``dpm++`` or ``euler``, with the noise schedule of the pipeline's own; None is the
            pipeline's own :attr:`scheduler`.
        eta: share of new noise in each step, 0 to 1; above 0 for DDIM alone.
        num_images_per_prompt: number of images of each prompt.
        seed: one per prompt, or one per image. None is 0, unless there are generators. Each further image of a prompt
            is another draw: :func:`vcf_batch.sharding.draw_seed`.
        generator: generators in place of seeds: one for each image, or one for the batch, in which case the images
            depend on the batch. They go on where they are, so that the next call gets other noise.
        latents: ``[B, C, H / f, W / f]``, the initial noise, standard normal; None draws it.
        original_size, crops_coords_top_left, target_size: what a Stable Diffusion XL is told of the picture, heights
            and tops first: the size before and the place of its cropping, and the size meant. None is the size of the
            images, and (0, 0).
        prompt_embeds, negative_prompt_embeds: ``[B, T, Dt]``, text tokens in place of texts.
        pooled_prompt_embeds, negative_pooled_prompt_embeds: ``[B, Dp]``, for a Stable Diffusion XL, beside the text
            tokens of that side.
        long_prompts: ``truncate`` cuts off what the text encoder does not take, ``chunk`` encodes it in windows
            (:meth:`VCFPipeline.encode_windows`).
        clip_skip: number of the text encoder's last layers that the prompts leave out; negative prompts do not.
        output_type: ``pil`` for PIL images, ``np`` for an array ``[B, H, W, 3]`` and ``pt`` for a tensor
            ``[B, 3, H, W]`` on the pipeline's device, both float32 in [0, 1]; ``latent`` for the float32 latents
            ``[B, C, H / f, W / f]``, which the VAE has not decoded.
        return_dict: False returns the tuple ``(images, None)``.
        callback_on_step_end: called after each step with pipeline, number of the step, timestep and a dictionary of
            tensors, which it returns: :class:`StepEnd`.
        callback_on_step_end_tensor_inputs: names of these tensors.

    Raises:
        ModelError: there are references, but the model lacks a part they need.
        TypeError: there is no such argument; with the nearest one.
        UsageError: a value outside its limits, a sequence of the wrong length, or two arguments for the same thing.
    """
    if output_type not in OUTPUT_TYPES:
        raise UsageError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}")
    if num_inference_steps is not None:
        whole_number("num_inference_steps", num_inference_steps, 1, MAX_STEPS)
    whole_number("num_images_per_prompt", num_images_per_prompt, 1)
    for name, edge in (("height", height), ("width", width)):
        if edge is not None:
            whole_number(name, edge, 1, MAX_EDGE)
    if not isinstance(guidance_rescale, Real) or not 0 <= guidance_rescale <= 1:
        raise UsageError(f"guidance_rescale is {guidance_rescale}; it must be between 0 and 1")
    given = {
        "latents": latents,
        "prompt_embeds": prompt_embeds,
        "negative_prompt_embeds": negative_prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
    }
    for name, tensor in given.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise UsageError(f"{name} is a {type(tensor).__name__}; give a torch.Tensor")
    if callback_on_step_end is not None and not callable(callback_on_step_end):
        raise UsageError(f"callback_on_step_end is {callback_on_step_end!r}; give a function")
    if isinstance(prompt, str):
        references, reference_weights = [references], [reference_weights]  # type: ignore[list-item, assignment]
        reference_roles, reference_masks = [reference_roles], [reference_masks]  # type: ignore[list-item]
    prompt = prompt if prompt is None else texts_of("prompt", prompt)
    for name, texts, tokens in (
        ("prompt", prompt, prompt_embeds),
        ("negative_prompt", negative_prompt, negative_prompt_embeds),
    ):
        if texts is not None and tokens is not None:
            raise UsageError(f"there are {name} and {name}_embeds; give one of them")
    if prompt is None and prompt_embeds is None:
        raise UsageError("there are neither prompt nor prompt_embeds; give one of them")
    count = len(prompt if prompt_embeds is None else prompt_embeds)  # type: ignore[arg-type]
    if not count:
        raise UsageError("prompt is empty; give at least one prompt")
    scales = guided_scales(self._scales(guidance_scale, count))
    device, images = self._execution_device, num_images_per_prompt
    if prompt is not None:
        positive = encode_texts(self, prompt, long_prompts, clip_skip)
    else:
        positive = _encoded(prompt_embeds.to(device), pooled_prompt_embeds)  # type: ignore[union-attr]
    if negative_prompt_embeds is not None:
        negative = _encoded(negative_prompt_embeds.to(device), negative_pooled_prompt_embeds)
    elif any(scale != 1 for scale in scales) or (callback_on_step_end and self.text_encoder is not None):
        texts = [text or "" for text in per_sample("negative_prompt", negative_prompt, count)]
        negative = encode_texts(self, texts, long_prompts)
    else:
        # No step computes their side.
        negative = [text._replace(tokens=torch.zeros_like(text.tokens)) for text in positive]
    if prompt_embeds is None and negative_prompt_embeds is None:
        positive, negative = leveled(self, positive, negative)
    shapes = [[len(side), *side[0].tokens.shape] for side in (positive, negative)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"prompt_embeds or the tokens of the prompts have the shape {shapes[0]}, and those of the negative ones "
            f"{shapes[1]}; give prompt_embeds and negative_prompt_embeds of one shape"
        )
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
    sampling = self._with_steps(
        Sampling(
            guidance_lo=guidance_lo,
            guidance_hi=guidance_hi,
            deep_cache=deep_cache,
            steps=num_inference_steps,
            scheduler=scheduler,
            eta=eta,
            height=height,
            width=width,
            **told_sizes(original_size, crops_coords_top_left, target_size),
        )
    )
    generators = generators_of(seed, generator, count, images)
    noise = self.draw_noise(
        generators, height, width, added=sampling.added_noises, latents=latents, count=count * images
    )
    used = prepare_scheduler(self.scheduler, sampling)
    self._guidance_scale = scales[0] if len({*scales}) == 1 else [each for each in scales for _ in range(images)]
    self._guidance_rescale, self._clip_skip, self._interrupt = guidance_rescale, clip_skip, False
    self._num_timesteps, self._cross_attention_kwargs = len(used.timesteps), None
    with self.progress_bar(total=len(used.timesteps)) as bar:
        made = denoise(
            self.unet,
            used,
            noise,
            self.conditioned(
                [each for each in positive for _ in range(images)],
                [each for each in negative for _ in range(images)],
                [each for each in fusions for _ in range(images)],
                noise,
                sampling,
            ),
            guidance_scale=[each for each in scales for _ in range(images)],
            sampling=sampling,
            guidance_rescale=guidance_rescale,
            generators=generators,
            watch=StepEnd(self, bar, callback_on_step_end, callback_on_step_end_tensor_inputs),
        )
    result: Any = made if output_type == "latent" else self.decode(made)
    if output_type in ("np", "pil"):
        result = result.cpu().permute(0, 2, 3, 1).numpy()
    if output_type == "pil":
        result = self.image_processor.numpy_to_pil(result)
    self.maybe_free_model_hooks()
    return StableDiffusionPipelineOutput(result, None) if return_dict else (result, None)


class StepEnd:
    """diffusers' progress bar and ``callback_on_step_end``, as the denoising calls them after each step.

    Args:
        pipeline: what the callback gets first. It may change ``_guidance_scale`` and set ``_interrupt`` there.
        bar: progress bar.
        callback: called with pipeline, number of the step, timestep and the dictionary of the tensors in ``names``;
            returns that dictionary, in which it may have replaced tensors. None is no callback.
        names: of ``latents`` (float32), ``prompt_embeds`` (what the UNet was given, of twice as many rows where it is
            guided, the unconditional side first) and ``negative_prompt_embeds``.

    Raises:
        UsageError: a name is another one.
    """

    def __init__(self, pipeline: "VCFPipeline", bar: Any, callback: Any, names: Sequence[str]) -> None:
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            names = callback.tensor_inputs
        known = pipeline._callback_tensor_inputs
        for name in names:
            if name not in known:
                raise UsageError(
                    f"callback_on_step_end_tensor_inputs has {name!r}; it may have {', '.join(known)} alone"
                )
        self.pipeline, self.bar, self.callback, self.names = pipeline, bar, callback, names

    def __call__(self, moment: Moment) -> None:
        """Call the callback, and take what it has replaced.

        Raises:
            UsageError: it returned something else than its dictionary, or tokens that cannot take effect.
        """
        self.bar.update()
        if self.callback is None:
            return
        negative = moment.conditioning.negative.tokens
        tensors = {"latents": moment.latents, "prompt_embeds": moment.tokens, "negative_prompt_embeds": negative}
        returned = self.callback(
            self.pipeline, moment.number, moment.timestep, {name: tensors[name] for name in self.names}
        )
        if not isinstance(returned, dict):
            raise UsageError(
                f"callback_on_step_end returned {type(returned).__name__}; it must return its last argument, the "
                "dictionary of tensors"
            )
        moment.latents = returned.get("latents", moment.latents)
        if (tokens := returned.get("prompt_embeds", moment.tokens)) is not moment.tokens:
            moment.conditioning = _replaced(moment.conditioning, tokens)
        if (tokens := returned.get("negative_prompt_embeds", negative)) is not negative:
            moment.conditioning = _replaced(moment.conditioning, None, tokens)
        scales = per_sample("the pipeline's _guidance_scale", self.pipeline._guidance_scale, len(moment.latents))
        moment.guidance_scale = guided_scales(scales)
        moment.stopped = self.pipeline.interrupt


def _encoded(tokens: Tensor, pooled: Tensor | None) -> list[EncodedText]:
    """Texts by their tokens ``[B, T, Dt]``, with their pooled embeddings ``[B, Dp]``.

    Raises:
        UsageError: there is another number of pooled embeddings.
    """
    if pooled is None:
        return [EncodedText(own) for own in tokens]
    if len(pooled) != len(tokens):
        raise UsageError(
            f"there are pooled embeddings of {len(pooled)} texts, and tokens of {len(tokens)}; give one for each"
        )
    return [EncodedText(*both) for both in zip(tokens, pooled.to(tokens.device), strict=True)]


def guided_scales(scales: Sequence[Any]) -> list[float]:
    """Guidance scales as diffusers understands them: 1 or less is no guidance.

    Raises:
        UsageError: a scale is no finite number.
    """
    for scale in scales:
        if not isinstance(scale, Real) or not math.isfinite(scale):
            raise UsageError(f"guidance_scale is {scale}; it must be a finite number")
    return [max(1.0, scale) for scale in scales]


def _replaced(conditioning: Conditioning, tokens: Tensor | None, negative: Tensor | None = None) -> Conditioning:
    """A conditioning with other tokens: those of both sides, the unconditional one first, or those of one side."""
    positive = conditioning.positive.tokens
    if any(span != (0, 1) for span in conditioning.ranges) or conditioning.is_limited:
        raise UsageError(
            "callback_on_step_end replaced tokens of a call with fusion_lo or fusion_hi, or with roles or masks, "
            "whose steps have different tokens; leave these out, or the tokens as they are"
        )
    if tokens is not None and len(tokens) == 2 * len(positive):
        negative, tokens = tokens.chunk(2)
    sides = []
    for side, new in ((conditioning.positive, tokens), (conditioning.negative, negative)):
        if new is not None and new.shape != side.tokens.shape:
            raise UsageError(
                f"callback_on_step_end replaced tokens of shape {[*side.tokens.shape]} by {[*new.shape]}; keep the "
                "shape, or turn guidance off for half as many rows"
            )
        sides.append(side if new is None else dataclasses.replace(side, tokens=new))
    return dataclasses.replace(conditioning, positive=sides[0], negative=sides[1])
