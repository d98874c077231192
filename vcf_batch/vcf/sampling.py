"""Denoising: from noise to latents under a conditioning, with a named scheduler or the model's own. Differentiable."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Generator, Tensor
from torch.utils.checkpoint import checkpoint

from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models.loading import load_errors
from vcf_batch.models.schedule import PINNED, SCHEDULER_CONFIG, check_schedule
from vcf_batch.vcf.acceleration import upload
from vcf_batch.vcf.attention import ByQueries, accept_token_bias
from vcf_batch.vcf.deep_cache import DeepCache
from vcf_batch.vcf.fusion import Conditioning, Inside
from vcf_batch.vcf.roles.role import layers_of

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}

_OWN_NOISE = ("DPMSolverSDEScheduler",)
"""Schedulers of diffusers that draw noise for a whole batch from a seed of their own. Every other one that draws noise
takes it from generators."""

Generators = Generator | Sequence[Generator]
"""One generator for a whole batch, or one for each sample."""

MAX_ETA = 1 - 1e-6
"""Largest ``eta`` that DDIM is given. At 1 it takes the root of a difference that rounding may bring below 0."""


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A new scheduler with a checkpoint's noise schedule, prediction type and spacing. It draws no noise of its own.

    Args:
        name: one of :data:`vcf_batch.config.limits.SCHEDULERS`.
        config: the configuration of the checkpoint's own scheduler.

    Raises:
        ModelError: this scheduler does not sample as the configuration says.
    """
    check_schedule(name, config, "the model")
    with load_errors(f"{SCHEDULER_CONFIG} of the model", ". Correct that file, or use another --scheduler"):
        return _SCHEDULERS[name].from_config(config, **PINNED[name])


def prepare_scheduler(own: Any, sampling: Sampling) -> Any:
    """The scheduler of a call, with its steps set: a new one where the sampling names one, else the model's own.

    Args:
        own: the scheduler of the model or pipeline. It is used as it is, with its own state, as diffusers does.
        sampling: the way from noise to an image, its steps given.

    Raises:
        ModelError: the scheduler does not sample as the model's configuration says, or is of another kind of model.
        UsageError: the schedule has fewer steps, the scheduler cannot take this number of steps, or it draws noise that
            is not the samples' own.
    """
    assert sampling.steps is not None
    name = type(own).__name__
    if sampling.scheduler is not None:
        # A scheduler that was not loaded has no class in its configuration.
        scheduler = make_scheduler(sampling.scheduler, {**own.config, "_class_name": name})
        set_steps(scheduler, sampling.steps, sampling.eta)
        return scheduler
    if not all(hasattr(own, each) for each in ("scale_model_input", "init_noise_sigma", "step")):
        raise ModelError(f"{name} does not denoise a Stable Diffusion; set another one as the pipeline's scheduler")
    takes, before = _parameters(own), torch.get_rng_state()
    if sampling.eta and not takes >= {"eta", "variance_noise"}:
        raise UsageError(f"eta is {sampling.eta:g}; {name} takes 0 only: use a DDIMScheduler")
    remedy = "use fewer steps, or set another one as the pipeline's scheduler"
    set_steps(own, sampling.steps, sampling.eta, remedy)
    if name in _OWN_NOISE or not ("generator" in takes or before.equal(torch.get_rng_state())):
        raise UsageError(
            f"{name} draws noise of its own, so that an image would depend on its neighbours in the batch; use one "
            "that takes generators, such as DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'"
        )
    return own


def _parameters(scheduler: Any) -> frozenset[str]:
    """Names of the parameters of a scheduler's ``step``."""
    return _parameters_of(type(scheduler).step)


@functools.cache
def _parameters_of(step: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(step).parameters)


def set_steps(
    scheduler: Any, steps: int, eta: float = 0, remedy: str = "use fewer --steps, or another --scheduler"
) -> None:
    """Set the number of steps of a scheduler. They are tried first, on a single number.

    Args:
        scheduler: a new one, or one that has sampled before.
        steps: number of denoising steps.
        eta: share of new noise in each step.
        remedy: what to do about steps that it cannot take, for the message.

    Raises:
        UsageError: the schedule has fewer steps, or the scheduler cannot take this number of steps.
    """
    config, limit = scheduler.config, scheduler.config.num_train_timesteps
    if steps > limit:
        raise UsageError(f"steps is {steps}; it must be between 1 and {limit}")
    try:
        _begin(scheduler, steps)
        _try_out(scheduler, eta)
        _begin(scheduler, steps)
    except Exception as error:  # schedulers have no common error type
        raise UsageError(
            f"steps is {steps}, which {type(scheduler).__name__} cannot take with the model's timestep_spacing "
            f"{config.get('timestep_spacing')!r} and prediction_type {config.prediction_type!r}: {error}; {remedy}"
        ) from error


def _begin(scheduler: Any, steps: int) -> None:
    """Set the timesteps, so that the first step is next."""
    scheduler.set_timesteps(steps, device="cpu")
    if surplus := int((scheduler.timesteps == -1).sum()):
        # Rounding gives 61 and other numbers of trailing steps one more timestep, which is -1.
        scheduler.timesteps = scheduler.timesteps[:-surplus]
    if hasattr(scheduler, "sigmas"):
        if surplus:
            scheduler.sigmas = torch.cat([scheduler.sigmas[: -1 - surplus], scheduler.sigmas[-1:]])
        # Otherwise the first step is looked up by its timestep, which the second one may share after rounding.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)


@torch.no_grad()
def _try_out(scheduler: Any, eta: float) -> None:
    """Take all steps with a single number, so that what fails does so before the UNet computes.

    Raises:
        Exception: the scheduler fails, or gives a timestep or a value that cannot be used.
    """
    one = torch.ones(1, 1, 1, 1)
    latents = one * scheduler.init_noise_sigma
    generator = Generator()
    for timestep in scheduler.timesteps:
        if not 0 <= timestep < scheduler.config.num_train_timesteps:
            raise ValueError(f"there is no timestep {timestep.item():g}")
        scheduler.scale_model_input(latents, timestep)
        latents = _step(scheduler, one, timestep, latents, eta, one, generator)
        if not latents.isfinite():
            raise ValueError(f"the step at timestep {timestep.item():g} divides by zero")


def _step(
    scheduler: Any,
    prediction: Tensor,
    timestep: Tensor,
    latents: Tensor,
    eta: float,
    noise: Tensor,
    generators: Generators | None = None,
) -> Tensor:
    """Latents after one step.

    The noise is used only if ``eta`` is above 0, and the generators only by schedulers that draw noise by themselves.
    """
    takes = _parameters(scheduler)
    settings: dict[str, Any] = {"eta": min(eta, MAX_ETA)} if "eta" in takes else {}
    if eta:
        settings["variance_noise"] = noise
    elif generators is not None and "generator" in takes:
        settings["generator"] = generators if isinstance(generators, Generator) else [*generators]
    return cast(Tensor, scheduler.step(prediction, timestep, latents, return_dict=False, **settings)[0])


@dataclass
class Moment:
    """The state of the denoising after a step. Who watches it may replace all but the first three."""

    number: int
    """Number of the step, from 0."""
    timestep: Tensor
    tokens: Tensor
    """``[B, S, Dt]``, what the UNet was given; ``[2B, S, Dt]`` in a guided step, the unconditional side first."""
    latents: Tensor
    """float32 ``[B, C, h, w]``."""
    conditioning: Conditioning
    guidance_scale: Sequence[float]
    stopped: bool = False
    """Whether the remaining steps are left out."""


def denoise(
    unet: UNet2DConditionModel,
    scheduler: Any,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    guidance_scale: Sequence[float],
    sampling: Sampling,
    guidance_rescale: float = 0.0,
    generators: Generators | None = None,
    watch: Callable[[Moment], None] | None = None,
) -> Tensor:
    """Denoise with classifier-free guidance, both sides in one UNet call.

    Latents, guidance and scheduler are float32 whatever the UNet's dtype. Where gradients flow, the activations of one
    step at a time are in memory: they are computed again, not kept. Nothing waits for the device: the scheduler's
    coefficients are numbers on the CPU, and nothing is read back.

    Args:
        unet: predicts what the scheduler's configuration says.
        scheduler: the result of :func:`prepare_scheduler`.
        noise: ``[B, 1, C, h, w]``, standard normal; ``[B, 1 + steps, C, h, w]`` where ``eta`` is above 0.
        conditioning: the conditioning of the same B samples.
        guidance_scale: one per sample; 1 throughout leaves the unconditional side out.
        sampling: the way from noise to an image, its steps given. Guidance in a part of the schedule is that of
            Kynkäänniemi et al. 2024 (arXiv 2404.07724). Deep blocks are also computed where guidance begins or ends,
            and always where gradients flow (:mod:`vcf_batch.vcf.deep_cache`). Height and width are those of the noise.
        guidance_rescale: share, 0 to 1, of rescaling each guided prediction to the deviation of the prompt's own: Lin
            et al. 2023 (arXiv 2305.08891), section 3.4.
        generators: the noise of schedulers that draw it by themselves.
        watch: called after each step; None reads nothing back.

    Returns:
        float32 latents ``[B, C, h, w]``.
    """
    limit = scheduler.config.num_train_timesteps

    def scales(values: Sequence[float]) -> tuple[Tensor, bool]:
        scale = upload(torch.tensor(values, dtype=torch.float32), noise.device).reshape(-1, 1, 1, 1)
        return scale, any(value != 1 for value in values)

    scale, any_guided = scales(guidance_scale)
    initial, *added = noise.float().unbind(1)
    latents = initial * scheduler.init_noise_sigma
    layers = layers_of(unet.config, *noise.shape[-2:]) if conditioning.is_limited else []
    selected: tuple[tuple[Inside, ...], bool] | None = None
    computed: tuple[bool, bool] | None = None
    # The scheduler reads its tables with CPU timesteps and the UNet takes device ones, so no step waits for a copy.
    timesteps = zip(scheduler.timesteps, upload(scheduler.timesteps, noise.device), strict=True)
    with DeepCache(unet, sampling.deep_cache) as cache:
        for number, (cpu_timestep, timestep) in enumerate(timesteps):
            time = cpu_timestep.item() / (limit - 1)
            inside = sampling.guidance_lo <= time <= sampling.guidance_hi
            guided = any_guided and inside
            # The limits of guidance count in a batch without guidance too: no sample depends on its neighbours' scales.
            cache.begin_step(number, is_new_batch=computed != (inside, any_guided))
            computed = inside, any_guided
            if selected != (selected := (conditioning.inside(time), guided)):
                tokens, settings = conditioning.select(*selected, layers)
                others = conditioning.added_inputs(guided)
                tokens, attention = tokens.to(unet.dtype), None
                if settings:
                    accept_token_bias(unet, adapted="ip_tokens" in settings)
                    attention = {name: _in(unet.dtype, value) for name, value in settings.items()}
            scaled = scheduler.scale_model_input(latents, cpu_timestep).to(unet.dtype)
            predict = functools.partial(
                unet,
                encoder_hidden_states=tokens,
                cross_attention_kwargs=attention,
                added_cond_kwargs=others,
                return_dict=False,
            )
            prediction = recomputed(predict, torch.cat([scaled, scaled]) if guided else scaled, timestep)[0].float()
            if guided:
                negative, positive = prediction.chunk(2)
                prediction = negative + scale * (positive - negative)
                if guidance_rescale:
                    prediction = rescale_noise_cfg(prediction, positive, guidance_rescale)
            new_noise = added[number] if sampling.eta else initial
            latents = _step(scheduler, prediction, cpu_timestep, latents, sampling.eta, new_noise, generators)
            if watch is None:
                continue
            moment = Moment(number, timestep, tokens, latents, conditioning, guidance_scale)
            watch(moment)
            latents = moment.latents
            if moment.stopped:
                break
            if moment.guidance_scale != guidance_scale:
                guidance_scale = moment.guidance_scale
                scale, any_guided = scales(guidance_scale)
            if moment.conditioning is not conditioning:
                conditioning, selected = moment.conditioning, None
    return latents


def _in(dtype: torch.dtype, value: ByQueries) -> ByQueries:
    return {key: own.to(dtype) for key, own in value.items()} if isinstance(value, dict) else value.to(dtype)


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Result of a function. Where gradients flow, its activations are not kept but computed again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
