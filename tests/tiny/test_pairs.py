"""Prompts with references of which it is known what a picture of both shows."""

from vcf_batch.tiny import pairs, world

COUNT = 200


def test_references_differ_in_everything_that_the_prompt_names() -> None:
    """A picture of both is one that the world could have drawn: no red star on a red background."""
    scenes = world.sample_scenes(COUNT, pairs.HELD_OUT + 1)
    for number, pair in enumerate(pairs.draw(COUNT)):
        reference = scenes.named(number)
        assert pair.wanted["shape"] != reference["shape"]
        assert pair.wanted["color"] not in (reference["color"], reference["background"], reference["background2"])
        assert {name: pair.wanted[name] for name in pair.wanted if name not in pairs.PROMPT} == {
            name: reference[name] for name in reference if name not in pairs.PROMPT
        }


def test_prompts_name_shape_and_colour_only() -> None:
    words = {word for name in world.VALUES if name not in pairs.PROMPT for word in world.VALUES[name]}
    for pair in pairs.draw(COUNT):
        assert pair.wanted["shape"] in pair.prompt
        assert not words - set(world.COLORS) & set(pair.prompt.split())


def test_the_same_pairs_come_again() -> None:
    first, again = pairs.draw(3), pairs.draw(3)
    assert [pair.prompt for pair in first] == [pair.prompt for pair in again]
    assert all(a.reference.tobytes() == b.reference.tobytes() for a, b in zip(first, again, strict=True))
