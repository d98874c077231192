"""Things that all training stages share: the rendered world, the tokenizer, the device, the checkpoints' folder."""

import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vcf_batch.tiny import networks, world
from vcf_batch.tiny.families import EMBEDDED_FAMILY, Family
from vcf_batch.tiny.fitting import Recipe, chunks, fit

SEED = 20260523
SCENES = 32_000
CAPTIONED_SCENES = 4000
"""Scenes whose captions the tokenizer is trained on."""
SHARED_PARTS = ("tokenizer", "text_encoder", "image_encoder", "vae", "probe", "judge", "aligner")
"""What a family with a UNet of its own may have from another one."""


class _Steps(IterableDataset[Any]):
    """What ``make`` returns for the steps from ``first`` on, shared among the workers of a loader in turns."""

    def __init__(self, make: Callable[[int], Any], first: int) -> None:
        self.make, self.first = make, first

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        return (self.make(step) for step in itertools.count(self.first + offset, stride))


def ahead(make: Callable[[int], Any], workers: int) -> Callable[[int], Any]:
    """``make``, for steps in their order, prepared by ``workers`` other processes; with 0 it is called when asked.

    A GPU needs this: captions for it are worded and split into tokens by CPUs.
    """
    if workers == 0:
        return make
    prepared: Iterator[Any] | None = None

    def one(step: int) -> Any:
        nonlocal prepared
        if prepared is None:  # The first step is known only now: a resumed stage does not begin at 0.
            loader: Iterable[Any] = DataLoader(_Steps(make, step), batch_size=None, num_workers=workers)
            prepared = iter(loader)
        return next(prepared)

    return one


class Workshop:
    """The output folder, the device and the rendered world, which all stages share."""

    def __init__(
        self,
        out: Path,
        device: torch.device,
        seconds: float,
        autocast: bool,
        start: Path | None = None,
        workers: int = 0,
        count: int = SCENES,
        family: Family = EMBEDDED_FAMILY,
    ) -> None:
        self.out, self.device, self.seconds, self.autocast, self.start = out, device, seconds, autocast, start
        self.workers, self.count, self.family = workers, count, family
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)

    @cache  # noqa: B019 - one workshop lives as long as the process
    def scenes(self) -> tuple[world.Scenes, Tensor]:
        """The training scenes and their pictures, uint8 ``[N, 3, 64, 64]``: rendered once."""
        scenes = self.family.scenes(self.count, SEED)
        pictures = torch.cat([world.render(scenes.part(part, SEED + part.start)) for part in chunks(self.count, 2000)])
        return scenes, (pictures * 255).round().to(torch.uint8)

    def pictures(self, indices: Tensor | slice) -> Tensor:
        """Training pictures, float32 ``[B, 3, 64, 64]`` in [-1, 1] on the device."""
        return self.scenes()[1][indices].to(self.device).float() / 127.5 - 1

    def clip_pixels(self, indices: Tensor | slice) -> Tensor:
        """Training pictures for the CLIP towers: float32 ``[B, 3, 64, 64]``, normalised as CLIP's input."""
        mean, std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
        return (self.pictures(indices) / 2 + 0.5 - mean) / std

    @cache  # noqa: B019
    def tokenizer(self) -> CLIPTokenizer:
        """The tokenizer, trained on first use."""
        folder = self.out / "tokenizer"
        if not folder.exists():
            networks.train_tokenizer(folder, self.family.scenes(CAPTIONED_SCENES, SEED))
        return CLIPTokenizer.from_pretrained(folder)

    def tokenize(self, texts: list[str]) -> Tensor:
        """Token ids ``[B, 48]`` on the CPU, padded and cut as diffusers' ``encode_prompt`` does."""
        length = networks.TEXT_TOKENS
        tokens = self.tokenizer()(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids

    def take(self, weights: Path) -> None:
        """Copy all parts of other weights but the UNet, those that are there already left as they are."""
        for part in SHARED_PARTS:
            if not (self.out / part).exists():
                partial = self.out / f"{part}.partial"
                shutil.copytree(weights / part, partial, dirs_exist_ok=True)
                partial.rename(self.out / part)

    def checkpoint(self, stage: str) -> Path:
        """The file that a stage resumes from."""
        return self.out / "checkpoints" / f"{stage}.pt"

    def begin(self, model: nn.Module, part: str) -> None:
        """Give ``model`` the weights of the same part of the family in ``start``, where there is one.

        Tensors of another shape keep their random start. A stage that has a checkpoint loads it afterwards.
        """
        if self.start is None:
            return
        own = model.state_dict()
        older: dict[str, Tensor] = {}
        for file in sorted((self.start / part).glob("*.safetensors")):
            older |= load_file(file)
        model.load_state_dict(
            {name: older[name].float() for name in own.keys() & older.keys() if own[name].shape == older[name].shape},
            strict=False,
        )

    def begin_words(self, clip: CLIPModel) -> None:
        """Give the words that the family in ``start`` knows too the embeddings that they have there."""
        if self.start is None:
            return
        older = CLIPTokenizer.from_pretrained(self.start / "tokenizer").get_vocab()
        weights = load_file(self.start / "text_encoder" / "model.safetensors")
        known = next(value for name, value in weights.items() if name.endswith("token_embedding.weight"))
        with torch.no_grad():
            for word, index in self.tokenizer().get_vocab().items():
                if word in older:
                    clip.text_model.embeddings.token_embedding.weight[index] = known[older[word]].float()

    def fit(self, stage: str, model: nn.Module, loss: Callable[[int], Tensor], recipe: Recipe) -> None:
        """Run one stage's training; see :func:`vcf_batch.tiny.fitting.fit`."""
        self.scenes()
        checkpoint = self.checkpoint(stage)
        done = fit(model, loss, recipe, checkpoint, self.seconds, self.autocast)
        if not done:
            click.echo(f"{stage}: stopped by the time limit; run the same command again to go on")
