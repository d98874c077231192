"""The schedule of a checkpoint: what sampling takes from the configuration of its own scheduler. No torch here.

Noise schedule, prediction type and spacing are the checkpoint's. What would draw noise of its own or is meant for
pixels is pinned. What the denoising loop does not do is refused by name.
"""

import json
from collections.abc import Mapping, Sized
from typing import Any

from vcf_batch.errors import ModelError

SCHEDULER_CONFIG = "scheduler/scheduler_config.json"

CLASSES = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LMSDiscrete",
        "PNDM",
        "SASolver",
        "UniPCMultistep",
    )
)
"""Classes of diffusers whose models every scheduler of :data:`vcf_batch.config.limits.SCHEDULERS` can sample. Their
noise has a schedule of betas, and the models are not distilled for few steps."""

PINNED: Mapping[str, Mapping[str, Any]] = {
    # DDIM clips by default, which is meant for pixels and ruins latents, as thresholding is. The configuration of a
    # scheduler that cannot clip does not turn that off.
    "ddim": {"clip_sample": False, "thresholding": False},
    # The other algorithms draw noise in each step, or need another end of the schedule than most checkpoints have.
    "dpm++": {"algorithm_type": "dpmsolver++", "thresholding": False},
    "euler": {},
}
"""Values that hold for each scheduler, whatever the checkpoint says."""

_OFF = (None, False)

_TRAINED: Mapping[str, tuple[Any, ...]] = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "predict_epsilon": (None, True),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "timestep_type": ("discrete",),
    "use_flow_sigmas": _OFF,
    "use_dynamic_shifting": _OFF,
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"),
}
"""Values of the keys that tell what the UNet was trained for. They bind every scheduler."""

_SIGMAS: Mapping[str, tuple[Any, ...]] = {
    "final_sigmas_type": ("zero", "sigma_min"),
    # It needs scipy, on whose version the bytes would depend.
    "use_beta_sigmas": _OFF,
}

_CHOICES: Mapping[str, Mapping[str, tuple[Any, ...]]] = {
    "ddim": _TRAINED,
    "dpm++": {
        **_TRAINED,
        **_SIGMAS,
        "solver_order": (1, 2, 3),
        # The last three are of other solvers; diffusers takes ``midpoint`` in their place.
        "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    },
    "euler": {**_TRAINED, **_SIGMAS, "interpolation_type": ("linear", "log_linear")},
}
"""Values that each scheduler takes."""

_LIMITS: Mapping[str, tuple[float, float]] = {
    "num_train_timesteps": (2, 1_000_000),
    "beta_start": (0, 1),
    "beta_end": (0, 1),
    "steps_offset": (0, 1_000_000),
}
"""Least and largest values of the numbers that every scheduler reads."""

_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas")
"""Keys of which one at most may be true."""


def check_schedule(scheduler: str, config: Mapping[str, Any], model: str) -> None:
    """Check that a scheduler samples as the configuration of a checkpoint's own scheduler says.

    Args:
        scheduler: one of :data:`vcf_batch.config.limits.SCHEDULERS`.
        config: the configuration of the checkpoint's own scheduler; empty stands for the scheduler's defaults.
        model: name of the checkpoint, for the message.

    Raises:
        ModelError: a key has a value that sampling does not implement; with value, choices and remedy.
    """
    where = f"in {SCHEDULER_CONFIG} of {model}"
    own = config.get("_class_name")
    if own is not None and str(own).removeprefix("Flax") not in CLASSES:
        raise ModelError(
            f"_class_name is {_told(own)} {where}; it must be one of {', '.join(sorted(CLASSES))}: use a model that "
            "predicts noise or v, without flow matching or distillation"
        )
    for key, choices in _CHOICES[scheduler].items():
        # A value must have the type as well, because 1 == True.
        if key in config and not any(type(config[key]) is type(each) and config[key] == each for each in choices):
            raise ModelError(
                f"{key} is {_told(config[key])} {where}; the scheduler {scheduler!r} takes "
                f"{', '.join(map(_told, choices))}: use a model that has one of these"
                + ("" if key in _TRAINED else ", or another --scheduler")
            )
    for key, (least, most) in _LIMITS.items():
        value = config.get(key, least)
        if not isinstance(value, int | float) or not least <= value <= most:
            raise ModelError(
                f"{key} is {_told(value)} {where}; it must be a number between {least} and {most}: correct that file, "
                "or use another model"
            )
    spacings = [key for key in _SPACINGS if config.get(key)]
    if scheduler != "ddim" and len(spacings) > 1:
        raise ModelError(f"{' and '.join(spacings)} are true {where}; keep one of them, or use --scheduler ddim")
    betas, count = config.get("trained_betas"), config.get("num_train_timesteps", 1000)
    if betas is not None and not (isinstance(betas, Sized) and len(betas) == count):
        raise ModelError(f"trained_betas {where} must be {count} numbers, one per training timestep; use another model")


def _told(value: Any) -> str:
    """A value as the JSON file has it, for a message."""
    return json.dumps(value, default=str)[:100]
