"""Stable Diffusion XL, on a random model of its layout at reduced width."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from support import ip_adapters, sd_layouts
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.models import adapter_layout
from vcf_batch.vcf import pno
from vcf_batch.vcf.aligner import ImageAligner
from vcf_batch.vcf.base.pipeline_xl import VCFXLPipeline
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline

SIZE = 64
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": (EulerDiscreteScheduler, {}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
}
RED, BLUE = Image.new("RGB", (40, 40), (220, 20, 30)), Image.new("RGB", (40, 40), (10, 20, 240))
LONG = " ".join(["a red star on a wall"] * 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd_layouts.save_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


def with_references(folder: Path) -> VCFPipeline:
    torch.manual_seed(5)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, image_size=32, patch_size=16, projection_dim=16))
    return VCFPipeline.from_pretrained(
        str(folder),
        image_encoder=encoder.eval(),
        feature_extractor=CLIPImageProcessor(size=32, crop_size=32),
        aligner=ImageAligner(32, 64).eval(),
    ).set_up("cpu")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> VCFPipeline:
    return with_references(folder)


def draw(pipeline: VCFPipeline, prompts: list[str], *args: Any, **settings: Any) -> torch.Tensor:
    used: dict[str, Any] = {
        "seeds": [*range(len(prompts))],
        "steps": 3,
        "guidance_scale": 5.0,
        "scheduler": "ddim",
        **settings,
    }
    return pipeline.generate(prompts, *args, **used)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_text_only_equals_stable_diffusion_xl(folder: Path, name: str) -> None:
    """The same images as diffusers' pipeline makes, whose empty negative prompt is None."""
    stock = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    stock.set_progress_bar_config(disable=True)
    kind, settings = SCHEDULERS[name]
    stock.scheduler = kind.from_config(stock.scheduler.config, **settings)
    ours = VCFPipeline.from_pretrained(str(folder)).set_up("cpu")
    ours.scheduler = kind.from_config(stock.scheduler.config)
    told: dict[str, Any] = {"original_size": (48, 96), "crops_coords_top_left": (3, 5), "target_size": (64, 32)}
    cases: list[dict[str, Any]] = [{}, {"negative_prompt": "blue"}, {"guidance_scale": 1.0}, told]
    for case in cases:
        used: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np", "guidance_scale": 5.0, **case}
        expected = stock("a red star", generator=torch.Generator().manual_seed(3), **used).images
        found = ours("a red star", generator=torch.Generator().manual_seed(3), **used).images
        assert np.abs(found - expected).max() < 1e-4, case


def test_tokens_and_pooled_embedding_are_those_of_diffusers(folder: Path, pipeline: VCFPipeline) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    for clip_skip in (None, 1):
        tokens, _, pooled, _ = stock.encode_prompt("a red star", clip_skip=clip_skip)
        (found,) = pipeline.family.encode(["a red star"], clip_skip=clip_skip)
        assert torch.equal(found.tokens, tokens[0]) and found.pooled is not None
        assert torch.equal(found.pooled, pooled[0]) and pipeline.family.width == 64
    with pytest.raises(UsageError, match="clip_skip is 3; it must be between 0 and 2"):
        pipeline.family.encode(["a red star"], clip_skip=3)


def test_the_empty_negative_prompt_is_zeros_where_the_model_says_so(folder: Path, pipeline: VCFPipeline) -> None:
    zeros = draw(pipeline, ["a red star"])
    encoded = VCFPipeline.from_pretrained(str(folder), force_zeros_for_empty_prompt=False).set_up("cpu")
    assert (draw(encoded, ["a red star"]) - zeros).abs().max() > 1e-3
    (empty,) = pipeline.family.encode([""])
    assert not pipeline.family.negative(empty).tokens.any() and empty.tokens.any()


@pytest.mark.parametrize("fusion", ["concat", "naive", "cross_attention"])
def test_a_sample_of_a_batch_equals_the_same_sample_alone(pipeline: VCFPipeline, fusion: str) -> None:
    """With prompts, references, roles, negative prompts and strengths of its own."""
    prompts, references = ["a red star", "", "blue", "a wall"], [RED, None, [RED, BLUE], BLUE]
    roles = ["layout", None, None, None] if fusion == "concat" else None
    settings: dict[str, Any] = {
        "negative_prompts": ["", "", "a", "b"],
        "strength": [0.5, 0.5, 1.0, 0.0],
        "reference_roles": roles,
    }
    together = draw(pipeline, prompts, references, fusion=fusion, **settings)
    for number in range(4):
        own: dict[str, Any] = {name: value and [value[number]] for name, value in settings.items()}
        alone = draw(pipeline, [prompts[number]], [references[number]], fusion=fusion, seeds=[number], **own)
        torch.testing.assert_close(together[number : number + 1], alone, atol=1e-4, rtol=0)
    text = draw(pipeline, prompts, negative_prompts=settings["negative_prompts"])
    assert (together[2] - text[2]).abs().max() > 1e-4
    torch.testing.assert_close(together[3], text[3], atol=1e-4, rtol=0)


def test_a_long_prompt_has_the_pooled_embedding_of_its_first_window(pipeline: VCFPipeline) -> None:
    (cut,), (whole,) = pipeline.family.encode([LONG]), pipeline.family.encode([LONG], chunked=True)
    assert len(whole.tokens) > len(cut.tokens) == 77
    # A pass over two windows may take other kernels than one over a single window.
    torch.testing.assert_close(whole.tokens[:77], cut.tokens, atol=1e-5, rtol=0)
    assert whole.pooled is not None and cut.pooled is not None
    torch.testing.assert_close(whole.pooled, cut.pooled, atol=1e-5, rtol=0)
    together = draw(pipeline, [LONG, "blue"], long_prompts="chunk")
    alone = draw(pipeline, ["blue"], seeds=[1], long_prompts="chunk")
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=0)


def test_prompt_noise_optimisation_lowers_the_loss(pipeline: VCFPipeline) -> None:
    text = pipeline.family.encode(["a red star", ""])
    with torch.no_grad():
        tokens = pipeline.encode_references([RED])
    sample, noise, conditioning = pipeline.prepare(
        text[:1], text[1:], [Fusion([tokens[0]])], seeds=[1], sampling=Sampling(steps=2, scheduler="ddim")
    )
    guide = Guide(pipeline.image_encoder, [0.5] * 3, [0.5] * 3)
    targets = guide.targets([[BLUE]], [None])
    settings: dict[str, Any] = {"steps": 3, "lr_conditioning": 0.01, "lr_noise": 0.01, "gamma": 0.1}
    images, (course,) = pno.optimize(sample, noise, conditioning, guide, targets, seeds=[1], **settings)
    assert images.shape == (1, 3, SIZE, SIZE) and course.best < course.first


def test_the_vae_is_float32_unless_the_model_says_that_half_precision_is_enough(folder: Path, tmp_path: Path) -> None:
    pipeline = VCFPipeline.from_pretrained(str(folder), dtype=torch.bfloat16).set_up("cpu")
    assert (pipeline.vae.dtype, pipeline.unet.dtype) == (torch.float32, torch.bfloat16)
    assert draw(pipeline, ["a red star"]).isfinite().all()
    fixed = sd_layouts.save_sdxl(tmp_path / "fixed", force_upcast=False)
    assert VCFPipeline.from_pretrained(str(fixed), dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_a_saved_pipeline_loads_and_draws_the_same(pipeline: VCFPipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = VCFPipeline.from_pretrained(str(tmp_path)).set_up("cpu")
    assert isinstance(loaded, VCFXLPipeline)
    assert torch.equal(draw(loaded, ["a red star"], [RED]), draw(pipeline, ["a red star"], [RED]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder": [None, None], "requires_aesthetics_score": True}, "is a refiner of Stable Diffusion XL"),
        ({"_class_name": "StableDiffusionXLInpaintPipeline"}, "is a StableDiffusionXLInpaintPipeline"),
    ],
)
def test_refiner_and_inpainting_are_refused_by_name(
    folder: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ModelError, match=message):
        VCFPipeline.from_pretrained(str(tmp_path))


def test_sizes_are_for_stable_diffusion_xl_alone() -> None:
    tiny = VCFPipeline.from_pretrained("tiny").set_up("cpu")
    with pytest.raises(UsageError, match="original_height is given, and this model is not told sizes"):
        tiny.generate(["a red star"], seeds=[1], steps=1, original_size=(64, 64))


def test_tokens_without_their_pooled_embedding_are_refused(pipeline: VCFPipeline) -> None:
    tokens = pipeline.encode_prompts(["a red star"])
    with pytest.raises(UsageError, match="needs: give pooled_prompt_embeds"):
        pipeline(prompt_embeds=tokens, num_inference_steps=1)
    (text,) = pipeline.family.encode(["a red star"])
    assert text.pooled is not None
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt", "seed": 1}
    given = pipeline(prompt_embeds=tokens, pooled_prompt_embeds=text.pooled[None], **settings).images
    assert torch.equal(given, pipeline("a red star", **settings).images)


@pytest.mark.parametrize("kind", ["base", "plus"])
def test_an_ip_adapter_of_its_layout_joins_sample_by_sample(folder: Path, tmp_path: Path, kind: str) -> None:
    """Its keys are those of the layers that the UNet's configuration tells, the middle last."""
    pipeline = VCFPipeline.from_pretrained(str(folder)).set_up("cpu")
    weights = ip_adapters.save_adapter(tmp_path / "adapter.safetensors", pipeline.unet, kind)
    names = [name.removesuffix(".processor") for name in [*pipeline.unet.attn_processors][1::2]]
    shapes = [tuple(pipeline.unet.get_submodule(name).to_k.weight.shape) for name in names]
    config = json.loads((folder / "unet" / "config.json").read_text())
    assert adapter_layout.cross_attention_layers(config) == shapes
    pipeline.use_ip_adapter(str(weights), str(ip_adapters.save_encoder(tmp_path / "image_encoder")))
    strengths = [0.0, 0.6, 1.0]
    together = draw(pipeline, ["a red star"] * 3, [RED, BLUE, RED], fusion="ip_adapter", strength=strengths)
    for number, reference in enumerate([RED, BLUE, RED]):
        own = {"fusion": "ip_adapter", "strength": strengths[number], "seeds": [number]}
        alone = draw(pipeline, ["a red star"], [reference], **own)
        torch.testing.assert_close(together[number : number + 1], alone, atol=1e-4, rtol=0)
    text = draw(VCFPipeline.from_pretrained(str(folder)).set_up("cpu"), ["a red star"] * 3)
    torch.testing.assert_close(together[0], text[0], atol=1e-4, rtol=0)
    assert (together[2] - text[2]).abs().max() > 1e-3
