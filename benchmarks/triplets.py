"""Measure whether the two scores of triplets work, and the cost of the text-only twin.

``python benchmarks/triplets.py scores``: compare pairs of pictures from the tiny model's world that share known
attributes. The table says how often the pair that shares the content, or the style, has the higher score.

``python benchmarks/triplets.py cost``: floating-point operations of a batch of the tiny model without and with twins.
"""

from collections.abc import Mapping
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vcf_batch import images
from vcf_batch.config.sampling import Sampling
from vcf_batch.metrics.clip_score import ClipJudge, content_alignment, cosine
from vcf_batch.metrics.lpips import PerceptualDistance
from vcf_batch.models import resolution
from vcf_batch.models.cache import fetch
from vcf_batch.tiny import world
from vcf_batch.tiny.pairs import HELD_OUT
from vcf_batch.tiny.probe import Probe
from vcf_batch.vcf.fusion import Fusion
from vcf_batch.vcf.pipeline import VCFPipeline

COLORS = ("color", "background", "background2")
CONTENT = ("shape", "position", "size")
OBJECT = ("shape", "color")


class Scenes:
    """Scenes, and variants of them in which chosen attributes have other values."""

    def __init__(self, count: int) -> None:
        self.generator = torch.Generator().manual_seed(HELD_OUT)
        self.original = world.sample_scenes(count, HELD_OUT + 3).attributes
        self.seed = HELD_OUT + 4

    def changed(self, base: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
        """Change the named attributes of every scene. ``colors`` changes all colours, to colours not in the scene."""
        values = dict(base)
        for name in names:
            if name == "colors":
                chances = torch.rand(len(base["color"]), len(world.COLORS), generator=self.generator)
                for color in COLORS:
                    chances.scatter_(1, base[color][:, None], -1.0)
                for place, color in enumerate(COLORS):
                    values[color] = chances.argsort(dim=1, descending=True)[:, place]
            else:
                size = len(world.VALUES[name])
                values[name] = (base[name] + torch.randint(1, size, base[name].shape, generator=self.generator)) % size
        return values

    def draw(self, attributes: Mapping[str, Tensor]) -> Tensor:
        """Pictures, float32 ``[B, 3, 64, 64]`` in [0, 1]; every call varies placement and tones a little."""
        self.seed += 1
        return world.render(world.Scenes(attributes, self.seed))


def report(name: str, alike: Tensor, different: Tensor) -> None:
    """Print the means of a score for two kinds of pairs, and how often the first is higher."""
    share = (alike > different).float().mean()
    print(
        f"{name}: mean {alike.mean():.3f} against {different.mean():.3f}; higher in {share:.1%} of {len(alike)} cases"
    )


def uint8(pictures: Tensor) -> list[NDArray[np.uint8]]:
    return [images.from_unit(picture) for picture in pictures.permute(0, 2, 3, 1).numpy()]


@click.group()
def main() -> None:
    """Measure triplets."""


@main.command()
@click.option("--count", default=400, show_default=True)
def scores(count: int) -> None:
    """Print how often each score is higher for the pair that shares the content or the style."""
    folder = resolution.tiny_folder()
    judge = ClipJudge.from_pretrained(f"{folder}/judge")
    probe = Probe.from_pretrained(f"{folder}/probe", dtype=torch.float32).eval()
    scenes = Scenes(count)
    original = scenes.draw(scenes.original)

    def aligned(attributes: Mapping[str, Tensor]) -> Tensor:
        layouts = judge.embed_layouts(uint8(original) + uint8(scenes.draw(attributes)))
        return content_alignment(*layouts.split(count))

    restyled = scenes.changed(scenes.original, "style", "pattern", "colors")
    same = aligned(restyled)
    report(
        "content_alignment, same content in another style, or another shape",
        same,
        aligned(scenes.changed(restyled, "shape")),
    )
    report(
        "content_alignment, same content in another style, or all other",
        same,
        aligned(scenes.changed(restyled, *CONTENT)),
    )

    other = scenes.changed(scenes.original, *CONTENT, "style", "pattern", "colors")

    def resembling(*shared: str) -> Tensor:
        drawn = scenes.draw(other | {name: scenes.original[name] for name in shared})
        return cosine(judge.embed_images(uint8(original)), judge.embed_images(uint8(drawn)))

    looks = resembling("style", "pattern", "background", "background2")
    report(
        "clip_reference, nothing shared but shape and colour of the object, or the looks", resembling(*OBJECT), looks
    )
    report("clip_reference, nothing shared but the looks, or nothing", looks, resembling())
    report("clip_reference, nothing shared but the style, or nothing", resembling("style"), resembling())

    def similar(attributes: Mapping[str, Tensor]) -> Tensor:
        pictures = scenes.draw(attributes)
        return PerceptualDistance(probe.features).compare(original * 2 - 1, pictures * 2 - 1)[1]

    replaced = scenes.changed(scenes.original, *CONTENT)
    same = similar(replaced)
    report(
        "style_similarity, other content in the same style, or another style",
        same,
        similar(scenes.changed(replaced, "style")),
    )
    whole = scenes.changed(replaced, "style", "pattern", "colors")
    report("style_similarity, other content in the same look, or another look", same, similar(whole))
    alone = similar({**whole, "style": scenes.original["style"]})
    report("style_similarity, nothing shared but the style, or nothing", alone, similar(whole))
    palette = similar({**whole, **{name: scenes.original[name] for name in COLORS}})
    report("style_similarity, nothing shared but the palette, or nothing", palette, similar(whole))
    report("style_similarity, nothing shared but the style, or the palette", alone, palette)


@main.command()
@click.option("--model", default="tiny", show_default=True)
@click.option("--batch-size", default=8, show_default=True)
def cost(model: str, batch_size: int) -> None:
    """Print the operations of a batch and of its text-only twins, for each fusion."""
    pipeline = VCFPipeline.from_pretrained(fetch(resolution.resolve(model)), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    reference = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    tokens = pipeline.encode_references([reference])[0]
    text = pipeline.encode_prompts(["a red circle"]).expand(batch_size, -1, -1)
    # One step is enough, because all steps have the same number of operations.
    inputs: dict[str, Any] = {
        "text_tokens": text,
        "negative_tokens": text,
        "seeds": range(batch_size),
        "sampling": Sampling(steps=1),
    }
    for fusion in ("concat", "naive"):
        counts = []
        for each in (Fusion([tokens], fusion), Fusion()):
            with FlopCounterMode(display=False) as counter:
                pipeline.generate_from_tokens(fusions=[each] * batch_size, **inputs)
            counts.append(counter.get_total_flops() / batch_size)
        sample, twin = counts
        print(
            f"{fusion}: {sample / 1e9:.2f} GFLOP a step and sample, its twin {twin / 1e9:.2f}: {twin / sample:.1%} more"
        )


if __name__ == "__main__":
    main()
