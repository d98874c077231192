"""What ``benchmarks/evaluation.py`` measures on: prompts with references, and how a picture of both is read."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vcf_batch.images import from_unit
from vcf_batch.metrics.texture import texture_similarity
from vcf_batch.tiny import pairs, world
from vcf_batch.tiny.families import HELD_OUT_FAMILY, Concepts
from vcf_batch.tiny.second_probe import SecondProbe, shown

ATTRIBUTES = ("shape", "color", "pattern", "background", "style", "position", "size", "gradients")
PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
"""Those that scikit-image carries in its package."""
PROMPTS_OF_A_PHOTOGRAPH = 8
REPORTED_SEED, TUNING_SEED = pairs.HELD_OUT + 1, pairs.HELD_OUT + 101
"""Seeds of the scenes that are reported, and of those that strengths are chosen on."""
RECALL_SEED = pairs.HELD_OUT + 201
"""Seed of the scenes whose captions are looked for."""
DRAWABLE = ("plain", "striped", "dotted", "checkered", "wavy", "noisy")
"""Patterns with edges, which a line drawing can show, and the plain one."""
CORNER = 0.4
"""Where the corners are, along both axes."""

Read = Callable[[Tensor], Mapping[str, Tensor]]
"""Function from pictures ``[B, 3, 64, 64]`` in [0, 1] to whether they show what is wanted, by its name: ``[B]``, or
fewer where it is not wanted of all."""


@dataclass(frozen=True)
class Cases:
    """Prompts with a reference each."""

    name: str
    prompts: Sequence[str]
    references: Sequence[Image.Image]
    read: Read
    perfect: Tensor
    """Pictures that show all that is wanted, ``[B, 3, 64, 64]``: what is read of them is the most that can be read."""


def pictures(tensor: Tensor) -> list[Image.Image]:
    """``[B, 3, H, W]`` in [0, 1] as images."""
    return [Image.fromarray(each) for each in from_unit(tensor.permute(0, 2, 3, 1).numpy())]


def attributes(probe: SecondProbe, wanted: world.Scenes, names: Sequence[str]) -> Read:
    """Whether pictures show these attributes of the scenes, as the second probe reads them."""
    return lambda made: {name: right for name, right in shown(probe, made, wanted).items() if name in names}


def of_the_world(
    name: str,
    scenes: world.Scenes,
    probe: SecondProbe,
    names: Sequence[str] = ATTRIBUTES,
    centers: Tensor | None = None,
) -> Cases:
    """References that show scenes. Prompts name another shape and a colour that the reference does not have."""
    wanted = pairs.wanted(scenes)
    return Cases(
        name,
        [pair.prompt for pair in pairs.with_prompts(scenes)],
        pictures(world.render(scenes, centers)),
        attributes(probe, wanted, names),
        world.render(wanted, centers),
    )


def of_concept(kind: str, count: int, probe: SecondProbe) -> Cases:
    """References that show a style, a pattern or a pair of colours that the family ``held-out`` has never seen."""
    concepts: Concepts | None = HELD_OUT_FAMILY.unseen
    assert concepts is not None
    scenes = concepts.scenes_of(kind, count, pairs.HELD_OUT + 301)
    return of_the_world(f"unseen {kind}", scenes, probe, ("shape", "color", kind))


def line_drawing(made: Tensor) -> Tensor:
    """Black lines on white where neighbouring pixels differ: pictures ``[B, 3, H, W]`` in [0, 1] as drawings."""
    down = torch.diff(made, dim=2, append=made[:, :, -1:]).abs().amax(dim=1, keepdim=True)
    right = torch.diff(made, dim=3, append=made[..., -1:]).abs().amax(dim=1, keepdim=True)
    return (1 - 2.5 * torch.maximum(down, right)).clamp(0, 1).expand_as(made)


def of_sketches(count: int, probe: SecondProbe, shape_named: bool) -> Cases:
    """References that are line drawings of scenes. The prompt names a shape and a colour, or a colour alone."""
    drawn = world.sample_scenes(count, pairs.HELD_OUT + (401 if shape_named else 501))
    patterns = torch.tensor([world.PATTERNS.index(name) for name in DRAWABLE])
    values = {
        **drawn.attributes,
        "style": torch.zeros_like(drawn.attributes["style"]),
        "pattern": patterns[drawn.attributes["pattern"] % len(DRAWABLE)],
    }
    scenes = world.Scenes(values, drawn.seed)
    wanted = pairs.wanted(scenes)
    prompts = [pair.prompt for pair in pairs.with_prompts(scenes)]
    if not shape_named:
        wanted = world.Scenes({**wanted.attributes, "shape": values["shape"]}, drawn.seed)
        prompts = [world.caption(wanted.named(number), ("color",), None) for number in range(count)]
    return Cases(
        "sketches" if shape_named else "sketches, no shape named",
        prompts,
        pictures(line_drawing(world.render(scenes))),
        attributes(probe, wanted, ("shape", "color", "pattern", "position", "size")),
        world.render(wanted),
    )


def of_corners(count: int, probe: SecondProbe) -> Cases:
    """References whose object is in a corner, which no caption of the world names and no stage has seen."""
    drawn = world.sample_scenes(count, pairs.HELD_OUT + 601)
    scenes = world.Scenes({**drawn.attributes, "size": drawn.attributes["size"] % 2}, drawn.seed)  # Small or medium.
    generator = torch.Generator().manual_seed(drawn.seed)
    centers = (torch.randint(2, (count, 2), generator=generator) * 2 - 1) * CORNER
    cases = of_the_world("corners", scenes, probe, ("shape", "color"), centers)
    wanted = pairs.wanted(scenes)

    def read(made: Tensor) -> Mapping[str, Tensor]:
        found = places(made, wanted)
        # The probe knows objects at named positions only, so it gets them moved to the middle.
        moves = (found.nan_to_num() * world.SIZE / 2).round().long().tolist()
        central = torch.stack([each.roll((y, -x), (1, 2)) for each, (x, y) in zip(made, moves, strict=True)])
        return {**cases.read(central), "corner": (found.sign() == centers.sign()).all(dim=1)}

    return Cases(cases.name, cases.prompts, cases.references, read, cases.perfect)


def places(made: Tensor, scenes: world.Scenes) -> Tensor:
    """Where the objects are, without a network: ``[B, 2]``, x to the right and y upwards, NaN where there is none.

    Pixels belong to the object if its colour is the nearest among those of the scene.
    """
    palette = torch.tensor([*world.COLORS.values()])
    plain = scenes.attributes["pattern"] == world.PATTERNS.index("plain")
    second = torch.where(plain, scenes.attributes["background"], scenes.attributes["background2"])
    colors = torch.stack(
        [palette[values] for values in (scenes.attributes["color"], scenes.attributes["background"], second)]
    )
    distances = (made - colors[..., None, None]).square().sum(dim=2)  # [3, B, H, W]
    own = (distances[0] < distances[1:].amin(dim=0)).float()
    axis = (torch.arange(world.SIZE) + 0.5) / world.SIZE * 2 - 1
    sums = own.sum(dim=(1, 2))
    x, y = (own.sum(dim=1) * axis).sum(dim=1) / sums, -(own.sum(dim=2) * axis).sum(dim=1) / sums
    return torch.stack([x, y], dim=1)


def of_photographs(folder: Path | None, probe: SecondProbe) -> Cases:
    """References that are photographs, which are like nothing that the family was trained on.

    ``palette`` and ``texture`` are right if of all the photographs the picture's own one is the nearest: chance is one
    in as many as there are.
    """
    files = photograph_files(folder)
    photographs = [Image.open(file).convert("RGB") for file in files]
    edge = (world.SIZE, world.SIZE)
    small = [np.asarray(image.resize(edge, Image.Resampling.BOX), np.float32) / 255 for image in photographs]
    targets = torch.from_numpy(np.stack(small)).permute(0, 3, 1, 2)
    count = len(files) * PROMPTS_OF_A_PHOTOGRAPH
    drawn = pairs.draw(count, pairs.HELD_OUT + 701)
    wanted = world.compose([pair.wanted for pair in drawn], seed=0)
    own = torch.arange(count) % len(files)

    def read(made: Tensor) -> Mapping[str, Tensor]:
        alike = torch.stack([texture_similarity(made, target.expand_as(made)) for target in targets], dim=1)
        distances = (colors_in_order(made)[:, None] - colors_in_order(targets)).abs().mean(dim=(2, 3))
        return {
            **attributes(probe, wanted, ("shape", "color"))(made),
            "palette": distances.argmin(dim=1) == own,
            "texture": alike.argmax(dim=1) == own,
        }

    return Cases(
        "photographs",
        [pair.prompt for pair in drawn],
        [photographs[number] for number in own.tolist()],
        read,
        targets[own],
    )


def photograph_files(folder: Path | None) -> list[Path]:
    """The photographs of a folder, or those of :data:`PHOTOGRAPHS` that scikit-image brings.

    Raises:
        UsageError: no folder is named, and scikit-image is not installed.
    """
    if folder is None:
        found = importlib.util.find_spec("skimage")
        if found is None or found.origin is None:
            raise click.UsageError("photographs are those of scikit-image: install it, or name others by --photographs")
        folder = Path(found.origin).parent / "data"
    files = sorted(file for file in folder.iterdir() if file.suffix in (".png", ".jpg", ".jpeg"))
    return [file for file in files if file.name in PHOTOGRAPHS] or files


def colors_in_order(made: Tensor) -> Tensor:
    """The colours of pictures wherever they are: ``[B, P, 12]``.

    Their projections on twelve directions, each in rising order. The mean difference of two pictures' is the sliced
    Wasserstein distance of their palettes.
    """
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(3, 12, generator=generator), dim=0)
    return (made.flatten(2).mT @ directions).sort(dim=1).values
