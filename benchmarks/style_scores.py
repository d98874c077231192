"""Search for a score that tells style from palette: ``python benchmarks/style_scores.py``.

The pairs are those of ``benchmarks/triplets.py``: pictures of the tiny model's world that share known attributes. Each
line of the table is a way to compare two pictures. Its figures are AUCs: how often a pair that shares the style alone
has the higher score than a pair that shares nothing, the palette alone, or palette and pattern; 50 % is chance. The
last column is how often the palette alone has the higher score than nothing: 50 % is blind to colours, as it should be.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from evaluation_cases import photograph_files
from PIL import Image
from torch import Tensor
from torch.nn import functional
from triplets import COLORS, CONTENT, Scenes

from vcf_batch.images import to_unit
from vcf_batch.metrics.lpips import PerceptualDistance
from vcf_batch.metrics.texture import texture_similarity
from vcf_batch.models.resolution import tiny_folder
from vcf_batch.tiny.probe import Probe

Compared = Callable[[Tensor, Tensor], Tensor]
"""A score ``[B]`` of pictures ``[B, 3, 64, 64]`` in [0, 1] and as many others."""

SHARED: Mapping[str, tuple[str, ...]] = {
    "style": ("style",),
    "nothing": (),
    "palette": COLORS,
    "palette and pattern": (*COLORS, "pattern"),
}
"""What the pictures of a pair have in common."""


def grey(pictures: Tensor) -> Tensor:
    """Brightness, of equal mean and contrast in all pictures, as three equal channels."""
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    brightness = (pictures * weights).sum(dim=1, keepdim=True)
    deviation, mean = torch.std_mean(brightness, dim=(2, 3), keepdim=True)
    return ((brightness - mean) / (deviation + 0.02) * 0.25 + 0.5).expand(-1, 3, -1, -1)


def equalised(pictures: Tensor) -> Tensor:
    """Brightness with a flat histogram: each pixel's rank, as three equal channels."""
    flat = grey(pictures)[:, 0].flatten(1)
    noise = torch.rand(flat.shape, generator=torch.Generator().manual_seed(0)) * 1e-3  # Equal pixels get any order.
    ranks = (flat + noise).argsort(dim=1).argsort(dim=1).float() / flat.shape[1]
    return ranks.view(-1, 1, *pictures.shape[2:]).expand(-1, 3, -1, -1)


def whitened(pictures: Tensor) -> Tensor:
    """Colours with mean 0.5 and uncorrelated channels of equal deviation in every picture."""
    pixels = pictures.flatten(2)
    pixels = pixels - pixels.mean(dim=2, keepdim=True)
    values, vectors = torch.linalg.eigh(pixels @ pixels.mT / pixels.shape[2] + 2e-3 * torch.eye(3))
    unit = vectors @ torch.diag_embed(values.rsqrt()) @ vectors.mT @ pixels
    return (unit * 0.25 + 0.5).view_as(pictures)


def shuffled(pictures: Tensor, edge: int = 16) -> Tensor:
    """The patches of every picture in another order, so that nothing lies where it lay."""
    patches = functional.unfold(pictures, edge, stride=edge)
    order = torch.rand(len(patches), patches.shape[2], generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    patches = patches.gather(2, order[:, None].expand_as(patches))
    return functional.fold(patches, pictures.shape[2:], edge, stride=edge)


def spectrum(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the log power spectra of whole pictures: the texture score without patches."""

    def logarithms(pictures: Tensor) -> Tensor:
        power = torch.fft.rfft2(grey(pictures)[:, 0] - 0.5).abs().square().flatten(1)[:, 1:]
        values = (power / power.mean(dim=1, keepdim=True) + 0.05).log()
        return values - values.mean(dim=1, keepdim=True)

    return torch.cosine_similarity(logarithms(a), logarithms(b))


def candidates(probe: Probe) -> dict[str, Compared]:
    """The ways to compare pictures, by the perceptual network of the tiny model where they need one."""

    def statistics(change: Callable[[Tensor], Tensor]) -> Compared:
        compare = PerceptualDistance(probe.features).compare
        return lambda a, b: compare(change(a) * 2 - 1, change(b) * 2 - 1)[1]

    def distance(change: Callable[[Tensor], Tensor]) -> Compared:
        compare = PerceptualDistance(probe.features).compare
        return lambda a, b: -compare(change(a) * 2 - 1, change(b) * 2 - 1)[0]

    def correlations(change: Callable[[Tensor], Tensor]) -> Compared:
        def one(maps: Tensor) -> Tensor:
            channels = maps.flatten(2) - maps.flatten(2).mean(dim=2, keepdim=True)
            unit = functional.normalize(channels, dim=2)
            return (unit @ unit.mT).flatten(1)

        def compare(a: Tensor, b: Tensor) -> Tensor:
            seen = (probe.features(change(pictures) * 2 - 1) for pictures in (a, b))
            alike = [torch.cosine_similarity(one(x), one(y)) for x, y in zip(*seen, strict=True)]
            return torch.stack(alike).mean(dim=0)

        return compare

    def same(pictures: Tensor) -> Tensor:
        return pictures

    return {
        "`style_similarity`: means and deviations of channels": statistics(same),
        "`style_similarity`, grey pictures of equal contrast": statistics(grey),
        "`style_similarity`, grey pictures with flat histograms": statistics(equalised),
        "`style_similarity`, whitened colours": statistics(whitened),
        "correlations of channels (Gram matrices)": correlations(same),
        "correlations, grey pictures of equal contrast": correlations(grey),
        "correlations, grey pictures with flat histograms": correlations(equalised),
        "correlations, whitened colours": correlations(whitened),
        "perceptual distance, patches shuffled, flat histograms": distance(lambda p: shuffled(equalised(p))),
        "power spectrum of the whole picture": spectrum,
        "`texture_similarity`: power spectrum of patches": texture_similarity,
    }


def auc(higher: Tensor, lower: Tensor) -> float:
    """How often a value of one kind exceeds one of the other kind; ties count half."""
    return ((higher[:, None] > lower).float() + 0.5 * (higher[:, None] == lower).float()).mean().item()


def of_photographs(folder: Path | None, edge: int) -> float:
    """AUC of the texture score for two quarters of one photograph against quarters of two, reduced to ``edge``."""
    quarters = []
    for file in photograph_files(folder):
        picture = torch.from_numpy(to_unit(Image.open(file).convert("RGB").resize((512, 512)))).permute(2, 0, 1)
        parts = functional.unfold(picture[None], 256, stride=256).mT.view(4, 3, 256, 256)
        quarters.append(functional.interpolate(parts, (edge, edge), mode="area"))
    whole = torch.cat(quarters)
    owner = torch.arange(len(whole)) // 4
    one, two = torch.combinations(torch.arange(len(whole))).T
    alike = torch.cat(
        [texture_similarity(whole[a], whole[b]) for a, b in zip(one.split(64), two.split(64), strict=True)]
    )
    return auc(alike[owner[one] == owner[two]], alike[owner[one] != owner[two]])


@click.command()
@click.option("--count", type=click.IntRange(min=2), default=400, show_default=True, help="Pairs of each kind.")
@click.option("--photographs", type=click.Path(path_type=Path, exists=True), help="[default: those of scikit-image]")
@torch.no_grad()
def main(count: int, photographs: Path | None) -> None:
    """Print the table, in minutes of one CPU core, and what the texture score tells of photographs."""
    probe = Probe.from_pretrained(f"{tiny_folder()}/probe", dtype=torch.float32).eval()
    scenes = Scenes(count)
    original = scenes.draw(scenes.original)
    other = scenes.changed(scenes.original, *CONTENT, "style", "pattern", "colors")
    pictures = {
        name: scenes.draw(other | {value: scenes.original[value] for value in shared})
        for name, shared in SHARED.items()
    }
    print("| score | style or nothing | style or palette | style or palette and pattern | palette or nothing |")
    print("|---|---|---|---|---|")
    for name, compared in candidates(probe).items():
        found = {kind: compared(original, shown) for kind, shown in pictures.items()}
        asked = [auc(found["style"], found[kind]) for kind in ("nothing", "palette", "palette and pattern")]
        cells = (f"{100 * share:.0f} %" for share in (*asked, auc(found["palette"], found["nothing"])))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for edge in (64, 128, 256):
        share = of_photographs(photographs, edge)
        print(f"quarters of one photograph or of two, {edge} pixels a side, `texture_similarity`: {100 * share:.0f} %")


if __name__ == "__main__":
    main()
