"""Projections: the part of a reference's aligned tokens that has one attribute (docs/roles.md)."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from vcf_batch.config.limits import ROLES
from vcf_batch.errors import ModelError
from vcf_batch.vcf.roles.role import ROLE_FILE

RIDGE = 0.01
"""Variance that is added in every direction, as a share of the mean one, so that rare directions are left out."""

REMOVED, RIVAL = 0.5, 3.0
"""Weights of what a projection removes, beside what it keeps: of any other attribute, and of one that is another role.
"""

SMALLEST = 0.05
"""Smallest singular value of a projection that is stored; a kept direction has about 1."""


@dataclass(frozen=True)
class Projection:
    """A linear map of the differences of tokens from their mean, of low rank."""

    mean: Tensor
    """``[1 + P, Dt]``, the mean token at each place, CLS first."""
    down: Tensor
    """``[K, Dt]``."""
    up: Tensor
    """``[Dt, K]``."""

    def to(self, device: str) -> "Projection":
        """The projection in float32 on a device, where it need not be copied for each reference."""
        return Projection(*(each.to(device, torch.float32) for each in (self.mean, self.down, self.up)))

    def __call__(self, tokens: Tensor) -> Tensor:
        """Project the aligned tokens ``[N, Dt]`` of a reference: all of them, the patches, or CLS.

        Raises:
            ModelError: the tokens are those of another encoder.
        """
        places = {len(self.mean): slice(None), len(self.mean) - 1: slice(1, None), 1: slice(1)}
        if len(tokens) not in places or tokens.shape[1] != self.mean.shape[1]:
            raise ModelError(
                f"the aligner's {ROLE_FILE} is for {len(self.mean)} tokens of width {self.mean.shape[1]}, and there "
                f"are {len(tokens)} of width {tokens.shape[1]}: fit the roles with 'vcf-batch model fit-roles'"
            )
        mean, down, up = (each.to(tokens.device, torch.float32) for each in (self.mean, self.down, self.up))
        mean = mean[places[len(tokens)]]
        return (mean + (tokens.float() - mean) @ down.mT @ up.mT).to(tokens.dtype)


def fit(pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]], kept: str) -> Projection:
    """The projection that keeps what differs in pairs of one attribute, and removes what differs in the others.

    It minimises the squared error of both, summed over all tokens, with a ridge: Wiener's filter ``A = C (C + C' + r
    I)^-1``, with the covariance ``C`` of the differences that are kept, and the weighted sum ``C'`` of the others'.

    Args:
        pairs: pairs of aligned tokens ``[1 + P, Dt]``, by the attribute that differs.
        kept: the attribute that is kept, one of those of ``pairs``.
    """
    covariances = {name: _covariance(each) for name, each in pairs.items()}
    own = covariances.pop(kept)
    others = torch.zeros_like(own)
    for name, each in covariances.items():
        others = others + (RIVAL if name in ROLES else REMOVED) * each
    ridge = RIDGE * (own + others).trace() * torch.eye(len(own), dtype=own.dtype) / len(own)
    matrix = own @ torch.linalg.inv(own + others + ridge)
    left, values, right = torch.linalg.svd(matrix)
    rank = max(1, int((values > SMALLEST).sum()))
    mean = torch.stack([tokens for each in pairs.values() for pair in each for tokens in pair]).double().mean(0)
    down = values[:rank, None] * right[:rank]
    return Projection(*(each.float().contiguous() for each in (mean, down, left[:, :rank])))


def _covariance(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    differences = torch.cat([second.double() - first.double() for first, second in pairs])
    return differences.mT @ differences / len(differences)


def to_bytes(projections: Mapping[str, Projection]) -> bytes:
    """The file of projections, by the names of their roles. Numbers are stored in 16 bits."""
    tensors = {
        f"{role}.{name}": value.half().contiguous()
        for role, projection in projections.items()
        for name, value in vars(projection).items()
    }
    return save(tensors)


def read(folder: str) -> dict[str, Projection]:
    """The projections beside the weights of an aligner; empty if there are none.

    Raises:
        ModelError: the file is damaged, or its tensors do not fit each other.
    """
    file = os.path.join(folder, ROLE_FILE)
    if not os.path.exists(file):
        return {}
    try:
        tensors = load_file(file)
        roles = dict.fromkeys(name.partition(".")[0] for name in tensors)
        found = {role: Projection(*(tensors[f"{role}.{name}"] for name in ("mean", "down", "up"))) for role in roles}
        for each in found.values():
            if each.mean.ndim != 2 or (each.mean @ each.down.mT @ each.up.mT).shape != each.mean.shape:
                raise ValueError("its tensors do not fit each other")
            if not all(value.isfinite().all() for value in vars(each).values()):
                raise ValueError("it has values that are not finite")
    except Exception as error:  # safetensors and torch have no common error type
        raise ModelError(
            f"{file} is damaged ({error}): move it away, and fit the roles again with 'vcf-batch model fit-roles'"
        ) from error
    return found
