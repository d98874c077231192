"""Prompt-noise optimisation (PNO): conditioning and noise follow the reference by gradient (docs/method.md, section 5)."""

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vcf_batch.records import Objective
from vcf_batch.vcf.fusion import Conditioning
from vcf_batch.vcf.guide import Guide

MAX_GRADIENT_NORM = 1.0
"""Of a sample, over conditioning and noise together."""

EXPLODED = 1e4
"""A gradient norm from which on the gradient says nothing: the loss itself stays within a few units."""

PERMUTATION_SEED = 1 << 63
"""Added to a sample's seed for its permutations. No sample has such a seed, so no noise comes from the same generator."""


def noise_regularizer(
    noise: Tensor, block: int = 4, permutations: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """How unlikely noise is to be standard normal, by concentration bounds (docs/method.md, section 5).

    Mean and covariance of the noise's blocks are held against what independent normal numbers give, in the noise's own
    order and in random ones. Typical noise has ``4 log 2``, and no gradient.

    Args:
        noise: all noise of one sample, of any shape; padded with zeros to whole blocks.
        block: length ``k`` of the vectors that the noise is cut into.
        permutations: random orders that are averaged over; 0 leaves their term out.
        generator: of the permutations, on the CPU; None is torch's default.

    Returns:
        Scalar, ``2 log 2`` or more.
    """
    flat = F.pad(noise.flatten(), (0, -noise.numel() % block))
    orders = [torch.randperm(len(flat), generator=generator).to(flat.device) for _ in range(permutations)]
    vectors = torch.stack([flat, *(flat[order] for order in orders)]).unflatten(1, (-1, block))
    count = vectors.shape[1]
    mean = vectors.mean(dim=1)
    covariance = vectors.mT @ vectors / count
    spread = torch.linalg.matrix_norm(covariance - torch.eye(block, device=flat.device), ord=2)
    excess = ((1 + spread).sqrt() - 1 - math.sqrt(block / count)).clamp(min=0)
    log_likelihood = (-count * mean.square().sum(dim=1) / (2 * block)).clamp(max=-math.log(2))
    log_likelihood = log_likelihood + (-count * excess.square() / 2).clamp(max=-math.log(2))
    return -log_likelihood[0] - (log_likelihood[1:].mean() if permutations else 0)


def optimize(
    sample: Callable[[Tensor, Conditioning], Tensor],
    guide: Guide,
    targets: Tensor,
    noise: Tensor,
    conditioning: Conditioning,
    *,
    seeds: Sequence[int],
    steps: int,
    lr_conditioning: float,
    lr_noise: float,
    gamma: float,
) -> tuple[Tensor, list[Objective]]:
    """Sample again and again, each time from a conditioning and noise that bring the image closer to the reference.

    The loss of a sample is ``-cosine(output, reference) + gamma * noise_regularizer(noise)``. Samples share the
    computation and nothing else: losses, gradient norms, AdamW's state, permutations and the best image are each
    sample's own. A sample whose loss or gradient is not finite, or explodes, stops at its best.

    Args:
        sample: noise and conditioning to images ``[B, 3, H, W]`` in [0, 1]. Differentiable.
        guide: what is followed; never the judge.
        targets: ``[B, D]``, the guide's embeddings of the references; of several, their weighted mean.
        noise: ``[B, ...]``, all noise of each sample, standard normal.
        conditioning: of the same B samples; its fused side is optimised.
        seeds: one per sample, for the regulariser's permutations.
        steps: updates of conditioning and noise, so ``steps + 1`` images are sampled.
        lr_conditioning, lr_noise: AdamW's learning rates.
        gamma: weight of the regulariser.

    Returns:
        Of each sample's images the one with the lowest loss, float32 ``[B, 3, H, W]`` in [0, 1], and the course of the
        loss.
    """
    tokens = conditioning.tokens.detach().float().clone().requires_grad_()
    noise = noise.detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([{"params": [tokens], "lr": lr_conditioning}, {"params": [noise], "lr": lr_noise}])
    generators = [torch.Generator().manual_seed(PERMUTATION_SEED + seed) for seed in seeds]
    running = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
    taken = torch.zeros_like(running, dtype=torch.int32)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            images = sample(noise, dataclasses.replace(conditioning, tokens=tokens))
            distance = -(guide.embed(images) * targets).sum(dim=1)
            loss = distance.detach() + _penalties(noise, generators, gamma)
        if step == 0:
            first, best, best_images = loss, loss, images.detach()
        running &= loss.isfinite()
        taken[running] = step
        better = running & (loss < best)
        best = torch.where(better, loss, best)
        best_images = torch.where(better[:, None, None, None], images.detach(), best_images)
        if step == steps or not running.any():
            break
        distance.sum().backward()
        norms = torch.stack([leaf.grad.flatten(1).norm(dim=1) for leaf in (tokens, noise)]).norm(dim=0)
        running &= norms < EXPLODED
        for leaf in (tokens, noise):
            shape = (-1, *[1] * (leaf.ndim - 1))
            clipped = leaf.grad / norms.clamp(min=MAX_GRADIENT_NORM).reshape(shape)
            leaf.grad = torch.where(running.reshape(shape), clipped, 0)
        optimizer.step()
        optimizer.zero_grad()
    course = zip(first.tolist(), best.tolist(), taken.tolist(), strict=True)
    return best_images, [Objective(*each) for each in course]


def _penalties(noise: Tensor, generators: Sequence[torch.Generator], gamma: float) -> Tensor:
    """The regulariser's part of each sample's loss, ``[B]``. Where gradients flow, the noise has got its own after it.

    One sample after the other, as the permutations of one take twenty times its memory.
    """
    penalties = []
    for own, generator in zip(noise, generators, strict=True):
        penalty = gamma * noise_regularizer(own, generator=generator)
        if penalty.requires_grad:
            penalty.backward()
        penalties.append(penalty.detach())
    return torch.stack(penalties)
