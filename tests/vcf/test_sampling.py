"""Denoising with tiny real components: the schedulers, the guidance, and the range in which references are used."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from support.tiny_models import IMAGE_TOKENS, TEXT_TOKENS, TEXT_WIDTH, build_pipeline
from vcf_batch.config.limits import ALIGNED_FUSIONS, SCHEDULERS
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.vcf.fusion import Fusion, condition
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.sampling import denoise, make_scheduler, prepare_scheduler, set_steps


@pytest.fixture(scope="module", params=("epsilon", "v_prediction"))
def pipeline(request: pytest.FixtureRequest) -> VCFPipeline:
    return build_pipeline(prediction_type=request.param)


@pytest.fixture(scope="module")
def epsilon() -> VCFPipeline:
    return build_pipeline()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8))


def red_cat(pipeline: VCFPipeline, image: Image.Image | None, **settings: Any) -> torch.Tensor:
    return pipeline.generate(["a red cat"], [image], seeds=[7], **settings)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_keep_the_noise_schedule_of_the_checkpoint(scheduler: str) -> None:
    config = make_scheduler(scheduler, build_pipeline(prediction_type="v_prediction").scheduler.config).config
    assert config.prediction_type == "v_prediction" and config.rescale_betas_zero_snr
    assert config.timestep_spacing == "trailing" and config.beta_schedule == "scaled_linear"


def test_schedulers_agree_on_the_image(pipeline: VCFPipeline) -> None:
    """With many steps every solver of the same equation ends at the same image."""
    expected, *others = (
        pipeline.generate(["a red cat"], seeds=[7], steps=60, guidance_scale=2, scheduler=scheduler)
        for scheduler in SCHEDULERS
    )
    for other in others:
        assert (other - expected).abs().mean() < 0.02


def test_eta_is_for_ddim_up_to_1(pipeline: VCFPipeline, image: Image.Image) -> None:
    """At zero terminal SNR, three steps at eta 1 end in the root of a negative number if nothing is done."""
    assert red_cat(pipeline, image, eta=1.0, steps=3).isfinite().all()
    for scheduler in ("dpm++", "euler"):
        with pytest.raises(UsageError, match=r"eta is 0\.5; the scheduler '.*' takes 0 only: use ddim"):
            red_cat(pipeline, image, eta=0.5, scheduler=scheduler)


def test_guidance_1_leaves_the_unconditional_side_out(epsilon: VCFPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    forward = epsilon.unet.forward

    def counted(sample: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        batches.append(len(sample))
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(epsilon.unet, "forward", counted)
    unguided = epsilon.generate(["a cat", "a dog"], seeds=[1, 2], guidance_scale=1, steps=2)
    beside_guided = epsilon.generate(["a cat", "a dog"], seeds=[1, 2], guidance_scale=[1, 4], steps=2)
    assert batches == [2, 2, 4, 4]
    torch.testing.assert_close(unguided[0], beside_guided[0], atol=1e-4, rtol=0)


def test_steps_outside_the_guidance_range_are_not_guided(epsilon: VCFPipeline, image: Image.Image) -> None:
    """Four steps are at 751, 501, 251 and 1 of 999; both ends are included."""
    guided, unguided = red_cat(epsilon, image), red_cat(epsilon, image, guidance_scale=1)
    assert torch.equal(red_cat(epsilon, image, guidance_lo=1 / 999, guidance_hi=751 / 999), guided)
    torch.testing.assert_close(red_cat(epsilon, image, guidance_lo=0.8), unguided)
    early, late = red_cat(epsilon, image, guidance_lo=0.5), red_cat(epsilon, image, guidance_hi=0.5)
    for one, other in itertools.combinations([guided, unguided, early, late], 2):
        assert (one - other).abs().max() > 0.005


# What the device is asked to do, on the device that computes nothing: reading a value back fails there


def on_meta(**sampling: Any) -> Callable[[], torch.Tensor]:
    """Denoises two samples with image tokens, the second of them fused in a part of the schedule alone."""
    pipeline = build_pipeline()
    text, tokens = torch.randn(2, TEXT_TOKENS, TEXT_WIDTH), torch.randn(IMAGE_TOKENS, TEXT_WIDTH)
    fusions = [Fusion([tokens], strength=0.5), Fusion([tokens], lo=0.4)]
    conditioning = condition(text, torch.zeros_like(text), fusions)
    sides = [
        dataclasses.replace(side, tokens=side.tokens.to("meta"), text=side.text.to("meta"))
        for side in (conditioning.positive, conditioning.negative)
    ]
    noise = torch.empty(2, 1, 4, 8, 8, device="meta")
    conditioning = dataclasses.replace(conditioning, positive=sides[0], negative=sides[1])
    used = Sampling(**sampling)
    unet = pipeline.unet.to("meta")
    settings: dict[str, Any] = {"guidance_scale": [4.0, 2.0], "sampling": used}

    def run() -> torch.Tensor:
        with torch.no_grad():
            return denoise(unet, prepare_scheduler(pipeline.scheduler, used), noise, conditioning, **settings)

    return run


class Transfers(TorchDispatchMode):
    """Counts copies from the CPU to the device, and those that would wait for the device."""

    count = waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device.type == "cpu" and result.device.type == "meta":
            self.count += 1
            self.waits += not (kwargs or {}).get("non_blocking")
        return result


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_step_waits_for_the_device(scheduler: str) -> None:
    """The device has no values that could be read back, and what is copied there does not grow with the steps."""
    counts = []
    for steps in (3, 6):
        run = on_meta(steps=steps, scheduler=scheduler)
        with Transfers() as transfers:
            assert run().device.type == "meta"
        counts.append(transfers.count)
    assert 0 < counts[0] == counts[1] <= 8


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
def test_nothing_waits_for_the_device_before_the_images_are_needed(fusion: str, image: Image.Image) -> None:
    """From prompts and references to images, each copy to the device is queued: the next batch can be queued too."""
    pipeline = build_pipeline().to("meta")
    with Transfers() as transfers:
        text, tokens = pipeline.encode_prompts(["a red cat", "a dog"]), pipeline.encode_references([image])
        fusions = [Fusion([tokens[0]], fusion, strength=0.5, lo=0.3), Fusion([tokens[0]], fusion)]
        sampling = Sampling(steps=4, eta=0.5)
        images = pipeline.generate_from_tokens(
            text, pipeline.encode_prompts(["", "ugly"]), fusions, seeds=[1, 2], guidance_scale=[4, 2], sampling=sampling
        )
    assert images.shape == (2, 3, 16, 16) and images.device.type == "meta"
    assert transfers.count and not transfers.waits


def test_a_step_that_is_not_guided_takes_half_the_operations() -> None:
    def operations(**settings: Any) -> int:
        run = on_meta(steps=8, **settings)
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    whole = operations()
    assert operations(guidance_lo=0.4, guidance_hi=0.9) == whole * (2 * 4 + 4) // (2 * 8)
    assert operations(guidance_lo=1.0) == whole // 2


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
def test_the_whole_range_is_no_range_and_an_empty_one_is_text_only(
    epsilon: VCFPipeline, image: Image.Image, fusion: str
) -> None:
    """Four steps are at 751, 501, 251 and 1 of 999."""
    plain, text_only = red_cat(epsilon, image, fusion=fusion), red_cat(epsilon, None)
    assert torch.equal(red_cat(epsilon, image, fusion=fusion, fusion_lo=0, fusion_hi=1), plain)
    assert torch.equal(red_cat(epsilon, image, fusion=fusion, fusion_lo=0.001, fusion_hi=0.752), plain)
    assert torch.equal(red_cat(epsilon, image, fusion=fusion, fusion_lo=0.8, fusion_hi=1), text_only)
    assert torch.equal(red_cat(epsilon, image, fusion=fusion, fusion_lo=0.6, fusion_hi=0.7), text_only)
    early = red_cat(epsilon, image, fusion=fusion, fusion_lo=0.5)
    late = red_cat(epsilon, image, fusion=fusion, fusion_hi=0.5)
    for one, other in itertools.combinations([plain, text_only, early, late], 2):
        assert (one - other).abs().max() > 0.005


def test_both_ends_of_the_range_are_included(epsilon: VCFPipeline, image: Image.Image) -> None:
    middle = red_cat(epsilon, image, fusion_lo=0.4, fusion_hi=0.6)
    assert torch.equal(red_cat(epsilon, image, fusion_lo=501 / 999, fusion_hi=501 / 999), middle)
    assert torch.equal(red_cat(epsilon, image, fusion_lo=502 / 999, fusion_hi=0.6), red_cat(epsilon, None))


def test_image_tokens_are_there_within_the_range_alone(
    epsilon: VCFPipeline, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside the range the UNet gets exactly the text; beside a row that is within its own, the rest is hidden."""
    given: list[tuple[int, bool]] = []
    forward = epsilon.unet.forward

    def noted(*args: Any, encoder_hidden_states: torch.Tensor, **kwargs: Any) -> tuple:
        given.append((encoder_hidden_states.shape[1], kwargs["cross_attention_kwargs"] is not None))
        return forward(*args, encoder_hidden_states=encoder_hidden_states, **kwargs)

    monkeypatch.setattr(epsilon.unet, "forward", noted)
    epsilon.generate(["a", "b"], [image, image], seeds=[1, 2], fusion_lo=[0.0, 0.5], fusion_hi=0.7)
    both = TEXT_TOKENS + IMAGE_TOKENS
    assert given == [(TEXT_TOKENS, False), (both, False), (both, True), (both, True)]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sampling_is_differentiable(pipeline: VCFPipeline, image: Image.Image, scheduler: str) -> None:
    """From the fused tokens and the noise to the decoded image, with a bias on the way."""
    text = pipeline.encode_prompts(["a red cat"]).requires_grad_()
    tokens = pipeline.encode_references([image])[0].requires_grad_()
    noise = pipeline.draw_noise([3]).requires_grad_()
    conditioning = condition(text, pipeline.encode_prompts([""]), [Fusion([tokens], strength=0.5)])
    sampling = Sampling(steps=3, scheduler=scheduler)
    used = prepare_scheduler(pipeline.scheduler, sampling)
    latents = denoise(pipeline.unet, used, noise, conditioning, guidance_scale=[4.0], sampling=sampling)
    pipeline.decode(latents).square().sum().backward()
    for leaf in (text, tokens, noise):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0
    pipeline.unet.zero_grad()
    pipeline.vae.zero_grad()


# Configurations of published checkpoints, whose scheduler is replaced by one of ours

SD: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
MULTISTEP = {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 2, "lower_order_final": True}
PUBLISHED: dict[str, dict[str, Any]] = {
    "DDIM": {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False},
    "DDIM that clips": {"_class_name": "DDIMScheduler", "clip_sample": True, "clip_sample_range": 1.0},
    "DDPM": {"_class_name": "DDPMScheduler", "variance_type": "fixed_small", "clip_sample": True},
    "PNDM": {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False},
    "Flax": {"_class_name": "FlaxPNDMScheduler"},
    "LMS": {"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True},
    "Heun": {"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": False, "clip_sample": False},
    "Euler": {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False},
    "Euler log-linear": {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
    "Euler with limits": {"_class_name": "EulerDiscreteScheduler", "sigma_min": 0.03, "sigma_max": 14.6},
    "Euler ancestral": {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
    "UniPC": {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh2", "predict_x0": True, "solver_order": 3},
    "DEIS": {"_class_name": "DEISMultistepScheduler", "algorithm_type": "deis", "solver_type": "logrho"},
    "DPM SDE": {"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": None, "use_karras_sigmas": True},
    "DPM++": MULTISTEP | {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    "DPM++ SDE": MULTISTEP | {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    "DPM++ SDE, Euler at the end": MULTISTEP | {"algorithm_type": "sde-dpmsolver++", "euler_at_final": True},
    "DPM": MULTISTEP | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "DPM to zero": MULTISTEP | {"algorithm_type": "dpmsolver", "final_sigmas_type": "zero"},
    "DPM SDE multistep": MULTISTEP | {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"},
    "Heun's solver": MULTISTEP | {"solver_type": "heun", "lower_order_final": False},
    "third order": MULTISTEP | {"solver_order": 3, "lambda_min_clipped": -5.1},
    "first order": MULTISTEP | {"solver_order": 1},
    "Karras": {"use_karras_sigmas": True},
    "Karras to sigma_min": {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
    "exponential": {"use_exponential_sigmas": True},
    "Lu": {"use_lu_lambdas": True},
    "thresholding": {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0},
    "zero SNR": ZERO_SNR,
    "linspace": {"timestep_spacing": "linspace", "steps_offset": 0},
    "sample": {"prediction_type": "sample"},
    "linear": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "betas": {"trained_betas": [0.001] * 1000},
}


class Plain(torch.nn.Module):
    """In place of a UNet: a prediction that rounds the same in any batch."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.timesteps: list[float] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        self.timesteps.append(timestep.item())
        return (sample * 0.25 + 0.125,)


def plain(schedule: dict[str, Any], seeds: list[int], unet: Plain | None = None, **sampling: Any) -> torch.Tensor:
    noises = [
        torch.randn(1 + sampling["steps"], 4, 2, 2, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    noise = torch.stack(noises) if sampling.get("eta") else torch.stack(noises)[:, :1]
    text = torch.zeros(len(seeds), 1, 1)
    conditioning = condition(text, text, [Fusion()] * len(seeds))
    used = Sampling(**{"scheduler": "ddim"} | sampling)
    scheduler = make_scheduler(used.scheduler or "ddim", schedule)
    set_steps(scheduler, sampling["steps"], used.eta)
    settings: dict[str, Any] = {"guidance_scale": [2.0] * len(seeds), "sampling": used}
    return torch.no_grad()(denoise)(unet or Plain(), scheduler, noise, conditioning, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_no_scheduler_draws_noise_of_its_own(name: str, scheduler: str) -> None:
    """The output is a function of the seeds, and a sample of its own seed, whatever scheduler the checkpoint had."""
    schedule = SD | PUBLISHED[name]
    for steps in (4, 16):
        both = plain(schedule, [1, 2], steps=steps, scheduler=scheduler)
        assert both.isfinite().all()
        assert torch.equal(both, plain(schedule, [1, 2], steps=steps, scheduler=scheduler))
        for number, seed in enumerate((1, 2)):
            assert torch.equal(both[number], plain(schedule, [seed], steps=steps, scheduler=scheduler)[0])


@pytest.mark.parametrize("name", ["DPM++ SDE, Euler at the end", "DPM SDE multistep", "DPM", "thresholding"])
def test_the_pinned_values_are_the_deterministic_ones(name: str) -> None:
    """dpm++ is DPM-Solver++ with any checkpoint, and nothing is clipped."""
    own = {key: value for key, value in PUBLISHED[name].items() if key not in ("algorithm_type", "thresholding")}
    for scheduler in SCHEDULERS:
        given, unpinned = (
            plain(SD | each, [1], steps=5, scheduler=scheduler) for each in (PUBLISHED[name], MULTISTEP | own)
        )
        assert torch.equal(given, unpinned)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "LCMScheduler"}, "LCMScheduler"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler"),
        ({"prediction_type": "flow_prediction"}, 'prediction_type is "flow_prediction"'),
        ({"prediction_type": None}, "prediction_type is null"),
        ({"predict_epsilon": False}, "predict_epsilon is false"),
        ({"beta_schedule": "sigmoid"}, 'beta_schedule is "sigmoid"'),
        ({"timestep_spacing": "quadratic"}, 'timestep_spacing is "quadratic"'),
        ({"timestep_type": "continuous", "prediction_type": "v_prediction"}, 'timestep_type is "continuous"'),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is true"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting is true"),
        ({"variance_type": "learned_range"}, 'variance_type is "learned_range"'),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas .* must be 1000 numbers"),
        ({"trained_betas": ["0.1"] * 1000}, "scheduler_config.json"),
        ({"num_train_timesteps": "many"}, "scheduler_config.json"),
    ],
)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_the_denoising_does_not_do_is_refused_by_name(
    changes: dict[str, Any], message: str, scheduler: str
) -> None:
    with pytest.raises(ModelError, match=message):
        plain(SD | changes, [1], steps=2, scheduler=scheduler)


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        ("dpm++", {"solver_order": 4}, "solver_order is 4 .* takes 1, 2, 3: .* or another --scheduler"),
        ("dpm++", {"solver_type": "rk4"}, 'solver_type is "rk4"'),
        ("dpm++", {"final_sigmas_type": "one"}, 'final_sigmas_type is "one"'),
        ("euler", {"final_sigmas_type": "one"}, 'final_sigmas_type is "one"'),
        ("euler", {"interpolation_type": "cubic"}, 'interpolation_type is "cubic"'),
        ("dpm++", {"use_beta_sigmas": True}, "use_beta_sigmas is true"),
        ("euler", {"use_beta_sigmas": True}, "use_beta_sigmas is true"),
        ("euler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "are true .* keep one of them"),
        ("dpm++", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "are true .* keep one of them"),
    ],
)
def test_what_one_scheduler_reads_is_refused_there_alone(scheduler: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        plain(SD | changes, [1], steps=2, scheduler=scheduler)
    plain(SD | changes, [1], steps=2, scheduler="ddim")


@pytest.mark.parametrize(
    ("scheduler", "steps", "changes", "message"),
    [
        ("ddim", 1000, {}, "steps is 1000, .* there is no timestep 1000; use fewer --steps"),
        ("dpm++", 1000, {"timestep_spacing": "linspace"}, "divides by zero; use fewer --steps, or another --sch"),
        ("ddim", 4, ZERO_SNR | {"prediction_type": "epsilon"}, "timestep 999 divides by zero"),
        ("euler", 1001, {}, "steps is 1001; it must be between 1 and 1000"),
    ],
)
def test_steps_that_a_schedule_does_not_have_are_refused(
    scheduler: str, steps: int, changes: dict[str, Any], message: str
) -> None:
    """Before the UNet computes, instead of an error of diffusers or an image of values that are not finite."""
    unet = Plain()
    with pytest.raises(UsageError, match=message):
        plain(SD | changes, [1], unet, steps=steps, scheduler=scheduler)
    assert not unet.timesteps


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_trailing_steps_are_as_many_as_asked_for(scheduler: str) -> None:
    """1000 in steps of 1000/61 are 62 timesteps after rounding, the last of them -1, which turns an image to noise."""
    unet = Plain()
    images = [
        plain(SD | ZERO_SNR, [1], unet if steps == 61 else None, steps=steps, scheduler=scheduler)
        for steps in (60, 61, 62)
    ]
    assert len(unet.timesteps) == 61 and min(unet.timesteps) >= 0
    assert (images[1] - images[0]).abs().max() < 2 * (images[2] - images[0]).abs().max() + 0.01


def test_noise_in_each_step_is_there_for_any_number_of_steps() -> None:
    assert plain(SD | ZERO_SNR, [1], steps=61, eta=0.5).isfinite().all()


def test_a_scheduler_that_was_not_loaded_is_refused_by_its_class() -> None:
    pipeline = build_pipeline()
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler"):
        pipeline.generate(["a cat"], seeds=[1], steps=2)
