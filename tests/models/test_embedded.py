"""What the embedded model can draw, by the words of a prompt."""

import random

import pytest

from vcf_batch.models import embedded
from vcf_batch.models.resolution import folder_identity, resolve, tiny_folder
from vcf_batch.tiny import demo, pairs, world


@pytest.mark.parametrize("prompt", ["a red star", "CIRCLE", "a Ring!", "7 star 7", "x\nsquare"])
def test_a_prompt_with_a_shape_and_learnt_words_can_be_drawn(prompt: str) -> None:
    """In capitals too. Digits and punctuation do not count."""
    assert embedded.can_draw(prompt)


@pytest.mark.parametrize("prompt", ["", "a photo of a cat", "a starfish", "a red picture", "two stars", "a 鹿"])
def test_a_prompt_without_a_shape_cannot_be_drawn(prompt: str) -> None:
    """A shape within another word does not count."""
    assert not embedded.can_draw(prompt)


@pytest.mark.parametrize("prompt", ["a wedding ring", "Times Square at night", "heart surgery", "a Star Wars poster"])
def test_a_prompt_with_a_word_that_was_not_learnt_cannot_be_drawn(prompt: str) -> None:
    """The name of a shape in it means something else, or is drawn without the rest."""
    assert not embedded.can_draw(prompt)


def test_every_prompt_of_its_own_world_can_be_drawn() -> None:
    """The demo's prompts, those of an evaluation, and every caption that names a shape."""
    scenes, rng = world.sample_scenes(50, 3), random.Random(0)
    captions = [world.caption(scenes.named(number), ("shape", "style"), rng) for number in range(50)]
    assert all(map(embedded.can_draw, [*demo.PROMPTS, *(pair.prompt for pair in pairs.draw(8)), *captions]))


def test_the_embedded_model_is_known_by_its_name_or_its_files() -> None:
    """The folder of the package is the same model under another name."""
    own = resolve(tiny_folder())
    assert embedded.is_embedded({"name": own.name, "identity": own.identity}) and own.name != "tiny"
    assert embedded.is_embedded({"name": "tiny", "identity": "of an older version"})
    assert not embedded.is_embedded({"name": "org/tiny", "identity": "0" * 40})
    assert own.identity == folder_identity(tiny_folder())
