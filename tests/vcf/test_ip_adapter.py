"""IP-Adapter as a fusion, against diffusers' own on tiny checkpoints in the published layouts."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from support import ip_adapters, sd_layouts
from support.tiny_models import build_pipeline
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import ModelError
from vcf_batch.records import Objective
from vcf_batch.vcf import pno
from vcf_batch.vcf.fusion import Conditioning, Fusion
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline

STOCK = {"ddim": DDIMScheduler, "dpm++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
KINDS = tuple(ip_adapters.TOKENS)
TWO_STEPS = Sampling(steps=2)


def picture(seed: int, width: int = 21, height: int = 17) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository: an adapter of each kind, and the image encoder beside them."""
    models = tmp_path_factory.mktemp("IP-Adapter") / "models"
    unet = build_pipeline().unet
    for kind in KINDS:
        ip_adapters.save_adapter(models / f"{kind}.safetensors", unet, kind)
    ip_adapters.save_adapter(models / "base.bin", unet)
    ip_adapters.save_encoder(models / "image_encoder")
    return models


def adapted(folder: Path, name: str = "base.safetensors") -> VCFPipeline:
    """The pipeline with an adapter, and no aligner, as of a plain Stable Diffusion."""
    pipeline = build_pipeline()
    pipeline.aligner = None
    pipeline.use_ip_adapter(str(folder / name), str(folder / "image_encoder"))
    return pipeline


def stock(folder: Path, name: str) -> StableDiffusionPipeline:
    components = build_pipeline().components
    pipeline = StableDiffusionPipeline(
        **{part: components[part] for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")},
        safety_checker=None,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(
        str(folder.parent), subfolder=folder.name, weight_name=name, low_cpu_mem_usage=False, local_files_only=True
    )
    return pipeline


def noise_of(pipeline: VCFPipeline, seed: int) -> torch.Tensor:
    return pipeline.draw_noise([seed])[:, 0]


@pytest.mark.parametrize("scheduler", STOCK)
@pytest.mark.parametrize("name", ["base.safetensors", "plus.safetensors", "full.safetensors", "base.bin"])
def test_one_reference_at_scale_1_is_what_diffusers_makes_of_it(folder: Path, name: str, scheduler: str) -> None:
    ours, theirs = adapted(folder, name), stock(folder, name)
    theirs.scheduler = STOCK[scheduler].from_config(theirs.scheduler.config)
    image = picture(0)
    expected = theirs(
        "a red cat",
        ip_adapter_image=image,
        latents=noise_of(ours, 7),
        num_inference_steps=6,
        guidance_scale=5,
        output_type="pt",
    ).images
    found = ours.generate(["a red cat"], [image], seeds=[7], fusion="ip_adapter", steps=6, scheduler=scheduler)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (found - ours.generate(["a red cat"], seeds=[7], steps=6, scheduler=scheduler)).abs().max() > 0.01


def test_strength_is_diffusers_scale_and_several_references_share_its_attention(folder: Path) -> None:
    ours, theirs = adapted(folder), stock(folder, "base.safetensors")
    theirs.set_ip_adapter_scale(0.6)
    shown = [picture(0), picture(1)]
    expected = theirs(
        "a red cat",
        ip_adapter_image=[shown],
        latents=noise_of(ours, 7),
        num_inference_steps=4,
        guidance_scale=5,
        output_type="pt",
    ).images
    found = ours.generate(["a red cat"], [shown], seeds=[7], fusion="ip_adapter", strength=0.6, steps=4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_strength_0_is_exactly_the_prompt_alone(folder: Path) -> None:
    ours = adapted(folder)
    alone = build_pipeline().generate(["a red cat"], seeds=[7])
    assert torch.equal(ours.generate(["a red cat"], [picture(0)], seeds=[7], fusion="ip_adapter", strength=0), alone)
    assert torch.equal(ours.generate(["a red cat"], seeds=[7], fusion="ip_adapter"), alone)


def test_a_sample_of_a_mixed_batch_equals_the_sample_alone(folder: Path) -> None:
    """Each with references, strength, weights, range and negative reference of its own, beside other fusions."""
    ours = build_pipeline()
    ours.use_ip_adapter(str(folder / "plus.safetensors"), str(folder / "image_encoder"))
    rows: list[dict[str, Any]] = [
        {"references": picture(0), "strength": 1.0},
        {"references": [picture(1), picture(2)], "strength": 0.4, "reference_weights": [3.0, 1.0]},
        {"references": None, "strength": 1.0},
        {"references": picture(3), "strength": 0.7, "fusion_lo": 0.5, "negative_references": picture(4)},
        {"references": picture(5), "strength": 0.8, "fusion": "concat"},
        {"references": picture(6), "strength": 0.0},
    ]
    defaults = {"reference_weights": None, "fusion_lo": 0.0, "negative_references": None, "fusion": "ip_adapter"}
    rows = [defaults | row for row in rows]
    prompts = [f"a {word} cat" for word in ("red", "big", "old", "sad", "wet", "shy")]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0]}
    together = ours.generate(prompts, seeds=range(6), **columns)
    for number, row in enumerate(rows):
        own: dict[str, Any] = {name: [value] for name, value in row.items()}
        alone = ours.generate([prompts[number]], seeds=[number], **own)
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=0)


def test_equal_references_are_one_and_weights_are_counts(folder: Path) -> None:
    ours = adapted(folder)

    def drawn(references: list[Image.Image], weights: list[float] | None = None) -> torch.Tensor:
        return ours.generate(["a red cat"], [references], seeds=[7], fusion="ip_adapter", reference_weights=[weights])

    one, other = picture(0), picture(1)
    torch.testing.assert_close(drawn([one, one]), drawn([one]), atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn([one, one, other]), drawn([one, other], [2, 1]), atol=1e-4, rtol=0)
    torch.testing.assert_close(drawn([one, other], [1, 0]), drawn([one]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("size", [(16, 16), (64, 31), (15, 40), (3, 200)])
def test_what_the_adapter_sees_is_what_clips_preprocessing_gives(folder: Path, size: tuple[int, int]) -> None:
    ours = adapted(folder).adapter
    image = picture(0, *size)
    prepared = ours.prepare(image)
    assert prepared.size == (16, 16) and np.array_equal(np.asarray(ours.prepare(prepared)), np.asarray(prepared))
    expected = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)(image, return_tensors="pt").pixel_values
    found = ours.processor(prepared, return_tensors="pt")["pixel_values"]
    tolerance = 0.0 if max(size) <= 8 * min(size) else 0.5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


def test_what_does_not_fit_is_refused_with_both_values(folder: Path, tmp_path: Path) -> None:
    pipeline, encoder = build_pipeline(), str(folder / "image_encoder")
    flat = safetensors.torch.load_file(folder / "base.safetensors")

    def refused(tensors: dict[str, torch.Tensor], message: str, tower: str = encoder) -> None:
        safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(ModelError, match=message):
            pipeline.use_ip_adapter(str(tmp_path / "x.safetensors"), tower)

    refused(
        {"lora_up.weight": torch.zeros(2)},
        "is no IP-Adapter: it must .* it has others, such as lora_up.weight",
    )
    for wrong in (torch.tensor([torch.nan] * 32), torch.ones(32, dtype=torch.int64)):
        refused(flat | {"image_proj.norm.weight": wrong}, r"no finite numbers: image_proj\.norm\.weight, torch\.")
    refused(
        {key: value for key, value in flat.items() if ".1.to_k" not in key},
        r"for the 7 cross-attention .* lack 1 tensors, such as 1\.to_k_ip",
    )
    refused(flat | {"image_proj.norm.bias": torch.ones(7)}, r"have shape \[7\] in norm.bias, which must be \[32\]")
    refused(flat | {"image_proj.norm.weight": torch.ones(7)}, "gives tokens of width 7, but .* on width 32; published")
    refused(flat | {"ip_adapter.0.to_q_lora.weight": torch.ones(7)}, r"have 1 that do not belong there, such as 0.to_q")
    refused({name: value for name, value in flat.items() if "bias" not in name}, "of its projection lack 2 tensors")
    wide = {key: value.new_ones(value.shape[0], 48) if "_ip" in key else value for key, value in flat.items()}
    refused(wide, r"have shape \[16, 48\] in 1.to_k_ip.weight, which must be \[16, 32\]")
    other = {key: value for key, value in flat.items() if "image_proj" not in key}
    refused(
        other
        | {"image_proj.proj.weight": torch.ones(4 * 48, 24), "image_proj.proj.bias": torch.ones(4 * 48)}
        | {f"image_proj.norm.{name}": torch.ones(48) for name in ("weight", "bias")},
        "gives tokens of width 48, but the model's UNet is conditioned on width 32",
    )
    refused(flat | {"image_proj.perceiver_resampler.proj_in.weight": torch.ones(1, 1)}, "FaceID adapter, which needs")
    narrow = ip_adapters.save_encoder(tmp_path / "narrow")
    plus = safetensors.torch.load_file(folder / "plus.safetensors")
    refused(
        plus | {"image_proj.proj_in.weight": torch.ones(64, 39)},
        "of width 39, but the image encoder .* 40",
        str(narrow),
    )
    refused({key: v for key, v in plus.items() if "layers.3" not in key}, "a resampler of 3 layers; it must have 4")
    refused(flat, "the image encoder", str(tmp_path / "nowhere"))


def test_the_encoder_may_be_a_clip_with_its_text_tower(folder: Path, tmp_path: Path) -> None:
    """As most are published: it gives what its vision tower alone gives."""
    both = sd_layouts.save_clip(tmp_path / "clip", width=ip_adapters.HIDDEN)
    pipeline = build_pipeline()
    pipeline.use_ip_adapter(str(folder / "plus.safetensors"), str(both))
    expected = CLIPModel.from_pretrained(both)
    pixels = torch.rand(1, 3, 224, 224)
    found = pipeline.adapter.encoder(pixels).image_embeds
    torch.testing.assert_close(found, expected.get_image_features(pixels).pooler_output)


def test_code_in_a_pickle_does_not_run(folder: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"image_proj": Code(), "ip_adapter": {}}, tmp_path / "x.bin")
    with pytest.raises(ModelError, match=r"x\.bin"):
        build_pipeline().use_ip_adapter(str(tmp_path / "x.bin"), str(folder / "image_encoder"))
    assert not (tmp_path / "ran").exists()


def test_the_fusion_needs_an_adapter() -> None:
    with pytest.raises(ModelError, match="no IP-Adapter is loaded: call use_ip_adapter first"):
        build_pipeline().generate(["a cat"], [picture(0)], seeds=[1], fusion="ip_adapter")


def optimized(pipeline: VCFPipeline, fusion: str, **settings: Any) -> tuple[list[torch.Tensor], Objective]:
    """The tokens of each forward of prompt-noise optimisation, and its course."""
    image, prompt = picture(0), pipeline.encode_prompts(["a red cat"])
    tokens = pipeline.encode_references([image], adapted=fusion == "ip_adapter")
    sample, noise, conditioning = pipeline.prepare(
        prompt, pipeline.encode_prompts([""]), [Fusion([tokens[0]], fusion, **settings)], seeds=[7], sampling=TWO_STEPS
    )
    guide = Guide(pipeline.image_encoder, [0.5] * 3, [0.5] * 3)
    seen = []

    def watched(noise: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        seen.append(conditioning.positive.image_prompts.tokens.detach().clone())
        return sample(noise, conditioning)

    rates = {"lr_conditioning": 1e-2, "lr_noise": 1e-2, "gamma": 0.1}
    targets = guide.targets([[image]], [None])
    _, (course,) = pno.optimize(watched, noise, conditioning, guide, targets, seeds=[7], steps=2, **rates)
    return seen, course


def test_prompt_noise_optimisation_follows_the_reference_through_the_tokens_of_the_adapter(folder: Path) -> None:
    seen, course = optimized(adapted(folder), "ip_adapter")
    assert course.best < course.first and course.steps == 2
    assert [torch.equal(tokens, seen[0]) for tokens in seen] == [True, False, False]


@pytest.mark.parametrize("fusion", ["concat", "ip_adapter"])
def test_tokens_that_no_step_uses_are_not_followed(folder: Path, fusion: str) -> None:
    """In a range between two steps only the noise is."""
    pipeline = build_pipeline()
    pipeline.use_ip_adapter(str(folder / "base.safetensors"), str(folder / "image_encoder"))
    _, course = optimized(pipeline, fusion, lo=0.9, hi=0.95)
    assert course.steps == 2


def test_the_adapter_is_not_saved_with_the_model(folder: Path, tmp_path: Path) -> None:
    pipeline = adapted(folder)
    assert not [name for name in pipeline.unet.state_dict() if "_ip" in name]
    pipeline.save_pretrained(tmp_path)
    again = VCFPipeline.from_pretrained(tmp_path)
    assert torch.equal(again.generate(["a cat"], seeds=[1]), build_pipeline().generate(["a cat"], seeds=[1]))


def test_an_adapter_that_is_loaded_later_uses_the_kernel_that_was_fixed(folder: Path) -> None:
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value)

    pipeline = build_pipeline().set_up("cpu", attention=kernel)
    pipeline.use_ip_adapter(str(folder / "base.safetensors"), str(folder / "image_encoder"))
    assert {processor.kernel for processor in pipeline.unet.attn_processors.values()} == {kernel}
