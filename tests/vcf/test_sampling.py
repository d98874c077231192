"""Denoising with tiny real components: the schedulers, the guidance, and the range in which references are used."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from support.tiny_models import IMAGE_TOKENS, TEXT_TOKENS, TEXT_WIDTH, build_pipeline
from vcf_batch.config import FUSIONS, SCHEDULERS, Sampling
from vcf_batch.errors import UsageError
from vcf_batch.vcf.fusion import Fusion, condition
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.sampling import denoise, make_scheduler


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
    settings: dict[str, Any] = {"guidance_scale": [4.0, 2.0], "sampling": Sampling(**sampling)}
    unet, schedule = pipeline.unet.to("meta"), pipeline.scheduler.config
    return torch.no_grad()(functools.partial(denoise, unet, schedule, noise, conditioning, **settings))


class Transfers(TorchDispatchMode):
    """Counts copies from the CPU to the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default:
            self.count += args[0].device.type == "cpu" and result.device.type == "meta"
        return result


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_no_step_waits_for_the_device(scheduler: str) -> None:
    """The device has no values that could be read back, and what is copied there does not grow with the steps."""
    counts = []
    for steps in (4, 12):
        run = on_meta(steps=steps, scheduler=scheduler)
        with Transfers() as transfers:
            assert run().device.type == "meta"
        counts.append(transfers.count)
    assert 0 < counts[0] == counts[1] <= 8


def test_a_step_that_is_not_guided_takes_half_the_operations() -> None:
    def operations(**settings: Any) -> int:
        run = on_meta(steps=8, **settings)
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    whole = operations()
    assert operations(guidance_lo=0.4, guidance_hi=0.9) == whole * (2 * 4 + 4) // (2 * 8)
    assert operations(guidance_lo=1.0) == whole // 2


@pytest.mark.parametrize("fusion", FUSIONS)
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
    sampling, schedule = Sampling(steps=3, scheduler=scheduler), pipeline.scheduler.config
    latents = denoise(pipeline.unet, schedule, noise, conditioning, guidance_scale=[4.0], sampling=sampling)
    pipeline.decode(latents).square().sum().backward()
    for leaf in (text, tokens, noise):
        assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().sum() > 0
    pipeline.unet.zero_grad()
    pipeline.vae.zero_grad()
