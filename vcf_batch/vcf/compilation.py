"""Compiling networks with ``torch.compile``, so that every process gets the same kernels for the same shapes."""

from typing import Any

import torch
from torch import nn

SHAPES = 256
"""Kinds of input that one network is compiled for at most; beyond it the call fails, and never goes on uncompiled."""


def compile_forward(network: nn.Module) -> None:
    """Compile a network's ``forward`` in place, anew for each kind of input: shapes and dtypes.

    Kernels are a function of these alone: nothing is timed, no shape is generalised from those before, and there is no
    falling back. What is compiled is kept on disk for other processes (:meth:`vcf_batch.worker.device.Device.prepare`).

    Where gradients are taken, nothing is compiled: on CPUs, torch 2.13 makes zeros of those of a VAE decoder.
    """
    plain = network.forward
    forward = torch.compile(plain, fullgraph=True, dynamic=False, options={"deterministic": True})

    def compiled(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # Which torch keeps for each thread on its own.
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            return forward(*args, **kwargs)

    network.forward = compiled  # type: ignore[method-assign]
