"""Denoising: from noise to latents under a conditioning, with one of the schedulers. Differentiable."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vcf_batch.config import Sampling
from vcf_batch.errors import UsageError
from vcf_batch.models.loading import load_errors
from vcf_batch.models.schedule import PINNED, SCHEDULER_CONFIG, check_schedule
from vcf_batch.vcf.attention import accept_token_bias
from vcf_batch.vcf.deep_cache import DeepCache
from vcf_batch.vcf.fusion import Conditioning
from vcf_batch.vcf.upload import upload

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}

MAX_ETA = 1 - 1e-6
"""Largest ``eta`` that DDIM is given. At 1 it takes the root of a difference that rounding may bring below 0."""


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A new scheduler with a checkpoint's noise schedule, prediction type and spacing. It draws no noise of its own.

    Args:
        name: one of :data:`vcf_batch.config.SCHEDULERS`.
        config: the configuration of the checkpoint's own scheduler.

    Raises:
        ModelError: this scheduler does not sample as the configuration says.
    """
    check_schedule(name, config, "the model")
    with load_errors(f"{SCHEDULER_CONFIG} of the model", ". Correct that file, or use another --scheduler"):
        return _SCHEDULERS[name].from_config(config, **PINNED[name])


def set_steps(scheduler: Any, steps: int, eta: float = 0) -> None:
    """Set the number of steps of a new scheduler. They are tried first, on a single number.

    Args:
        scheduler: the result of :func:`make_scheduler`.
        steps: number of denoising steps.
        eta: share of new noise in each step.

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
            f"{config.timestep_spacing!r} and prediction_type {config.prediction_type!r}: {error}; use fewer --steps, "
            "or another --scheduler"
        ) from error


def _begin(scheduler: Any, steps: int) -> None:
    """Set the timesteps, so that the first step is next."""
    scheduler.set_timesteps(steps, device="cpu")
    surplus = len(scheduler.timesteps) - steps
    if surplus > 0:
        # Rounding gives 61 and other numbers of trailing steps one more timestep, which is -1.
        scheduler.timesteps = scheduler.timesteps[:steps]
    if hasattr(scheduler, "sigmas"):
        if surplus > 0:
            scheduler.sigmas = torch.cat([scheduler.sigmas[:steps], scheduler.sigmas[-1:]])
        # Otherwise the first step is looked up by its timestep, which the second one may share after rounding.
        scheduler.set_begin_index(0)


@torch.no_grad()
def _try_out(scheduler: Any, eta: float) -> None:
    """Take all steps with a single number, so that what fails does so before the UNet computes.

    Raises:
        Exception: the scheduler fails, or gives a timestep or a value that cannot be used.
    """
    one = torch.ones(1, 1, 1, 1)
    latents = one * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        if not 0 <= timestep < scheduler.config.num_train_timesteps:
            raise ValueError(f"there is no timestep {timestep.item():g}")
        scheduler.scale_model_input(latents, timestep)
        latents = _step(scheduler, one, timestep, latents, eta, one)
        if not latents.isfinite():
            raise ValueError(f"the step at timestep {timestep.item():g} divides by zero")


def _step(scheduler: Any, prediction: Tensor, timestep: Tensor, latents: Tensor, eta: float, noise: Tensor) -> Tensor:
    """Latents after one step. The noise is used only if ``eta`` is above 0."""
    variance = {"eta": min(eta, MAX_ETA), "variance_noise": noise} if eta else {}
    return cast(Tensor, scheduler.step(prediction, timestep, latents, return_dict=False, **variance)[0])


def denoise(
    unet: UNet2DConditionModel,
    schedule: Mapping[str, Any],
    noise: Tensor,
    conditioning: Conditioning,
    *,
    guidance_scale: Sequence[float],
    sampling: Sampling,
) -> Tensor:
    """Denoise with classifier-free guidance, both sides in one UNet call.

    Latents, guidance and scheduler are float32 whatever the UNet's dtype. Where gradients flow, the activations of one
    step at a time are in memory: they are computed again, not kept. Nothing waits for the device: the scheduler's
    coefficients are numbers on the CPU, and nothing is read back.

    Args:
        unet: predicts what the schedule says.
        schedule: the configuration of the checkpoint's own scheduler.
        noise: ``[B, 1, C, h, w]``, standard normal; ``[B, 1 + steps, C, h, w]`` where ``eta`` is above 0.
        conditioning: the conditioning of the same B samples.
        guidance_scale: one per sample; 1 throughout leaves the unconditional side out.
        sampling: the way from noise to an image, its steps given. Guidance in a part of the schedule is that of
            Kynkäänniemi et al. 2024 (arXiv 2404.07724). Deep blocks are also computed where guidance begins or ends,
            and always where gradients flow (:mod:`vcf_batch.vcf.deep_cache`). Height and width are those of the noise.

    Returns:
        float32 latents ``[B, C, h, w]``.

    Raises:
        ModelError: the scheduler does not sample as the schedule says.
        UsageError: the schedule has fewer steps, or the scheduler cannot take this number of steps.
    """
    scheduler = make_scheduler(sampling.scheduler, schedule)
    assert sampling.steps is not None
    set_steps(scheduler, sampling.steps, sampling.eta)
    limit = scheduler.config.num_train_timesteps
    scale = upload(torch.tensor(guidance_scale, dtype=torch.float32), noise.device).reshape(-1, 1, 1, 1)
    any_guided = any(value != 1 for value in guidance_scale)
    initial, *added = noise.float().unbind(1)
    latents = initial * scheduler.init_noise_sigma
    selected: tuple[tuple[bool, ...], bool] | None = None
    was_inside: bool | None = None
    # The scheduler reads its tables with CPU timesteps and the UNet takes device ones, so no step waits for a copy.
    timesteps = zip(scheduler.timesteps, upload(scheduler.timesteps, noise.device), strict=True)
    with DeepCache(unet, sampling.deep_cache) as cache:
        for number, (cpu_timestep, timestep) in enumerate(timesteps):
            time = cpu_timestep.item() / (limit - 1)
            inside = sampling.guidance_lo <= time <= sampling.guidance_hi
            guided = any_guided and inside
            # The limits of guidance count in a batch without guidance too: no sample depends on its neighbours' scales.
            cache.begin_step(number, is_new_batch=inside != was_inside)
            was_inside = inside
            if selected != (selected := (conditioning.inside(time), guided)):
                tokens, settings = conditioning.select(*selected)
                tokens, attention = tokens.to(unet.dtype), None
                if settings:
                    accept_token_bias(unet)
                    attention = {name: value.to(unet.dtype) for name, value in settings.items()}
            scaled = scheduler.scale_model_input(latents, cpu_timestep).to(unet.dtype)
            predict = functools.partial(
                unet, encoder_hidden_states=tokens, cross_attention_kwargs=attention, return_dict=False
            )
            prediction = recomputed(predict, torch.cat([scaled, scaled]) if guided else scaled, timestep)[0].float()
            if guided:
                negative, positive = prediction.chunk(2)
                prediction = negative + scale * (positive - negative)
            new_noise = added[number] if sampling.eta else initial
            latents = _step(scheduler, prediction, cpu_timestep, latents, sampling.eta, new_noise)
    return latents


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Result of a function. Where gradients flow, its activations are not kept but computed again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
