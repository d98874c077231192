"""Prompt-noise optimisation (PNO): follow the reference by gradients through sampling (docs/method.md, section 5)."""

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
"""Largest gradient norm of a sample, over its conditioning and noise together."""

EXPLODED = 1e4
"""Gradient norm from which on a gradient is useless, because the loss itself stays within a few units."""

PERMUTATION_SEED = 1 << 63
"""Offset added to a sample's seed for its permutations. It is above every seed, so no noise uses the same generator."""


def noise_regularizer(
    noise: Tensor, block: int = 4, permutations: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """Improbability of noise under a standard normal distribution, by concentration bounds (docs/method.md, section 5).

    The noise is cut into blocks, in its own order and in random orders. The mean and covariance of the blocks are
    compared with those of independent normal numbers. Typical noise has ``4 log 2`` or a little more; ``4 log 2`` is
    the minimum with permutations.

    Args:
        noise: all noise of one sample, of any shape; it is padded with zeros to whole blocks.
        block: length ``k`` of a block.
        permutations: number of random orders to average over; 0 leaves their term out.
        generator: generator of the permutations, on the CPU; None is torch's default.

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
    noise: Tensor,
    conditioning: Conditioning,
    guide: Guide,
    targets: Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    lr_conditioning: float,
    lr_noise: float,
    gamma: float,
) -> tuple[Tensor, list[Objective]]:
    """Optimise conditioning and noise in ``steps`` updates, so that the image comes closer to the reference.

    The loss of a sample is ``-cosine(output, reference) + gamma * noise_regularizer(noise)``. Samples share the
    computation only: each has its own loss, gradient norm, AdamW state, permutations and best image. A sample stops at
    its best image once its loss or gradient is not finite, or its gradient norm reaches :data:`EXPLODED`.

    Args:
        sample, noise, conditioning: a batch of B samples, as :meth:`VCFPipeline.prepare` returns it. The noise of every
            denoising step, the fused tokens of the conditioning and the tokens of an IP-Adapter are optimised.
        guide: the CLIP to follow; never the judge.
        targets: ``[B, D]``, the guide's embedding of each reference, or the weighted mean of several.
        seeds: one per sample, for the regulariser's permutations.
        steps: number of updates of conditioning and noise; ``steps + 1`` images are sampled.
        lr_conditioning, lr_noise: AdamW's learning rates.
        gamma: weight of the regulariser.

    Returns:
        For each sample the image with the lowest loss, float32 ``[B, 3, H, W]`` in [0, 1], and a summary of its losses.
    """
    positive = conditioning.positive
    tokens, adapted = (
        own.detach().float().clone().requires_grad_() for own in (positive.tokens, positive.image_prompts.tokens)
    )
    noise = noise.detach().clone().requires_grad_()
    prompts = dataclasses.replace(positive.image_prompts, tokens=adapted)
    positive = dataclasses.replace(positive, tokens=tokens, image_prompts=prompts)
    conditioning = dataclasses.replace(conditioning, positive=positive)
    learnt = [tokens, adapted] if prompts.strength.any() else [tokens]
    optimizer = torch.optim.AdamW([{"params": learnt, "lr": lr_conditioning}, {"params": [noise], "lr": lr_noise}])
    generators = [torch.Generator().manual_seed(PERMUTATION_SEED + seed) for seed in seeds]
    running = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
    taken = torch.zeros_like(running, dtype=torch.int32)
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            images = sample(noise, conditioning)
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
        distance.sum().backward(inputs=[*learnt, noise])
        running &= _clip([*learnt, noise], running)
        optimizer.step()
        optimizer.zero_grad()
    course = zip(first.tolist(), best.tolist(), taken.tolist(), (~running).tolist(), strict=True)
    return best_images, [Objective(*each) for each in course]


def _clip(leaves: Sequence[Tensor], running: Tensor) -> Tensor:
    """Clip each sample's gradient over all ``leaves`` to a norm of at most :data:`MAX_GRADIENT_NORM`.

    Leaves that no step has used have no gradient, and stay as they are. Samples that are not ``running``, and samples
    with a useless gradient, get a gradient of 0.

    Returns:
        Whether each sample's gradient is useful, bool ``[B]``.
    """
    gradients = [(leaf, leaf.grad) for leaf in leaves if leaf.grad is not None]
    norms = torch.stack([gradient.flatten(1).norm(dim=1) for _, gradient in gradients]).norm(dim=0)
    useful = norms < EXPLODED
    for leaf, gradient in gradients:
        shape = (-1, *[1] * (leaf.ndim - 1))
        clipped = gradient * (MAX_GRADIENT_NORM / norms.clamp(min=MAX_GRADIENT_NORM)).reshape(shape)
        leaf.grad = torch.where((running & useful).reshape(shape), clipped, 0)
    return useful


def _penalties(noise: Tensor, generators: Sequence[torch.Generator], gamma: float) -> Tensor:
    """The regulariser's part of each sample's loss, ``[B]``.

    If gradients are enabled, this also adds the regulariser's gradient to ``noise.grad``. The samples are computed one
    after the other, because the permutations of one take twenty times the memory of its noise.
    """
    penalties = []
    for own, generator in zip(noise, generators, strict=True):
        penalty = gamma * noise_regularizer(own, generator=generator)
        if penalty.requires_grad:
            penalty.backward()
        penalties.append(penalty.detach())
    return torch.stack(penalties)
