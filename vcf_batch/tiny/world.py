"""A procedural world of captioned pictures, drawn from signed distance functions.

Every picture shows one object on a patterned background in one of five styles. All pictures follow from a seed, so the
world needs no files and is unlimited. Its attributes are known exactly, so the pictures of a model can be measured.

Legend of shapes: ``B`` scenes, ``H = W = 64`` pixels.
"""

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from vcf_batch.models.embedded import SHAPES

SIZE = 64

COLORS = {
    "red": (0.85, 0.13, 0.13),
    "orange": (0.97, 0.54, 0.08),
    "yellow": (0.98, 0.87, 0.18),
    "green": (0.15, 0.60, 0.22),
    "cyan": (0.20, 0.80, 0.83),
    "blue": (0.12, 0.25, 0.82),
    "purple": (0.50, 0.18, 0.68),
    "pink": (0.97, 0.52, 0.72),
    "brown": (0.47, 0.28, 0.12),
    "black": (0.06, 0.06, 0.06),
    "white": (0.97, 0.97, 0.97),
    "gray": (0.53, 0.53, 0.53),
}
PATTERNS = ("plain", "striped", "dotted", "checkered", "gradient", "wavy", "radial", "noisy")
STYLES = ("flat", "outlined", "soft", "mosaic", "sketchy")
POSITIONS = ("center", "left", "right", "top", "bottom")
SIZES = ("small", "medium", "large")
DIRECTIONS = ("vertical", "rising", "horizontal", "falling")

VALUES: Mapping[str, Sequence[str]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "pattern": PATTERNS,
    "background": tuple(COLORS),
    "background2": tuple(COLORS),
    "style": STYLES,
    "position": POSITIONS,
    "size": SIZES,
    "direction": DIRECTIONS,
}
"""Attribute name to its possible values.

``background2`` has no meaning where the pattern is plain. ``direction`` is that of the lines, and has a meaning only
where the pattern is striped. ``background`` is the upper colour of a gradient, the inner one of a radial pattern, and
the one between dots.
"""

ORDERED = ("dotted", "gradient", "radial")
"""Patterns whose two colours cannot be exchanged."""

_RADII = torch.tensor([0.40, 0.51, 0.64])
_CENTERS = torch.tensor([[0.0, 0.0], [-0.36, 0.0], [0.36, 0.0], [0.0, 0.36], [0.0, -0.36]])  # x right, y up
_PALETTE = torch.tensor(list(COLORS.values()))
_INK = 0.07
_TILE = 4
_VARIATIONS = 0x5CE9E5


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes: ``attributes[name]`` is int64 ``[B]``, an index into ``VALUES[name]``."""

    attributes: Mapping[str, Tensor]
    seed: int

    def __len__(self) -> int:
        return len(self.attributes["shape"])

    def part(self, indices: slice | Tensor, seed: int = 0) -> "Scenes":
        """Some of the scenes. Their small variations come from ``seed``, not from the seed of all scenes."""
        return Scenes({name: values[indices] for name, values in self.attributes.items()}, seed)

    def named(self, index: int) -> dict[str, str]:
        """The attributes of one scene in words."""
        return {name: VALUES[name][int(values[index])] for name, values in self.attributes.items()}


def sample_scenes(count: int, seed: int) -> Scenes:
    """Draw ``count`` scenes. The object and the two background colours always differ from one another."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: values for name, values in VALUES.items() if name != "direction"}
    attributes = {name: torch.randint(len(values), (count,), generator=generator) for name, values in drawn.items()}
    palettes = torch.rand(count, len(COLORS), generator=generator).argsort(dim=1)
    attributes["color"], attributes["background"], attributes["background2"] = palettes[:, :3].unbind(1)
    return Scenes({**attributes, "direction": _directions(count, seed)}, seed)


def _directions(count: int, seed: int) -> Tensor:
    """Directions of stripes: those that :func:`render` drew before scenes had them, so that pictures stay the same."""
    generator = torch.Generator().manual_seed(seed ^ _VARIATIONS)
    for shape in ((count, 2), (count,), (count,)):  # Place, size and rotation of the objects come first.
        torch.rand(*shape, generator=generator)
    return torch.randint(len(DIRECTIONS), (count,), generator=generator)


def compose(descriptions: Sequence[Mapping[str, str]], seed: int) -> Scenes:
    """Scenes from words. Each description maps every attribute to its value; the direction may be left out."""
    plain = {"direction": DIRECTIONS[0]}
    return Scenes(
        {
            name: torch.tensor([values.index((plain | {**d})[name]) for d in descriptions])
            for name, values in VALUES.items()
        },
        seed,
    )


def render(scenes: Scenes, centers: Tensor | None = None) -> Tensor:
    """Render the scenes: float32 ``[B, 3, 64, 64]`` in [0, 1]. Placement and tones vary a little with the seed.

    Args:
        scenes: the scenes.
        centers: where the objects are instead of at their named positions: ``[B, 2]``, x to the right and y upwards,
            from -1 to 1.
    """
    generator = torch.Generator().manual_seed(scenes.seed ^ _VARIATIONS)
    count = len(scenes)
    a = scenes.attributes

    def jitter(*shape: int, scale: float) -> Tensor:
        return (torch.rand(count, *shape, generator=generator) * 2 - 1) * scale

    axis = (torch.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x, y = axis.view(1, 1, SIZE).expand(count, SIZE, SIZE), -axis.view(1, SIZE, 1).expand(count, SIZE, SIZE)
    pixel = 2 / SIZE

    center = (_CENTERS[a["position"]] if centers is None else centers) + jitter(2, scale=0.04)
    radius = (_RADII[a["size"]] + jitter(scale=0.03)).view(count, 1, 1)
    px, py = _rotate(x - center[:, 0, None, None], y - center[:, 1, None, None], jitter(scale=0.15))
    distance = _distance(px / radius, py / radius, a["shape"]) * radius

    mask, edges = _pattern(x, y, a["pattern"], a["direction"], generator)
    tones = (_PALETTE + jitter(len(COLORS), 3, scale=0.025)).clamp(0, 1)
    rows = torch.arange(count)
    color, first, second = (tones[rows, a[name], :, None, None] for name in ("color", "background", "background2"))
    background = first + (second - first) * mask[:, None]
    inside = (0.5 - distance / pixel).clamp(0, 1)[:, None]
    flat = background + (color - background) * inside

    # Ink is dark. Around a black object it is white, because a dark outline would be invisible.
    ink = torch.where((a["color"] == list(COLORS).index("black")), 0.95, _INK).view(count, 1, 1, 1)
    line = (1.6 - distance.abs() / pixel).clamp(0, 1)[:, None]
    outlined = torch.lerp(flat, torch.full_like(flat, _INK), edges[:, None] * (1 - inside) * 0.85)
    outlined = outlined + (ink - outlined) * line

    pictures = flat.clone()
    for style, draw in {
        "outlined": lambda s: outlined[s],
        "soft": lambda s: _soft(flat[s]),
        "mosaic": lambda s: _mosaic(flat[s], generator),
        "sketchy": lambda s: _sketchy(flat[s], line[s], x[s], y[s], generator),
    }.items():
        chosen = a["style"] == STYLES.index(style)
        if chosen.any():
            pictures[chosen] = draw(chosen)
    return pictures.clamp(0, 1)


def _rotate(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return x * cos - y * sin, x * sin + y * cos


def _distance(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the outline of each scene's shape of radius 1, negative inside. ``[B, H, W]``."""
    out = torch.empty_like(x)
    for index, name in enumerate(SHAPES):
        chosen = shape == index
        if chosen.any():
            out[chosen] = _SDF[name](x[chosen], y[chosen])
    return out


def _box(x: Tensor, y: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(x.abs() - half_width, y.abs() - half_height)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * math.cos(math.pi / 6) + y * 0.5, -y) - 0.52


def _star(x: Tensor, y: Tensor) -> Tensor:
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, y)  # 0 at the upper tip
    folded = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    r = torch.hypot(x, y)
    u, v = r * folded.sin(), r * folded.cos()
    tip, notch = (0.0, 1.08), (0.46 * math.sin(sector / 2), 0.46 * math.cos(sector / 2))
    nx, ny = tip[1] - notch[1], notch[0] - tip[0]
    return ((u - tip[0]) * nx + (v - tip[1]) * ny) / math.hypot(nx, ny)


def _heart(x: Tensor, y: Tensor) -> Tensor:
    u, v = (x + y + 0.25) * math.sqrt(0.5), (y + 0.25 - x) * math.sqrt(0.5)
    half = 0.55
    square = _box(u, v, half, half)
    lobes = torch.minimum(torch.hypot(u - half, v), torch.hypot(u, v - half)) - half
    return torch.minimum(square, lobes)


def _arrow(x: Tensor, y: Tensor) -> Tensor:
    head = torch.maximum((x.abs() + (y - 1.0)) * math.sqrt(0.5), 0.05 - y)
    return torch.minimum(head, _box(x, y + 0.45, 0.3, 0.5))


_SDF = {
    "circle": lambda x, y: torch.hypot(x, y) - 0.88,
    "square": lambda x, y: _box(x, y, 0.78, 0.78),
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.3), _box(x, y, 0.3, 0.95)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.66).abs() - 0.24,
    "diamond": lambda x, y: (x.abs() * 1.6 + y.abs() - 1.0) / math.hypot(1.6, 1.0),
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.92, 0.72 - torch.hypot(x - 0.45, y - 0.1)),
    "arrow": _arrow,
}


def _pattern(
    x: Tensor, y: Tensor, pattern: Tensor, direction: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Share of the second colour in each pixel, and strength of hard edges. Both ``[B, H, W]`` in [0, 1]."""
    count = len(pattern)

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(count, generator=generator) * (high - low) + low).view(count, 1, 1)

    torch.randint(4, (count,), generator=generator)  # The directions: what is drawn after them must not change.
    along, _ = _rotate(x, y, direction * (math.pi / 4))
    frequency, phase = uniform(2.2, 3.2) * math.pi, uniform(0, 2 * math.pi)
    cell = uniform(0.36, 0.48)
    dots = torch.hypot(
        *(torch.remainder(v + phase / 7, cell) - cell / 2 for v in (x, y)),
    )
    coarse = functional.interpolate(
        torch.rand(count, 1, 9, 9, generator=generator), (SIZE, SIZE), mode="bicubic", align_corners=False
    )[:, 0]
    level = 2 * math.pi / SIZE * 2.8  # change of a wave over one pixel, so that edges are about one pixel wide
    waves = {
        "plain": torch.full_like(x, -1.0),
        "striped": (along * frequency + phase).sin() / level,
        "dotted": (cell * 0.31 - dots) * SIZE / 2,
        "checkered": (x * frequency * 0.8 + phase).sin() * (y * frequency * 0.8 + phase).sin() / level * 1.5,
        "wavy": ((y + (x * 5.5 + phase).sin() * 0.13) * frequency + phase).sin() / level,
        "noisy": (coarse - 0.5) * 16,
    }
    hard = torch.stack([waves.get(name, waves["plain"]) for name in PATTERNS])[pattern, torch.arange(count)]
    mask = (hard + 0.5).clamp(0, 1)
    edges = (1.2 - hard.abs()).clamp(0, 1)

    ramp = ((-y * uniform(0.7, 0.9)) + 0.5).clamp(0, 1)
    glow = (torch.hypot(x, y) / uniform(0.9, 1.1) * 1.1 - 0.15).clamp(0, 1)
    for name, smooth in (("gradient", ramp), ("radial", glow)):
        chosen = (pattern == PATTERNS.index(name)).view(count, 1, 1)
        mask = torch.where(chosen, smooth * smooth * (3 - 2 * smooth), mask)
        edges = torch.where(chosen, 0.0, edges)
    plain = (pattern == PATTERNS.index("plain")).view(count, 1, 1)
    return torch.where(plain, 0.0, mask), torch.where(plain, 0.0, edges)


def _soft(pictures: Tensor) -> Tensor:
    """Blur the pictures and fade them a little."""
    offsets = torch.arange(-6, 7)
    kernel = torch.exp(-offsets.square() / (2 * 2.2**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1).expand(3, 1, -1)
    for shape, padding in (((3, 1, 1, 13), (6, 6, 0, 0)), ((3, 1, 13, 1), (0, 0, 6, 6))):
        padded = functional.pad(pictures, padding, mode="replicate")
        pictures = functional.conv2d(padded, kernel.reshape(shape), groups=3)
    return pictures * 0.88 + 0.1


def _mosaic(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Redraw the pictures as tiles of one colour each, with dark joints."""
    tiles = functional.avg_pool2d(pictures, _TILE)
    tiles = tiles * (0.92 + 0.16 * torch.rand(len(tiles), 1, *tiles.shape[2:], generator=generator))
    joint = torch.arange(SIZE) % _TILE == 0
    joints = (joint.view(-1, 1) | joint.view(1, -1)).float()
    large = functional.interpolate(tiles, scale_factor=_TILE, mode="nearest")
    return large * (1 - 0.35 * joints)


def _sketchy(pictures: Tensor, line: Tensor, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Redraw the pictures as pencil hatching on paper, with a thin pencil outline."""
    phase = torch.rand(len(x), 1, 1, generator=generator) * 6
    wobble = (x * 4 + phase).sin() * 0.08 + (y * 7 - phase).sin() * 0.05
    strokes = (((x + y + wobble) * 26 + phase).sin() * 0.5 + 0.5)[:, None]
    paper = torch.lerp(pictures, torch.ones_like(pictures), 0.12)
    shaded = paper * (0.62 + 0.38 * strokes) + 0.1 * strokes
    return torch.lerp(shaded, torch.full_like(shaded, 0.2), line * 0.6)


_OPENINGS = ("", "", "", "a picture of ", "an image of ", "a drawing of ", "an illustration of ")
_OBJECTS = ("shape", "object", "thing", "figure")
_PLACES = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "at the left side"),
    "right": ("on the right", "at the right side"),
    "top": ("at the top", "in the upper part"),
    "bottom": ("at the bottom", "in the lower part"),
}
_PATTERN_WORDS = {
    "plain": ("plain", "solid", "uniform"),
    "striped": ("striped", "stripy"),
    "dotted": ("dotted", "polka dot", "spotted"),
    "checkered": ("checkered", "checkerboard"),
    "gradient": ("gradient", "fading"),
    "wavy": ("wavy", "rippled"),
    "radial": ("radial", "glowing"),
    "noisy": ("noisy", "blotchy"),
}
_STYLE_WORDS = {
    "flat": ("in flat style", "flat design", "as a flat graphic"),
    "outlined": ("in outlined style", "with outlines", "as an outlined cartoon"),
    "soft": ("in soft style", "soft and blurry", "as a soft watercolor"),
    "mosaic": ("in mosaic style", "as a mosaic", "made of mosaic tiles"),
    "sketchy": ("in sketchy style", "as a pencil sketch", "sketchy hatching"),
}
_DIRECTION_WORDS = {
    "vertical": ("vertical", "vertically"),
    "rising": ("rising diagonal", "rising", "diagonal"),
    "horizontal": ("horizontal", "horizontally"),
    "falling": ("falling diagonal", "falling", "diagonal"),
}
_SIZE_WORDS = {"small": ("small", "little"), "medium": ("medium", "medium sized"), "large": ("large", "big")}
_COLOR_WORDS = {"gray": ("gray", "grey")}


def caption(scene: Mapping[str, str], named: Collection[str], rng: random.Random | None) -> str:
    """Describe a scene by the attributes in ``named``, in words that ``rng`` varies.

    ``background`` stands for both background colours. If ``named`` is empty, the caption is an opening or empty.
    Without ``rng`` the wording is always the same.
    """
    choose: Callable[[Sequence[str]], str] = rng.choice if rng else lambda options: options[0]
    chance = rng.random if rng else lambda: 1.0

    def word(name: str, words: Mapping[str, Sequence[str]]) -> str:
        return choose(words.get(scene[name], (scene[name],)))

    parts = []
    if {"shape", "color", "size", "position"} & set(named):
        words = [word("size", _SIZE_WORDS)] if "size" in named else []
        words += [word("color", _COLOR_WORDS)] if "color" in named else []
        words += [scene["shape"] if "shape" in named else choose(_OBJECTS)]
        phrase = ("an " if words[0][0] in "aeio" else "a ") + " ".join(words)
        parts.append(phrase + (" " + word("position", _PLACES) if "position" in named else ""))
    if {"pattern", "background"} & set(named):
        text = _background(scene, named, choose, chance, word)
        article = "an" if text[0] in "aeio" else "a"
        parts.append(f"{'on' if parts else 'over'} {article} {text}")
    if "style" in named:
        drawn_in_lines = "direction" in named and scene["style"] == "outlined"
        parts.append("as line art" if drawn_in_lines and chance() < 0.25 else word("style", _STYLE_WORDS))
        if chance() < 0.2:
            parts = parts[-1:] + parts[:-1]
    return choose(_OPENINGS) + choose((", ", " ")).join(parts)


def _background(
    scene: Mapping[str, str],
    named: Collection[str],
    choose: Callable[[Sequence[str]], str],
    chance: Callable[[], float],
    word: Callable[[str, Mapping[str, Sequence[str]]], str],
) -> str:
    """The part of a caption that describes the background, without an article."""
    pattern = scene["pattern"]
    directed = {"pattern", "direction"} <= set(named)
    kind = word("pattern", _PATTERN_WORDS) + " " if "pattern" in named else ""
    line = word("direction", _DIRECTION_WORDS) + " " if directed and pattern == "striped" else ""
    colors = [word("background", _COLOR_WORDS)]
    if pattern != "plain":
        colors.append(word("background2", _COLOR_WORDS))
    stripes = line != "" and chance() < 0.4
    if "background" not in named:
        return f"background with {line}stripes" if stripes else f"{line}{kind}background"
    if directed and pattern == "gradient":
        forms = ("{}background from {} at the top to {} at the bottom", "{}background from {} down to {}")
        return choose(forms).format(kind, *colors)
    both = " and ".join(colors)
    if stripes:
        return choose((f"background with {line}{both} stripes", f"background with {line}stripes of {both}"))
    return f"{line}{kind}{both} background" if chance() < 0.5 else f"{line}{kind}background of {both}"


CAPTIONED = ("shape", "color", "pattern", "background", "style", "position", "size")
"""Attributes that a caption may name."""

TAUGHT = (*CAPTIONED, "direction")
"""What captions name in training: also the direction of stripes and gradients, and line art by that name."""

LOOKS = ("pattern", "background", "style", "position", "size", "direction")
"""Attributes that a reference is used for: all except the object and its colour."""


def draw_named(rng: random.Random, full: float, among: Sequence[str] = CAPTIONED) -> tuple[str, ...]:
    """Choose the attributes that a caption names: with probability ``full`` all of ``among``, else a random subset."""
    if rng.random() < full:
        return tuple(among)
    return tuple(name for name in among if rng.random() < 0.55)


def captions(scenes: Scenes, rng: random.Random, full: float, among: Sequence[str] = CAPTIONED) -> list[str]:
    """One caption per scene, which names the attributes that :func:`draw_named` chooses."""
    return [caption(scenes.named(index), draw_named(rng, full, among), rng) for index in range(len(scenes))]
