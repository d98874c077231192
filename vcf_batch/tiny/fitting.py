"""The training loop for every stage of the tiny family. It resumes from its own checkpoint."""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

CHECKPOINT_SECONDS = 120


@dataclass(frozen=True)
class Recipe:
    """Settings of one stage's training: AdamW with linear warm-up, cosine decay to zero, and gradient norm 1."""

    steps: int
    batch: int
    lr: float
    weight_decay: float = 0.01
    warmup: int = 100
    ema: float = 0.0
    """Decay of the moving average of the weights. The stage saves the average, or with 0 the weights."""

    def lr_at(self, step: int) -> float:
        """The learning rate of one step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    recipe: Recipe,
    checkpoint: Path,
    seconds: float,
    autocast: bool,
) -> bool:
    """Train ``model`` until the recipe's last step or the time limit, whichever comes first.

    Resumes from ``checkpoint`` if it exists, and rewrites it every two minutes and at the end. So an interrupted stage
    loses little. At the end the model holds the averaged weights.

    Args:
        loss: step number to scalar loss. It draws its batch from the step number, so a resumed run gets the same
            batches as an uninterrupted one.
        seconds: time limit of this call.
        autocast: compute in bfloat16 (``torch.autocast``).

    Returns:
        Whether the recipe's last step was reached.
    """
    device = next(model.parameters()).device
    if autocast and device.type == "cpu":
        speed_up_cpu_autocast(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=recipe.lr, weight_decay=recipe.weight_decay, betas=(0.9, 0.98), fused=True
    )
    average = {name: value.detach().clone() for name, value in model.state_dict().items()} if recipe.ema else None
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, average = state["step"], state["average"]

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "average": average}
        partial = checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, checkpoint)

    model.train()
    end = saved = time.monotonic()
    end += seconds
    step = first
    smooth = None
    with tqdm(total=recipe.steps, initial=first, desc=checkpoint.stem, mininterval=10) as bar:
        while step < recipe.steps and time.monotonic() < end:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(step)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                value = loss(step)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
            if average is not None:
                # Early in the training the decay is smaller, so that the average forgets the random start.
                decay = min(recipe.ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 1 - decay)
            smooth = value.item() if smooth is None else 0.98 * smooth + 0.02 * value.item()
            bar.set_postfix(loss=f"{smooth:.4f}", refresh=False)
            bar.update()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save(step)
                saved = time.monotonic()
    if step > first:
        save(step)
    if average is not None:
        model.load_state_dict(average)
    model.eval()
    return step >= recipe.steps


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware (AMX). One that does not takes 8 times longer."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


def speed_up_cpu_autocast(model: nn.Module) -> None:
    """Avoid operations that PyTorch computes slowly in bfloat16 on a CPU: group norms, and attention's backward pass.

    Measured on the UNet of this family, a step takes 0.4 of the time it takes otherwise. Results change only within
    bfloat16's rounding.
    """
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation("eager")
    if isinstance(model, AttentionMixin):
        model.set_attn_processor(AttnProcessor())


def batch_indices(size: int, batch: int, seed: int) -> Callable[[int], Tensor]:
    """A function from step number to the indices of its batch. Every epoch permutes the ``size`` items anew."""
    order: dict[int, Tensor] = {}

    def indices(step: int) -> Tensor:
        per_epoch = size // batch
        epoch, position = divmod(step, per_epoch)
        if epoch not in order:
            order.clear()
            order[epoch] = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return order[epoch][position * batch : (position + 1) * batch]

    return indices


def chunks(size: int, step: int) -> Iterator[slice]:
    """Slices that cover ``range(size)``, each at most ``step`` long."""
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
