"""Calling VCFPipeline as diffusers' pipelines are called: equality with StableDiffusionPipeline."""

import inspect
from collections.abc import Iterator
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.schedulers import KarrasDiffusionSchedulers
from PIL import Image

from support.tiny_models import IMAGE_SIZE, TEXT_TOKENS, TEXT_WIDTH, build_pipeline
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.pipeline import VCFPipeline

PROMPTS = ["a red cat", "a blue dog"]
FOUR: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "output_type": "pt"}

UNKNOWN_HERE = {
    "cross_attention_kwargs": "the strength of references gets to the attention by it",
    "ip_adapter_image": "references with fusion='ip_adapter', after use_ip_adapter",
    "ip_adapter_image_embeds": "references with fusion='ip_adapter', after use_ip_adapter",
    "timesteps": "the scheduler sets the timesteps",
    "sigmas": "the scheduler sets the sigmas",
    "kwargs": "of deprecated arguments",
}
"""Arguments of StableDiffusionPipeline that this pipeline does not take, each with its reason or what to use."""


@pytest.fixture(scope="module")
def shared() -> VCFPipeline:
    return build_pipeline()


@pytest.fixture
def pipeline(shared: VCFPipeline) -> Iterator[VCFPipeline]:
    """A pipeline whose scheduler and attention processors are its own again after the test."""
    scheduler, processors = shared.scheduler, shared.unet.attn_processors
    yield shared
    shared.scheduler = scheduler
    shared.unet.set_attn_processor(processors)
    shared.set_progress_bar_config(disable=True)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8))


def stock(pipeline: VCFPipeline) -> StableDiffusionPipeline:
    """diffusers' own pipeline over the same components."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "feature_extractor")
    components = {name: getattr(pipeline, name) for name in names}
    plain = StableDiffusionPipeline(**components, safety_checker=None, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    return plain


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def equal_to_stock(pipeline: VCFPipeline, prompt: Any = None, **settings: Any) -> torch.Tensor:
    """The result of a call, once it is found to be that of diffusers' own pipeline."""
    results = []
    for each in (stock(pipeline), pipeline):
        generator = settings.get("generator")
        if isinstance(generator, torch.Generator):
            generator = torch.Generator().manual_seed(generator.initial_seed())
        elif generator is not None:
            generator = generators(*(one.initial_seed() for one in generator))
        results.append(each(prompt, **FOUR | settings | {"generator": generator}).images)
    expected, found = (torch.as_tensor(result) for result in results)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    return found


# Equality with StableDiffusionPipeline


@pytest.mark.parametrize(
    "settings",
    [
        {"generator": generators(11, 12)},
        {"generator": torch.Generator().manual_seed(3)},
        {"generator": torch.Generator().manual_seed(3), "eta": 0.7},
        {"generator": generators(11, 12), "eta": 1.0},
        {"generator": torch.Generator().manual_seed(3), "num_images_per_prompt": 3},
        {"generator": generators(1, 2, 3, 4), "num_images_per_prompt": 2},
        {"generator": generators(11, 12), "guidance_rescale": 0.7},
        {"generator": generators(11, 12), "guidance_scale": 1.0},
        {"generator": generators(11, 12), "guidance_scale": 0.0},
        {"generator": generators(11, 12), "negative_prompt": None},
        {"generator": generators(11, 12), "negative_prompt": ["ugly", "grey"]},
        {"generator": generators(11, 12), "height": 24, "width": 32},
        {"generator": generators(11, 12), "output_type": "latent"},
        {"generator": generators(11, 12), "output_type": "np"},
        {"latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))},
        {"latents": torch.randn(2, 4, 8, 8), "generator": torch.Generator().manual_seed(3), "eta": 0.5},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_stable_diffusion_has_too_gives_the_same_images(pipeline: VCFPipeline, settings: dict[str, Any]) -> None:
    """Without references the images are those of StableDiffusionPipeline with the same arguments, within 1e-5."""
    if settings.get("height"):
        settings["height"], settings["width"] = 24, 32
    equal_to_stock(pipeline, PROMPTS, **settings)


def test_at_strength_0_the_images_are_stable_diffusions(pipeline: VCFPipeline, picture: Image.Image) -> None:
    expected = equal_to_stock(pipeline, PROMPTS, generator=generators(1, 2), guidance_rescale=0.3)
    found = pipeline(PROMPTS, picture, strength=0, generator=generators(1, 2), guidance_rescale=0.3, **FOUR).images
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (pipeline(PROMPTS, picture, generator=generators(1, 2), **FOUR).images - expected).abs().max() > 0.005


def test_text_tokens_take_the_place_of_prompts(pipeline: VCFPipeline, picture: Image.Image) -> None:
    """As in StableDiffusionPipeline; and with references, as the prompts themselves."""
    given = pipeline.encode_prompts(PROMPTS), pipeline.encode_prompts(["ugly", "grey"])
    tokens: dict[str, Any] = dict(zip(("prompt_embeds", "negative_prompt_embeds"), given, strict=True))
    found = equal_to_stock(pipeline, generator=generators(1, 2), **tokens)
    assert torch.equal(pipeline(PROMPTS, negative_prompt=["ugly", "grey"], seed=[1, 2], **FOUR).images, found)
    equal_to_stock(pipeline, generator=generators(1, 2), prompt_embeds=given[0])
    equal_to_stock(pipeline, generator=generators(1, 2), prompt_embeds=given[0], negative_prompt=["ugly", ""])
    fused = pipeline(references=[picture, None], seed=[1, 2], **tokens, **FOUR).images
    expected = pipeline(PROMPTS, [picture, None], negative_prompt=["ugly", "grey"], seed=[1, 2], **FOUR).images
    assert torch.equal(fused, expected) and torch.equal(fused[1], found[1]) and not torch.equal(fused[0], found[0])


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_clip_skip_leaves_out_layers_for_prompts_alone(
    pipeline: VCFPipeline, clip_skip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers 0.42.1 looks for the text tower where transformers before 5 had it.
    monkeypatch.setitem(vars(pipeline.text_encoder), "text_model", pipeline.text_encoder)
    skipped = equal_to_stock(pipeline, PROMPTS, generator=generators(1, 2), clip_skip=clip_skip)
    monkeypatch.undo()
    assert torch.equal(pipeline(PROMPTS, seed=[1, 2], clip_skip=clip_skip, **FOUR).images, skipped)
    whole = pipeline(PROMPTS, seed=[1, 2], **FOUR).images
    assert torch.allclose(skipped, whole, atol=1e-5) == (clip_skip == 0)


# The pipeline's own scheduler

REFUSED = {"DPMSolverSDEScheduler", "EDMEulerScheduler"}
WITHOUT_SCIPY = "LMSDiscreteScheduler"
SCHEDULERS: list[tuple[str, dict[str, Any]]] = [
    *((each.name, {}) for each in KarrasDiffusionSchedulers if each.name not in REFUSED),
    *((f"{name}Scheduler", {}) for name in ("LCM", "TCD", "SASolver", "DDIMParallel", "DDPMParallel")),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
]


@pytest.mark.parametrize(("name", "settings"), SCHEDULERS, ids=lambda part: part if isinstance(part, str) else "")
def test_the_pipelines_own_scheduler_samples(pipeline: VCFPipeline, name: str, settings: dict[str, Any]) -> None:
    """With whatever scheduler is set, the images are those of StableDiffusionPipeline, and a sample's own in a batch.

    A scheduler that draws noise takes it from each sample's generator.
    """
    if name == WITHOUT_SCIPY:
        pytest.importorskip("scipy")
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **settings)
    together = equal_to_stock(pipeline, PROMPTS, generator=generators(1, 2), num_inference_steps=5)
    assert torch.equal(pipeline(PROMPTS, seed=[1, 2], **FOUR | {"num_inference_steps": 5}).images, together)
    alone = pipeline(PROMPTS[1], seed=2, **FOUR | {"num_inference_steps": 5}).images
    torch.testing.assert_close(alone, together[1:], atol=1e-4, rtol=0)
    assert torch.equal(pipeline.generate(PROMPTS, seeds=[1, 2], steps=5, guidance_scale=5), together)


def test_a_named_scheduler_takes_the_place_of_the_pipelines_own(pipeline: VCFPipeline) -> None:
    """With the noise schedule of the pipeline's own, which stays as it is."""
    ddim = pipeline(PROMPTS, seed=[1, 2], **FOUR).images
    own = diffusers.EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.scheduler = own
    assert not torch.equal(pipeline(PROMPTS, seed=[1, 2], **FOUR).images, ddim)
    assert torch.equal(pipeline(PROMPTS, seed=[1, 2], scheduler="ddim", **FOUR).images, ddim)
    assert torch.equal(pipeline.generate(PROMPTS, seeds=[1, 2], steps=4, guidance_scale=5, scheduler="ddim"), ddim)
    assert pipeline.scheduler is own


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "DDPMScheduler"])
def test_what_is_prepared_gives_the_same_images_for_the_same_noise(pipeline: VCFPipeline, name: str) -> None:
    """Prompt-noise optimisation samples one noise many times, so a scheduler draws the same noise each time."""
    pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    text = pipeline.encode_prompts(PROMPTS)
    sample, noise, conditioning = pipeline.prepare(text, text, [Fusion()] * 2, seeds=[1, 2], sampling=Sampling(steps=3))
    with torch.no_grad():
        assert torch.equal(sample(noise, conditioning), sample(noise, conditioning))


class OwnNoise(diffusers.EulerDiscreteScheduler):
    """A scheduler that draws noise from torch's global generator."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        noise = torch.randn_like(sample)
        return super().step(model_output, timestep, sample + noise, return_dict=return_dict)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("DPMSolverSDE", UsageError, "DPMSolverSDEScheduler draws noise of its own"),
        ("own", UsageError, "OwnNoise draws noise of its own"),
        ("EDMEuler", UsageError, "EDMEulerScheduler cannot take .* there is no timestep .* set another one"),
        ("FlowMatchEulerDiscrete", ModelError, "FlowMatchEulerDiscreteScheduler does not denoise"),
    ],
)
def test_schedulers_that_cannot_sample_are_refused_by_name(
    pipeline: VCFPipeline, name: str, error: type[Exception], message: str
) -> None:
    config = pipeline.scheduler.config
    if name == "DPMSolverSDE":  # whose own package is not installed
        kind: Any = type("DPMSolverSDEScheduler", (diffusers.EulerDiscreteScheduler,), {})
    else:
        kind = OwnNoise if name == "own" else getattr(diffusers, f"{name}Scheduler")
    pipeline.scheduler = kind.from_config(config)
    with pytest.raises(error, match=message):
        pipeline(PROMPTS, **FOUR)


def test_eta_is_refused_for_schedulers_without_it(pipeline: VCFPipeline) -> None:
    """diffusers ignores it."""
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(UsageError, match=r"eta is 0.5; EulerDiscreteScheduler takes 0 only: use a DDIMScheduler"):
        pipeline(PROMPTS, eta=0.5, **FOUR)


# Seeds and generators


def test_further_images_of_a_prompt_are_further_draws(pipeline: VCFPipeline) -> None:
    """The first has the prompt's seed; the others have other noise, the same in every call."""
    first = pipeline(PROMPTS, seed=[1, 2], **FOUR).images
    three = pipeline(PROMPTS, seed=[1, 2], num_images_per_prompt=3, **FOUR).images
    torch.testing.assert_close(three[[0, 3]], first, atol=1e-4, rtol=0)
    assert all((three[one] - three[0]).abs().max() > 0.01 for one in (1, 2))
    assert torch.equal(pipeline(PROMPTS, seed=[1, 2], num_images_per_prompt=3, **FOUR).images, three)
    each = pipeline(PROMPTS, seed=[1, 7, 2, 8], num_images_per_prompt=2, **FOUR).images
    torch.testing.assert_close(each[[0, 2]], first, atol=1e-4, rtol=0)


def test_numbers_may_be_numpys(pipeline: VCFPipeline) -> None:
    expected = pipeline("a", seed=3, **FOUR).images
    one: dict[str, Any] = {"seed": np.int64(3), "guidance_scale": np.float32(5)}
    several: dict[str, Any] = {"seed": np.arange(3, 4), "guidance_scale": np.array([5.0])}
    assert torch.equal(pipeline("a", **FOUR | one).images, expected)
    assert torch.equal(pipeline(["a"], **FOUR | several).images, expected)


def test_a_generator_goes_on_where_it_is(pipeline: VCFPipeline) -> None:
    generator = torch.Generator().manual_seed(1)
    first, second = (pipeline("a", generator=generator, **FOUR).images for _ in range(2))
    assert torch.equal(first, pipeline("a", seed=1, **FOUR).images) and not torch.equal(first, second)


def test_without_a_seed_the_images_are_those_of_seed_0(pipeline: VCFPipeline) -> None:
    """Unlike in diffusers, no image is random."""
    assert torch.equal(pipeline("a", **FOUR).images, pipeline("a", seed=0, **FOUR).images)


# The callback and the progress bar


def test_callback_sees_and_replaces_tensors(pipeline: VCFPipeline, picture: Image.Image) -> None:
    """After each step; with references the tokens that the UNet was given are the fused ones."""
    seen: list[tuple[int, int, dict[str, Any]]] = []
    names = pipeline._callback_tensor_inputs

    def note(pipe: VCFPipeline, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((number, int(timestep), {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
        if number == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    settings: dict[str, Any] = FOUR | {"output_type": "latent", "callback_on_step_end": note}
    assert not pipeline("a", picture, **settings, callback_on_step_end_tensor_inputs=names).images.any()
    length = TEXT_TOKENS + 5
    shapes = {"latents": (1, 4, 8, 8), "prompt_embeds": (2, length, 32), "negative_prompt_embeds": (1, length, 32)}
    assert seen == [(number, timestep, shapes) for number, timestep in enumerate((751, 501, 251, 1))]
    pipeline("a", **settings)
    assert seen[-1] == (3, 1, {"latents": (1, 4, 8, 8)}), "what is not asked for is not given"


@pytest.mark.parametrize("count", [1, 2])
def test_callback_turns_guidance_off(pipeline: VCFPipeline, picture: Image.Image, count: int) -> None:
    """As diffusers' documentation does it, with half as many rows; and as guidance_lo does it, with references too."""

    def cut(pipe: VCFPipeline, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if number == 1:
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    names: dict[str, Any] = {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    prompts = PROMPTS[:count]
    equal_to_stock(pipeline, prompts, generator=generators(1, 2)[:count], **names)
    found = pipeline(prompts, picture, seed=[1, 2][:count], **names, **FOUR).images
    limited = pipeline(prompts, picture, seed=[1, 2][:count], guidance_lo=0.4, **FOUR).images
    torch.testing.assert_close(found, limited, atol=1e-5, rtol=0)


def test_official_callback_works(pipeline: VCFPipeline) -> None:
    callback = SDCFGCutoffCallback(cutoff_step_ratio=0.5)
    cut = equal_to_stock(pipeline, "a cat", generator=generators(4), callback_on_step_end=callback)
    assert not torch.equal(cut, pipeline("a cat", seed=4, **FOUR).images)


def test_callback_changes_guidance_and_tokens_with_effect(pipeline: VCFPipeline) -> None:
    def louder(pipe: VCFPipeline, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale += 1.0
        return tensors

    found = equal_to_stock(pipeline, PROMPTS, generator=generators(1, 2), callback_on_step_end=louder)
    assert pipeline.guidance_scale == 9.0 and not torch.equal(found, pipeline(PROMPTS, seed=[1, 2], **FOUR).images)
    other = pipeline.encode_prompts(["ugly", "ugly"])

    def avoid(pipe: VCFPipeline, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(tensors, other)

    settings: dict[str, Any] = {"seed": [1, 2], "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]}
    changed = pipeline(PROMPTS, callback_on_step_end=avoid, **settings, **FOUR).images
    assert not torch.equal(changed, pipeline(PROMPTS, seed=[1, 2], **FOUR).images)


def test_callback_turns_guidance_on(pipeline: VCFPipeline) -> None:
    """From the first step on, with the negative prompt: all but the first step of a guided call."""

    def guide(pipe: VCFPipeline, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 5.0
        return tensors

    settings: dict[str, Any] = FOUR | {"seed": 1, "negative_prompt": "ugly"}
    found = pipeline("a", callback_on_step_end=guide, **settings | {"guidance_scale": 1.0}).images
    torch.testing.assert_close(found, pipeline("a", guidance_hi=0.7, **settings).images, atol=1e-5, rtol=0)


def test_callback_interrupts(pipeline: VCFPipeline) -> None:
    count = 0

    def stop(pipe: VCFPipeline, number: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal count
        count += 1
        pipe._interrupt = number == 1
        return tensors

    equal_to_stock(pipeline, "a", generator=generators(1), callback_on_step_end=stop)
    assert count == 4, "two steps of each pipeline"


@pytest.mark.parametrize(
    ("returned", "names", "settings", "message"),
    [
        (None, ["latents"], {}, "callback_on_step_end returned NoneType"),
        ({}, ["noise_pred"], {}, "has 'noise_pred'; it may have latents, prompt_embeds, negative_prompt_embeds alone"),
        ({"prompt_embeds": torch.zeros(2, 3, 4)}, ["prompt_embeds"], {}, r"replaced tokens of shape \[1, 16, 32\]"),
        ({"prompt_embeds": torch.zeros(2, 16, 32)}, ["prompt_embeds"], {"fusion_lo": 0.3}, "fusion_lo or fusion_hi"),
    ],
)
def test_what_a_callback_cannot_do_is_refused(
    pipeline: VCFPipeline, returned: Any, names: list[str], settings: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"callback_on_step_end": lambda *_: returned, "callback_on_step_end_tensor_inputs": names}
    with pytest.raises(UsageError, match=message):
        pipeline("a", **given, **settings, **FOUR)


def test_progress_bar_counts_the_steps(pipeline: VCFPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    """In a call, until it is turned off; generate and runs have none."""
    pipeline("a", **FOUR)
    assert not capsys.readouterr().err
    pipeline.set_progress_bar_config(desc="steps")
    pipeline("a", **FOUR)
    assert "steps" in (shown := capsys.readouterr().err) and "4/4" in shown
    pipeline.generate(["a"], seeds=[1])
    assert not capsys.readouterr().err


# The signature, and what is refused


def test_the_signature_has_every_argument() -> None:
    """Editors and help() show them; what StableDiffusionPipeline has and this pipeline has not has a reason."""
    ours, theirs = (inspect.signature(kind.__call__).parameters for kind in (VCFPipeline, StableDiffusionPipeline))
    assert theirs.keys() - ours.keys() == UNKNOWN_HERE.keys()
    kinds = {parameter.kind for parameter in ours.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    assert all(parameter.default is not inspect.Parameter.empty for parameter in [*ours.values()][1:])
    documented = VCFPipeline.__call__.__doc__ or ""
    assert all(name in documented for name in [*ours][1:])
    generate = inspect.signature(VCFPipeline.generate).parameters
    assert generate.keys() >= {"height", "width", "steps", "strength", "fusion", "guidance_scale", "scheduler"}


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("guidance", "guidance_scale"),
        ("guidance_scales", "guidance_scale"),
        ("num_steps", "num_inference_steps"),
        ("steps", "num_inference_steps"),
        ("seeds", "seed"),
        ("negative_prompts", "negative_prompt"),
        ("reference", "references"),
        ("refernce_weights", "reference_weights"),
        ("schedular", "scheduler"),
    ],
)
def test_an_unknown_argument_is_told_with_the_nearest(pipeline: VCFPipeline, name: str, near: str) -> None:
    with pytest.raises(TypeError, match=f"there is no argument '{name}'; did you mean '{near}'"):
        pipeline("a", **dict[str, Any]({name: 1}))


def test_an_unknown_argument_without_a_near_one_is_told_with_all(pipeline: VCFPipeline) -> None:
    with pytest.raises(TypeError, match="there is no argument 'xyz'; there are prompt, references, reference_weights"):
        pipeline("a", xyz=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="there is no argument 'step'; did you mean 'steps'"):
        pipeline.generate(["a"], seeds=[1], step=1)  # type: ignore[call-arg]


TOKENS = torch.zeros(1, TEXT_TOKENS, TEXT_WIDTH)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": None}, "neither prompt nor prompt_embeds"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt_embeds": TOKENS}, "there are prompt and prompt_embeds"),
        ({"negative_prompt": "b", "negative_prompt_embeds": TOKENS}, "negative_prompt and negative_prompt_embeds"),
        ({"negative_prompt_embeds": TOKENS[:, 1:]}, r"shape \[1, 16, 32\], and .* \[1, 15, 32\]"),
        ({"generator": generators(1, 2)}, "generator has 2 generators for 1 images"),
        ({"generator": generators(1), "seed": 1}, "a seed and a generator"),
        ({"seed": [1, 2]}, "seed has 2 values for 1 prompts"),
        ({"references": "x.png"}, r"references has a str; give images of PIL, as Image\.open"),
        ({"references": [np.zeros((8, 8, 3))]}, "references has a ndarray; give images of PIL"),
        ({"negative_references": "x.png"}, "negative_references has a str; give images of PIL"),
        ({"prompt": 3}, "prompt has a int; give a text, or a list of texts"),
        ({"prompt": ["a", None]}, "prompt has a NoneType; give a text"),
        ({"num_images_per_prompt": 1.5}, r"num_images_per_prompt is 1\.5; it must be a whole number, 1 or more"),
        ({"num_inference_steps": "4"}, "num_inference_steps is '4'; it must be a whole number, between 1 and 1000"),
        ({"height": 10**6}, "height is 1000000; it must be a whole number, between 1 and 8192"),
        ({"strength": "a"}, "strength is 'a'; it must be a number"),
        ({"guidance_rescale": "x"}, "guidance_rescale is x; it must be between 0 and 1"),
        ({"guidance_scale": "7"}, "guidance_scale is 7; it must be a finite number"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents is a ndarray; give a torch.Tensor"),
        ({"prompt": None, "prompt_embeds": [[1.0]]}, "prompt_embeds is a list; give a torch.Tensor"),
        ({"generator": 3}, "generator is 3; give a torch.Generator"),
        ({"generator": [None]}, r"generator is \[None\]; give a torch.Generator"),
        ({"callback_on_step_end": "x"}, "callback_on_step_end is 'x'; give a function"),
        ({"seed": -1}, "seed is -1; it must be between 0 and 9223372036854775807"),
        ({"seed": 2**70}, "seed is 1180591620717411303424; it must be"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan; it must be a finite number"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0; it must be a whole number, 1 or more"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0; it must be a whole number, between 1 and 1000"),
        ({"guidance_rescale": 2}, "guidance_rescale is 2; it must be between 0 and 1"),
        ({"clip_skip": 9}, "clip_skip is 9; it must be between 0 and 2"),
        ({"output_type": "jpg"}, "'jpg'; it must be one of pil, np, pt, latent"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, r"latents has the shape \[2, 4, 8, 8\]; it must have \[1, 4, 8, 8\]"),
        ({"latents": torch.zeros(1, 4, 8, 8), "height": 24}, r"it must have \[1, 4, 12, 8\]"),
        ({"latents": torch.zeros(4, 8, 8)}, r"latents has the shape \[4, 8, 8\]"),
        ({"height": 15}, "height is 15; it must be a multiple of 2"),
    ],
)
def test_wrong_values_are_refused(pipeline: VCFPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline(**{"prompt": "a"} | settings)


# Results, and pipelines without some parts


def test_result_types(pipeline: VCFPipeline) -> None:
    """pil, np and pt show the same image, with return_dict and without."""
    results = {kind: pipeline("a", **FOUR | {"output_type": kind}).images for kind in ("pil", "np", "pt")}
    tensor = results["pt"]
    assert tensor.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE) and tensor.dtype == torch.float32
    assert np.array_equal(results["np"], tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.asarray(results["pil"][0]), (results["np"][0] * 255).round())
    images, flags = pipeline("a", return_dict=False, **FOUR)
    assert torch.equal(images, tensor) and flags is None
    latents = pipeline("a", **FOUR | {"output_type": "latent"}).images
    with torch.no_grad():
        assert latents.shape == (1, 4, 8, 8) and torch.equal(pipeline.decode(latents), tensor)


def test_a_setting_may_be_a_tensor(pipeline: VCFPipeline) -> None:
    """Of one value, or of one for each prompt."""
    first, second = (pipeline("a", **FOUR | {"guidance_scale": torch.tensor(own)}).images for own in (3.0, [3.0]))
    assert torch.equal(first, second) and torch.equal(first, pipeline("a", **FOUR | {"guidance_scale": 3.0}).images)


def test_diffusers_way_to_load_an_ip_adapter_names_this_one(pipeline: VCFPipeline) -> None:
    with pytest.raises(UsageError, match=r"load_ip_adapter is not supported: call use_ip_adapter\(weights, encoder\)"):
        pipeline.load_ip_adapter("h94/IP-Adapter", subfolder="models", weight_name="ip-adapter_sd15.safetensors")


def test_without_text_encoder_the_tokens_are_enough() -> None:
    parts = dict(build_pipeline().components)
    whole = VCFPipeline(**parts)
    whole.set_progress_bar_config(disable=True)
    text, negative = whole.encode_prompt("a cat", "cpu", 1, True)
    rest = VCFPipeline(**{**parts, "text_encoder": None, "tokenizer": None})
    rest.set_progress_bar_config(disable=True)
    found = rest(prompt_embeds=text, negative_prompt_embeds=negative, **FOUR).images
    torch.testing.assert_close(found, whole("a cat", **FOUR).images, atol=1e-5, rtol=0)
    unguided = rest(prompt_embeds=text, **FOUR | {"guidance_scale": 1.0}).images
    torch.testing.assert_close(unguided, whole("a cat", **FOUR | {"guidance_scale": 1.0}).images, atol=1e-5, rtol=0)
    alone = VCFPipeline(**{**dict.fromkeys(parts), "text_encoder": whole.text_encoder, "tokenizer": whole.tokenizer})
    assert torch.equal(alone.encode_prompt("a cat", "cpu", 1, True)[0], text)


def test_pipelines_change_their_class(pipeline: VCFPipeline) -> None:
    """from_pipe goes from Stable Diffusion to this pipeline and back with the same components."""
    plain = StableDiffusionPipeline.from_pipe(pipeline)
    again = VCFPipeline.from_pipe(plain, aligner=pipeline.aligner)
    again.set_progress_bar_config(disable=True)
    assert again.unet is pipeline.unet and again.image_encoder is pipeline.image_encoder
    assert torch.equal(again("a", **FOUR).images, pipeline("a", **FOUR).images)
