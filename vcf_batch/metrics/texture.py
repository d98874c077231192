"""Texture: how alike two pictures are drawn, whatever their colours and wherever things are."""

import torch
from torch import Tensor

_LUMINANCE = (0.299, 0.587, 0.114)
_STEPS = 4
"""Steps from a patch to the next one that does not overlap it."""
_FAINT = 1e-6
"""Added to the power of a patch, times its pixels squared: that of a contrast below one of 255 grey levels, so that
rounding in plain areas does not count as texture."""
_FLOOR = 0.05
"""Added to the relative power of every frequency, whose mean is 1, so that frequencies without power are alike."""


def texture_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of the textures of pictures, float32 ``[B]``: 1 for equal ones, around 0 and less for unlike ones.

    The texture of a picture is the power of each spatial frequency, in direction and in pixels, of its brightness
    (docs/quality.md). No network takes part. Colours and contrast have no effect, and neither have places: they are in
    the phases, and the powers are those of patches.

    Args:
        a, b: float ``[B, 3, H, W]`` in [0, 1], of equal sizes, of 8 pixels a side and more.

    Raises:
        ValueError: the shapes differ, are not those of pictures, or are too small.
    """
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < 2 * _STEPS:
        raise ValueError(
            f"pictures must be two tensors of one shape [B, 3, H, W] with {2 * _STEPS} pixels a side and more, not "
            f"{[*a.shape]} and {[*b.shape]}"
        )
    return torch.cosine_similarity(_texture(a), _texture(b))


def _texture(pictures: Tensor) -> Tensor:
    """Logarithm of the relative power of each frequency, with mean 0: ``[B, 3, H, W]`` to ``[B, F]``.

    Patches are half as high and wide as the picture, and overlap by three quarters. Each counts for the same, however
    strong its contrast.
    """
    height, width = (edge // 2 for edge in pictures.shape[2:])
    brightness = (pictures.float() * torch.tensor(_LUMINANCE, device=pictures.device).view(3, 1, 1)).sum(dim=1)
    window = torch.outer(*(torch.hann_window(edge, periodic=False, device=pictures.device) for edge in (height, width)))
    total: Tensor | float = 0.0
    for row in brightness.unfold(1, height, height // _STEPS).unbind(1):  # Some at a time: large pictures need less.
        patches = row.unfold(1, width, width // _STEPS)
        patches = (patches - patches.mean(dim=(2, 3), keepdim=True)) * window
        power = torch.fft.rfft2(patches).abs().square()
        sums = power.sum(dim=(2, 3), keepdim=True) + _FAINT * (height * width) ** 2
        total = total + (power / sums).sum(dim=1)
    assert isinstance(total, Tensor)
    powers = total.flatten(1)[:, 1:]  # Without that of the patch's mean.
    logarithms = (powers / powers.mean(dim=1, keepdim=True).clamp(min=1e-12) + _FLOOR).log()
    return logarithms - logarithms.mean(dim=1, keepdim=True)
