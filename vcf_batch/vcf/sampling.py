"""Denoising: from noise to latents under a conditioning, with one of the schedulers. Differentiable."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor

from vcf_batch.config import SCHEDULERS
from vcf_batch.errors import UsageError
from vcf_batch.vcf.attention import accept_token_bias
from vcf_batch.vcf.fusion import Conditioning

_SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "euler": EulerDiscreteScheduler,
}


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """A new scheduler with a checkpoint's noise schedule, prediction type and spacing.

    Args:
        name: ``ddim``, ``dpm++`` or ``euler``.
        config: of the checkpoint's own scheduler.

    Raises:
        UsageError: no such scheduler.
    """
    if name not in _SCHEDULERS:
        raise UsageError(f"scheduler is {name!r}; it must be one of {', '.join(SCHEDULERS)}")
    # DDIM clips by default, which is meant for pixels and ruins latents; a checkpoint whose own scheduler cannot clip
    # has no say in its configuration.
    fixed = {"clip_sample": False} if name == "ddim" else {}
    return _SCHEDULERS[name].from_config(config, **fixed)


def denoise(
    unet: UNet2DConditionModel,
    scheduler: Any,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    guidance_scale: Sequence[float],
    steps: int,
) -> Tensor:
    """Denoise with classifier-free guidance, both sides in one UNet call.

    Latents, guidance and scheduler are float32 whatever the UNet's dtype.

    Args:
        unet: predicts what the scheduler expects.
        scheduler: of :func:`make_scheduler`, used for nothing else.
        noise: ``[B, C, h, w]``, standard normal.
        conditioning: of the same B samples.
        guidance_scale: one per sample; 1 throughout leaves the unconditional side out.
        steps: denoising steps.

    Returns:
        float32 latents ``[B, C, h, w]``.

    Raises:
        UsageError: the scheduler cannot take so many steps.
    """
    limit = scheduler.config.num_train_timesteps
    if not 1 <= steps <= limit:
        raise UsageError(f"steps is {steps}; it must be between 1 and {limit}")
    scheduler.set_timesteps(steps, device="cpu")
    scale = torch.tensor(guidance_scale, dtype=torch.float32, device=noise.device).reshape(-1, 1, 1, 1)
    guided = any(value != 1 for value in guidance_scale)
    latents = noise.float() * scheduler.init_noise_sigma
    fused: tuple[bool, ...] | None = None
    # The scheduler reads its tables with CPU timesteps and the UNet takes device ones, so no step waits for a copy.
    for cpu_timestep, timestep in zip(scheduler.timesteps, scheduler.timesteps.to(noise.device), strict=True):
        inside = conditioning.inside(cpu_timestep.item() / (limit - 1))
        if inside != fused:
            fused = inside
            tokens, bias = conditioning.select(inside, guided)
            tokens, attention = tokens.to(unet.dtype), None
            if bias is not None:
                accept_token_bias(unet)
                attention = {"token_bias": bias.to(unet.dtype)}
        scaled = scheduler.scale_model_input(latents, cpu_timestep).to(unet.dtype)
        prediction = unet(
            torch.cat([scaled, scaled]) if guided else scaled,
            timestep,
            encoder_hidden_states=tokens,
            cross_attention_kwargs=attention,
            return_dict=False,
        )[0].float()
        if guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + scale * (positive - negative)
        latents = scheduler.step(prediction, cpu_timestep, latents, return_dict=False)[0]
    return latents
