"""The procedural world: a function of its seed, described truthfully."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vcf_batch.models.embedded import SHAPES
from vcf_batch.tiny import world


def test_the_world_is_a_function_of_its_seed() -> None:
    scenes, again = world.sample_scenes(6, seed=3), world.sample_scenes(6, seed=3)
    assert torch.equal(world.render(scenes), world.render(again))
    assert world.captions(scenes, random.Random(1), 0.5) == world.captions(again, random.Random(1), 0.5)
    assert not torch.equal(world.render(scenes), world.render(world.sample_scenes(6, seed=4)))


def test_pictures_are_finite_and_within_range() -> None:
    pictures = world.render(world.sample_scenes(200, seed=0))
    assert pictures.shape == (200, 3, world.SIZE, world.SIZE)
    assert pictures.dtype == torch.float32
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert pictures.isfinite().all()


def test_object_and_background_colours_differ() -> None:
    a = world.sample_scenes(500, seed=1).attributes
    for one, other in (("color", "background"), ("color", "background2"), ("background", "background2")):
        assert (a[one] != a[other]).all()


BASE = {
    "shape": "circle",
    "color": "red",
    "pattern": "striped",
    "background": "blue",
    "background2": "white",
    "style": "flat",
    "position": "center",
    "size": "medium",
}


@pytest.mark.parametrize("attribute", sorted(world.VALUES))
def test_every_value_of_an_attribute_looks_different(attribute: str) -> None:
    used = {value for name, value in BASE.items() if name in ("color", "background", "background2")} - {BASE[attribute]}
    values = [value for value in world.VALUES[attribute] if value not in used]
    pictures = world.render(world.compose([{**BASE, attribute: value} for value in values], seed=5))
    for first in range(len(values)):
        for second in range(first):
            difference = (pictures[first] - pictures[second]).abs().mean()
            assert difference > 0.005, (values[first], values[second])


def test_words_become_the_scene_they_name() -> None:
    assert world.compose([BASE], seed=0).named(0) == BASE


def test_a_full_caption_names_everything() -> None:
    text = world.caption(BASE, world.CAPTIONED, random.Random(0))
    for word in ("circle", "red", "blue", "white", "medium"):
        assert word in text


@settings(max_examples=200, deadline=None)
@given(st.sets(st.sampled_from(world.CAPTIONED)), st.integers(0, 10_000), st.integers(0, 499))
def test_a_caption_never_says_what_it_was_not_told_to(named: set[str], seed: int, index: int) -> None:
    scene = _SCENES.named(index)
    text = world.caption(scene, named, random.Random(seed))
    if "shape" not in named:
        assert not set(text.replace(",", "").split()) & set(SHAPES)
    if "color" not in named:
        said = {"gray" if word == "grey" else word for word in text.replace(",", "").split()} & set(world.COLORS)
        background = {scene["background"], scene["background2"]} if "background" in named else set()
        assert said <= background


_SCENES = world.sample_scenes(500, seed=9)
