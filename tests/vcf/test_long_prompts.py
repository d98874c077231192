"""Prompts of more tokens than the text encoder takes, encoded in windows."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from support import ip_adapters
from support.tiny_models import TEXT_TOKENS, build_pipeline
from vcf_batch.config.limits import FUSIONS, ROLED_FUSIONS
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import UsageError
from vcf_batch.vcf import pno
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline

WORDS = TEXT_TOKENS - 2
"""Words of a window: the tokenizer's words are letters."""
LONG = " ".join("abcdefghijklmnopqrstuvwxyz")


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> VCFPipeline:
    made = build_pipeline()
    ip_adapters.give_adapter(made, tmp_path_factory.mktemp("adapter"))
    return made


def pieces(text: str) -> list[str]:
    """The words of each window of a text."""
    words = text.split()
    return [" ".join(words[start : start + WORDS]) for start in range(0, max(1, len(words)), WORDS)]


@pytest.mark.parametrize("words", [0, 1, WORDS, WORDS + 1, 2 * WORDS, 2 * WORDS + 1])
def test_each_window_is_encoded_alone_with_its_own_begin_and_end(pipeline: VCFPipeline, words: int) -> None:
    """So the first one is what is left of a prompt that is cut off, and a short prompt is as it was."""
    text = " ".join((LONG * 2).replace(" ", "")[:words])
    found = pipeline.encode_windows([text, "a"])
    expected = pipeline.encode_prompts(pieces(text))
    assert len(found[0]) == len(pieces(text)) * TEXT_TOKENS
    torch.testing.assert_close(found[0], expected.flatten(0, 1))
    torch.testing.assert_close(found[1], pipeline.encode_prompts(["a"])[0])


def test_layers_are_left_out_of_each_window(pipeline: VCFPipeline) -> None:
    expected = pipeline.encode_prompts(pieces(LONG), clip_skip=1).flatten(0, 1)
    torch.testing.assert_close(pipeline.encode_windows([LONG], clip_skip=1)[0], expected)


@pytest.mark.parametrize(("prompt", "negative"), [(LONG, "b"), ("b", LONG), (LONG, LONG[::-1])])
def test_text_only_equals_stable_diffusion_on_the_joined_windows(
    pipeline: VCFPipeline, prompt: str, negative: str
) -> None:
    """The shorter of prompt and negative prompt is filled up with windows of the empty prompt."""
    sides = [pipeline.encode_prompts((pieces(text) + [""] * 2)[:2]).flatten(0, 1)[None] for text in (prompt, negative)]
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "feature_extractor")
    components: dict[str, Any] = {name: getattr(pipeline, name) for name in names}
    stock = StableDiffusionPipeline(**components, safety_checker=None, requires_safety_checker=False)
    stock.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"guidance_scale": 6.0, "num_inference_steps": 3, "output_type": "np"}
    expected = stock(
        prompt_embeds=sides[0],
        negative_prompt_embeds=sides[1],
        generator=torch.Generator().manual_seed(4),
        **settings,
    ).images
    given: dict[str, Any] = {"negative_prompt": negative, "long_prompts": "chunk", "seed": 4}
    np.testing.assert_allclose(pipeline(prompt, **given, **settings).images, expected, atol=1e-5)
    ours = pipeline.generate(
        [prompt], seeds=[4], negative_prompts=[negative], long_prompts="chunk", guidance_scale=6, steps=3
    )
    np.testing.assert_allclose(ours.permute(0, 2, 3, 1).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fusion", "role"), [*((each, None) for each in FUSIONS), *((each, "layout") for each in ROLED_FUSIONS)]
)
def test_a_sample_does_not_depend_on_how_long_its_neighbours_are(
    pipeline: VCFPipeline, fusion: str, role: str | None
) -> None:
    """With each fusion, with limits, and in and out of the fusion range."""
    prompts, negatives = [LONG, "a b", "c", LONG * 2], ["", LONG, "", "d"]
    lows = [0.0, 0.5, 0.9, 0.4]
    settings: dict[str, Any] = {"fusion": fusion, "strength": 0.6, "long_prompts": "chunk", "steps": 3}
    references = [picture(n) for n in range(4)]
    together = pipeline.generate(
        prompts,
        references,
        seeds=range(4),
        negative_prompts=negatives,
        fusion_lo=lows,
        reference_roles=role,
        **settings,
    )
    for n in range(4):
        alone = pipeline.generate(
            [prompts[n]],
            [references[n]],
            seeds=[n],
            negative_prompts=[negatives[n]],
            fusion_lo=lows[n],
            reference_roles=role,
            **settings,
        )
        torch.testing.assert_close(together[n], alone[0], atol=1e-4, rtol=0)


def test_what_is_said_after_the_first_window_counts(pipeline: VCFPipeline) -> None:
    both = [LONG, LONG + " z z z"]
    seen = pipeline.generate(both, seeds=[1, 1], steps=2, long_prompts="chunk")
    cut = pipeline.generate(both, seeds=[1, 1], steps=2)
    assert not torch.equal(seen[0], seen[1])
    torch.testing.assert_close(cut[0], cut[1], atol=1e-6, rtol=0)


def test_prompt_noise_optimisation_takes_long_prompts(pipeline: VCFPipeline) -> None:
    guide = Guide(pipeline.image_encoder, [0.5] * 3, [0.5] * 3)
    text, negative = (pipeline.encode_windows([text])[0] for text in (LONG, LONG[::-1]))
    tokens = pipeline.encode_references([picture(0)])
    sample, noise, conditioning = pipeline.prepare(
        [text], [negative], [Fusion([*tokens])], seeds=[3], sampling=Sampling(steps=2)
    )
    targets = guide.targets([[picture(0)]], [None])
    made, (objective,) = pno.optimize(
        sample, noise, conditioning, guide, targets, seeds=[3], steps=2, lr_conditioning=0.01, lr_noise=0.01, gamma=0.1
    )
    assert made.isfinite().all() and objective.steps == 2 and objective.best <= objective.first


def test_other_ways_are_refused(pipeline: VCFPipeline) -> None:
    with pytest.raises(UsageError, match="long_prompts is 'refuse'; it must be one of truncate, chunk"):
        pipeline("a", long_prompts="refuse")
