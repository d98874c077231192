"""What keeps a device busy: compiled networks, recorded calls, and copies that wait for nothing.

Compilation gives every process the same kernels for the same shapes.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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


REPLAYED_ROWS = 4
"""Most rows of a call that is recorded: 2 samples with both sides of the guidance. Above, the kernels take longer than
their launches."""

Computation = Callable[[], tuple[Tensor, ...]]


def replay_small_batches(network: nn.Module) -> None:
    """Record each kind of small call of a network as a CUDA graph, and replay it, in place of its ``forward``.

    A call of the UNet launches hundreds of kernels. For one or two samples the launches take longer than the kernels,
    and a graph has one launch. It holds the same kernels, so the bits are the same. Calls with gradients are not
    recorded. The first argument has the rows; the network returns a tuple of tensors.

    Nothing of this has run on a GPU.
    """
    plain = network.forward
    recorded: dict[Any, tuple[list[Tensor], Callable[[], None], tuple[Tensor, ...]]] = {}

    def replayed(sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        leaves, spec = pytree.tree_flatten(((sample, *args), kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() or len(sample) > REPLAYED_ROWS:
            return plain(sample, *args, **kwargs)
        settings = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
        kind = (str(spec), *settings, *((tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors))
        if kind not in recorded:
            own = [tensor.clone() for tensor in tensors]
            following = iter(own)
            own_args, own_kwargs = pytree.tree_unflatten(
                [next(following) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec
            )
            recorded[kind] = (own, *record(lambda: plain(*own_args, **own_kwargs)))
        inputs, replay, outputs = recorded[kind]
        for mine, given in zip(inputs, tensors, strict=True):
            mine.copy_(given)
        replay()
        return tuple(output.clone() for output in outputs)

    network.forward = replayed  # type: ignore[method-assign]


def record(work: Computation) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """Record the kernels of a work as a CUDA graph.

    Returns:
        A function that launches the kernels again, and the tensors that they write.
    """
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        work()  # what happens once, such as compiling and looking for kernels, cannot be recorded
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    # Other threads go on using the GPU meanwhile.
    with torch.cuda.graph(graph, pool=_pool(), capture_error_mode="thread_local"):
        outputs = work()
    return graph.replay, outputs


@functools.cache
def _pool() -> Any:
    """Memory that all graphs share, as one is replayed at a time and its outputs are copied at once."""
    return torch.cuda.graph_pool_handle()


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
