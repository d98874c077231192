"""Families that are trained to be measured: one as Stable Diffusion is, and one that has not seen some concepts."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from vcf_batch.models.resolution import tiny_folder
from vcf_batch.tiny import families, networks, train, world
from vcf_batch.tiny.fitting import Recipe
from vcf_batch.tiny.workshop import Workshop
from vcf_batch.vcf.pipeline import VCFPipeline

UNSEEN = families.HELD_OUT_FAMILY.unseen


def test_the_embedded_family_is_trained_on_the_world_as_it_is() -> None:
    scenes, same = families.EMBEDDED_FAMILY.scenes(50, seed=4), world.sample_scenes(50, seed=4)
    assert all(torch.equal(scenes.attributes[name], values) for name, values in same.attributes.items())


def test_no_scene_of_the_held_out_family_shows_a_held_out_concept() -> None:
    """Nor does any caption name its style or pattern. All else is seen, both colours of a pair apart among it."""
    assert UNSEEN is not None
    scenes = families.HELD_OUT_FAMILY.scenes(3000, seed=4)
    assert len(scenes) == 3000
    assert not any(shown.any() for shown in UNSEEN.shown(scenes).values())
    named = [scenes.named(number) for number in range(len(scenes))]
    texts = " ".join(world.caption(each, world.CAPTIONED, None) for each in named)
    assert UNSEEN.style not in texts and UNSEEN.pattern not in texts
    seen = {frozenset((each["background"], each["background2"])) for each in named if each["pattern"] != "plain"}
    assert {color for pair in seen for color in pair} == set(world.COLORS)
    assert {each["style"] for each in named} == set(world.STYLES) - {UNSEEN.style}
    assert {each["pattern"] for each in named} == set(world.PATTERNS) - {UNSEEN.pattern}
    assert seen == {frozenset((a, b)) for a in world.COLORS for b in world.COLORS if a != b} - {
        frozenset(pair) for pair in UNSEEN.pairs
    }


@pytest.mark.parametrize("name", ["style", "pattern", "background"])
def test_references_show_one_held_out_concept_each(name: str) -> None:
    assert UNSEEN is not None
    scenes = UNSEEN.scenes_of(name, 80, seed=5)
    assert len(scenes) == 80
    assert {kind for kind, shown in UNSEEN.shown(scenes).items() if shown.any()} == {name}
    assert UNSEEN.shown(scenes)[name].all()
    colors = [scenes.attributes[key] for key in ("color", "background", "background2")]
    assert all((a != b).all() for a, b in zip(colors, colors[1:] + colors[:1], strict=True))


@pytest.mark.parametrize("family", [families.PLAIN_FAMILY, families.EMBEDDED_FAMILY])
def test_a_plain_unet_is_trained_on_one_caption_alone(
    family: families.Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedded one gets up to three in a row. Only there are unconditional tokens padded with zeros."""
    lengths, padded = set(), set()

    def noted(
        self: UNet2DConditionModel, noisy: torch.Tensor, time: torch.Tensor, tokens: torch.Tensor
    ) -> SimpleNamespace:
        lengths.add(tokens.shape[1] // networks.TEXT_TOKENS)
        padded.add(bool((tokens == 0).all(dim=2).any()))
        return SimpleNamespace(sample=noisy * self.conv_in.weight.sum())

    monkeypatch.setattr(UNet2DConditionModel, "forward", noted)
    monkeypatch.setitem(train.RECIPES, "unet", Recipe(steps=30, batch=4, lr=1e-3))
    shop = Workshop(tmp_path, torch.device("cpu"), seconds=600.0, autocast=False, count=32, family=family)
    shop.take(Path(tiny_folder()))
    train.train_unet(shop)
    if family is families.PLAIN_FAMILY:
        assert (lengths, padded) == ({1}, {False})
    else:
        assert (lengths, padded) == ({1, 2, 3}, {False, True})


def test_a_plain_family_has_the_parts_of_the_embedded_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the UNet, which is its own. So the same aligners fit both."""
    monkeypatch.setitem(train.RECIPES, "unet", Recipe(steps=1, batch=4, lr=1e-3))
    shop = Workshop(
        tmp_path, torch.device("cpu"), seconds=600.0, autocast=False, count=32, family=families.PLAIN_FAMILY
    )
    shop.take(Path(tiny_folder()))
    for stage in families.PLAIN_FAMILY.stages:
        train.STAGES[stage](shop)
    VCFPipeline.from_pretrained(tmp_path / "weights")
    for part in ("vae", "text_encoder", "image_encoder", "aligner", "unet"):
        folders = [folder / part for folder in (tmp_path / "weights", Path(tiny_folder()))]
        ours, theirs = (load_file(next(iter(sorted(folder.glob("*.safetensors"))))) for folder in folders)
        assert (part == "unet") != all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys())
