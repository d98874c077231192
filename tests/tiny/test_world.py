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


def test_pictures_are_those_that_published_figures_were_measured_on() -> None:
    """Their bytes have the sum that they had before scenes had directions, but for rounding on other processors."""
    pictures = (world.render(world.sample_scenes(200, seed=990_000_001)) * 255).round().to(torch.uint8)
    assert int(pictures.long().sum()) == pytest.approx(304_982_641, abs=2000)


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
    "direction": "vertical",
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


@pytest.mark.parametrize(
    ("direction", "along", "across"),
    [
        ("vertical", (0, 1), (1, 0)),
        ("horizontal", (1, 0), (0, 1)),
        ("rising", (-1, 1), (1, 1)),
        ("falling", (1, 1), (-1, 1)),
    ],
)
def test_stripes_run_in_the_direction_that_is_said(
    direction: str, along: tuple[int, int], across: tuple[int, int]
) -> None:
    """Moved a pixel along its stripes, right and down, a picture hardly changes; moved across them it does."""
    scene = {**BASE, "direction": direction, "position": "bottom", "size": "small"}
    assert direction in world.caption(scene, ("pattern", "direction"), None)
    corner = world.render(world.compose([scene], seed=3))[0, :, :24, :24]

    def change(right: int, down: int) -> float:
        return (corner.roll((down, right), (1, 2)) - corner)[:, 2:-2, 2:-2].abs().mean().item()

    assert change(*along) < 0.01
    assert change(*across) > 0.03


def test_of_a_gradient_the_upper_colour_is_said_first() -> None:
    scene = {**BASE, "pattern": "gradient", "background": "yellow", "background2": "blue", "size": "small"}
    assert "from yellow at the top to blue at the bottom" in world.caption(scene, world.TAUGHT, None)
    picture = world.render(world.compose([scene], seed=0))[0]
    (upper, lower) = (picture[:, row, 2].tolist() for row in (1, 62))
    assert upper[0] > upper[2] and lower[2] > lower[0]


def test_captions_say_directions_and_line_art_where_they_are_taught() -> None:
    """And nowhere else: a family that was trained on other captions does not know these words."""
    new = {"line", "from", "stripes", "horizontal", "rising", "diagonal", "down"}
    said, taught = (
        {word for text in world.captions(_SCENES, random.Random(2), 1.0, among) for word in text.split()}
        for among in (world.CAPTIONED, world.TAUGHT)
    )
    assert not new & said
    assert new <= taught


@settings(max_examples=200, deadline=None)
@given(st.sets(st.sampled_from(world.TAUGHT)), st.integers(0, 10_000), st.integers(0, 499))
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
