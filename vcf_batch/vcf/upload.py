"""Copies from the CPU to the device that samples, none of which waits for the device."""

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a tensor to a device.

    An ordinary copy to a GPU waits until the GPU has done all its work so far. This one goes by pinned memory and is
    queued behind that work, so that the work of one batch is queued while the GPU is busy with the batch before.

    Args:
        tensor: a tensor on the CPU, not written to afterwards; one that is on the device already is returned itself.
        device: the device.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
