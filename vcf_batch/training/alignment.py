"""Training steps and validation of an aligner, with the loss over all workers' pairs (docs/method.md, section 3).

Every worker has its own part of each batch, but the contrastive loss compares the pairs of the whole batch. Therefore
each worker gathers the pooled tokens of all workers, with gradients. Loss and gradient are those of one large batch.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vcf_batch.training.training_config import TrainingConfig
from vcf_batch.vcf.aligner import ImageAligner, info_nce_loss, reconstruction_loss, tether_loss

MIN_TEMPERATURE = 0.01
"""Lower limit of a learned temperature, as in CLIP."""


class Diverged(Exception):
    """The training has diverged; the message says what is no longer finite."""


class Losses(NamedTuple):
    """The training losses, each a scalar."""

    total: Tensor
    info_nce: Tensor
    """Contrastive loss over the pairs of all workers."""
    reconstruction: Tensor
    """Reconstruction loss over this worker's pairs."""
    tether: Tensor
    """Reconstruction loss with the roles exchanged, over this worker's pairs."""


class Alignment(nn.Module):
    """The trained module: the aligner and the temperature. Data-parallel training wraps it.

    Args:
        aligner: the aligner, in float32.
        config: gives ``info_nce_weight``, ``tether``, ``temperature`` and ``learn_temperature``.
        dtype: bfloat16 makes the aligner compute in bfloat16; any other type means float32. Losses are always float32.
    """

    scale: Tensor | None = None
    """``[Dt]``, what tokens are multiplied by before they are compared: see :func:`level`. None is 1."""

    def __init__(self, aligner: ImageAligner, config: TrainingConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.aligner, self.weight, self.tether, self.dtype = aligner, config.info_nce_weight, config.tether, dtype
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(config.temperature)), requires_grad=config.learn_temperature
        )

    @property
    def temperature(self) -> Tensor:
        temperature = self.log_temperature.exp()
        return temperature.clamp(min=MIN_TEMPERATURE) if self.log_temperature.requires_grad else temperature

    def align(self, vision_tokens: Tensor) -> Tensor:
        """Align vision tokens ``[B, N, Dv]``: float32 ``[B, N, Dt]``."""
        with torch.autocast(vision_tokens.device.type, torch.bfloat16, enabled=self.dtype is torch.bfloat16):
            return self.aligner(vision_tokens.float()).float()

    def compared(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, N, Dt]`` as the losses compare them, in float32."""
        return tokens.float() if self.scale is None else tokens.float() * self.scale

    def forward(self, vision_tokens: Tensor, text_tokens: Tensor) -> Losses:
        """The training loss.

        Args:
            vision_tokens: vision tokens of this worker's pairs, ``[B, N, Dv]``.
            text_tokens: text tokens of the same pairs, ``[B, T, Dt]``.

        Returns:
            The losses. Data-parallel training averages their gradients over the workers; without a tether, the average
            is the gradient of :func:`vcf_batch.vcf.aligner.alignment_loss` over all workers' pairs, of the tokens as
            they are compared.
        """
        image_tokens, text_tokens = self.compared(self.align(vision_tokens)), self.compared(text_tokens)
        image, text = (gathered(tokens.mean(dim=1, keepdim=True)) for tokens in (image_tokens, text_tokens))
        contrastive = info_nce_loss(image, text, self.temperature)
        reconstruction, tether = (loss(image_tokens, text_tokens) for loss in (reconstruction_loss, tether_loss))
        total = self.weight * contrastive + reconstruction + self.tether * tether
        return Losses(total, contrastive, reconstruction, tether)


def level(norms: Sequence[float], widths: Sequence[int]) -> Tensor | None:
    """Factors that make the parts of a token from several text encoders count alike (docs/method.md, section 8).

    With them each part has the same mean norm for its width, and a token about the norm that it had.

    Args:
        norms: mean norm of each encoder's part of the text tokens, more than 0.
        widths: width of each part.

    Returns:
        float32 ``[Dt]``; None for one encoder, whose tokens are compared as they are.
    """
    if len(widths) == 1:
        return None
    sizes = [norm / math.sqrt(width) for norm, width in zip(norms, widths, strict=True)]
    whole = math.sqrt(sum(width * size**2 for size, width in zip(sizes, widths, strict=True)) / sum(widths))
    return torch.cat([torch.full((width,), whole / size) for size, width in zip(sizes, widths, strict=True)])


def gathered(tensor: Tensor) -> Tensor:
    """The tensors of all workers, concatenated in the order of ranks. Gradients flow back to every worker."""
    return _Gather.apply(tensor) if world_size() > 1 else tensor


class _Gather(torch.autograd.Function):
    """Concatenation of all workers' tensors, with its gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Every worker's loss has a gradient for every worker's tokens.
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def world_size() -> int:
    """Number of workers that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def summed(values: list[float], device: torch.device) -> list[float]:
    """Each of the values, added up over all workers."""
    tensor = torch.tensor(values, device=device)
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


class Trainer:
    """Optimiser and schedule around an :class:`Alignment`: AdamW, cosine decay to zero, clipped gradient norm.

    Args:
        alignment: the module to train, on its device.
        parallel: the same module, wrapped for data-parallel training if there are several workers.
        config: the recipe.
        steps: number of steps of the whole training.
    """

    def __init__(self, alignment: Alignment, parallel: nn.Module, config: TrainingConfig, steps: int) -> None:
        self.alignment, self.parallel, self.config = alignment, parallel, config
        groups: list[dict[str, Any]] = [{"params": list(alignment.aligner.parameters())}]
        if config.learn_temperature:
            # Weight decay would pull the temperature towards 1.
            groups.append({"params": [alignment.log_temperature], "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)

    @property
    def steps_done(self) -> int:
        return self.schedule.last_epoch

    def step(self, vision_tokens: Tensor, text_tokens: Tensor) -> Losses:
        """Train one step on this worker's part of a batch.

        Returns:
            The losses before the step, without gradients.

        Raises:
            Diverged: the loss or its gradient is no longer finite. The weights stay as they were.
        """
        losses = Losses(*self.parallel(vision_tokens, text_tokens))
        if not losses.total.isfinite():
            raise Diverged(f"the loss is {losses.total.item()} in step {self.steps_done + 1:,}")
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = nn.utils.clip_grad_norm_(self.alignment.parameters(), self.config.gradient_norm)
        if not norm.isfinite():
            raise Diverged(f"the norm of the gradient is {norm.item()} in step {self.steps_done + 1:,}")
        self.optimizer.step()
        self.schedule.step()
        return Losses(*(loss.detach() for loss in losses))

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """Losses and retrieval over the validation pairs of all workers.

        The contrastive loss compares at most ``batch_size`` pairs at a time, as in training. Retrieval looks for each
        image's own caption among the captions of all validation pairs.

        Args:
            batches: this worker's validation pairs, in the form that :meth:`step` takes; may be empty.

        Returns:
            ``validation_pairs``, ``validation_loss``, ``validation_info_nce``, ``validation_reconstruction``,
            ``validation_tether``, ``recall_at_1``, ``recall_at_5`` (image to caption, 0 to 1) and ``temperature``.
        """
        pooled, errors = [torch.empty(0, 2, self.alignment.aligner.config.text_dim)], [0.0, 0.0]
        for vision_tokens, text_tokens in batches:
            image_tokens = self.alignment.compared(self.alignment.align(vision_tokens))
            text_tokens = self.alignment.compared(text_tokens)
            for number, loss in enumerate((reconstruction_loss, tether_loss)):
                errors[number] += loss(image_tokens, text_tokens).item() * len(text_tokens)
            pooled.append(torch.stack([image_tokens.mean(dim=1), text_tokens.mean(dim=1)], dim=1).cpu())
        parts: list[Any] = [(torch.cat(pooled), errors)]
        if world_size() > 1:
            parts = [None] * world_size()
            dist.all_gather_object(parts, (torch.cat(pooled), errors))
        image, text = torch.cat([tokens for tokens, _ in parts]).unbind(dim=1)
        temperature, size = self.alignment.temperature.item(), self.config.batch_size
        contrastive = sum(
            info_nce_loss(some_images[:, None], their_texts[:, None], temperature).item() * len(some_images)
            for some_images, their_texts in zip(image.split(size), text.split(size), strict=True)
        ) / len(image)
        reconstruction, tether = (sum(own[number] for _, own in parts) / len(image) for number in (0, 1))
        return {
            "validation_pairs": len(image),
            "validation_loss": self.config.info_nce_weight * contrastive + reconstruction + self.config.tether * tether,
            "validation_info_nce": contrastive,
            "validation_reconstruction": reconstruction,
            "validation_tether": tether,
            "recall_at_1": recall(image, text, 1),
            "recall_at_5": recall(image, text, 5),
            "temperature": temperature,
        }

    def not_finite(self, row: Mapping[str, Any]) -> str:
        """What is not finite in a validation's row or in the trained weights, in words; empty if nothing is."""
        for name, value in row.items():
            if isinstance(value, float) and not math.isfinite(value):
                return f"{name} is {value}"
        for name, weight in self.alignment.named_parameters():
            if not weight.isfinite().all():
                return f"the weights {name} are not all finite"
        return ""

    def state_dict(self) -> dict[str, Any]:
        """The state from which a training is resumed: tensors and plain values."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {"alignment": self.alignment, "optimizer": self.optimizer, "schedule": self.schedule}


def recall(image: Tensor, text: Tensor, k: int) -> float:
    """Share of images (0 to 1) whose own caption is among the ``k`` most similar. In a tie the own caption wins.

    Args:
        image, text: pooled tokens ``[V, Dt]``; row i of one belongs to row i of the other.
    """
    similarity = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    # NaN is not similar: written so, it never makes an own caption the closest.
    closer = (~(similarity <= similarity.diagonal()[:, None])).sum(dim=1)
    return (closer < k).float().mean().item()
