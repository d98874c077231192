"""VCFPipeline with tiny real components: against stock Stable Diffusion, batch against single sample, round trips."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from PIL import Image

from support.tiny_models import IMAGE_TOKENS, TEXT_WIDTH, VISION_WIDTH, build_pipeline
from vcf_batch.config.limits import ALIGNED_FUSIONS, SCHEDULERS
from vcf_batch.config.limits import IMAGE_TOKENS as IMAGE_TOKEN_CHOICES
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.arguments import BLANK
from vcf_batch.vcf.base.family import EncodedText
from vcf_batch.vcf.base.stable_diffusion import StableDiffusion
from vcf_batch.vcf.pipeline import VCFPipeline

PREDICTIONS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module", params=PREDICTIONS)
def pipeline(request: pytest.FixtureRequest) -> VCFPipeline:
    return build_pipeline(seed=0, prediction_type=request.param)


@pytest.fixture(scope="module")
def epsilon() -> VCFPipeline:
    return build_pipeline(seed=0)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 255, (12, 20, 3), dtype=np.uint8)) for _ in range(3)]


def stock(pipeline: VCFPipeline) -> StableDiffusionPipeline:
    """diffusers' own pipeline over the same components."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "feature_extractor")
    components = {name: getattr(pipeline, name) for name in names}
    plain = StableDiffusionPipeline(**components, safety_checker=None, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    return plain


def as_tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def mixed_batch(images: list[Image.Image]) -> tuple[list[str], list[list[Image.Image]], dict[str, Any]]:
    """Six samples that differ in everything that a sample may differ in."""
    prompts = ["a red cat", "a blue dog", "two birds", "a house", "a red cat", "a tree"]
    references = [[images[0]], [images[0], images[1], images[2]], [], [images[1]], [images[2], images[0]], [images[2]]]
    settings: dict[str, Any] = {
        "seeds": [1, 2, 3, 4, 2**63 - 1, 6],
        "negative_prompts": ["", "ugly", "", "grey", "", ""],
        "fusion": ["concat", "concat", "concat", "naive", "cross_attention", "concat"],
        "strength": [0.4, 1.0, None, None, 0.7, 0.0],
        "guidance_scale": [5.0, 1.0, 7.5, None, 3.0, 0.0],
        "fusion_lo": [0.0, 0.4, 0.0, 0.3, 0.0, 0.0],
        "fusion_hi": [1.0, 1.0, 0.2, 1.0, 0.6, 1.0],
        "reference_weights": [None, [1.0, 0.0, 3.0], None, [2.0], [0.9, 0.1], None],
        "negative_references": [None, images[1], images[2], images[0], None, images[0]],
    }
    return prompts, references, settings


def alone(pipeline: VCFPipeline, images: list[Image.Image], i: int, scheduler: str = "ddim") -> torch.Tensor:
    prompts, references, settings = mixed_batch(images)
    single = {name: values[i : i + 1] for name, values in settings.items()}
    return pipeline.generate(prompts[i : i + 1], references[i : i + 1], scheduler=scheduler, **single)[0]


# Equality with diffusers


def test_text_only_equals_stable_diffusion(pipeline: VCFPipeline) -> None:
    prompts, negatives, seeds = ["a red cat", "a blue dog"], ["ugly", ""], [11, 12]
    expected = stock(pipeline)(
        prompts,
        negative_prompt=negatives,
        guidance_scale=7.0,
        num_inference_steps=6,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    ours = pipeline.generate(prompts, seeds=seeds, negative_prompts=negatives, guidance_scale=7, steps=6)
    torch.testing.assert_close(ours, as_tensor(expected), atol=1e-5, rtol=0)


def test_noise_in_each_step_equals_stable_diffusion(pipeline: VCFPipeline) -> None:
    """With eta, a sample's generator goes on after the initial noise, step by step."""
    prompts, seeds = ["a red cat", "a blue dog"], [11, 12]
    expected = stock(pipeline)(
        prompts,
        guidance_scale=3.0,
        num_inference_steps=4,
        eta=0.7,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    ours = pipeline.generate(prompts, seeds=seeds, guidance_scale=3, steps=4, eta=0.7)
    torch.testing.assert_close(ours, as_tensor(expected), atol=1e-5, rtol=0)


def test_text_only_without_guidance_equals_stable_diffusion(pipeline: VCFPipeline) -> None:
    generator = torch.Generator().manual_seed(5)
    expected = stock(pipeline)(
        "a house", guidance_scale=1.0, num_inference_steps=3, generator=generator, output_type="np"
    ).images
    ours = pipeline.generate(["a house"], seeds=[5], guidance_scale=1, steps=3)
    torch.testing.assert_close(ours, as_tensor(expected), atol=1e-5, rtol=0)


def test_concat_at_strength_1_equals_stable_diffusion_on_concatenated_tokens(
    pipeline: VCFPipeline, images: list[Image.Image]
) -> None:
    """The unconditional side is padded with zeros, as the authors do."""
    prompts, seeds = ["a red cat", "a blue dog"], [3, 4]
    tokens = torch.cat([pipeline.encode_prompts(prompts), pipeline.encode_references(images[:2])], dim=1)
    negative = torch.cat([pipeline.encode_prompts(["", ""]), torch.zeros(2, IMAGE_TOKENS, TEXT_WIDTH)], dim=1)
    expected = stock(pipeline)(
        prompt_embeds=tokens,
        negative_prompt_embeds=negative,
        guidance_scale=7.0,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).images
    ours = pipeline.generate(prompts, images[:2], seeds=seeds, guidance_scale=7, steps=4, strength=1)
    torch.testing.assert_close(ours, as_tensor(expected), atol=1e-5, rtol=0)


def test_prompts_are_encoded_as_diffusers_does(epsilon: VCFPipeline) -> None:
    prompts = [f"prompt number {number}" for number in range(35)]
    expected, negative = stock(epsilon).encode_prompt(prompts, "cpu", 1, True, ["ugly"] * 35)
    torch.testing.assert_close(epsilon.encode_prompts(prompts), expected)
    torch.testing.assert_close(epsilon.encode_prompts(["ugly"]), negative[:1])


# Independence of the samples in a batch


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sample_of_a_mixed_batch_equals_the_sample_alone(
    pipeline: VCFPipeline, images: list[Image.Image], scheduler: str
) -> None:
    """The output is a function of the sample, whatever shares its batch: noise comes from one CPU generator per sample.

    The batch mixes fusions, their ranges, strengths, guidance scales, negative prompts and references, and numbers and
    weights of references.
    """
    prompts, references, settings = mixed_batch(images)
    batch = pipeline.generate(prompts, references, scheduler=scheduler, **settings)
    assert batch.shape == (6, 3, 16, 16) and batch.dtype == torch.float32 and batch.device.type == "cpu"
    assert batch.min() >= 0 and batch.max() <= 1
    for i, image in enumerate(batch):
        torch.testing.assert_close(image, alone(pipeline, images, i, scheduler), atol=1e-4, rtol=0)


def test_order_of_the_batch_does_not_matter(pipeline: VCFPipeline, images: list[Image.Image]) -> None:
    prompts, references, settings = mixed_batch(images)
    turned = pipeline.generate(
        prompts[::-1], references[::-1], **{name: values[::-1] for name, values in settings.items()}
    )
    torch.testing.assert_close(turned.flip(0), pipeline.generate(prompts, references, **settings), atol=1e-4, rtol=0)


def test_bfloat16_batch_is_close_to_the_samples_alone(images: list[Image.Image]) -> None:
    """bfloat16's own tolerance: 8 bits of mantissa, and other kernels for a batch than for one sample.

    Measured on two CPU cores: at most 0.001, against at most 0.1 (mean 0.006) from bfloat16 to float32.
    """
    half = build_pipeline(seed=0).to(dtype=torch.bfloat16)
    prompts, references, settings = mixed_batch(images)
    batch = half.generate(prompts, references, **settings)
    assert batch.dtype == torch.float32
    for i, image in enumerate(batch):
        difference = (image - alone(half, images, i)).abs()
        assert difference.mean() < 0.005 and difference.max() < 0.05


def test_bfloat16_is_close_to_float32(epsilon: VCFPipeline, images: list[Image.Image]) -> None:
    prompts, references, settings = mixed_batch(images)
    half = build_pipeline(seed=0).to(dtype=torch.bfloat16).generate(prompts, references, **settings)
    assert (half - epsilon.generate(prompts, references, **settings)).abs().mean() < 0.02


# Strength, references, guidance


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
def test_strength_0_is_exactly_text_only(pipeline: VCFPipeline, images: list[Image.Image], fusion: str) -> None:
    text_only = pipeline.generate(["a red cat"], seeds=[7])
    fused = pipeline.generate(["a red cat"], [images[0]], seeds=[7], fusion=fusion, strength=0)
    assert torch.equal(fused, text_only)


def test_text_only_row_beside_concat_rows_is_text_only(pipeline: VCFPipeline, images: list[Image.Image]) -> None:
    """The image tokens and the unconditional padding of its neighbours are hidden from it."""
    text_only = pipeline.generate(["a red cat"], seeds=[7])
    batch = pipeline.generate(
        ["a red cat", "a dog", "a red cat"], [None, images, images[0]], seeds=[7, 8, 7], strength=[None, None, 0]
    )
    torch.testing.assert_close(batch[:1], text_only, atol=1e-5, rtol=0)
    torch.testing.assert_close(batch[2:], text_only, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
def test_reference_and_strength_show_in_the_image(
    pipeline: VCFPipeline, images: list[Image.Image], fusion: str
) -> None:
    def generate(reference: Image.Image, strength: float) -> torch.Tensor:
        return pipeline.generate(["a red cat"], [reference], seeds=[7], fusion=fusion, strength=strength)

    weak, strong, other = generate(images[0], 0.2), generate(images[0], 0.9), generate(images[1], 0.9)
    assert (weak - strong).abs().max() > 0.01 and (strong - other).abs().max() > 0.01


def test_strength_of_concat_tends_to_text_only(pipeline: VCFPipeline, images: list[Image.Image]) -> None:
    text_only = pipeline.generate(["a red cat"], seeds=[7])
    faint = pipeline.generate(["a red cat"], [images[0]], seeds=[7], strength=1e-12)
    torch.testing.assert_close(faint, text_only, atol=1e-4, rtol=0)


def test_strength_scales_the_softmax_mass_of_image_tokens(pipeline: VCFPipeline, images: list[Image.Image]) -> None:
    """Strength 2 counts each image token twice, so it equals stock Stable Diffusion on the tokens given twice."""
    image = pipeline.encode_references(images[:1])
    twice = stock(pipeline)(
        prompt_embeds=torch.cat([pipeline.encode_prompts(["a red cat"]), image, image], dim=1),
        negative_prompt_embeds=torch.cat([pipeline.encode_prompts([""]), torch.zeros_like(image).repeat(1, 2, 1)], 1),
        guidance_scale=5.0,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(7),
        output_type="np",
    ).images
    doubled = pipeline.generate(["a red cat"], [images[0]], seeds=[7], strength=2)
    torch.testing.assert_close(doubled, as_tensor(twice), atol=1e-4, rtol=0)


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
def test_order_of_references_does_not_matter(pipeline: VCFPipeline, images: list[Image.Image], fusion: str) -> None:
    forward = pipeline.generate(["a red cat"], [images], seeds=[7], fusion=fusion)
    backward = pipeline.generate(["a red cat"], [images[::-1]], seeds=[7], fusion=fusion)
    torch.testing.assert_close(forward, backward, atol=1e-4, rtol=0)


# Control over what transfers


def knobs(pipeline: VCFPipeline, images: Any, **settings: Any) -> torch.Tensor:
    return pipeline.generate(["a red cat"], [images], seeds=[7], **settings)


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
@pytest.mark.parametrize("strength", [None, 0.6])
def test_equal_references_equal_one(
    epsilon: VCFPipeline, images: list[Image.Image], fusion: str, strength: float | None
) -> None:
    """Weights are shares of one strength: giving a reference twice changes nothing, however it is divided."""
    one = knobs(epsilon, images[0], fusion=fusion, strength=strength)
    for weights in (None, [[0.5, 0.5]], [[3, 1]]):
        twice = knobs(epsilon, [images[0]] * 2, fusion=fusion, strength=strength, reference_weights=weights)
        torch.testing.assert_close(twice, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
def test_weight_0_leaves_a_reference_out(epsilon: VCFPipeline, images: list[Image.Image], fusion: str) -> None:
    first = knobs(epsilon, images[0], fusion=fusion)
    # Not to the last bit: the image encoder has seen two images at once.
    left_out = knobs(epsilon, images[:2], fusion=fusion, reference_weights=[[1, 0]])
    torch.testing.assert_close(left_out, first, atol=1e-5, rtol=0)
    nearly = knobs(epsilon, images[:2], fusion=fusion, reference_weights=[[1, 1e-9]])
    torch.testing.assert_close(nearly, first, atol=1e-4, rtol=0)
    even = knobs(epsilon, images[:2], fusion=fusion)
    assert torch.equal(knobs(epsilon, images[:2], fusion=fusion, reference_weights=[[7, 7]]), even)
    assert (even - first).abs().max() > 0.005


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
def test_guidance_leads_nowhere_where_both_sides_are_the_same(
    epsilon: VCFPipeline, images: list[Image.Image], fusion: str
) -> None:
    """The unconditional side is fused with the negative reference as the other one with the reference."""
    same = knobs(epsilon, images[0], fusion=fusion, negative_prompts="a red cat", negative_references=images[0])
    unguided = knobs(epsilon, images[0], fusion=fusion, guidance_scale=1)
    torch.testing.assert_close(same, unguided, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fusion", ALIGNED_FUSIONS)
def test_what_the_unconditional_side_may_be(epsilon: VCFPipeline, images: list[Image.Image], fusion: str) -> None:
    def generate(**settings: Any) -> torch.Tensor:
        return knobs(epsilon, images[0], fusion=fusion, strength=0.9, **settings)

    zeros, blank, negative = generate(), generate(unconditional="blank"), generate(negative_references=images[1])
    for one, other in itertools.combinations([zeros, blank, negative], 2):
        assert (one - other).abs().max() > 0.005
    assert torch.equal(generate(unconditional="zeros"), zeros)
    assert torch.equal(generate(negative_references=BLANK), blank)
    assert torch.equal(generate(unconditional="blank", negative_references=images[1]), negative)
    assert torch.equal(generate(unconditional="negative", negative_references=[images[1]]), negative)
    assert torch.equal(generate(unconditional="negative", negative_references=[None]), zeros)


def test_text_only_stays_text_only_but_for_a_negative_reference(
    epsilon: VCFPipeline, images: list[Image.Image]
) -> None:
    text_only = knobs(epsilon, None)
    assert torch.equal(knobs(epsilon, None, unconditional="blank"), text_only)
    assert torch.equal(knobs(epsilon, images[0], strength=0, negative_references=images[1]), text_only)
    assert torch.equal(knobs(epsilon, None, guidance_scale=1), knobs(epsilon, images[0], strength=0, guidance_scale=1))
    assert (knobs(epsilon, None, negative_references=images[1]) - text_only).abs().max() > 0.005


def test_image_tokens_replace_the_aligners_choice(epsilon: VCFPipeline, images: list[Image.Image]) -> None:
    pictures = {choice: knobs(epsilon, images[0], image_tokens=choice) for choice in IMAGE_TOKEN_CHOICES}
    assert torch.equal(pictures["all"], knobs(epsilon, images[0]))
    whole = epsilon.encode_references(images)
    for choice, count in (("all", IMAGE_TOKENS), ("patches", IMAGE_TOKENS - 1), ("cls", 1)):
        assert epsilon.encode_references(images, choice).shape == (3, count, TEXT_WIDTH)
    torch.testing.assert_close(epsilon.encode_references(images, "cls"), whole[:, :1])
    torch.testing.assert_close(epsilon.encode_references(images, "patches"), whole[:, 1:])
    for one, other in itertools.combinations(pictures.values(), 2):
        assert (one - other).abs().max() > 0.005
    with pytest.raises(UsageError, match="image_tokens is 'pooled'; it must be one of all, patches, cls"):
        knobs(epsilon, images[0], image_tokens="pooled")


# Encoding references


def test_references_are_the_aligned_penultimate_tokens(epsilon: VCFPipeline, images: list[Image.Image]) -> None:
    squashed = images[0].resize((16, 16), Image.Resampling.BICUBIC)
    mean, std = epsilon.feature_extractor.image_mean, epsilon.feature_extractor.image_std
    pixels = (np.asarray(squashed, dtype=np.float32) / 255 - np.float32(mean)) / np.float32(std)
    vision = epsilon.image_encoder.vision_model
    with torch.no_grad():
        hidden = vision.pre_layrnorm(vision.embeddings(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
        for layer in vision.encoder.layers[:-1]:
            hidden = layer(hidden, None)
        expected = epsilon.aligner(hidden)
    torch.testing.assert_close(epsilon.encode_references(images[:1]), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape == (1, IMAGE_TOKENS, TEXT_WIDTH)


def test_squashing_before_encoding_changes_nothing(epsilon: VCFPipeline, images: list[Image.Image]) -> None:
    squashed = [epsilon.squash(image) for image in images]
    assert {image.size for image in squashed} == {(16, 16)}
    assert torch.equal(epsilon.encode_references(squashed), epsilon.encode_references(images))


@pytest.mark.parametrize(("tokens", "count"), [("patches", IMAGE_TOKENS - 1), ("cls", 1)])
def test_token_choice_of_the_aligner_is_used(images: list[Image.Image], tokens: str, count: int) -> None:
    pipeline = build_pipeline()
    pipeline.register_modules(aligner=ImageAligner(VISION_WIDTH, TEXT_WIDTH, tokens=tokens))
    assert pipeline.encode_references(images).shape == (3, count, TEXT_WIDTH)


def test_distinct_inputs_are_encoded_once(
    epsilon: VCFPipeline, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    prompts, references = StableDiffusion.encode, epsilon.encode_references

    def counted_prompts(self: StableDiffusion, texts: list[str], *settings: Any) -> list[EncodedText]:
        encoded.append(len(texts))
        return prompts(self, texts, *settings)

    def counted_references(found: list[Image.Image], image_tokens: str | None, **given: bool) -> torch.Tensor:
        encoded.append(len(found))
        return references(found, image_tokens, **given)

    monkeypatch.setattr(StableDiffusion, "encode", counted_prompts)
    monkeypatch.setattr(epsilon, "encode_references", counted_references)
    epsilon.generate(["a", "a", "b"], [images[0], images[:2], images[1]], seeds=[1, 2, 3], steps=1)
    assert encoded == [3, 2], "prompts a, b and the empty negative prompt; two images"


# Sizes and decoding


def test_size_and_noise(epsilon: VCFPipeline) -> None:
    image = epsilon.generate(["a"], seeds=[1], height=24, width=32, steps=1)
    assert image.shape == (1, 3, 24, 32)
    noise = epsilon.draw_noise([5, 6])
    expected = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(6))
    assert torch.equal(noise[1, 0], expected)
    assert torch.equal(epsilon.draw_noise([6], added=2)[0, 0], expected), "what follows does not change what is first"
    with pytest.raises(UsageError, match="width is 31; it must be a multiple of 2"):
        epsilon.generate(["a"], seeds=[1], width=31)


def test_decoding_in_parts_changes_nothing(epsilon: VCFPipeline) -> None:
    latents = torch.randn(11, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        together, single = epsilon.decode(latents), torch.cat([epsilon.decode(latent[None]) for latent in latents])
    torch.testing.assert_close(together, single, atol=1e-5, rtol=0)


# Loading, saving, missing parts


def test_save_and_load_keeps_everything(pipeline: VCFPipeline, images: list[Image.Image], tmp_path: Path) -> None:
    """diffusers silently drops a component that is not in _optional_components."""
    pipeline.register_to_config(default_strength=0.25)
    try:
        pipeline.save_pretrained(tmp_path)
        loaded = VCFPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        index = json.loads((tmp_path / "model_index.json").read_text())
        assert index["aligner"] == ["vcf_batch.vcf.aligner", "ImageAligner"] and index["default_steps"] == 4
        assert (loaded.config.default_steps, loaded.config.default_guidance_scale) == (4, 5.0)
        assert loaded.config.default_strength == 0.25
        assert loaded.aligner.config.vision_dim == VISION_WIDTH
        prompts, references, settings = mixed_batch(images)
        expected = pipeline.generate(prompts, references, **settings)
        assert torch.equal(loaded.generate(prompts, references, **settings), expected)
        changed = VCFPipeline.from_pretrained(tmp_path, default_steps=9)
        assert changed.config.default_steps == 9
    finally:
        pipeline.register_to_config(default_strength=None)


def test_diffusers_loads_a_saved_pipeline(epsilon: VCFPipeline, images: list[Image.Image], tmp_path: Path) -> None:
    """DiffusionPipeline.from_pretrained finds the class once the package is imported, without code in the folder."""
    epsilon.save_pretrained(tmp_path)
    assert not [*tmp_path.rglob("*.py")]
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is VCFPipeline and isinstance(loaded.aligner, ImageAligner)
    settings: dict[str, Any] = {"seeds": [1], "steps": 2}
    expected = epsilon.generate(["a cat"], [images[0]], **settings)
    assert torch.equal(loaded.generate(["a cat"], [images[0]], **settings), expected)


def test_the_embedded_model_is_loaded_by_its_name() -> None:
    """As the commands' --model tiny, wherever the program runs."""
    loaded = VCFPipeline.from_pretrained("tiny", dtype=torch.float32)
    assert loaded.config.default_strength == 0.3 and loaded.aligner is not None
    by_path = VCFPipeline.from_pretrained(tiny_folder(), dtype=torch.float32)
    weights = zip(loaded.unet.parameters(), by_path.unet.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)


# `make test` imports the same modules in test_layering.py, and finds that nothing is said.
@pytest.mark.slow
def test_importing_gives_no_hints() -> None:
    """Nothing here uses torchvision, which transformers tells to install whenever diffusers is imported."""
    code = (
        "from vcf_batch import ImageAligner, VCFPipeline, run; import vcf_batch.worker.worker, vcf_batch.tiny.train, "
        "vcf_batch.training.assembly; VCFPipeline.from_pretrained('tiny').set_up('cpu')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stdout + done.stderr


def test_plain_stable_diffusion_folder(epsilon: VCFPipeline, images: list[Image.Image], tmp_path: Path) -> None:
    """Text only as it is; with references once the missing parts are given."""
    stock(epsilon).save_pretrained(tmp_path)
    plain = VCFPipeline.from_pretrained(tmp_path)
    assert plain.config.default_steps == 50 and plain.config.default_guidance_scale == 9.0
    assert plain.aligner is None and plain.safety_checker is None
    settings: dict[str, Any] = {"seeds": [1], "steps": 2, "guidance_scale": 5}
    assert torch.equal(plain.generate(["a cat"], **settings), epsilon.generate(["a cat"], **settings))
    with pytest.raises(ModelError, match="no aligner, and references need one"):
        plain.generate(["a cat"], [images[0]], **settings)
    with pytest.raises(ModelError, match="no image_encoder, and references need one"):
        VCFPipeline.from_pretrained(tmp_path, aligner=epsilon.aligner).generate(["a cat"], [images[0]], **settings)
    whole = VCFPipeline.from_pretrained(tmp_path, aligner=epsilon.aligner, image_encoder=epsilon.image_encoder)
    expected = epsilon.generate(["a cat"], [images[0]], **settings)
    assert torch.equal(whole.generate(["a cat"], [images[0]], **settings), expected)


def test_parts_that_do_not_fit_are_refused() -> None:
    parts = dict(build_pipeline().components)
    with pytest.raises(ModelError, match="tokens of width 64, but the UNet is conditioned on width 32"):
        VCFPipeline(**{**parts, "aligner": ImageAligner(VISION_WIDTH, 64)})
    with pytest.raises(ModelError, match="reads tokens of width 40, but the image encoder gives width 48"):
        VCFPipeline(**{**parts, "aligner": ImageAligner(40, TEXT_WIDTH)})
    distilled = UNet2DConditionModel.from_config(parts["unet"].config, time_cond_proj_dim=8)
    with pytest.raises(ModelError, match=r"time_cond_proj_dim is 8.*; use a model without distillation"):
        VCFPipeline(**{**parts, "unet": distilled})
    with pytest.raises(ModelError, match="runs no safety checker"):
        VCFPipeline(**{**parts, "safety_checker": torch.nn.Identity()})


def test_default_strength_is_for_concat(images: list[Image.Image]) -> None:
    pipeline = build_pipeline()
    assert [pipeline.resolve_strength(fusion, None) for fusion in ALIGNED_FUSIONS] == [0.3, 1.0, 0.3]
    pipeline.register_to_config(default_strength=0.1)
    assert [pipeline.resolve_strength(fusion, None) for fusion in ALIGNED_FUSIONS] == [0.3, 0.1, 0.3]
    assert pipeline.resolve_strength("concat", 0.0) == 0.0
    given = pipeline.generate(["a cat"], [images[0]], seeds=[1], strength=0.1)
    assert torch.equal(pipeline.generate(["a cat"], [images[0]], seeds=[1]), given)
    pipeline.aligner.register_to_config(default_strength=0.2)
    assert [pipeline.resolve_strength(fusion, None) for fusion in ALIGNED_FUSIONS] == [0.3, 0.2, 0.3]


# The face of a diffusers pipeline


def test_call_returns_pil_images(epsilon: VCFPipeline, images: list[Image.Image]) -> None:
    output = epsilon("a red cat", images[:2], seed=3, num_inference_steps=2)
    tensor = epsilon.generate(["a red cat"], [images[:2]], seeds=[3], steps=2)
    assert isinstance(output, StableDiffusionPipelineOutput)
    assert output.nsfw_content_detected is None and output.images[0].size == (16, 16)
    assert np.array_equal(np.asarray(output.images[0]), (tensor[0].permute(1, 2, 0).numpy() * 255).round())
    assert torch.equal(epsilon("a red cat", images[:2], seed=3, num_inference_steps=2, output_type="pt")[0], tensor)
    weighted = epsilon("a red cat", images[:2], reference_weights=[1, 0], seed=3, output_type="pt")[0]
    alone = epsilon("a red cat", images[0], seed=3, output_type="pt")[0]
    torch.testing.assert_close(weighted, alone, atol=1e-5, rtol=0)


def test_call_takes_one_reference_for_all_or_one_each(epsilon: VCFPipeline, images: list[Image.Image]) -> None:
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "return_dict": False}
    shared, _ = epsilon(["a", "b"], images[0], seed=[1, 2], **settings)
    each, _ = epsilon(["a", "b"], [images[0], [images[0]]], seed=[1, 2], **settings)
    assert torch.equal(shared, each)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": [1]}, "seeds has 1 values for 2 prompts"),
        ({"strength": [0.1, 0.2, 0.3]}, "strength has 3 values for 2 prompts"),
        ({"strength": -1}, "strength is -1"),
        ({"fusion": "blend"}, "'blend'; it must be one of naive, concat, cross_attention"),
        ({"fusion": "blend", "strength": 0.5}, "'blend'; it must be one of naive, concat, cross_attention"),
        ({"scheduler": "pndm"}, "'pndm'; it must be one of ddim"),
        ({"steps": 0}, "steps is 0; it must be between 1 and 1000"),
        ({"references": [None]}, "references has 1 values for 2 prompts"),
        ({"fusion_lo": 0.7, "fusion_hi": 0.2}, "fusion_lo is 0.7 and fusion_hi 0.2"),
        ({"fusion_hi": 1.5}, "fusion_hi 1.5; both must be between 0 and 1"),
        ({"reference_weights": [[1.0], None]}, "reference_weights has 1 values for 0 references"),
        ({"unconditional": "ones"}, "'ones'; it must be one of zeros, blank, negative"),
        ({"unconditional": "negative"}, "there are no negative_references"),
    ],
)
def test_wrong_values_are_refused(epsilon: VCFPipeline, settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        epsilon.generate(["a", "b"], **{"seeds": [1, 2], **settings})


def test_no_prompts_is_refused(epsilon: VCFPipeline) -> None:
    with pytest.raises(UsageError, match="prompts is empty"):
        epsilon.generate([], seeds=[])


@pytest.mark.parametrize("given", [{}, {"torch_dtype": torch.bfloat16}, {"dtype": torch.bfloat16}], ids=str)
def test_every_part_has_one_dtype_however_it_is_stored(given: dict[str, Any]) -> None:
    """That of float32 if none is given. Some parts of ``tiny`` are stored in 16 bits."""
    pipeline = VCFPipeline.from_pretrained("tiny", **given)
    expected = next(iter(given.values()), torch.float32)
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.image_encoder, pipeline.aligner)
    assert {part.dtype for part in parts} == {expected}
