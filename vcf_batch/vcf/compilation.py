"""Compile networks with ``torch.compile``, so that every process gets the same kernels for the same shapes."""

from typing import Any

import torch
from torch import nn

MAX_SHAPES = 256
"""Largest number of input kinds for which one network is compiled. One kind more raises an error; the network is
never run uncompiled instead."""


def compile_forward(network: nn.Module) -> None:
    """Compile a network's ``forward`` in place, separately for each kind of input (shapes and dtypes).

    Kernels depend on the kind of input only: no kernel is chosen by timing, no shape is generalised from earlier ones,
    and there is no fallback. Compiled code is kept on disk for other processes
    (:meth:`vcf_batch.worker.device.Device.set_up`).

    While gradients are enabled, the plain network runs: on CPUs, torch 2.13 computes zeros for the gradients of a
    compiled VAE decoder.
    """
    plain = network.forward
    forward = torch.compile(plain, fullgraph=True, dynamic=False, options={"deterministic": True})

    def compiled(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # torch keeps this limit separately for each thread, so it is set here and not once for the process.
        with torch._dynamo.config.patch(recompile_limit=MAX_SHAPES):
            return forward(*args, **kwargs)

    network.forward = compiled  # type: ignore[method-assign]
