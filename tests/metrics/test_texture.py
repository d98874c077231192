"""The texture score: blind to colours, contrast and places; it tells apart how pictures are drawn."""

import pytest
import torch
from torch import Tensor

from vcf_batch.metrics.texture import texture_similarity
from vcf_batch.tiny import world

BASE = {
    "shape": "star",
    "color": "red",
    "pattern": "dotted",
    "background": "blue",
    "background2": "white",
    "style": "mosaic",
    "position": "left",
    "size": "large",
}


def drawn(**changes: str) -> Tensor:
    return world.render(world.compose([BASE | changes], seed=3))


def test_equal_pictures_have_the_texture_of_each_other() -> None:
    pictures = world.render(world.sample_scenes(4, seed=2))
    torch.testing.assert_close(texture_similarity(pictures, pictures), torch.ones(4))


def test_colours_and_contrast_have_no_effect() -> None:
    """Other than that of two colours of one brightness, between which nothing shows."""
    picture = drawn()
    assert texture_similarity(picture, picture * 0.4 + 0.3).item() > 0.999
    assert texture_similarity(picture, 1 - picture).item() > 0.999
    assert texture_similarity(picture, picture.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1)).item() > 0.9


def test_a_picture_is_more_like_another_one_of_its_style_than_of_its_palette() -> None:
    other = {"shape": "circle", "position": "right", "size": "small", "pattern": "striped"}
    own = drawn()
    palette = drawn(**other, style="soft")
    style = drawn(**other, color="green", background="yellow", background2="black")
    assert texture_similarity(own, style) > texture_similarity(own, palette) + 0.2


def test_patches_are_taken_along_the_picture_s_own_edges() -> None:
    """A picture that is turned by a right angle has its frequencies turned too: stripes tell up from across."""
    stripes = (torch.arange(48) // 4 % 2).float().expand(1, 3, 32, 48)
    assert texture_similarity(stripes, stripes.roll(3, dims=3)).item() > 0.95
    across = (torch.arange(32) // 4 % 2).float().view(1, 1, 32, 1).expand(1, 3, 32, 48)
    assert texture_similarity(stripes, across).item() < 0.7


def test_pictures_of_one_colour_are_alike() -> None:
    """They have no frequency at all, and the score is a number."""
    assert torch.isfinite(texture_similarity(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16))).all()


@pytest.mark.parametrize("shape", [(1, 3, 4, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_what_is_no_picture_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="pixels a side"):
        texture_similarity(torch.zeros(shape), torch.zeros(shape))
