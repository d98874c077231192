"""Denoising: from noise to latents under a conditioning, with one of the schedulers. Differentiable."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vcf_batch.config import Sampling
from vcf_batch.errors import UsageError
from vcf_batch.vcf.attention import accept_token_bias
from vcf_batch.vcf.deep_cache import DeepCache
from vcf_batch.vcf.fusion import Conditioning

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}

MAX_ETA = 1 - 1e-6
"""Largest ``eta`` that DDIM is given. At 1 it takes the root of a difference that rounding may bring below 0."""


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A new scheduler with a checkpoint's noise schedule, prediction type and spacing.

    Args:
        name: one of :data:`vcf_batch.config.SCHEDULERS`.
        config: the configuration of the checkpoint's own scheduler.
    """
    # DDIM clips by default, which is meant for pixels and ruins latents. The configuration of a scheduler that cannot
    # clip does not turn that off.
    fixed = {"clip_sample": False} if name == "ddim" else {}
    return _SCHEDULERS[name].from_config(config, **fixed)


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
    step at a time are in memory: they are computed again, not kept. No step waits for the device: the scheduler's
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
        UsageError: the schedule has fewer steps.
    """
    scheduler = make_scheduler(sampling.scheduler, schedule)
    limit = scheduler.config.num_train_timesteps
    assert sampling.steps is not None
    if sampling.steps > limit:
        raise UsageError(f"steps is {sampling.steps}; it must be between 1 and {limit}")
    scheduler.set_timesteps(sampling.steps, device="cpu")
    scale = torch.tensor(guidance_scale, dtype=torch.float32, device=noise.device).reshape(-1, 1, 1, 1)
    any_guided = any(value != 1 for value in guidance_scale)
    initial, *added = noise.float().unbind(1)
    latents = initial * scheduler.init_noise_sigma
    selected: tuple[tuple[bool, ...], bool] | None = None
    was_inside: bool | None = None
    # The scheduler reads its tables with CPU timesteps and the UNet takes device ones, so no step waits for a copy.
    timesteps = zip(scheduler.timesteps, scheduler.timesteps.to(noise.device), strict=True)
    with DeepCache(unet, sampling.deep_cache) as cache:
        for number, (cpu_timestep, timestep) in enumerate(timesteps):
            time = cpu_timestep.item() / (limit - 1)
            inside = sampling.guidance_lo <= time <= sampling.guidance_hi
            guided = any_guided and inside
            # The limits of guidance count in a batch without guidance too: no sample depends on its neighbours' scales.
            cache.begin_step(number, is_new_batch=inside != was_inside)
            was_inside = inside
            if selected != (selected := (conditioning.inside(time), guided)):
                tokens, bias = conditioning.select(*selected)
                tokens, attention = tokens.to(unet.dtype), None
                if bias is not None:
                    accept_token_bias(unet)
                    attention = {"token_bias": bias.to(unet.dtype)}
            scaled = scheduler.scale_model_input(latents, cpu_timestep).to(unet.dtype)
            predict = functools.partial(
                unet, encoder_hidden_states=tokens, cross_attention_kwargs=attention, return_dict=False
            )
            prediction = recomputed(predict, torch.cat([scaled, scaled]) if guided else scaled, timestep)[0].float()
            if guided:
                negative, positive = prediction.chunk(2)
                prediction = negative + scale * (positive - negative)
            variance = {}
            if sampling.eta:
                variance = {"eta": min(sampling.eta, MAX_ETA), "variance_noise": added[number]}
            latents = scheduler.step(prediction, cpu_timestep, latents, return_dict=False, **variance)[0]
    return latents


def recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    """Result of a function. Where gradients flow, its activations are not kept but computed again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
