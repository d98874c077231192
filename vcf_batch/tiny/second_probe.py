"""The second probe: it reads what pictures show, and nothing that makes or scores pictures has seen its weights.

The first probe is also the perceptual distance and a part of the autoencoder's loss, so pictures may suit it too well.
This one has another architecture, other scenes and other seeds. It is trained where it is used, within minutes.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from vcf_batch.tiny.fitting import Recipe, batch_indices, bfloat16_is_fast, chunks
from vcf_batch.tiny.probe import HEADS, attribute_losses, correct
from vcf_batch.tiny.world import COLORS, DIRECTIONS, PATTERNS, Scenes, render, sample_scenes

PROBE_SEED = 770_000_000
"""Seed of the probe's own scenes. No stage of the family draws from it."""

PROBE_SCENES = 48_000
PROBE_RECIPE = Recipe(steps=3000, batch=64, lr=2e-3, weight_decay=0.02)


class SecondProbe(nn.Module):
    """A classifier of the attributes of 64x64 pictures: patches of 4x4 pixels, then residual blocks with batch norms.

    Args:
        width: number of channels at 16x16; at 8x8 there are twice as many.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4),
            _Residual(width),
            _Residual(width),
            nn.Conv2d(width, 2 * width, 2, stride=2),
            _Residual(2 * width),
            _Residual(2 * width),
            nn.AvgPool2d(2),
            nn.Flatten(),
        )
        sizes = {**HEADS, "direction": len(DIRECTIONS)}
        self.heads = nn.ModuleDict({name: nn.Linear(2 * width * 16, size) for name, size in sizes.items()})

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        """Logits ``[B, number of values]`` by attribute, from pictures ``[B, 3, 64, 64]`` in [-1, 1]."""
        flat = self.body(pictures)
        return {name: head(flat) for name, head in self.heads.items()}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.change = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, maps: Tensor) -> Tensor:
        return functional.relu(maps + self.change(maps))


def second_probe(file: Path) -> SecondProbe:
    """The second probe from ``file``, which is written first if it does not exist: minutes on one CPU core."""
    if not file.exists():
        trained = _trained()
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in trained.state_dict().items()}, file)
    model = SecondProbe()
    model.load_state_dict(load_file(file))
    return model.eval().requires_grad_(False)


def _trained() -> SecondProbe:
    """A probe trained on renders with a little noise, since the pictures of a model are never quite clean."""
    torch.manual_seed(PROBE_SEED)
    model = SecondProbe()
    scenes = sample_scenes(PROBE_SCENES, PROBE_SEED)
    pictures = torch.cat([render(scenes.part(part, PROBE_SEED + part.start)) for part in chunks(PROBE_SCENES, 2000)])
    pictures = (pictures * 255).round().to(torch.uint8)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PROBE_RECIPE.lr, weight_decay=PROBE_RECIPE.weight_decay, fused=True
    )
    indices = batch_indices(PROBE_SCENES, PROBE_RECIPE.batch, PROBE_SEED)
    model.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
    for step in tqdm(range(PROBE_RECIPE.steps), desc="second probe", mininterval=10):
        for group in optimizer.param_groups:
            group["lr"] = PROBE_RECIPE.lr_at(step)
        chosen = indices(step)
        batch = pictures[chosen].float() / 127.5 - 1
        batch = batch + torch.randn_like(batch) * torch.rand(len(batch), 1, 1, 1) * 0.08
        batch = batch.contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16_is_fast()):
            logits = model(batch)
        losses = attribute_losses(logits, scenes.part(chosen).attributes)
        losses["direction"] = losses["direction"] * _striped(scenes.part(chosen))
        optimizer.zero_grad(set_to_none=True)
        torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
        optimizer.step()
    return model


def _striped(scenes: Scenes) -> Tensor:
    return scenes.attributes["pattern"] == PATTERNS.index("striped")


@torch.no_grad()
def shown(probe: SecondProbe, pictures: Tensor, scenes: Scenes) -> Mapping[str, Tensor]:
    """Whether each picture shows the scenes' attributes: attribute to bool.

    All have a value for every picture, ``[B]``, but two: ``stripes``, the direction of the scenes that are striped, and
    ``gradients``, whether those of the scenes that are gradients are the right way up.

    Args:
        pictures: ``[B, 3, 64, 64]`` in [0, 1].
    """

    def parts() -> Iterator[dict[str, Tensor]]:
        for part in chunks(len(pictures), 256):
            logits = probe(pictures[part] * 2 - 1)
            some = scenes.part(part)
            direction = logits.pop("direction").argmax(1) == some.attributes["direction"]
            yield {**correct(logits, some.attributes), "stripes": direction[_striped(some)]}

    read = list(parts())
    return {name: torch.cat([part[name] for part in read]) for name in read[0]} | {
        "gradients": _upright(pictures, scenes)
    }


def _upright(pictures: Tensor, scenes: Scenes) -> Tensor:
    """Whether the gradients are the right way up, without any network.

    The margins of the upper and of the lower quarter are nearer to their own two colours than to these exchanged.
    """
    chosen = scenes.attributes["pattern"] == PATTERNS.index("gradient")
    palette = torch.tensor(list(COLORS.values()))
    first, second = (palette[scenes.attributes[name][chosen]] for name in ("background", "background2"))
    margins = torch.cat([pictures[chosen][..., :6], pictures[chosen][..., -6:]], dim=3)
    upper, lower = margins[:, :, :12].mean((2, 3)), margins[:, :, -12:].mean((2, 3))
    wanted = (upper - first).square().sum(1) + (lower - second).square().sum(1)
    exchanged = (upper - second).square().sum(1) + (lower - first).square().sum(1)
    return wanted < exchanged
