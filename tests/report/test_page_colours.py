"""The colours of the report's page can be told apart, in both themes."""

import importlib.resources
import re

import pytest


def themes() -> dict[str, dict[str, tuple[float, ...]]]:
    """The colours of the style sheet, as red, green, blue and opacity from 0 to 1, by theme and name."""
    style = (importlib.resources.files("vcf_batch.report") / "page.css").read_text("utf-8")
    assert not re.search(r"#[0-9a-fA-F]{3,8}\b", re.sub(r"--[a-z-]+: #[0-9a-f]+;", "", style)), (
        "a colour without a name"
    )
    light, dark = (
        dict(re.findall(r"--([a-z-]+): #([0-9a-f]+);", part))
        for part in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    )
    assert light.keys() == dark.keys()

    def parsed(text: str) -> tuple[float, ...]:
        text = "".join(2 * digit for digit in text) if len(text) == 3 else text
        return tuple(int(part, 16) / 255 for part in (text[:2], text[2:4], text[4:6], text[6:] or "ff"))

    return {
        theme: {name: parsed(text) for name, text in colours.items()}
        for theme, colours in (("light", light), ("dark", dark))
    }


def contrast(one: tuple[float, ...], ground: tuple[float, ...]) -> float:
    """The contrast ratio of WCAG 2.2, 1 to 21; the first colour is composed over the other."""

    def luminance(colour: tuple[float, ...]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    mixed = tuple(one[3] * c + (1 - one[3]) * g for c, g in zip(one[:3], ground[:3], strict=True))
    high, low = sorted((luminance(mixed), luminance(ground)), reverse=True)
    return (high + 0.05) / (low + 0.05)


TEXT, GRAPHICS = 4.5, 3.0
CONTRASTS = [
    *((name, ground, TEXT) for name in ("ink", "quiet", "accent") for ground in ("paper", "card", "faint")),
    ("paper", "accent", TEXT),
    *((name, ground, GRAPHICS) for name in ("edge", "accent", "ink") for ground in ("paper", "card")),
    *((name, "paper", GRAPHICS) for name in ("dot", "point", "accent")),
]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_the_contrast_of_wcag_2_2_aa(theme: str) -> None:
    """4.5 for texts and 3 for what is drawn, in both themes, for each pair that the page has."""
    colours = themes()[theme]
    low = {
        (name, ground): contrast(colours[name], colours[ground])
        for name, ground, least in CONTRASTS
        if contrast(colours[name], colours[ground]) < least
    }
    assert not low
    without = {"line", "accent-soft", "veil"}  # rules, areas below a line, and what a dialog dims
    assert {name for pair in CONTRASTS for name in pair[:2]} == colours.keys() - without
