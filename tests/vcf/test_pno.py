"""Prompt-noise optimisation: the authors' regulariser, and what must hold for every sample of a batch."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from support.tiny_models import build_pipeline
from vcf_batch.config.limits import SCHEDULERS
from vcf_batch.config.sampling import Sampling
from vcf_batch.records import Objective
from vcf_batch.vcf import pno
from vcf_batch.vcf.fusion import Conditioning, Fusion
from vcf_batch.vcf.guide import Guide
from vcf_batch.vcf.pipeline import VCFPipeline

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "vcf_golden.npz")

SETTINGS: dict[str, Any] = {"steps": 3, "lr_conditioning": 1e-2, "lr_noise": 1e-2, "gamma": 0.1}


def golden(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


# The regulariser


@pytest.mark.parametrize(
    ("noise", "value"), [("pno_noise", "pno_reg_noshuffle"), ("pno_noise_off", "pno_reg_off_noshuffle")]
)
def test_regularizer_equals_the_authors(noise: str, value: str) -> None:
    torch.testing.assert_close(pno.noise_regularizer(golden(noise), permutations=0), golden(value), rtol=1e-5, atol=0)


def test_gradient_of_the_regularizer_equals_the_authors() -> None:
    noise = golden("pno_grad_in").requires_grad_()
    value = pno.noise_regularizer(noise, permutations=0)
    value.backward()
    assert noise.grad is not None
    torch.testing.assert_close(value, golden("pno_grad_loss"), rtol=1e-5, atol=0)
    scale = golden("pno_grad").abs().max()
    torch.testing.assert_close(noise.grad / scale, golden("pno_grad") / scale, rtol=1e-5, atol=1e-5)


def test_typical_noise_costs_little() -> None:
    """4 log 2 is the least that it can cost."""
    for seed in range(10):
        noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed))
        assert 4 * math.log(2) - 1e-5 <= pno.noise_regularizer(noise) < 5
        assert pno.noise_regularizer(noise * 2) > 5 and pno.noise_regularizer(noise + 1) > 5


def test_permutations_come_from_the_generator() -> None:
    noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(0)) + 0.2
    generator = torch.Generator().manual_seed(0)
    value = pno.noise_regularizer(noise, generator=generator)
    assert value == pno.noise_regularizer(noise, generator=torch.Generator().manual_seed(0))
    assert value != pno.noise_regularizer(noise, generator=generator)


def test_noise_is_padded_to_whole_blocks() -> None:
    noise = torch.full((7,), 3.0)
    padded = torch.cat([noise, torch.zeros(1)])
    assert pno.noise_regularizer(noise, permutations=0) == pno.noise_regularizer(padded, permutations=0)


# Optimisation


class Batch:
    """Samples with references of their own, ready to be optimised: those of three that ``numbers`` names."""

    def __init__(self, pipeline: VCFPipeline, numbers: Sequence[int] = (0, 1, 2), **sampling: Any) -> None:
        rng = np.random.default_rng(0)
        drawn = [Image.fromarray(rng.integers(0, 255, (12, 20, 3), dtype=np.uint8)) for _ in range(3)]
        references = [drawn[n] for n in numbers]
        self.guide = Guide(
            pipeline.image_encoder, pipeline.feature_extractor.image_mean, pipeline.feature_extractor.image_std
        )
        self.targets = self.guide.targets([[image] for image in references], [None] * len(references))
        self.seeds = list(numbers)
        fusions = [
            Fusion([tokens], ("concat", "naive", "concat")[n], (0.5, 0.3, 1.0)[n], hi=(1, 1, 0.9)[n])
            for n, tokens in zip(numbers, pipeline.encode_references(references), strict=True)
        ]
        self.sample, self.noise, self.conditioning = pipeline.prepare(
            pipeline.encode_prompts([("a red cat", "two dogs", "a tree")[n] for n in numbers]),
            pipeline.encode_prompts([""] * len(numbers)),
            fusions,
            seeds=self.seeds,
            guidance_scale=[(3.0, 5.0, 2.0)[n] for n in numbers],
            sampling=Sampling(**{"steps": 2} | sampling),
        )

    def optimize(self, **changes: Any) -> tuple[Tensor, list[Objective]]:
        arguments: dict[str, Any] = {
            "sample": self.sample,
            "guide": self.guide,
            "targets": self.targets,
            "noise": self.noise,
            "conditioning": self.conditioning,
            "seeds": self.seeds,
        }
        return pno.optimize(**(arguments | SETTINGS | changes))


@pytest.fixture(scope="module")
def pipeline() -> VCFPipeline:
    return build_pipeline()


@pytest.fixture(scope="module")
def batch(pipeline: VCFPipeline) -> Batch:
    return Batch(pipeline)


@pytest.fixture(scope="module")
def optimized(batch: Batch) -> tuple[Tensor, list[Objective]]:
    return batch.optimize()


def test_the_image_with_the_lowest_loss_is_returned(batch: Batch, optimized: tuple[Tensor, list[Objective]]) -> None:
    images, course = optimized
    assert images.shape == (3, 3, 16, 16) and not images.requires_grad
    cosines = (batch.guide.embed(images) * batch.targets).sum(dim=1)
    for objective, cosine in zip(course, cosines.tolist(), strict=True):
        assert objective.best < objective.first and objective.steps == 3
        assert objective.best + cosine == pytest.approx(0.1 * 4 * math.log(2), abs=0.1), "the regulariser's part"


def test_what_makes_it_worse_is_not_returned(batch: Batch) -> None:
    """The best of all forwards, the first among them, not the last."""
    with torch.no_grad():
        plain = batch.sample(batch.noise, batch.conditioning)
    images, course = batch.optimize(steps=1, lr_conditioning=100.0, lr_noise=100.0)
    torch.testing.assert_close(images, plain, atol=1e-5, rtol=0)
    assert all(objective.best == objective.first and objective.steps == 1 for objective in course)


@pytest.mark.parametrize("number", range(3))
def test_a_sample_does_not_depend_on_its_neighbours(
    pipeline: VCFPipeline, optimized: tuple[Tensor, list[Objective]], number: int
) -> None:
    """Losses, gradient norms, AdamW's state, permutations and the best image are each sample's own."""
    images, course = optimized
    (alone,), (objective,) = Batch(pipeline, [number]).optimize()
    torch.testing.assert_close(images[number], alone, atol=1e-3, rtol=0)
    assert dataclasses.astuple(course[number]) == pytest.approx(dataclasses.astuple(objective), abs=1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_is_followed(pipeline: VCFPipeline, scheduler: str) -> None:
    """Multistep solvers keep a state, which computing activations again must not touch."""
    _, (objective,) = Batch(pipeline, [0], scheduler=scheduler, steps=3).optimize(steps=2)
    assert objective.best < objective.first


def test_the_noise_of_every_step_is_followed(pipeline: VCFPipeline) -> None:
    """With eta, each step adds noise of its own, and all of it is optimised."""
    batch = Batch(pipeline, [0, 1], steps=3, eta=0.5)
    followed: list[Tensor] = []

    def sample(noise: Tensor, conditioning: Conditioning) -> Tensor:
        followed.append(noise.detach().clone())
        return batch.sample(noise, conditioning)

    _, course = batch.optimize(sample=sample, gamma=0.0)
    assert batch.noise.shape == (2, 4, 4, 8, 8)
    assert all(objective.best < objective.first for objective in course)
    moved = (followed[-1] - followed[0]).abs().flatten(2).mean(dim=2)
    assert (moved > 1e-2).all()


# Bad numbers


@pytest.mark.parametrize("factor", [1e6, math.nan])
def test_a_sample_whose_gradient_explodes_stops_at_its_best(
    batch: Batch, optimized: tuple[Tensor, list[Objective]], factor: float
) -> None:
    """It is marked by its steps, and costs its neighbours nothing."""
    images, course = optimized
    ours, our_course = batch.optimize(targets=batch.targets * torch.tensor([[1.0], [factor], [1.0]]))
    assert [(objective.steps, objective.stopped) for objective in our_course] == [(3, False), (0, True), (3, False)]
    assert ours.isfinite().all() and not torch.equal(ours[1], images[1])
    for number in (0, 2):
        assert torch.equal(ours[number], images[number]) and our_course[number] == course[number]


def test_a_sample_that_turns_bad_later_keeps_its_best(batch: Batch, optimized: tuple[Tensor, list[Objective]]) -> None:
    sampled: list[Tensor] = []

    def sample(noise: Tensor, conditioning: Conditioning) -> Tensor:
        bad = torch.tensor([0.0, math.nan if len(sampled) > 1 else 0.0, 0.0])
        sampled.append(batch.sample(noise, conditioning) + bad[:, None, None, None])
        return sampled[-1]

    images, course = batch.optimize(sample=sample)
    assert [(objective.steps, objective.stopped) for objective in course] == [(3, False), (1, True), (3, False)]
    assert torch.equal(images[1], sampled[1][1])
    assert torch.equal(images[0], optimized[0][0]) and torch.equal(images[2], optimized[0][2])


# Memory


def test_memory_does_not_grow_with_the_denoising_steps(pipeline: VCFPipeline, batch: Batch) -> None:
    """What is kept for the gradient grows by a few latents a step; one UNet call alone keeps a thousand times that."""
    kept = 0

    def keep(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    def kept_by(function: Callable[[], Any]) -> int:
        nonlocal kept
        kept = 0
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function()
        return kept

    noise = batch.noise.clone().requires_grad_()
    few, many = (
        kept_by(functools.partial(Batch(pipeline, steps=steps).sample, noise, batch.conditioning)) for steps in (2, 6)
    )
    unet = kept_by(lambda: pipeline.unet(noise[:, 0], 1, batch.conditioning.positive.tokens))
    assert (many - few) / 4 <= 4 * noise.nbytes
    assert unet > 100 * 4 * noise.nbytes
