"""Roles and masks: the limits of where references act, and what must hold at their ends."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from support import ip_adapters
from support.tiny_models import TEXT_WIDTH, build_pipeline
from vcf_batch import images
from vcf_batch.config.limits import ROLED_FUSIONS, ROLES
from vcf_batch.config.sampling import Sampling
from vcf_batch.errors import ModelError, UsageError
from vcf_batch.vcf import pno
from vcf_batch.vcf.attention import accept_token_bias
from vcf_batch.vcf.fusion import Fusion, condition
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline
from vcf_batch.vcf.roles import projections
from vcf_batch.vcf.roles.reach import Reach, mask_of, on_grid
from vcf_batch.vcf.roles.role import ALL, BY_NAME, Layers, Role, layers_of, role_of

SD15 = {
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
}
FINE, COARSE = Layers(8, 8, False), Layers(4, 4, True)
STYLE_ALONE = Role("style")
"""A role without limits but its name."""


def picture(seed: int, edge: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (edge, edge, 3), dtype=np.uint8))


def mask(left: int, right: int, edge: int = 16) -> Image.Image:
    """A mask with one brightness in each half."""
    pixels = np.full((edge, edge), left, np.uint8)
    pixels[:, edge // 2 :] = right
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> VCFPipeline:
    """A pipeline with an aligner, projections of its tokens, and an IP-Adapter."""
    made = build_pipeline()
    ip_adapters.give_adapter(made, tmp_path_factory.mktemp("adapter"))
    tokens = made.encode_references([picture(seed) for seed in range(40)])
    pairs = {name: [(tokens[n], tokens[n + 1]) for n in range(start, start + 19)] for name, start in START.items()}
    made.aligner.projections = {name: projections.fit(pairs, name) for name in START}
    return made


START = {"style": 0, "palette": 20}


def draw(pipeline: VCFPipeline, references: Any, **settings: Any) -> torch.Tensor:
    return pipeline.generate(["a red cat"], [references], seeds=[7], **settings)


@pytest.mark.parametrize("fusion", ROLED_FUSIONS)
@pytest.mark.parametrize("count", [1, 2])
def test_the_role_all_changes_no_bit_and_costs_nothing(pipeline: VCFPipeline, fusion: str, count: int) -> None:
    references = [picture(1), picture(2)][:count]
    plain = draw(pipeline, references, fusion=fusion)
    assert torch.equal(draw(pipeline, references, fusion=fusion, reference_roles=["all"]), plain)
    tokens = [torch.ones(3, TEXT_WIDTH)] * count
    assert Fusion(tokens, fusion, roles=[ALL] * count, masks=[None] * count).reach is None


@pytest.mark.parametrize("fusion", ROLED_FUSIONS)
def test_a_white_mask_equals_none(pipeline: VCFPipeline, fusion: str) -> None:
    plain = draw(pipeline, picture(1), fusion=fusion, strength=0.7)
    white = draw(pipeline, picture(1), fusion=fusion, strength=0.7, reference_masks=[mask(255, 255)])
    torch.testing.assert_close(white, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fusion", ROLED_FUSIONS)
@pytest.mark.parametrize("role", ["all", "style", "layout"])
@pytest.mark.parametrize("weights", [None, [[3, 1]]])
def test_two_equal_references_with_one_role_equal_one(
    pipeline: VCFPipeline, fusion: str, role: str, weights: Any
) -> None:
    one = draw(pipeline, picture(1), fusion=fusion, reference_roles=role)
    twice = draw(pipeline, [picture(1)] * 2, fusion=fusion, reference_roles=role, reference_weights=weights)
    torch.testing.assert_close(twice, one, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fusion", ROLED_FUSIONS)
def test_a_black_mask_equals_text_only(pipeline: VCFPipeline, fusion: str) -> None:
    """On the unconditional side, too, which has zeros or tokens of nothing in their place."""
    black = draw(pipeline, picture(1), fusion=fusion, reference_masks=[mask(0, 0)])
    torch.testing.assert_close(black, draw(pipeline, None, fusion=fusion), atol=1e-5, rtol=0)
    half = draw(pipeline, picture(1), fusion=fusion, reference_masks=[mask(0, 255)])
    plain = draw(pipeline, picture(1), fusion=fusion)
    assert (half - black).abs().max() > 0.005 and (half - plain).abs().max() > 0.005


@pytest.mark.parametrize("fusion", ROLED_FUSIONS)
@pytest.mark.parametrize("layers", [FINE, COARSE], ids=["fine", "coarse"])
def test_where_a_mask_is_black_queries_attend_to_the_text_alone(
    pipeline: VCFPipeline, fusion: str, layers: Layers
) -> None:
    """In each cross-attention layer, for its queries in that region; the others are as without a mask."""
    text, image = torch.randn(1, 6, TEXT_WIDTH), torch.randn(4, TEXT_WIDTH)
    settings: dict[str, Any] = {"mode": fusion, "strength": 0.8, "unconditional": image * 2}
    block = pipeline.unet.down_blocks[int(layers.is_coarse)].attentions[0].transformer_blocks[0].attn2
    hidden = torch.randn(2, layers.queries, block.query_dim)
    accept_token_bias(pipeline.unet)

    @torch.no_grad()
    def attended(references: Sequence[torch.Tensor], **limits: Any) -> torch.Tensor:
        conditioning = condition(text, text * 0.5, [Fusion(references, **settings, **limits)])
        tokens, given = conditioning.select(conditioning.inside(0.5), True, [FINE, COARSE])
        result: torch.Tensor = block(hidden, tokens, **given)
        return result.unflatten(1, (layers.height, layers.width))

    masked = attended([image], masks=[mask(0, 255)])
    plain = attended([image])
    without = torch.cat([block(hidden[:1], text * 0.5), block(hidden[1:], text)]).detach().reshape(plain.shape)
    half = layers.width // 2
    torch.testing.assert_close(masked[:, :, :half], without[:, :, :half], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked[:, :, half:], plain[:, :, half:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fusion", ROLED_FUSIONS)
def test_a_role_acts_in_its_layers_and_steps_alone(fusion: str) -> None:
    text, image = torch.randn(1, 6, TEXT_WIDTH), torch.randn(4, TEXT_WIDTH)
    role = Role("layout", fine=0.0, coarse=2.0, lo=0.8)
    conditioning = condition(text, text, [Fusion([image], fusion, 0.5, roles=[role])])
    assert conditioning.inside(0.9) == ((0,),) and conditioning.inside(0.7) == ((),)
    tokens, given = conditioning.select(conditioning.inside(0.7), True, [FINE, COARSE])
    assert not given or not any(each[..., :6].any() for each in given["token_bias"])
    tokens, given = conditioning.select(conditioning.inside(0.9), False, [FINE, COARSE])
    if fusion == "concat":
        assert torch.equal(tokens, torch.cat([text, image[None]], dim=1))
        assert (given["token_bias"][FINE.queries][0, 0, 6:] == -torch.inf).all()
        torch.testing.assert_close(given["token_bias"][COARSE.queries][0, 0].exp(), torch.ones(10))
    else:
        assert given["ip_strength"][FINE.queries].item() == 0 and given["ip_strength"][COARSE.queries].item() == 1


def test_references_of_other_roles_take_nothing_from_each_other() -> None:
    """Weights count among the references of one role."""
    roles = [STYLE_ALONE, Role("palette", fine=2.0), STYLE_ALONE]
    reach = Reach(roles, [1.0, 0.2, 3.0], [None] * 3, [2, 1, 1])
    weights, total = reach.in_layers(FINE, (0, 1, 2))
    torch.testing.assert_close(weights, torch.tensor([[0.25, 0.25, 2.0, 0.75]]))
    torch.testing.assert_close(total, torch.tensor([[3.0]]))
    weights, total = reach.in_layers(FINE, (1, 2))
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.0, 2.0, 1.0]]))


def test_where_masks_part_the_picture_each_reference_has_its_part_to_itself() -> None:
    reach = Reach([ALL, ALL], [0.5, 0.5], [mask(255, 0), mask(0, 51)], [1, 1])
    weights, total = reach.in_layers(COARSE, (0, 1))
    halves = weights.unflatten(0, (4, 4))[0]
    torch.testing.assert_close(halves, torch.tensor([[1.0, 0.0]] * 2 + [[0.0, 0.2]] * 2))
    torch.testing.assert_close(total.unflatten(0, (4, 4))[0, :, 0], torch.tensor([1.0, 1.0, 0.2, 0.2]))


def test_a_query_gets_the_mean_brightness_of_the_pixels_behind_it() -> None:
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:2, :4], pixels[0, 4] = 255, 248
    found = on_grid(Image.fromarray(pixels), COARSE).reshape(4, 4)
    assert found[0, 0] == 1 and found[0, 1] == 31 / 255 and found.sum() == 1 + 31 / 255


def test_a_mask_in_memory_is_read_as_one_in_a_file() -> None:
    """What is transparent is white, and 16 bits are rounded to 8, not cut off at 255."""
    clear, deep = Image.new("RGBA", (4, 4)), Image.fromarray(np.full((4, 4), 16448, np.uint16))
    for made, brightness in ((clear, 255), (deep, 64), (Image.new("LA", (4, 4), (0, 128)), 127)):
        file = io.BytesIO()
        made.save(file, "png")
        for each in (made, images.decode(file.getvalue(), 100)):
            assert (np.asarray(mask_of(each)) == brightness).all(), each.mode


def test_resolutions_of_stable_diffusion_fall_into_halves() -> None:
    assert layers_of(SD15, 64, 48) == [
        Layers(64, 48, False),
        Layers(32, 24, False),
        Layers(16, 12, True),
        Layers(8, 6, True),
    ]
    assert [layers.queries for layers in layers_of(SD15, 9, 13)] == [9 * 13, 5 * 7, 3 * 4, 2 * 2]
    assert layers_of(build_pipeline().unet.config, 8, 8) == [FINE, COARSE]
    unnamed = {name: value for name, value in SD15.items() if name != "mid_block_type"}
    assert layers_of(unnamed, 64, 48) == layers_of(SD15, 64, 48), "the published configuration leaves it out"
    with pytest.raises(UsageError, match="cross-attention at 1 resolution"):
        layers_of({"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "mid_block_type": None}, 8, 8)


@pytest.mark.parametrize("fusion", ROLED_FUSIONS)
def test_a_sample_of_a_batch_with_other_roles_equals_the_sample_alone(pipeline: VCFPipeline, fusion: str) -> None:
    cases: list[tuple[Any, Any, Any]] = [
        ([picture(1), picture(2)], ["style", "layout"], None),
        ([picture(1)], None, None),
        ([picture(3)], "layout", [mask(0, 255)]),
        ([], None, None),
        ([picture(2), picture(3)], None, [mask(255, 100), None]),
    ]
    prompts = ["a red cat", "a dog", "two birds", "a house", "a tree"]
    references, roles, masks = zip(*cases, strict=True)
    together = pipeline.generate(
        prompts,
        references,
        seeds=range(5),
        fusion=fusion,
        fusion_hi=[1.0, 1.0, 1.0, 1.0, 0.6],
        reference_roles=roles,
        reference_masks=masks,
    )
    for number, (own, role, limit) in enumerate(cases):
        alone = pipeline.generate(
            prompts[number : number + 1],
            [own],
            seeds=[number],
            fusion=fusion,
            fusion_hi=0.6 if number == 4 else 1.0,
            reference_roles=[role],
            reference_masks=[limit],
        )
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=0)


def test_each_role_changes_the_picture_in_its_own_way(pipeline: VCFPipeline) -> None:
    made = {role: draw(pipeline, picture(1), reference_roles=role, steps=8) for role in ROLES}
    made["none"] = draw(pipeline, None, steps=8)
    for first, one in made.items():
        for second, other in made.items():
            assert first == second or (one - other).abs().max() > 0.001, (first, second)
    assert {*BY_NAME} == {*ROLES}


def test_with_an_ip_adapter_style_acts_in_the_fine_layers_alone(pipeline: VCFPipeline) -> None:
    """Its tokens have no projection, so that the role of an aligner's would be a larger strength and nothing else."""
    style = role_of("style", adapted=True)
    assert (style.weight(COARSE), style.weight(FINE), style.acts_at(0.0)) == (0, 1, True)
    made = draw(pipeline, picture(1), fusion="ip_adapter", strength=0.3, reference_roles="style")
    for strength in (0.3, 0.9):
        other = draw(pipeline, picture(1), fusion="ip_adapter", strength=strength)
        assert (made - other).abs().max() > 0.001, strength
    assert role_of("layout", adapted=True) is BY_NAME["layout"]


def test_calling_the_pipeline_takes_roles_and_masks(pipeline: VCFPipeline) -> None:
    expected = draw(pipeline, picture(1), reference_roles="style", reference_masks=[mask(0, 255)])
    made = pipeline(
        "a red cat",
        picture(1),
        seed=7,
        guidance_scale=5.0,
        scheduler="ddim",
        reference_roles="style",
        reference_masks=mask(0, 255),
        output_type="pt",
    )
    torch.testing.assert_close(made.images, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fusion": "naive", "reference_roles": "style"}, "cannot be limited by roles or masks"),
        ({"fusion": "cross_attention", "reference_masks": [mask(0, 1)]}, "cannot be limited by roles or masks"),
        ({"reference_roles": "shape"}, "'shape'; it must be one of all, style"),
        ({"reference_roles": [["style"] * 2]}, "reference_roles has 2 values for 1 references"),
        ({"reference_masks": [[None, mask(0, 1)]]}, "reference_masks has 2 values for 1 references"),
        ({"reference_masks": ["mask.png"]}, "reference_masks has a str"),
        (
            {"reference_masks": [Image.new("F", (4, 4))]},
            "reference_masks: the image cannot be read because it has 32-bit",
        ),
        ({"fusion": "ip_adapter", "reference_roles": "palette"}, "must be one of all, style, layout"),
    ],
)
def test_wrong_limits_are_refused(pipeline: VCFPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw(pipeline, picture(1), **settings)


def test_a_role_without_its_projection_is_refused() -> None:
    with pytest.raises(ModelError, match="the role style needs a projection"):
        draw(build_pipeline(), picture(1), reference_roles="style")


def test_projections_are_saved_with_the_aligner(pipeline: VCFPipeline, tmp_path: Path) -> None:
    other = build_pipeline()
    other.aligner.projections = pipeline.aligner.projections
    other.save_pretrained(tmp_path)
    loaded = VCFPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"reference_roles": "style"}
    torch.testing.assert_close(
        draw(loaded, picture(1), **settings), draw(other, picture(1), **settings), atol=0.01, rtol=0
    )
    file = tmp_path / "aligner" / "roles.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"roles\.safetensors is damaged"):
        VCFPipeline.from_pretrained(tmp_path)
    flat = projections.to_bytes({"style": projections.Projection(torch.zeros(8), torch.zeros(1, 8), torch.zeros(8, 1))})
    file.write_bytes(flat)
    with pytest.raises(ModelError, match="its tensors do not fit each other"):
        VCFPipeline.from_pretrained(tmp_path)


def test_a_projection_keeps_its_attribute_and_removes_the_others() -> None:
    """Differences in one direction stay, and those in another go; the mean stays where it is."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(64, 3, 8, generator=generator) * 0.1
    moved = {name: base.clone() for name in ("style", "palette")}
    moved["style"][..., 0] += torch.randn(64, 3, generator=generator)
    moved["palette"][..., 1] += torch.randn(64, 3, generator=generator)
    pairs = {name: [*zip(base, each, strict=True)] for name, each in moved.items()}
    project = projections.fit(pairs, "style")
    torch.testing.assert_close(project(project.mean), project.mean)
    tokens = project.mean + torch.eye(8)[:3]
    change = project(tokens) - project.mean
    assert change[0, 0] > 0.9 and change[1].norm() < 0.1 and change[2].norm() < 0.1
    assert project(tokens[1:])[0].shape == (8,) and len(project.down) < 4
    with pytest.raises(ModelError, match="for 3 tokens of width 8, and there are 7"):
        project(torch.zeros(7, 8))


def test_pno_follows_the_reference_within_its_role(pipeline: VCFPipeline) -> None:
    """The tokens are optimised where the role lets them act, and the best image is not worse than the first."""
    guide = Guide(pipeline.image_encoder, [0.5] * 3, [0.5] * 3)
    text = pipeline.encode_prompts(["a red cat", ""])
    tokens = pipeline.encode_references([picture(1)])[0]
    fusion = Fusion([tokens], roles=[BY_NAME["layout"]])
    sample, noise, conditioning = pipeline.prepare(text[:1], text[1:], [fusion], seeds=[3], sampling=Sampling(steps=6))
    targets = guide.targets([[picture(1)]], [None])
    made, (objective,) = pno.optimize(
        sample, noise, conditioning, guide, targets, seeds=[3], steps=2, lr_conditioning=0.01, lr_noise=0.01, gamma=0.1
    )
    assert made.isfinite().all() and objective.steps == 2 and objective.best <= objective.first


def test_roles_and_masks_take_at_most_15_percent_more_operations(pipeline: VCFPipeline) -> None:
    def operations(**settings: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            draw(pipeline, picture(1), strength=0.5, **settings)
        return counter.get_total_flops()

    plain = operations()
    for role in ROLES:
        assert operations(reference_roles=role) <= 1.15 * plain
    assert operations(reference_masks=[mask(0, 255)]) <= 1.15 * plain
