"""Deep features of the UNet, used for several steps."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from support.tiny_models import build_pipeline
from vcf_batch.vcf.deep_cache import DeepCache
from vcf_batch.vcf.pipeline import VCFPipeline

PROMPTS = ["a red cat", "a blue dog", "a green bird"]


@pytest.fixture(scope="module")
def pipeline() -> VCFPipeline:
    return build_pipeline()


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8))


@pytest.fixture
def computed(pipeline: VCFPipeline) -> Iterator[dict[str, int]]:
    """How often a shallow block and a deep one were computed."""
    counts = {"shallow": 0, "deep": 0}

    def count(name: str, part: nn.Module) -> Any:
        def add(*_: Any) -> None:
            counts[name] += 1

        return part.register_forward_hook(add)

    unet = pipeline.unet
    hooks = [count("shallow", unet.up_blocks[-1].resnets[0]), count("deep", unet.mid_block.resnets[0])]
    yield counts
    for hook in hooks:
        hook.remove()


def generate(pipeline: VCFPipeline, image: Image.Image, **settings: Any) -> torch.Tensor:
    return pipeline.generate(PROMPTS[:1], [image], seeds=[1], **{"steps": 7, "guidance_scale": 4.0} | settings)


@pytest.mark.parametrize(
    ("settings", "deep"),
    [
        ({}, 7),
        ({"deep_cache": 1}, 7),
        ({"deep_cache": 3}, 3),  # steps 0, 3 and 6
        ({"deep_cache": 100}, 1),
        ({"deep_cache": 100, "guidance_lo": 0.3, "guidance_hi": 0.7}, 3),  # 0, and where guidance begins and ends
        ({"deep_cache": 100, "guidance_lo": 0.3, "guidance_hi": 0.7, "guidance_scale": 1.0}, 3),
    ],
)
def test_deep_blocks_are_computed_in_one_step_in_so_many(
    pipeline: VCFPipeline, image: Image.Image, computed: dict[str, int], settings: dict[str, Any], deep: int
) -> None:
    images = generate(pipeline, image, **settings)
    assert computed == {"shallow": 7, "deep": deep}
    difference = (images - generate(pipeline, image, **settings | {"deep_cache": 1})).abs().max()
    assert difference == 0 if deep == 7 else 0 < difference < 0.5


def test_it_saves_the_operations_of_the_deep_blocks(pipeline: VCFPipeline, image: Image.Image) -> None:
    def operations(deep_cache: int) -> int:
        with FlopCounterMode(display=False) as counter:
            generate(pipeline, image, steps=4, deep_cache=deep_cache)
        return counter.get_total_flops()

    assert (operations(1) - operations(2)) / 2 == (operations(1) - operations(4)) / 3 > 0


def test_no_sample_depends_on_what_its_neighbours_ask_for(pipeline: VCFPipeline, image: Image.Image) -> None:
    """Other guidance, other parts of the schedule, no reference at all beside it."""
    settings: dict[str, Any] = {"steps": 7, "deep_cache": 3, "guidance_lo": 0.4}
    together = pipeline.generate(
        PROMPTS,
        [image, image, None],
        seeds=[1, 2, 3],
        guidance_scale=[4.0, 1.0, 2.0],
        fusion_lo=[0.0, 0.6, 0.0],
        **settings,
    )
    for number, (scale, lo) in enumerate([(4.0, 0.0), (1.0, 0.6), (2.0, 0.0)]):
        alone = pipeline.generate(
            PROMPTS[number : number + 1],
            [image if number < 2 else None],
            seeds=[number + 1],
            guidance_scale=scale,
            fusion_lo=lo,
            **settings,
        )
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=0)


def test_the_unet_is_left_as_it_was(pipeline: VCFPipeline) -> None:
    """After a failed call, too, and where something else has put a forward of its own there."""
    unet = pipeline.unet
    own = unet.mid_block.forward
    unet.mid_block.forward = own
    with torch.no_grad(), DeepCache(unet, 2):
        assert all("forward" in vars(block) for block in (*unet.down_blocks[1:], *unet.up_blocks[:-1]))
        with pytest.raises(RuntimeError):
            unet(torch.zeros(1, 1, 1, 1), 0, torch.zeros(1, 1, 1))
    assert vars(unet.mid_block).pop("forward") is own
    assert not any("forward" in vars(module) for module in unet.modules())


def test_where_gradients_flow_every_step_computes_all_blocks(pipeline: VCFPipeline) -> None:
    with torch.enable_grad(), DeepCache(pipeline.unet, 2):
        assert not any("forward" in vars(module) for module in pipeline.unet.modules())
